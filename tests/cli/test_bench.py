"""`jettison bench`: speed and memory."""

from __future__ import annotations

import pytest

KEYS = {
    "prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_bytes", "peak_anon_bytes", "weight_bytes", "state_bytes",
    "bytes_read_per_token", "threads", "target",
}  # fmt: skip
SIZES = ("--prompt-tokens", 16, "--new-tokens", 4, "--rounds", 1)


@pytest.mark.parametrize("target", ["onnx", "torch"])
def test_json_has_every_measure(run, request, target):
    artifact = request.getfixturevalue(f"{target}_artifact")
    result = run("bench", artifact, *SIZES, "--batch", 2, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.json
    assert set(document) == KEYS
    assert document["target"] == target
    for key in KEYS - {"target"}:
        assert document[key] > 0, key
    slots = 64 if target == "onnx" else 128
    assert document["state_bytes"] == 2 * 4 * 4 * slots * 32 * 4


def test_threads_are_those_asked_for(run, onnx_artifact):
    assert run("bench", onnx_artifact, *SIZES, "--threads", 1, "--json").json["threads"] == 1


def test_table_names_every_measure(run, small_artifact):
    result = run("bench", small_artifact, *SIZES)
    assert (result.code, result.err) == (0, "")
    assert all(key in result.out for key in KEYS)


def test_sizes_must_fit(run, small_artifact):
    run("bench", small_artifact, "--prompt-tokens", 1000, "--new-tokens", 64).fails(2, "1024")
    run("bench", small_artifact, "--rounds", 0).fails(2, "--rounds", "at least 1")
    run("bench", small_artifact, "--batch", "two").fails(2, "--batch")
