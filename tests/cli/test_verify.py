"""`jettison verify`: finds one flipped byte, wherever it is."""

from __future__ import annotations

import pytest

KEYS = {"artifact", "ok", "files", "bytes", "problems"}
PROBLEM_KEYS = {"kind", "name", "found", "needed"}


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_sound_artifact_passes(run, onnx_artifact):
    result = run("verify", onnx_artifact)
    assert (result.code, result.err) == (0, "")
    assert "sound" in result.out
    document = run("verify", onnx_artifact, "--json").json
    assert set(document) == KEYS
    assert (document["ok"], document["problems"]) == (True, [])
    files = [path for path in onnx_artifact.rglob("*") if path.is_file() and path.name != "jettison.json"]
    assert document["files"] == len(files)
    assert document["bytes"] == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize(
    "name", ["model.onnx.data", "model.onnx", "tokenizer.json", "graph/after.txt", "jettison.json"]
)
def test_one_flipped_byte_is_found(run, onnx_artifact, copied, name):
    artifact = copied(onnx_artifact)
    flip(artifact / name, (artifact / name).stat().st_size // 2)
    run("verify", artifact).fails(1, name)
    result = run("verify", artifact, "--json")
    assert result.code == 1
    assert result.json["ok"] is False
    assert set(result.json["problems"][0]) == PROBLEM_KEYS
    assert name in str(result.json["problems"])


def test_large_damaged_file_passes_load_but_not_verify(run, onnx_artifact, copied):
    artifact = copied(onnx_artifact)
    assert (artifact / "model.onnx.data").stat().st_size > 1 << 20
    flip(artifact / "model.onnx.data", 1000)
    assert run("inspect", artifact).code == 0
    run("verify", artifact).fails(1, "1 of 12 files", "model.onnx.data", "content changed")


def test_file_that_does_not_belong_is_a_note(run, small_artifact, copied):
    artifact = copied(small_artifact)
    (artifact / "notes.txt").write_text("mine")
    result = run("verify", artifact)
    assert (result.code, result.err) == (0, "")
    assert "note: notes.txt" in result.out
    document = run("verify", artifact, "--json").json
    assert document["ok"] is True
    assert [problem["kind"] for problem in document["problems"]] == ["extra"]
