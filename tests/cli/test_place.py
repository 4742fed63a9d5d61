"""`jettison place`: an artifact written again for less memory."""

from __future__ import annotations

import pytest
import torch

import jettison
from jettison.api import parse_passes
from jettison.ir.errors import ArtifactError, OptionError
from jettison.passes.place_weights import PlaceWeights
from jettison.runtime.session import Session
from tests.cli.running import INT4, forge, optimized

WORK = ("--context", "64", "--prompt", "16")


@pytest.fixture(autouse=True)
def _measured(monkeypatch):
    """A process of a million bytes on every machine."""
    monkeypatch.setattr("jettison.placing.process_bytes", lambda: 1_000_000)


@pytest.fixture(scope="module")
def whole(once, two_layers):
    """Two layers of the bundled model in 4 bits, all in memory. Not to be changed."""
    return once("whole-int4", lambda out: optimized(two_layers, out, "--passes", INT4, "--target", "torch"))


def missing(error):
    """Bytes that an error says would do."""
    return int(str(error).partition("Give host=")[2].split()[0])


def least(whole, **work):
    with pytest.raises(OptionError) as caught:
        jettison.place(whole, 1, **{"context": 64, "prompt": 16, **work})
    return missing(caught.value)


def test_what_does_not_fit_is_streamed_and_says_the_same(run, whole, tmp_path):
    limit = least(whole) + 200_000
    result = run("place", whole, "--host-memory", limit, *WORK, "--out", tmp_path / "out", "--json")
    assert (result.code, result.err) == (0, "")
    document = result.json
    assert [record["name"] for record in document["passes"]] == ["quantize-weights", "cache-kv", "place-weights"]
    assert document["pipeline"].endswith("context=64,prompt=16,batch=1,objective=latency,reserve=1MB}")
    assert (tmp_path / "out" / "weights.stream").stat().st_size > 100_000
    placed = jettison.load(tmp_path / "out")
    wanted = jettison.load(whole)
    assert placed.generate("The captain", max_new_tokens=12) == wanted.generate("The captain", max_new_tokens=12)
    assert placed.executor.stream.statistics.bytes_taken > 0
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (whole / "tokenizer.json").read_bytes()
    assert run("verify", tmp_path / "out").code == 0


def test_a_table_says_what_was_done(run, whole, tmp_path):
    result = run("place", whole, "--host-memory", least(whole), *WORK, "--out", tmp_path / "out")
    assert (result.code, result.err) == (0, "")
    assert "are on the disk, and a step reads" in result.out
    assert result.out.endswith(f"artifact   {tmp_path / 'out'}\n")


def test_a_model_that_was_not_saved_runs(whole):
    placed = jettison.place(whole, f"{least(whole)}B", context=64, prompt=16)
    assert placed.generate([1, 2, 3], max_new_tokens=4) == jettison.load(whole).generate([1, 2, 3], max_new_tokens=4)
    assert placed.executor.stream.statistics.bytes_taken > 0
    placed.executor.stream.close()


def test_a_session_keeps_to_what_the_memory_has_room_for(whole):
    work = {"context": 128, "prompt": 16, "batch": 2}
    placed = jettison.place(whole, least(whole, **work), **work)
    session = placed.session(2, 128)
    assert session.prefill_chunk == 16
    prompt = list(range(3, 43))
    expected = Session(jettison.load(whole).executor, 2, 128, prefill_chunk=16)
    assert torch.equal(session.prefill([prompt, prompt]), expected.prefill([prompt, prompt]))
    assert placed.session(4, 64).prefill_chunk == 8
    for batch, capacity in ((3, 100), (2, 129), (1, 300)):
        with pytest.raises(OptionError, match=r"placed beside 2 x 128, so that all fit .* `jettison place"):
            placed.session(batch, capacity)
    with pytest.raises(OptionError, match="Ask for fewer tokens"):
        placed.generate(prompt, max_new_tokens=300)
    placed.executor.stream.close()


def test_a_session_of_segments_keeps_to_it_too(two_layers, tmp_path):
    with pytest.raises(OptionError) as caught:
        jettison.optimize(two_layers, [*parse_passes(INT4), PlaceWeights(host=1, context=64, prompt=16, reserve=1)])
    place = PlaceWeights(host=missing(caught.value), context=64, prompt=16, reserve=1)
    jettison.optimize(two_layers, [*parse_passes(INT4), place]).save_pretrained(tmp_path / "out")
    placed = jettison.load(tmp_path / "out")
    assert placed.session(1, 64).prefill_chunk == 16
    with pytest.raises(OptionError, match=r"placed beside 1 x 64, so that all fit [\d,]+ bytes of the host"):
        placed.session(1, 65)
    forge(tmp_path / "out", planned={"context": "much"})
    with pytest.raises(ArtifactError, match="planned is not described"):
        jettison.load(tmp_path / "out").executor  # noqa: B018


def test_weights_that_were_placed_are_not_placed_again(run, whole, tmp_path, is_left_clean):
    limit = least(whole)
    assert run("place", whole, "--host-memory", limit, *WORK, "--out", tmp_path / "out").code == 0
    again = run("place", tmp_path / "out", "--host-memory", limit, *WORK, "--out", is_left_clean / "out")
    again.fails(2, "placed before", "the artifact that it was made from")


def test_an_onnx_artifact_is_made_again_instead(run, onnx_artifact, is_left_clean):
    result = run("place", onnx_artifact, "--host-memory", "2GB", "--out", is_left_clean / "out")
    result.fails(1, "target onnx", "jettison optimize", "place-weights{host=SIZE}")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ((), ("--host-memory 2GiB",)),
        (("--host-memory", "much"), ("--host-memory",)),
        (("--host-memory", "1MB"), ("bytes are missing", "Give host=")),
        (("--host-memory", "2GB", "--context", "100000"), ("context=100000", "at most")),
    ],
)
def test_what_cannot_be_placed(run, whole, is_left_clean, options, parts):
    run("place", whole, *options, "--out", is_left_clean / "out").fails(2, *parts)
