"""Sparse feed-forward layers in ONNX: against the program, in a prompt and step by step, and what is refused."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch

import jettison
from jettison.codegen.onnx.emit import MINIMUM_ORT
from jettison.codegen.onnx.sparse_mlp import cut_into_slabs, is_group_mixture
from jettison.ir.errors import UnsupportedError
from jettison.ir.program import Program
from jettison.passes.cache_kv import CacheKV
from jettison.passes.formats import IntGroups
from jettison.passes.predict_mlp_sparsity import PredictMlpSparsity
from jettison.passes.predictors import HiRE
from jettison.passes.quantize_weights import QuantizeWeights
from tests.codegen.running import Emitted, SideBySide, attributes, emit
from tests.models.tiny_feed_forward import AttentionBlock, Block, FeedForward, calibrated, stacked
from tests.models.tiny_models import random_ids, tiny_model

NEURONS, GROUP = 256, 32
# Activations in 8-bit integers, through both matrices of a layer.
INT8_TOLERANCE = 5e-2
LAYERS: dict[str, dict[str, Any]] = {
    "relu": {"activation": "relu", "gated": False, "bias": True, "is_flat": False},
    "gated": {"activation": "silu", "gated": True, "bias": False, "is_flat": False},
    "gelu": {"activation": "gelu", "gated": False, "bias": False, "is_flat": True},
    "gelu_tanh": {"activation": "gelu_tanh", "gated": False, "bias": True, "is_flat": False},
}  # fmt: skip


@functools.cache
def captured(*layers: str) -> Program:
    """The first of the layers has an attention; a cache needs one."""
    first, *others = (FeedForward(NEURONS, **LAYERS[name]) for name in layers)
    return calibrated(stacked(AttentionBlock(first), *map(Block, others)))


def sparse(*layers: str, quantized: tuple[QuantizeWeights, ...] = ()) -> Program:
    """A program with a cache whose layers are read by groups, a quarter of them by each token."""
    program = captured(*layers).copy()
    for pass_ in (*quantized, PredictMlpSparsity(method=HiRE(rank=8), keep=0.25, group=GROUP, force=True), CacheKV()):
        record = pass_.run(program)
        assert record.rewrites > 0
        assert record.misses == []
    return program


def check(emitted: Emitted, tolerance: float) -> None:
    """Alone and three together, whose prompts have different lengths."""
    for rows in ([6], [5, 1, 3]):
        both = SideBySide(emitted, len(rows), 16)
        both.check(rows, tolerance=tolerance)
        both.check_steps(3, tolerance)


def data_bytes(emitted: Emitted) -> int:
    return sum(path.stat().st_size for path in emitted.folder.glob("*.data"))


def test_float_layers(tmp_path: Path):
    """Biases and none, a gate, both gelus, tokens as rows."""
    emitted = emit(sparse("relu", "gated", "gelu", "gelu_tanh"), tmp_path)
    check(emitted, 1e-4)
    assert data_bytes(emitted) < 1.05 * emitted.program.weight_bytes() + 2**16


@pytest.mark.parametrize(
    ("layer", "bits", "symmetric", "activation"),
    [("gated", 4, False, b"swiglu"), ("relu", 8, True, b"relu")],
)
def test_quantised_layers(layer: str, bits: int, symmetric: bool, activation: bytes, tmp_path: Path):
    """One layer: the predictor of a second would read what rounding to 8-bit integers left of the first."""
    program = sparse(layer, quantized=(QuantizeWeights(bits=bits, symmetric=symmetric),))
    emitted = emit(program, tmp_path)
    check(emitted, INT8_TOLERANCE)
    assert [graph.minimum_ort for graph in emitted.graphs] == [MINIMUM_ORT["experts"]] * len(emitted.graphs)
    (node,) = emitted.nodes("QMoE")
    expected = {"expert_weight_bits": bits, "block_size": 32, "activation_type": activation}
    assert attributes(node).items() >= expected.items()
    # Codes once, for the prompt and for a step; a gate and its neighbour are one matrix.
    assert data_bytes(emitted) < 1.1 * program.weight_bytes() + 2**16


def test_a_prompt_runs_all_groups_and_a_step_some():
    program = sparse("relu", "gelu_tanh", quantized=(QuantizeWeights(bits=4, skip=r"layers\.1\.mlp"),))
    cut = cut_into_slabs(program)
    for entry, indices in (("prefill", False), ("decode", True)):
        (node,) = [node for node in cut.entries[entry].graph.nodes if is_group_mixture(node)]
        assert (node.args[1] is not None) == indices
    # The program itself stays as it is, and so does one without such layers.
    assert not any(is_group_mixture(node) for entry in program.entries.values() for node in entry.graph.nodes)
    plain = sparse("relu", "gelu_tanh")
    assert cut_into_slabs(plain) is plain


@pytest.mark.parametrize(
    ("layer", "passes", "found"),
    [
        ("gelu", (QuantizeWeights(bits=4),), "a layer of gelu read by groups"),
        ("relu", (QuantizeWeights(bits=2),), "2 and 2 bits read by groups"),
        ("relu", (QuantizeWeights(bits=8, only="down"), QuantizeWeights(bits=4)), "4 and 8 bits read by groups"),
        ("relu", (QuantizeWeights(format=IntGroups(4, 32, float_zeros=True)),), "zero points between the codes read"),
        ("relu", (QuantizeWeights(group=64, only="up"), QuantizeWeights()), "groups of 64 and 32 columns of 32"),
    ],
)
def test_refuses_what_the_kernel_does_not_take(layer: str, passes: tuple[QuantizeWeights, ...], found: str):
    with pytest.raises(UnsupportedError, match=rf"\[onnx\] layers.0.mlp.up.weight: found {found}") as caught:
        cut_into_slabs(sparse(layer, quantized=passes))
    message = str(caught.value)
    assert "needs relu, silu or a gated silu, 4 or 8 bits, the same in both matrices" in message
    assert "skip=" in message
    assert 'target="torch"' in message


def test_a_model_generates_what_the_torch_target_generates():
    """OPT gives its layers tokens as rows."""
    model = tiny_model("opt", layers=1)
    text = "predict-mlp-sparsity{keep=0.5,group=8,force=true}"
    ids, found = random_ids(1, 9), []
    for target in ("torch", "onnx"):
        made = jettison.optimize(model, text, target=target, calibration_size=(2, 32), strict=True)
        found.append(torch.as_tensor(made.generate(ids, max_new_tokens=12)).flatten().tolist())
    assert found[0] == found[1]
