"""Generation over a session with made-up logits, and over tiny-llama in fp32 against `generate` of transformers."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from jettison.ir.errors import ArtifactError, OptionError, UnsupportedError
from jettison.runtime import generation
from jettison.runtime.generation import GenerationResult, generate, stream
from jettison.runtime.generation_options import DEFAULT_NEW_TOKENS, GenerationOptions
from jettison.runtime.tokenizer import Tokenizer, load_tokenizer
from tests.models.tiny_models import tiny_model

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
PROMPTS = ["The captain", "It was a dark and stormy night; the rain fell in torrents, and", "“Ah,”"]


class PrefixSession:
    """Logits are a function of a row's own tokens, so a row alone and the row in a batch must agree."""

    most_best = 0

    def __init__(
        self,
        logits_of: Callable[[list[int]], torch.Tensor],
        batch: int,
        capacity: int,
        vocab_size: int,
        context: int = 64,
    ) -> None:
        self.logits_of, self.batch, self.capacity = logits_of, batch, min(capacity, context)
        self.vocab_size, self.context = vocab_size, context
        self.lengths = [0] * batch
        self.states = {"tokens": torch.zeros(batch, self.capacity, dtype=torch.int64)}
        self.prefilled: list[list[int]] = []
        self.fed: list[list[int]] = []

    def prefill(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        assert not any(self.lengths), "one prefill per session"
        self.prefilled = [list(row) for row in rows]
        return self._append(self.prefilled)

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        assert len(tokens) == self.batch
        self.fed.append(list(tokens))
        assert all(0 <= token < self.vocab_size for token in tokens), "an embedding would be read out of bounds"
        return self._append([[token] for token in tokens])

    def decode_best(self, tokens: Sequence[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert 1 <= count <= self.most_best
        self.asked = count
        values, ids = self.decode(tokens).sort(dim=1, descending=True, stable=True)
        return values[:, :count], ids[:, :count]

    def repeated(self, times: int) -> PrefixSession:
        wide = PrefixSession(self.logits_of, self.batch * times, self.capacity, self.vocab_size, self.context)
        wide.lengths = [length for length in self.lengths for _ in range(times)]
        wide.states["tokens"].copy_(self.states["tokens"].repeat_interleave(times, 0))
        self.wide = wide
        return wide

    def _append(self, rows: list[list[int]]) -> torch.Tensor:
        assert len(rows) == self.batch
        logits = []
        for row, (tokens, new) in enumerate(zip(self.states["tokens"], rows, strict=True)):
            before, self.lengths[row] = self.lengths[row], self.lengths[row] + len(new)
            assert self.lengths[row] <= self.capacity, "a row outgrew what the session was opened for"
            tokens[before : self.lengths[row]] = torch.tensor(new)
            logits.append(self.logits_of(tokens[: self.lengths[row]].tolist()))
        return torch.stack(logits)


class Opener:
    """Opens sessions and remembers them."""

    def __init__(self, logits_of: Callable[[list[int]], torch.Tensor], vocab_size: int, context: int = 64) -> None:
        self.logits_of, self.vocab_size, self.context = logits_of, vocab_size, context
        self.opened: list[tuple[int, int]] = []
        self.sessions: list[PrefixSession] = []

    def __call__(self, batch: int, capacity: int) -> PrefixSession:
        self.opened.append((batch, capacity))
        self.sessions.append(PrefixSession(self.logits_of, batch, capacity, self.vocab_size, self.context))
        return self.sessions[-1]


def seeded(vocab_size: int = 50, context: int = 64) -> Opener:
    """Random logits, the same for the same tokens."""

    def logits_of(row: list[int]) -> torch.Tensor:
        state = np.random.SeedSequence([len(row), *row]).generate_state(1)[0]
        return torch.randn(vocab_size, generator=torch.Generator().manual_seed(int(state)))

    return Opener(logits_of, vocab_size, context)


def scripted(*scripts: Sequence[int], vocab_size: int = 300, prompt_tokens: int = 1) -> Opener:
    """Every row says its script, whatever it is fed; the row is known by the first token of its prompt."""

    def logits_of(row: list[int]) -> torch.Tensor:
        script = scripts[row[0]]
        said = len(row) - prompt_tokens
        logits = torch.zeros(vocab_size)
        logits[script[min(said, len(script) - 1)]] = 1.0
        return logits

    return Opener(logits_of, vocab_size)


class ByteTokenizer(Tokenizer):
    """One token per byte, and 256 for the end: every character outside ASCII is split over tokens."""

    vocab_size, eos_token_id, special_tokens = 257, 256, {"<end>": 256}

    def _encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    pytest.importorskip("transformers")
    return load_tokenizer(TINY_LLAMA)


@pytest.fixture(scope="module")
def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()


@pytest.fixture
def open_llama(llama) -> Opener:
    def logits_of(row: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return llama(torch.tensor([row])).logits[0, -1]

    return Opener(logits_of, llama.config.vocab_size, llama.config.max_position_embeddings)


@pytest.mark.parametrize(("options", "asked"), [({}, 1), ({"do_sample": True, "top_k": 5, "seed": 2}, 6)])
def test_a_session_that_picks_the_best_tokens_gives_the_same(options, asked, monkeypatch):
    longest = generate(seeded(), [[1, 2, 3], [4]], GenerationOptions(max_new_tokens=12, **options)).token_ids
    given = GenerationOptions(max_new_tokens=12, eos_token_id=[longest[0][4]], **options)
    expected = generate(seeded(), [[1, 2, 3], [4]], given).token_ids
    assert len(expected[0]) < len(expected[1]), "a row ends before the other"
    monkeypatch.setattr(PrefixSession, "most_best", 8)
    opener = seeded()
    assert generate(opener, [[1, 2, 3], [4]], given).token_ids == expected
    assert opener.sessions[0].asked == asked


def drain(pieces) -> tuple[list[str], GenerationResult]:
    collected = []
    while True:
        try:
            collected.append(next(pieces))
        except StopIteration as end:
            return collected, end.value


# --- against transformers --------------------------------------------------------------------------------------------


def test_greedy_tokens_equal_transformers(llama, open_llama, tokenizer):
    prompts = [tokenizer.encode(text) for text in PROMPTS]
    result = generate(open_llama, prompts, GenerationOptions(max_new_tokens=12, eos_token_id=0), tokenizer)
    for prompt, row in zip(prompts, result.rows, strict=True):
        theirs = llama.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)[0, len(prompt) :].tolist()
        assert list(row.token_ids) == theirs
        assert row.text == tokenizer.decode(theirs)
        assert (row.finish_reason, row.prompt_tokens) == ("length", len(prompt))
    assert result.token_ids == [list(row.token_ids) for row in result.rows]
    assert result.texts == [row.text for row in result.rows]
    assert result.steps == 11


def test_end_tokens_end_a_row_as_in_transformers(llama, open_llama, tokenizer):
    prompt = tokenizer.encode(PROMPTS[0])
    free = generate(open_llama, [prompt], GenerationOptions(max_new_tokens=10)).token_ids[0]
    ends = [free[6], 4000]
    theirs = llama.generate(
        torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=ends, pad_token_id=0
    )
    row = generate(open_llama, [prompt], GenerationOptions(max_new_tokens=10, eos_token_id=ends)).rows[0]
    assert list(row.token_ids) == theirs[0, len(prompt) :].tolist()
    assert row.finish_reason == "eos"


def test_stop_string_split_over_tokens_ends_a_row_as_in_transformers(llama, open_llama, tokenizer):
    prompt = tokenizer.encode(PROMPTS[1])
    free = generate(open_llama, [prompt], GenerationOptions(max_new_tokens=10), tokenizer).rows[0]
    stop = "ows, an"
    assert stop in free.text
    assert not any(stop in tokenizer.decode([a, b]) for a, b in zip(free.token_ids, free.token_ids[1:], strict=False))
    theirs = llama.generate(
        torch.tensor([prompt]), max_new_tokens=10, do_sample=False, stop_strings=stop, tokenizer=tokenizer._tokenizer
    )
    options = GenerationOptions(max_new_tokens=10, stop_strings=stop)
    row = generate(open_llama, [prompt], options, tokenizer).rows[0]
    assert list(row.token_ids) == theirs[0, len(prompt) :].tolist()
    assert 2 < len(row.token_ids) < 10
    assert row.finish_reason == "stop"
    assert row.text == free.text[: free.text.index(stop)]


def test_a_stop_string_begun_by_the_prompt_does_not_count(open_llama, tokenizer):
    prompt = tokenizer.encode(PROMPTS[1])  # ends in "and"; " the" follows
    row = generate(open_llama, [prompt], GenerationOptions(max_new_tokens=3, stop_strings="and the"), tokenizer).rows[0]
    assert row.text.startswith(" the")
    assert row.finish_reason == "length"


def test_streamers_of_transformers_are_fed(open_llama, tokenizer):
    transformers = pytest.importorskip("transformers")
    prompt = tokenizer.encode(PROMPTS[0])
    options = GenerationOptions(max_new_tokens=8)
    streamer = transformers.TextIteratorStreamer(tokenizer._tokenizer, timeout=60, skip_special_tokens=True)
    tokens: list[tuple[int, int]] = []
    run = {"on_token": lambda row, token: tokens.append((row, token)), "streamer": streamer}
    thread = threading.Thread(target=generate, args=(open_llama, [prompt], options, tokenizer), kwargs=run)
    thread.start()
    text = "".join(streamer)
    thread.join()
    row = generate(open_llama, [prompt], options, tokenizer).rows[0]
    assert text == PROMPTS[0] + row.text
    assert tokens == [(0, token) for token in row.token_ids]


def test_max_length_counts_the_prompt_as_in_transformers(llama, open_llama, tokenizer):
    prompt = tokenizer.encode(PROMPTS[0])
    theirs = llama.generate(torch.tensor([prompt]), max_length=len(prompt) + 3, do_sample=False)
    row = generate(open_llama, [prompt], GenerationOptions(max_length=len(prompt) + 3)).rows[0]
    assert list(row.token_ids) == theirs[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def random_llama() -> Any:
    pytest.importorskip("transformers")
    return tiny_model("llama")


@pytest.mark.parametrize("penalty", [1.3, 2.5, 0.8])
def test_greedy_tokens_with_a_repetition_penalty_equal_transformers(random_llama, penalty):
    def logits_of(row: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return random_llama(torch.tensor([row])).logits[0, -1]

    prompts = [[5, 9, 9, 17, 3, 60, 5], [40], [8, 7, 6, 5]]
    open_session = Opener(logits_of, random_llama.config.vocab_size, 128)
    given = {"max_new_tokens": 30, "repetition_penalty": penalty, "do_sample": False, "eos_token_id": 2}
    rows = generate(open_session, prompts, GenerationOptions(**given)).rows
    longest = max(len(prompt) for prompt in prompts)
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    theirs = random_llama.generate(padded, attention_mask=mask, pad_token_id=0, **given)[:, longest:].tolist()
    assert [list(row.token_ids) for row in rows] == [
        new[: len(row.token_ids)] for row, new in zip(rows, theirs, strict=True)
    ]
    assert all(set(new[len(row.token_ids) :]) <= {0} for row, new in zip(rows, theirs, strict=True))
    free = generate(open_session, prompts, GenerationOptions(max_new_tokens=30, eos_token_id=2)).rows
    assert [row.token_ids for row in free] != [row.token_ids for row in rows], "the penalty must matter"


def test_default_is_the_number_of_new_tokens_of_transformers(llama):
    with pytest.warns(UserWarning, match="model-agnostic default"):
        theirs = llama.generate(torch.tensor([[5, 6, 7]]), do_sample=False, eos_token_id=4095, pad_token_id=0)
    assert theirs.shape[1] - 3 == DEFAULT_NEW_TOKENS
    assert len(generate(seeded(), [[5, 6, 7]]).rows[0].token_ids) == DEFAULT_NEW_TOKENS


# --- batches ---------------------------------------------------------------------------------------------------------

ROWS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11], [1, 2, 3, 4]]


@pytest.mark.parametrize("eos", [None, [3, 17, 30]])
def test_rows_of_different_length_equal_each_row_alone(eos):
    options = GenerationOptions(max_new_tokens=15, eos_token_id=eos, pad_token_id=2)
    together = generate(seeded(), ROWS, options)
    alone = [generate(seeded(), [row], options).rows[0] for row in ROWS]
    assert list(together.rows) == alone
    if eos:
        assert {row.finish_reason for row in alone} == {"eos", "length"}
        assert all(row.token_ids[-1] in eos for row in alone if row.finish_reason == "eos")
        assert not any(token in eos for row in alone for token in row.token_ids[:-1])


def test_a_sampled_row_does_not_depend_on_the_rows_beside_it():
    options = GenerationOptions(max_new_tokens=12, do_sample=True, seed=9, eos_token_id=[3, 17])
    together = generate(seeded(), ROWS, options).token_ids
    assert generate(seeded(), ROWS[:1], options).token_ids == together[:1]
    changed = [ROWS[0], [40, 41], ROWS[2]]
    assert generate(seeded(), changed, options).token_ids[2] == together[2]


def test_sampling_repeats_with_its_seed():
    def tokens(seed: int | None) -> list[list[int]]:
        return generate(seeded(), ROWS, GenerationOptions(max_new_tokens=12, do_sample=True, seed=seed)).token_ids

    assert tokens(3) == tokens(3)
    assert tokens(3) != tokens(4)
    assert tokens(None) != tokens(None)
    assert tokens(3) != generate(seeded(), ROWS, GenerationOptions(max_new_tokens=12)).token_ids


def test_sampling_stays_within_the_options():
    # One token is far ahead, so a cold or narrow draw always takes it and a hot one does not.
    def logits_of(row: list[int]) -> torch.Tensor:
        return torch.linspace(0.0, 3.0, 50).index_fill(0, torch.tensor([7]), 8.0)

    for narrow in ({"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.5}, {"temperature": 0.01}):
        options = GenerationOptions(max_new_tokens=20, do_sample=True, seed=0, **narrow)
        assert generate(Opener(logits_of, 50), [[1]], options).token_ids == [[7] * 20]
    options = GenerationOptions(max_new_tokens=20, do_sample=True, seed=0, temperature=20.0, top_k=4)
    assert set(generate(Opener(logits_of, 50), [[1]], options).token_ids[0]) == {7, 47, 48, 49}


@pytest.mark.parametrize("temperature", [1e-6, 1e6])
def test_the_ends_of_the_temperature_range_work(temperature):
    options = GenerationOptions(max_new_tokens=8, do_sample=True, top_k=0, temperature=temperature, seed=0)
    greedy = generate(seeded(), [[1]], GenerationOptions(max_new_tokens=8)).token_ids
    assert (generate(seeded(), [[1]], options).token_ids == greedy) == (temperature < 1)


def test_generation_ends_when_every_row_has_ended():
    opener = scripted([5, 9], [6, 6, 6, 9], [9])
    result = generate(opener, [[0], [1], [2]], GenerationOptions(max_new_tokens=30, eos_token_id=9, pad_token_id=77))
    assert result.token_ids == [[5, 9], [6, 6, 6, 9], [9]]
    assert result.steps == 3
    assert opener.opened == [(3, 31)]
    assert opener.sessions[0].fed == [[5, 6, 77], [77, 6, 77], [77, 6, 77]]
    assert result.prefill_seconds > 0
    assert result.decode_seconds > 0


@pytest.mark.parametrize("pad", [None, 5000])
def test_finished_rows_are_fed_a_token_the_model_has(pad):
    opener = scripted([9], [6, 6, 9])
    options = GenerationOptions(eos_token_id=9, pad_token_id=pad)
    assert generate(opener, [[0], [1]], options).token_ids == [[9], [6, 6, 9]]
    assert opener.sessions[0].fed == [[9, 6], [9, 6]]


def test_one_new_token_needs_no_decode():
    opener = seeded()
    result = generate(opener, ROWS, GenerationOptions(max_new_tokens=1))
    assert (result.steps, result.decode_seconds, opener.sessions[0].fed) == (0, 0.0, [])
    assert all(len(row.token_ids) == 1 for row in result.rows)


def test_tokens_are_reported_in_order_as_they_come():
    seen: list[tuple[int, int]] = []
    opener = scripted([5, 9], [6, 7, 8, 9])
    generate(
        opener, [[0], [1]], GenerationOptions(eos_token_id=9), on_token=lambda row, token: seen.append((row, token))
    )
    assert seen == [(0, 5), (1, 6), (0, 9), (1, 7), (1, 8), (1, 9)]


def test_time_spent_in_the_callback_is_not_counted(monkeypatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(generation, "time", SimpleNamespace(perf_counter=lambda: next(clock)))

    def slow(row: int, token: int) -> None:
        for _ in range(100):
            next(clock)

    result = generate(seeded(), [[1]], GenerationOptions(max_new_tokens=5), on_token=slow)
    assert (result.prefill_seconds, result.decode_seconds, result.steps) == (1, 4, 4)


def test_prompts_may_be_tensors_and_arrays():
    expected = generate(seeded(), [[1, 2, 3], [4, 5]]).token_ids
    assert generate(seeded(), [torch.tensor([1, 2, 3]), np.array([4, 5])]).token_ids == expected
    assert generate(seeded(), torch.tensor([[1, 2, 3], [4, 5, 6]])).token_ids[0] == expected[0]


def test_generation_stops_at_the_context():
    opener = seeded(context=16)
    result = generate(opener, [list(range(10))], GenerationOptions(max_new_tokens=40))
    assert len(result.rows[0].token_ids) == 6
    assert result.rows[0].finish_reason == "length"
    assert opener.opened == [(1, 50)]
    # As in transformers, the longest prompt decides for the whole batch.
    both = generate(seeded(context=16), [list(range(10)), [1]], GenerationOptions(max_new_tokens=40))
    assert [len(row.token_ids) for row in both.rows] == [6, 6]


def test_an_error_in_a_callback_reaches_the_caller():
    def fail(row: int, token: int) -> None:
        raise RuntimeError("reader has gone")

    with pytest.raises(RuntimeError, match="reader has gone"):
        generate(seeded(), [[1]], on_token=fail)


# --- several sequences -----------------------------------------------------------------------------------------------


def test_sequences_of_a_prompt_follow_each_other_and_equal_repeated_prompts():
    options = {"max_new_tokens": 12, "do_sample": True, "seed": 5, "eos_token_id": [3, 17], "repetition_penalty": 1.2}
    opener = seeded()
    several = generate(opener, ROWS, GenerationOptions(**options, num_return_sequences=3))
    repeated = generate(seeded(), [row for row in ROWS for _ in range(3)], GenerationOptions(**options))
    assert several.rows == repeated.rows
    assert [row.prompt_tokens for row in several.rows] == [len(row) for row in ROWS for _ in range(3)]
    assert len(set(several.rows)) == 12, "each draws on its own"
    assert several.steps == repeated.steps
    # The model reads each prompt once.
    assert opener.opened == [(4, 19)]
    (session,) = opener.sessions
    assert (session.prefilled, len(session.fed)) == (ROWS, 0)
    assert (session.wide.prefilled, len(session.wide.fed)) == ([], several.steps)


def test_on_token_counts_sequences_as_rows():
    seen: dict[int, list[int]] = {}
    options = GenerationOptions(max_new_tokens=6, do_sample=True, seed=1, num_return_sequences=2)
    result = generate(seeded(), ROWS, options, on_token=lambda row, token: seen.setdefault(row, []).append(token))
    assert [seen[row] for row in range(8)] == result.token_ids


def test_one_text_is_streamed_of_one_sequence():
    options = GenerationOptions(do_sample=True, num_return_sequences=2)
    message = (
        "found num_return_sequences=2, needs 1, because one text is written as it comes. Set num_return_sequences=1, "
        "or use generate without a streamer."
    )
    with pytest.raises(OptionError) as caught:
        stream(seeded(), [1], options, BYTES)
    assert str(caught.value) == f"[generate] stream: {message}"
    with pytest.raises(OptionError) as caught:
        generate(seeded(), [[1]], options, streamer=RecordingStreamer())
    assert str(caught.value) == f"[generate] streamer: {message}"


# --- text, streaming, stop strings -----------------------------------------------------------------------------------

BYTES = ByteTokenizer()
SAID = "naïve 日本 🙂🙃 END of it"


def test_streamed_pieces_add_up_to_the_text_of_generate():
    script = [*SAID.encode(), 256]
    options = GenerationOptions(max_new_tokens=60, eos_token_id=256)
    pieces, result = drain(stream(scripted(script), [0], options, BYTES))
    assert "".join(pieces) == SAID
    assert set(pieces) == set(SAID)  # character by character, none of them cut
    assert result.rows == generate(scripted(script), [[0]], options, BYTES).rows
    assert result.rows[0].finish_reason == "eos"
    assert result.token_ids == [script]
    assert result.steps == len(script) - 1


def test_streamed_tiny_llama_adds_up(open_llama, tokenizer):
    prompt = tokenizer.encode("“日本 — naïve 🙂” said the")
    options = GenerationOptions(max_new_tokens=16, do_sample=True, temperature=4.0, top_k=0, seed=1)
    pieces, result = drain(stream(open_llama, prompt, options, tokenizer))
    assert "".join(pieces) == result.rows[0].text == tokenizer.decode(result.token_ids[0])
    assert all(pieces)
    assert len(pieces) > 4


def test_a_character_cut_by_the_token_limit_shows_as_a_replacement_at_the_end():
    options = GenerationOptions(max_new_tokens=3)
    pieces, result = drain(stream(scripted(list("a🙂".encode())), [0], options, BYTES))
    assert pieces == ["a", "\ufffd"]
    assert result.texts == ["a\ufffd"]


def test_stop_strings_split_over_tokens_cut_the_text_and_are_never_streamed():
    options = GenerationOptions(max_new_tokens=60, stop_strings=["END", "🙂x", "zzz"])
    pieces, result = drain(stream(scripted(SAID.encode()), [0], options, BYTES))
    before = SAID[: SAID.index("END")]
    assert "".join(pieces) == result.texts[0] == before
    assert "🙂" not in pieces  # held until the next character showed that it begins no stop string
    assert "🙂🙃" in "".join(pieces)
    assert result.rows[0].finish_reason == "stop"
    assert bytes(result.token_ids[0]).decode() == before + "END"


def test_text_held_back_for_a_stop_string_is_given_at_the_end():
    options = GenerationOptions(max_new_tokens=4, stop_strings="ending")
    pieces, result = drain(stream(scripted(b"a endless"), [0], options, BYTES))
    assert pieces == ["a", " ", "en"]
    assert (result.texts, result.rows[0].finish_reason) == (["a en"], "length")


def test_each_row_of_a_batch_stops_at_its_own_stop_string():
    options = GenerationOptions(max_new_tokens=12, stop_strings=["\n\n", "#"], eos_token_id=256)
    scripts = [b"one\n\ntwo", b"one two # three", [*b"one", 256], b"no stop in this one"]
    rows = generate(scripted(*scripts), [[0], [1], [2], [3]], options, BYTES).rows
    assert [row.text for row in rows] == ["one", "one two ", "one", "no stop in t"]
    assert [row.finish_reason for row in rows] == ["stop", "stop", "eos", "length"]
    assert [len(row.token_ids) for row in rows] == [5, 9, 4, 12]


def test_a_special_token_may_be_a_stop_string():
    options = GenerationOptions(max_new_tokens=12, stop_strings=["<end>"])
    row = generate(scripted([*b"hi", 256, *b"more"]), [[0]], options, BYTES).rows[0]
    assert (row.text, row.finish_reason, row.token_ids) == ("hi", "stop", (*b"hi", 256))


def test_without_a_tokenizer_there_is_no_text():
    assert generate(seeded(), [[1]]).texts == [None]


def test_streaming_runs_the_model_as_the_pieces_are_read():
    opener = scripted(b"abcdef")
    pieces = stream(opener, [0], GenerationOptions(max_new_tokens=6), BYTES)
    assert not any(opener.sessions[0].lengths)
    assert next(pieces) == "a"
    assert len(opener.sessions[0].fed) == 0
    assert next(pieces) == "b"
    assert len(opener.sessions[0].fed) == 1
    pieces.close()
    assert len(opener.sessions[0].fed) == 1


class RecordingStreamer:
    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended += 1


def test_a_streamer_gets_the_prompt_then_each_token_then_the_end():
    streamer = RecordingStreamer()
    generate(scripted([5, 6, 9]), [[0]], GenerationOptions(eos_token_id=9), streamer=streamer)
    assert [value.tolist() for value in streamer.values] == [[[0]], [5], [6], [9]]
    assert all(value.dtype == torch.int64 for value in streamer.values)
    assert streamer.ended == 1


def test_a_streamer_is_told_of_the_end_after_an_error():
    def logits_of(row: list[int]) -> torch.Tensor:
        return torch.full((10,), torch.nan if len(row) > 2 else 0.0)

    streamer = RecordingStreamer()
    with pytest.raises(ArtifactError, match="not numbers"):
        generate(Opener(logits_of, 10), [[1]], streamer=streamer)
    assert streamer.ended == 1


# --- options ---------------------------------------------------------------------------------------------------------


def test_options_are_brought_to_one_form():
    options = GenerationOptions(
        max_new_tokens=np.int64(4), temperature=2, top_p=1, eos_token_id=7, stop_strings="x", do_sample=True
    )
    assert options == GenerationOptions(
        max_new_tokens=4, temperature=2.0, top_p=1.0, eos_token_id=[7], stop_strings=["x"], do_sample=True
    )
    assert (options.eos_token_id, options.stop_strings, type(options.max_new_tokens)) == ((7,), ("x",), int)
    assert {options: 1}[options] == 1  # hashable


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: found 0, needs an integer of at least 1. Set max_new_tokens=20."),
        (
            {"max_new_tokens": True},
            "max_new_tokens: found True, needs an integer of at least 1. Set max_new_tokens=20.",
        ),
        ({"max_new_tokens": 2.0}, "max_new_tokens: found 2.0, needs an integer of at least 1. Set max_new_tokens=20."),
        ({"max_length": -1}, "max_length: found -1, needs an integer of at least 1. Set max_new_tokens instead."),
        ({"top_k": -1}, "top_k: found -1, needs an integer of at least 0. Set top_k=0 to keep all tokens."),
        ({"top_k": None}, "top_k: found None, needs an integer of at least 0. Set top_k=0 to keep all tokens."),
        ({"seed": -1}, "seed: found -1, needs an integer of at least 0. Set seed=0."),
        ({"seed": 2**63}, "seed: found 9223372036854775808, needs an integer below 2**63. Set seed=0."),
        ({"seed": "x"}, "seed: found 'x', needs an integer of at least 0. Set seed=0."),
        ({"pad_token_id": -1}, "pad_token_id: found -1, needs an integer of at least 0. Leave pad_token_id out."),
        ({"do_sample": 1}, "do_sample: found 1, needs True or False. Set do_sample=True to sample."),
        ({"temperature": -0.5}, "temperature: found -0.5, needs a number from 0 to 1e6. Set temperature=1.0."),
        ({"temperature": float("nan")}, "temperature: found nan, needs a number from 0 to 1e6. Set temperature=1.0."),
        ({"temperature": float("inf")}, "temperature: found inf, needs a number from 0 to 1e6. Set temperature=1.0."),
        (
            {"temperature": 0, "do_sample": True},
            "temperature: found 0.0, needs at least 1e-6 to sample, because logits are divided by it. Set "
            "do_sample=False for the most likely token.",
        ),
        ({"top_p": 1.5}, "top_p: found 1.5, needs a number from 0 to 1. Set top_p=1.0 to keep all tokens."),
        ({"min_p": -0.1}, "min_p: found -0.1, needs a number from 0 to 1. Set min_p=0.0 to keep all tokens."),
        ({"min_p": True}, "min_p: found True, needs a number from 0 to 1. Set min_p=0.0 to keep all tokens."),
        (
            {"repetition_penalty": 0},
            "repetition_penalty: found 0, needs a number from 1e-6 to 1e6. Set repetition_penalty=1.0 to go without.",
        ),
        (
            {"repetition_penalty": "1.1"},
            "repetition_penalty: found '1.1', needs a number from 1e-6 to 1e6. Set repetition_penalty=1.0 to go "
            "without.",
        ),
        (
            {"num_return_sequences": 0},
            "num_return_sequences: found 0, needs an integer of at least 1. Set num_return_sequences=1.",
        ),
        (
            {"num_return_sequences": 2},
            "num_return_sequences: found 2, needs 1 with do_sample=False, because the most likely tokens are the same "
            "every time. Set do_sample=True, or num_return_sequences=1.",
        ),
        ({"top_p": "a"}, "top_p: found 'a', needs a number from 0 to 1. Set top_p=1.0 to keep all tokens."),
        (
            {"stop_strings": ["a", ""]},
            "stop_strings: found ['a', ''], needs one or more strings that are not empty. Leave stop_strings out to "
            "stop at none.",
        ),
        (
            {"stop_strings": [3]},
            "stop_strings: found [3], needs one or more strings that are not empty. Leave stop_strings out to "
            "stop at none.",
        ),
        (
            {"stop_strings": 3},
            "stop_strings: found 3, needs one or more strings that are not empty. Leave stop_strings out to "
            "stop at none.",
        ),
        (
            {"eos_token_id": [1, -1]},
            "eos_token_id: found [1, -1], needs a token id or a list of them. Set eos_token_id=[] to never stop at "
            "one.",
        ),
        (
            {"eos_token_id": "x"},
            "eos_token_id: found 'x', needs a token id or a list of them. Set eos_token_id=[] to never stop at one.",
        ),
    ],
    ids=str,
)
def test_option_values_out_of_range_are_refused(values, message):
    with pytest.raises(OptionError) as caught:
        GenerationOptions(**values)
    assert str(caught.value) == f"[generate] {message}"


def test_overrides_win_over_the_file_and_the_file_over_the_defaults():
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [1, 2], "pad_token_id": -1}
    options = GenerationOptions.from_config(config, temperature=0.3, max_new_tokens=5, top_p=None)
    assert options == GenerationOptions(
        max_new_tokens=5, do_sample=True, temperature=0.3, top_p=0.9, top_k=50, eos_token_id=[1, 2]
    )
    assert GenerationOptions.from_config(config, eos_token_id=[], top_k=0).eos_token_id == ()
    assert GenerationOptions.from_config() == GenerationOptions.from_config({}) == GenerationOptions()


def test_penalty_min_p_and_sequences_of_the_file_are_honoured():
    config = {"do_sample": True, "repetition_penalty": 1.1, "min_p": 0.05, "num_return_sequences": 2, "top_k": 0}
    options = GenerationOptions.from_config(config, max_new_tokens=4)
    assert (options.repetition_penalty, options.min_p, options.num_return_sequences) == (1.1, 0.05, 2)
    assert len(generate(seeded(), [[1]], options).rows) == 2
    off = {"repetition_penalty": 1.0, "min_p": 0.0, "num_return_sequences": 1}
    assert GenerationOptions.from_config(config, **off) == GenerationOptions(do_sample=True, top_k=0)
    assert GenerationOptions.from_config({**config, **dict.fromkeys(off)}) == GenerationOptions(do_sample=True, top_k=0)


def test_lengths_of_the_call_win_over_lengths_of_the_file():
    assert GenerationOptions.from_config({"max_length": 4096}).max_length == 4096
    opener = seeded()
    options = GenerationOptions.from_config({"max_length": 4096}, max_new_tokens=3)
    assert len(generate(opener, [[1]], options).rows[0].token_ids) == 3
    options = GenerationOptions.from_config({"max_new_tokens": 30}, max_length=5)
    assert len(generate(opener, [[1]], options).rows[0].token_ids) == 4


def test_every_name_of_transformers_is_known_and_its_defaults_are_neutral():
    transformers = pytest.importorskip("transformers")
    theirs = transformers.GenerationConfig()
    names = {name for name in vars(theirs) if not name.startswith("_")}
    defaults = theirs._get_default_generation_params() | {"max_length": 40}
    known = {"user_set_attributes"}  # bookkeeping of newer versions, if any
    options = GenerationOptions.from_config(theirs.to_dict() | defaults, **dict.fromkeys(names - known))
    assert options == GenerationOptions(max_length=40)
    GenerationOptions.from_config(theirs.to_dict(), **{**defaults, "do_sample": True})


def test_foreign_names_in_the_file_are_ignored():
    config = {"_from_model_config": True, "user_token_id": 195, "cache_implementation": "hybrid", "use_cache": False}
    config |= {"output_scores": True, "num_assistant_tokens": 4, "transformers_version": "4.40.0"}
    assert GenerationOptions.from_config(config) == GenerationOptions()


@pytest.mark.parametrize(
    ("config", "overrides", "message"),
    [
        (
            {"no_repeat_ngram_size": 3},
            {},
            "no_repeat_ngram_size: found 3 (in generation_config.json), which jettison does not do (yet) and which "
            "would change the output. Set no_repeat_ngram_size=0 to go without.",
        ),
        (
            {},
            {"num_beams": 4},
            "num_beams: found 4, which jettison does not do (yet) and which would change the output. Use "
            "do_sample=True for varied text, or set num_beams=1 to go without.",
        ),
        (
            {"do_sample": True},
            {"typical_p": 0.9},
            "typical_p: found 0.9, which jettison does not do (yet) and which would change the output. Use top_p, or "
            "set typical_p=1 to go without.",
        ),
        (
            {},
            {"forced_bos_token_id": 0},
            "forced_bos_token_id: found 0, which jettison does not do (yet) and which would change the output. Leave "
            "forced_bos_token_id out.",
        ),
        (
            {},
            {"cache_implementation": "quantized"},
            "cache_implementation: found 'quantized', which jettison does not do (yet) and which would change the "
            "output. Choose the cache when optimising, with the pass cache-kv{policy=...}, or leave "
            "cache_implementation out.",
        ),
        (
            {},
            {"suppress_tokens": [4]},
            "suppress_tokens: found [4], which jettison does not do (yet) and which would change the output. Set "
            "suppress_tokens=[] to go without.",
        ),
    ],
    ids=str,
)
def test_settings_that_would_change_the_output_are_refused(config, overrides, message):
    with pytest.raises(UnsupportedError) as caught:
        GenerationOptions.from_config(config, **overrides)
    assert str(caught.value) == f"[generate] {message}"


def test_neutral_values_are_accepted():
    neutral = {"no_repeat_ngram_size": 0, "num_beams": 1, "eta_cutoff": 0.0, "typical_p": 1.0, "suppress_tokens": []}
    config = {"no_repeat_ngram_size": 3, "num_beams": 4, "eta_cutoff": 0.1}
    assert GenerationOptions.from_config(config, do_sample=True, **neutral) == GenerationOptions(do_sample=True)
    # Greedy decoding never reads the sampling filters, here as in transformers.
    assert GenerationOptions.from_config({"typical_p": 0.1, "temperature": 0.0}).temperature == 0.0


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_tokens", "Did you mean max_new_tokens?"),
        ("temprature", "Did you mean temperature?"),
        ("eos_token", "Did you mean eos_token_id?"),
        ("repetition_penalti", "Did you mean repetition_penalty?"),
        ("guidance_scal", "Did you mean guidance_scale?"),
        (
            "zzz",
            "The options are do_sample, eos_token_id, max_length, max_new_tokens, min_p, num_return_sequences, "
            "pad_token_id, repetition_penalty, seed, stop_strings, temperature, top_k, top_p.",
        ),
    ],
)
def test_unknown_options_list_close_matches(name, hint):
    for value in (3, None):
        with pytest.raises(OptionError) as caught:
            GenerationOptions.from_config({}, **{name: value})
        assert str(caught.value) == f"[generate] {name}: unknown option, needs a name of transformers' generate. {hint}"


# --- bad prompts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (
            [],
            "prompts: found no prompts, needs a list with one list of token ids per row. Encode the text with the "
            "model's tokenizer first.",
        ),
        (
            "Hello",
            "prompts: found text, needs a list with one list of token ids per row. Encode the text with the model's "
            "tokenizer first.",
        ),
        (
            [[1], "Hello"],
            "prompt 1: found str, needs a list of token ids. Encode text with the model's tokenizer, and wrap a single "
            "prompt in a list.",
        ),
        (
            [1, 2, 3],
            "prompt 0: found int, needs a list of token ids. Encode text with the model's tokenizer, and wrap a single "
            "prompt in a list.",
        ),
        (
            torch.tensor([1, 2]),
            "prompt 0: found int, needs a list of token ids. Encode text with the model's tokenizer, and wrap a single "
            "prompt in a list.",
        ),
        (
            [[1], []],
            "prompt 1: found no tokens, needs at least 1 to continue from. Start with the beginning-of-text token of "
            "the model, or any text.",
        ),
        (
            [[1, 2.5]],
            "prompt 0, position 1: found 2.5 (float), needs an integer token id. Encode the text with the model's "
            "tokenizer.",
        ),
        (
            [[True]],
            "prompt 0, position 0: found True (bool), needs an integer token id. Encode the text with the model's "
            "tokenizer.",
        ),
        (
            [[1], [3, 4, 50, 60]],
            "prompt 1, position 2: found token 50, needs 0 to 49, because the model's vocabulary has 50 tokens. Use "
            "the tokenizer of this model, and drop padding.",
        ),
        (
            [[3, -100]],
            "prompt 0, position 1: found token -100, needs 0 to 49, because the model's vocabulary has 50 tokens. Use "
            "the tokenizer of this model, and drop padding.",
        ),
        (
            [[1], [2] * 65],
            "prompt 1: found 65 tokens, needs at most 63, because the model's context holds 64 and one must be left to "
            "generate. Shorten the prompt, for example to its last 63 tokens.",
        ),
        (
            [[2] * 64],
            "prompt 0: found 64 tokens, needs at most 63, because the model's context holds 64 and one must be left to "
            "generate. Shorten the prompt, for example to its last 63 tokens.",
        ),
    ],
    ids=range(12),
)
def test_bad_prompts_are_refused_before_the_model_runs(prompts, message):
    opener = seeded()
    with pytest.raises(OptionError) as caught:
        generate(opener, prompts)
    assert str(caught.value) == f"[generate] {message}"
    assert not any(length for session in opener.sessions for length in session.lengths)


