"""`jettison diff`: two artifacts, or one before and after its passes."""

from __future__ import annotations

import jettison

KEYS = {"before", "after", "summary", "diff"}
SIDE_KEYS = {"name", "pipeline", "weight_bytes", "state_bytes"}


def test_one_artifact_is_compared_with_its_source(run, onnx_artifact):
    result = run("diff", onnx_artifact, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.json
    assert set(document) == KEYS
    assert set(document["before"]) == set(document["after"]) == SIDE_KEYS
    assert document["before"]["weight_bytes"] > 3 * document["after"]["weight_bytes"]
    assert (
        document["summary"]["added"]["jettison.quantized_linear"] == document["summary"]["removed"]["aten.linear"] == 30
    )
    assert document["diff"] == jettison.load(onnx_artifact).diff()


def test_two_artifacts_are_compared(run, onnx_artifact, torch_artifact):
    document = run("diff", onnx_artifact, torch_artifact, "--json").json
    assert document["before"]["name"] == str(onnx_artifact)
    assert document["after"]["pipeline"].startswith("quantize-weights{bits=8")
    assert document["summary"]["added"]["jettison.windowed_attention"] == 4
    assert document["after"]["state_bytes"] < document["before"]["state_bytes"]


def test_an_artifact_does_not_differ_from_itself(run, onnx_artifact):
    document = run("diff", onnx_artifact, onnx_artifact, "--json").json
    assert document["diff"] == ""
    assert (document["summary"]["added"], document["summary"]["removed"]) == ({}, {})


def test_people_see_the_counts_and_the_diff(run, onnx_artifact):
    result = run("diff", onnx_artifact)
    assert (result.code, result.err) == (0, "")
    assert jettison.load(onnx_artifact).diff() in result.out
    brief = run("diff", onnx_artifact, "--summary").out
    assert "aten.linear" in brief
    assert "@@" not in brief
    assert run("diff", onnx_artifact, "--summary", "--json").json["diff"] is None


def test_a_missing_artifact_is_named(run, onnx_artifact, tmp_path):
    run("diff", onnx_artifact, tmp_path / "none").fails(1, "none", "does not exist")
