"""Generation over a session with made-up logits, and over tiny-llama in fp32 against `generate` of transformers."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from jettison.ir.errors import OptionError
from jettison.runtime import generation
from jettison.runtime.generation import generate, stream
from jettison.runtime.generation_options import DEFAULT_NEW_TOKENS, GenerationOptions
from tests.models.tiny_models import tiny_model
from tests.runtime.scripted_sessions import (
    ByteTokenizer,
    Opener,
    PrefixSession,
    RecordingStreamer,
    scripted,
    seeded,
)

PROMPTS = ["The captain", "It was a dark and stormy night; the rain fell in torrents, and", "“Ah,”"]


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
        stream(seeded(), [1], options, ByteTokenizer())
    assert str(caught.value) == f"[generate] stream: {message}"
    with pytest.raises(OptionError) as caught:
        generate(seeded(), [[1]], options, streamer=RecordingStreamer())
    assert str(caught.value) == f"[generate] streamer: {message}"


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
        stream(seeded(), [999], None, ByteTokenizer())


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
