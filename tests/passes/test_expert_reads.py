"""Experts under `quantize-weights`: both stacks packed as one, routers left alone, and what stands in the way."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import Tensor

from jettison.drift import dense_value
from jettison.ir.compare import run_program
from jettison.ir.constants import Constant
from jettison.ir.match import is_call
from jettison.ir.ops import experts, quantized_experts
from jettison.ir.program import Program
from jettison.ir.serialize import load_program, save_program
from jettison.passes.formats.int_groups import IntGroups
from jettison.passes.pipeline import prepare
from jettison.passes.quantize_weights import QuantizeWeights
from tests.helpers import (
    Apply,
    Embedded,
    assert_declines,
    assert_golden,
    assert_idempotent,
    assert_same_numbers,
    export_tiny,
    run_pass,
)

EXPERTS, WIDTH, INNER = 4, 40, 24
PARAMETERS = {"router": (EXPERTS, WIDTH), "gate_up": (EXPERTS, 2 * INNER, WIDTH), "down": (EXPERTS, WIDTH, INNER)}


def mixture(self, x: Tensor, scale: float = 8.0) -> Tensor:
    """A layer as those of Mixtral; small weights would make a router indifferent."""
    tokens = x.reshape(-1, WIDTH)
    shares, indices = torch.softmax(torch.nn.functional.linear(tokens, self.router) * scale, -1).topk(2)
    weights = shares / shares.sum(-1, keepdim=True)
    return experts(tokens, indices, weights, self.gate_up, self.down, "silu").reshape(x.shape)


@functools.cache
def mixture_program() -> Program:
    program = export_tiny(Embedded(Apply(mixture, **PARAMETERS), width=WIDTH))
    prepare(program)
    return program


def decoded(program: Program, before: Program) -> Program:
    """`before` with the weights that the packed ones of `program` decode to."""
    reference = before.copy()
    for name in program.packed:
        value = dense_value(program, name)
        assert value is not None
        assert tuple(value.shape) == before.constants[name].shape
        reference.constants[name] = Constant(name, value, before.constants[name].dtype)
    return reference


def reasons(program: Program) -> set[str]:
    """Why nothing was packed; what reads a stack besides the experts has a reason of its own."""
    after, record = run_pass(QuantizeWeights(skip="embed"), program)
    assert (record.rewrites, after.packed) == (0, {})
    return {miss.reason for miss in record.misses}


def test_golden_experts(snapshot):
    after, record = assert_golden(snapshot, QuantizeWeights(skip="embed"), mixture_program(), "experts")
    assert (record.rewrites, record.misses) == (1, [])
    assert_same_numbers(decoded(after, mixture_program()), after)


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(8, 32, True), (8, 128, False), (4, 64, True), (4, 128, False)]
)
def test_computes_with_the_decoded_stacks(bits: int, group: int, symmetric: bool):
    after, _ = run_pass(QuantizeWeights(bits, group, symmetric), mixture_program())
    assert_same_numbers(decoded(after, mixture_program()), after, ((1, 1), (2, 7)))


@pytest.mark.parametrize("bits", [8, 4])
def test_error_and_bytes_are_those_of_the_format(bits: int):
    """Half a step of each group, and one code per weight, one scale and one zero point per group."""
    before = mixture_program()
    after, record = run_pass(QuantizeWeights(bits, 32, skip="embed"), before)
    saved = 0
    for name in ("body.gate_up", "body.down"):
        stack, parts = before.constants[name].value(), after.packed[name].parts
        scales = after.constants[parts["scales"]].value()
        error = (dense_value(after, name) - stack).abs().amax(-1)
        assert (error <= 0.501 * scales.amax(-1)).all()
        rows, blocks = math.prod(stack.shape[:-1]), -(-stack.shape[-1] // 32)
        packed_bytes = rows * (blocks * 32 * bits // 8 + blocks * 4 + -(-blocks * bits // 8))
        assert sum(after.constants[part].nbytes for part in parts.values()) == packed_bytes
        saved += stack.nbytes - packed_bytes
        assert name not in after.constants
    assert record.bytes_before - record.bytes_after == saved
    assert after.packed["body.down"].shape == (EXPERTS, WIDTH, INNER)


def test_a_stack_is_encoded_as_its_matrices_are():
    after, _ = run_pass(QuantizeWeights(4, 32, skip="embed"), mixture_program())
    parts = after.packed["body.down"].parts
    expected = IntGroups(4, 32, False).encode(mixture_program().constants["body.down"].value()[2])
    for part, value in expected.items():
        assert after.constants[parts[part]].value()[2].equal(value), part


def test_a_stack_in_bf16_is_read_without_a_copy_in_fp32():
    program = mixture_program().copy()
    stored = program.constants["body.gate_up"].value().bfloat16()
    program.constants["body.gate_up"] = Constant("body.gate_up", stored, torch.float32)
    after, _ = run_pass(QuantizeWeights(8, 32), program)
    assert (dense_value(after, "body.gate_up") - stored.float()).abs().max() < 4e-3


def test_a_router_stays_as_it_is():
    """Also in a second run, when its experts are packed, and where the router is not the linear next to the choice."""
    once, _ = run_pass(QuantizeWeights(8, skip="embed"), mixture_program())
    assert "body.router" in once.used_constants()
    assert_declines(QuantizeWeights(4, skip="embed"), once, reason=None)


def test_a_linear_of_the_same_size_is_no_router():
    def function(self, x: Tensor) -> Tensor:
        return mixture(self, x) * torch.nn.functional.linear(x, self.other).sum(-1, keepdim=True)

    program = export_tiny(Embedded(Apply(function, **PARAMETERS, other=(EXPERTS, WIDTH)), width=WIDTH))
    after, record = run_pass(QuantizeWeights(skip="embed"), program)
    assert record.rewrites == 2
    assert "body.other" in after.packed
    assert "body.router" not in after.packed


def test_idempotent():
    assert_idempotent(QuantizeWeights(skip="embed"), mixture_program())


def test_skip_takes_both_stacks_or_says_why_not():
    assert_declines(QuantizeWeights(skip="embed|gate_up|down"), mixture_program(), reason=None)
    reason = "body.down is left out, and one operator reads both stacks in packed form"
    assert_declines(QuantizeWeights(skip="embed|down"), mixture_program(), reason=reason)


def test_declines_stacks_that_are_computed():
    def function(self, x: Tensor) -> Tensor:
        indices = torch.zeros(x.shape[0] * x.shape[1], 1, dtype=torch.int64)
        out = experts(x.reshape(-1, WIDTH), indices, indices.float(), self.gate_up * x.mean(), self.down, "silu")
        return out.reshape(x.shape)

    program = export_tiny(Embedded(Apply(function, **PARAMETERS), width=WIDTH))
    assert "the weights of the experts are not constants" in reasons(program)


def test_declines_a_stack_that_is_read_elsewhere():
    def function(self, x: Tensor) -> Tensor:
        return mixture(self, x) + self.down.sum()

    program = export_tiny(Embedded(Apply(function, **PARAMETERS), width=WIDTH))
    assert "aten.sum needs the float form of the weight too" in reasons(program)


def test_packed_experts_are_saved_and_loaded(tmp_path):
    after, _ = run_pass(QuantizeWeights(), mixture_program())
    files = tmp_path / "program.json", tmp_path / "weights.safetensors"
    save_program(after, *files)
    loaded = load_program(*files)
    assert str(loaded) == str(after)
    assert sum(is_call(node, quantized_experts) for node in loaded.entries["forward"].graph.nodes) == 1
    ids = torch.tensor([[3, 5, 7]])
    assert run_program(loaded, ids)[0].equal(run_program(after, ids)[0])
