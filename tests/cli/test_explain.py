"""`jettison explain`: what each pass did, and what every layer came to."""

from __future__ import annotations

import json

import pytest

from jettison.cli.explain import _decode_limit
from tests.cli.running import optimized

KEYS = {
    "artifact", "pipeline", "passes", "not_recognised", "layers", "weight_bytes", "state_bytes_per_token",
    "state_bytes_fixed", "decode_limit", "run_by_torch", "streamed_bytes",
}  # fmt: skip
LAYER_KEYS = {
    "layer", "weights", "weight_bytes", "streamed_bytes", "kv_policy", "state_bytes_per_token", "state_bytes_fixed",
}  # fmt: skip


def explained(run, artifact):
    result = run("explain", artifact, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.json
    assert set(document) == KEYS
    assert all(set(layer) == LAYER_KEYS for layer in document["layers"])
    return document


def test_layers_of_an_onnx_artifact_add_up(run, onnx_artifact):
    document = explained(run, onnx_artifact)
    assert [layer["layer"] for layer in document["layers"]] == [0, 1, None]
    assert sum(layer["weight_bytes"] for layer in document["layers"]) == document["weight_bytes"]
    manifest = json.loads((onnx_artifact / "jettison.json").read_text())
    assert document["weight_bytes"] == manifest["weight_bytes"]
    first = document["layers"][0]
    formats = {weight["name"]: weight["format"] for weight in first["weights"]}
    assert formats["model.layers.0.mlp.down_proj.weight"] == "int4{group=32,symmetric=false}"
    assert formats["model.layers.0.input_layernorm.weight"] == "f32"
    down = next(w for w in first["weights"] if w["name"] == "model.layers.0.mlp.down_proj.weight")
    assert down["shape"] == [256, 768]
    # Codes, scales in fp32, zero points.
    assert down["bytes"] == 256 * 768 // 2 + 256 * 24 * 4 + 256 * 24 // 2
    assert (first["kv_policy"], first["state_bytes_fixed"]) == ("full", 0)
    assert first["state_bytes_per_token"] == 2 * 4 * 32 * 4
    assert document["state_bytes_per_token"] == 2 * first["state_bytes_per_token"]


def test_what_limits_decode_of_a_torch_artifact(run, torch_artifact, onnx_artifact):
    limit = explained(run, torch_artifact)["decode_limit"]
    assert limit.startswith("limited by arithmetic: PyTorch's int8 kernel")
    assert f"decode     {limit}\n" in run("explain", torch_artifact).out
    assert explained(run, onnx_artifact)["decode_limit"] is None
    assert "decode  " not in run("explain", onnx_artifact).out


@pytest.mark.parametrize(
    ("weight_format", "target", "words"),
    [
        ("int3{group=32,symmetric=false}", "torch", "in 3 bits are decoded at each call"),
        ("nf4{group=64,double=true}", "torch", "in nf4 are decoded at each call"),
        ("bitmap{of=int4,group=128}", "torch", "expanding a bitmap takes longer than int4"),
        ("nf4{group=64,double=true}", "onnx", "become 8-bit ones"),
        ("lut{bits=4,per_row=false}", "onnx", "are decoded to fp32"),
        ("int2{group=32,symmetric=false}", "onnx", None),
    ],
)
def test_formats_that_are_slower_than_their_bits_are_named(weight_format, target, words):
    limit = _decode_limit(target, {"float32", weight_format})
    assert limit is None if words is None else words in limit


def test_layers_of_a_torch_artifact_add_up(run, torch_artifact):
    document = explained(run, torch_artifact)
    assert sum(layer["weight_bytes"] for layer in document["layers"]) == document["weight_bytes"]
    first = document["layers"][0]
    formats = {weight["name"]: weight["format"] for weight in first["weights"]}
    assert formats["model.layers.0.mlp.up_proj.weight"] == "int8{group=64,symmetric=false}"
    assert formats["model.layers.0.mlp.down_proj.weight"] == "bf16"  # left out by skip=
    assert first["kv_policy"] == "window{size=64}"
    assert (first["state_bytes_per_token"], first["state_bytes_fixed"]) == (0, 2 * 4 * 128 * 32 * 4)


@pytest.fixture(scope="session")
def missing_artifact(small_model, tmp_path_factory):
    from tests.cli.running import optimized

    out = tmp_path_factory.mktemp("missing") / "out"
    passes = "quantize-weights{group=32,skip='nothing'},cache-kv{policy=window}"
    return optimized(small_model, out, "--target", "torch", "--passes", passes)


def test_misses_are_told_with_their_reasons(run, missing_artifact):
    document = explained(run, missing_artifact)
    quantized, cached = document["passes"]
    assert quantized["misses"] == [{"node": "skip='nothing'", "reason": "found in the name of no weight"}]
    assert "the layer has no sliding window" in cached["misses"][0]["reason"]
    assert document["layers"][0]["kv_policy"] == "full"  # the policy did not apply
    result = run("explain", missing_artifact)
    assert "found in the name of no weight" in result.out
    assert "the layer has no sliding window" in result.out


def test_every_pass_says_where_it_fired(run, onnx_artifact):
    quantized, cached = explained(run, onnx_artifact)["passes"]
    assert "model.layers.0.mlp.down_proj.weight" in quantized["where"]
    assert len(cached["where"]) == 2
    assert "model.layers.0.mlp.down_proj.weight" in run("explain", onnx_artifact).out


def test_tables_are_not_cut(run, onnx_artifact):
    result = run("explain", onnx_artifact)
    assert (result.code, result.err) == (0, "")
    assert "7 x int4{group=32,symmetric=false}, 2 x f32" in result.out
    assert "…" not in result.out


def test_where_8_bits_would_be_smaller_is_told(run, two_layers, tmp_path):
    note = "factored weights take more bytes than quantize-weights{bits=8} would"
    for ratio, is_told in ((0.9, True), (0.4, False)):
        out = tmp_path / str(ratio)
        passes = f"factorize-linear{{ratio={ratio},method=svd}}"
        made = run("optimize", two_layers, "--passes", passes, "--target", "torch", "--out", out)
        assert (made.code, note in made.out) == (0, is_told)
        assert (note in run("explain", out).out) is is_told
        (record,) = [each for each in explained(run, out)["passes"] if each["name"] == "factorize-linear"]
        assert [note in each for each in record["notes"]] == ([True] if is_told else [])


def test_what_is_streamed_is_said_by_layer(run, small_model, tmp_path):
    limit = "place-weights{host=1175KB,reserve=600KB,context=64,prompt=16}"
    placed = optimized(small_model, tmp_path / "placed", "--target", "torch", "--passes", limit)
    document = explained(run, placed)
    tiers = {weight["name"]: weight["tier"] for layer in document["layers"] for weight in layer["weights"]}
    assert tiers["model.layers.0.input_layernorm.weight"] is None
    assert set(tiers.values()) == {None, "disk"}
    streamed = [w for layer in document["layers"] for w in layer["weights"] if w["tier"]]
    assert document["streamed_bytes"] == sum(weight["bytes"] for weight in streamed)
    assert f"streamed   {document['streamed_bytes']:,} bytes" in run("explain", placed).out
    assert "are on the disk" in run("explain", placed).out


def test_nothing_is_said_about_streaming_where_nothing_is(run, torch_artifact):
    assert explained(run, torch_artifact)["streamed_bytes"] == 0
    assert "streamed" not in run("explain", torch_artifact).out
