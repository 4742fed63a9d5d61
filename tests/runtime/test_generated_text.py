"""What a text is made of: pieces that are streamed, stop strings, and streamers of transformers."""

from __future__ import annotations

import pytest
import torch

from jettison.ir.errors import ArtifactError
from jettison.runtime.generation import generate, stream
from jettison.runtime.generation_options import GenerationOptions
from tests.runtime.scripted_sessions import (
    ByteTokenizer,
    Opener,
    RecordingStreamer,
    drain,
    scripted,
    seeded,
)

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
