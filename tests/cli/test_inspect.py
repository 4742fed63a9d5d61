"""`jettison inspect`: entries, states, kernels, files and bytes."""

from __future__ import annotations

import re

KEYS = {
    "artifact", "format_version", "target", "pipeline", "source", "model", "libraries", "requires", "seed", "entries",
    "states", "kernels", "files", "bytes_by_class", "weight_bytes", "file_bytes", "state_bytes",
}  # fmt: skip


def test_json_of_an_onnx_artifact(run, onnx_artifact):
    result = run("inspect", onnx_artifact, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.json
    assert set(document) == KEYS
    assert (document["target"], document["kernels"]) == ("onnx", [])
    assert document["source"]["name"] == "tiny-llama"
    assert re.fullmatch(r"[0-9a-f]{64}", document["source"]["sha256"])
    assert [entry["name"] for entry in document["entries"]] == ["prefill", "decode"]
    for entry in document["entries"]:
        assert set(entry) == {"name", "operators", "file", "inputs", "outputs"}
        assert entry["operators"] > 30
        assert entry["file"] == "model.onnx"
        assert {"input_ids", "position_ids", "attention_mask"} <= {*entry["inputs"]}
        assert entry["outputs"] == ["logits"]
    assert len(document["states"]) == 4
    assert document["states"][0] == {
        "name": "past_key_values.0.key", "shape": ["batch", 4, "capacity", 32], "dtype": "f32",
    }  # fmt: skip
    assert document["state_bytes"] == 4 * 4 * 1024 * 32 * 4
    for file in document["files"]:
        assert (onnx_artifact / file["name"]).stat().st_size == file["bytes"]
    assert sum(document["bytes_by_class"].values()) == sum(file["bytes"] for file in document["files"])
    assert document["file_bytes"] == (onnx_artifact / "model.onnx.data").stat().st_size
    # The tables of angles; beside them there is padding.
    assert document["file_bytes"] > document["weight_bytes"] + 2 * 1024 * 16 * 4


def test_json_of_a_torch_artifact(run, torch_artifact):
    document = run("inspect", torch_artifact, "--json").json
    assert set(document) == KEYS
    assert (document["target"], document["kernels"], document["seed"]) == ("torch", [], 3)
    assert [entry["name"] for entry in document["entries"]] == ["prefill", "decode"]
    assert document["states"][0]["shape"] == ["batch", 4, 64 + 64, 32]
    assert document["state_bytes"] == 4 * 4 * 128 * 32 * 4
    assert document["file_bytes"] == (torch_artifact / "weights.safetensors").stat().st_size
    assert document["file_bytes"] > document["weight_bytes"]  # by the header


def test_tables_name_everything_whole(run, onnx_artifact, monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")  # of no concern to a pipe
    result = run("inspect", onnx_artifact)
    assert (result.code, result.err) == (0, "")
    document = run("inspect", onnx_artifact, "--json").json
    assert f"weights    {document['weight_bytes']:,} bytes" in result.out
    assert f"on disk    {document['file_bytes']:,} bytes" in result.out
    for file in document["files"]:
        assert file["name"] in result.out
        assert file["sha256"] in result.out
    assert "[batch, 4, capacity, 32]" in result.out
    assert "…" not in result.out