def test_a_prompt_of_all_but_one_token_of_the_context_works():
    assert len(generate(seeded(), [[2] * 63]).rows[0].token_ids) == 1


def test_a_stream_refuses_bad_prompts_before_it_is_read():
    with pytest.raises(OptionError, match="prompt 0, position 0: found token 999"):
        stream(seeded(), [999], None, BYTES)


def test_max_length_within_the_prompt_is_refused():
    with pytest.raises(OptionError) as caught:
        generate(seeded(), [[1], [1, 2, 3]], GenerationOptions(max_length=3))
    assert str(caught.value) == (
        "[generate] max_length: found 3 with a prompt of 3 tokens, needs more than the prompt, because max_length "
        "counts the prompt too. Set max_new_tokens=20."
    )


def test_text_needs_a_tokenizer():
    with pytest.raises(OptionError) as caught:
        generate(seeded(), [[1]], GenerationOptions(stop_strings=["a", "b"]))
    assert str(caught.value) == (
        "[generate] stop_strings: found ['a', 'b'] but no tokenizer, needs one to compare text. Pass tokenizer=, or "
        "end rows with eos_token_id."
    )
    with pytest.raises(OptionError) as caught:
        stream(seeded(), [1])
    assert str(caught.value) == (
        "[generate] stream: found no tokenizer, needs one to turn tokens into text. Pass tokenizer=, or use "
        "generate(on_token=...) for token ids."
    )


def test_a_streamer_takes_one_prompt():
    with pytest.raises(OptionError) as caught:
        generate(seeded(), [[1], [2]], streamer=RecordingStreamer())
    assert str(caught.value) == (
        "[generate] streamer: found 2 prompts, needs one, because a streamer prints one text. Pass the prompts one by "
        "one, or use on_token."
    )
