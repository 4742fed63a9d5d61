"""Text from files and from the model itself."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from jettison.api import optimize
from jettison.ir.errors import ArtifactError, OptionError
from jettison.ir.progress import listening
from jettison.optimized_model import OptimizedModel
from jettison.runtime.tokenizer import TokenizersTokenizer, load_tokenizer
from jettison.sample_text import (
    MOST_ROWS,
    cut_windows,
    load_text,
    load_windows,
    rows_that_fit,
    sample_text,
    sample_windows,
    start_token,
    text_tokens,
)

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
VOCAB, CONTEXT = 32, 64


@pytest.fixture(autouse=True)
def one_thread():
    """Small tensors gain nothing from threads, and threads that wait for a busy core cost seconds."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model() -> OptimizedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, initializer_range=0.3, bos_token_id=5, eos_token_id=6,
    )  # fmt: skip
    return optimize(LlamaForCausalLM(config), target="torch")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(TINY_LLAMA)


def test_sampling_follows_the_probabilities_of_the_model(model):
    count = 4000
    windows = sample_windows(model.executor, 3, count=count, length=2, seed=1)
    found = torch.bincount(torch.tensor([window[1] for window in windows]), minlength=VOCAB) / count
    expected = model.session(1, 8).prefill([[3]])[0].softmax(-1)
    assert expected.max() < 0.9, "a model that is sure of itself would prove nothing"
    distance = 0.5 * (found - expected).abs().sum()
    assert distance < 0.05
    assert 0.5 * (1 / VOCAB - expected).abs().sum() > 0.2, "nor would one that finds everything equally likely"


def test_windows_are_what_was_asked_for(model):
    windows = sample_windows(model.executor, 3, count=5, length=17)
    assert [len(window) for window in windows] == [17] * 5
    assert {window[0] for window in windows} == {3}
    assert all(0 <= token < VOCAB for window in windows for token in window)
    assert len({tuple(window) for window in windows}) == 5


def test_a_window_depends_on_its_seed_and_index_and_not_on_the_rows_beside_it(model):
    together = sample_windows(model.executor, 3, count=5, length=12, seed=7)
    assert sample_windows(model.executor, 3, count=5, length=12, seed=7, rows=2) == together
    assert sample_windows(model.executor, 3, count=3, length=12, seed=7) == together[:3]
    assert sample_windows(model.executor, 3, count=5, length=12, seed=8) != together


def test_every_token_continues_the_ones_before_it(model):
    """What was sampled is likelier in its order than in the reverse, so the context was used."""
    (window,) = sample_windows(model.executor, 3, count=1, length=24, seed=0)
    scores = model.session(1, 24).score([window])[0].log_softmax(-1)
    likelihood = scores[:-1].gather(1, torch.tensor(window[1:])[:, None]).mean()
    shuffled = model.session(1, 24).score([window[:1] + window[:0:-1]])[0].log_softmax(-1)
    assert likelihood > shuffled[:-1].gather(1, torch.tensor(window[:0:-1])[:, None]).mean()


def test_without_a_start_token_every_window_has_its_own(model):
    windows = sample_windows(model.executor, None, count=12, length=2, seed=0)
    assert len({window[0] for window in windows}) > 3
    assert sample_windows(model.executor, None, count=12, length=2, seed=0, rows=5) == windows


def test_text_begins_with_the_token_the_model_names(model, monkeypatch):
    assert start_token(model) == 5
    sampled = sample_text(model, windows=2, length=9, seed=4)
    assert [window[0] for window in sampled.windows] == [5, 5]
    assert sampled.text is None, "a module has no tokenizer"
    for config, expected in (({"eos_token_id": [6, 7]}, 6), ({"bos_token_id": VOCAB}, None), ({}, None)):
        monkeypatch.setattr(model, "_generation_config", config)
        assert start_token(model) == expected


def test_text_is_decoded_where_there_is_a_tokenizer(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "_tokenizer", tokenizer)
    sampled = sample_text(model, windows=2, length=9, seed=4)
    assert sampled.text == "\n\n".join(tokenizer.decode(window) for window in sampled.windows)


def test_sampling_reports_every_token_as_progress(model):
    class Total:
        def __init__(self) -> None:
            self.wanted, self.done = 0.0, 0.0

        def start(self, description: str, total: float):
            self.wanted = total
            return self.add

        def add(self, amount: float) -> None:
            self.done += amount

        def stop(self, advance) -> None:
            pass

    total = Total()
    with listening(total):
        sample_windows(model.executor, 3, count=5, length=10, rows=2)
    assert total.done == total.wanted == 5 * 9


@pytest.mark.parametrize(
    ("start", "settings", "words"),
    [
        (3, {"count": 0, "length": 4}, "count=0"),
        (3, {"count": 1, "length": 1}, "length=1"),
        (3, {"count": 1, "length": 4, "seed": -1}, "seed=-1"),
        (VOCAB, {"count": 1, "length": 4}, f"start token {VOCAB}: needs 0 to {VOCAB - 1}"),
        (3, {"count": 1, "length": CONTEXT + 1}, f"context is {CONTEXT}"),
    ],
)
def test_sampling_refuses_what_it_cannot_do(model, start, settings, words):
    with pytest.raises(OptionError, match=words):
        sample_windows(model.executor, start, **settings)


def test_rows_are_limited_by_the_bytes_of_their_states(model, monkeypatch):
    assert rows_that_fit(model.executor, 8) == MOST_ROWS
    row_bytes = 2 * 2 * CONTEXT * 8 * 4  # key and value, 2 heads of 8 channels, f32
    monkeypatch.setattr("jettison.sample_text.MOST_STATE_BYTES", 3 * row_bytes)
    assert rows_that_fit(model.executor, CONTEXT) == 3
    monkeypatch.setattr("jettison.sample_text.MOST_STATE_BYTES", 0)
    assert rows_that_fit(model.executor, CONTEXT) == 1


def test_load_text_drops_the_byte_order_mark_and_carriage_returns(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo \xc3\xa9\n")
    assert load_text(path) == "one\ntwo é\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no such file"),
        (b"caf\xe9 au lait", r"byte 3 \(0xe9\) is not UTF-8"),
        (b"", "found 0 tokens, needs at least 2"),
        (b" \n\t\n", "found 0 tokens, needs at least 2"),
    ],
)
def test_load_text_refuses_what_is_no_text(tmp_path, content, words):
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(OptionError, match=words) as raised:
        load_text(path)
    assert str(path) in str(raised.value)


def test_load_text_refuses_a_folder(tmp_path):
    with pytest.raises(OptionError, match="cannot be read"):
        load_text(tmp_path)


def test_a_short_text_says_how_many_tokens_it_has_and_needs(tmp_path, tokenizer):
    path = tmp_path / "text.txt"
    path.write_text("Fifteen men on the dead man's chest")
    count = len(tokenizer.encode(path.read_text()))
    with pytest.raises(OptionError, match=f"text.txt: found {count} tokens, needs at least 64"):
        load_windows(path, tokenizer, 64)
    assert load_windows(path, tokenizer, count) == [tokenizer.encode(path.read_text())]


@given(st.integers(0, 300), st.integers(2, 50))
def test_windows_follow_each_other_and_the_remainder_is_dropped(total, length):
    tokens = list(range(total))
    if total < length:
        with pytest.raises(OptionError, match=f"found {total} tokens, needs at least {length}"):
            cut_windows(tokens, length)
        return
    windows = cut_windows(tokens, length)
    assert all(len(window) == length for window in windows)
    assert [token for window in windows for token in window] == tokens[: total // length * length]


@pytest.mark.parametrize("template", ["<|endoftext|> $A", "$A <|endoftext|>", "<|endoftext|> $A <|endoftext|>", None])
def test_special_tokens_that_a_tokenizer_adds_are_taken_off(tokenizer, template):
    import tokenizers

    raw = tokenizers.Tokenizer.from_file(str(TINY_LLAMA / "tokenizer.json"))
    if template is not None:
        raw.post_processor = tokenizers.processors.TemplateProcessing(
            single=template, special_tokens=[("<|endoftext|>", 0)]
        )
    adding = TokenizersTokenizer(raw)
    for text in ("Pieces of eight!", "", " a\n\nb"):
        assert text_tokens(adding, text) == tokenizer.encode(text)
    if template is not None:
        assert adding.encode("Pieces of eight!") != tokenizer.encode("Pieces of eight!")


def test_without_a_token_of_the_model_its_tokenizer_names_one(model, tokenizer, monkeypatch):
    monkeypatch.setattr(model, "_generation_config", {})
    monkeypatch.setattr(model, "_tokenizer", tokenizer)
    assert start_token(model) == tokenizer.eos_token_id == 0


def test_a_damaged_tokenizer_counts_as_none(model, monkeypatch):
    def refuse():
        raise ArtifactError("damaged")

    monkeypatch.setattr(model, "_open_tokenizer", refuse)
    assert sample_text(model, windows=1, length=4).text is None
