from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jettison.passes.canonicalize_linear import CanonicalizeLinear
from jettison.passes.eliminate_no_ops import EliminateNoOps
from tests.helpers import (
    assert_declines,
    assert_golden,
    assert_idempotent,
    assert_same_numbers,
    export_body,
    run_pass,
)


def conv1d(self, x):
    """GPT-2's Conv1D: the weight is `[K, N]` and the leading axes are flattened."""
    flat = torch.addmm(self.bias, x.view(-1, 8), self.weight)
    return flat.view(x.shape[0], x.shape[1], 6)


def exported_conv1d():
    return run_pass(EliminateNoOps(), export_body(conv1d, weight=(8, 6), bias=(6,)))[0]


def calls(program):
    return [str(node.target) for node in program.entries["forward"].graph.nodes if node.op == "call_function"]


def test_golden_conv1d(snapshot):
    before = exported_conv1d()
    once, record = assert_golden(snapshot, CanonicalizeLinear(), before, "conv1d")
    assert record.rewrites == 1
    after, record = assert_golden(snapshot, CanonicalizeLinear(), once, "conv1d_unflattened")
    assert record.rewrites == 1
    assert calls(after) == ["aten.embedding.default", "aten.linear.default"]
    assert_same_numbers(before, once)
    assert_same_numbers(before, after)


def test_golden_products(snapshot):
    def products(self, x):
        return x @ self.right + x @ self.left.t() + x @ self.left.transpose(0, 1) + x @ self.left.permute(1, 0)

    before = export_body(products, right=(8, 6), left=(6, 8))
    after, record = assert_golden(snapshot, CanonicalizeLinear(), before, "products")
    assert record.rewrites == 4
    assert_same_numbers(before, after)


def test_two_runs_reach_the_fixed_point():
    """The first run makes the linear, the second takes the reshapes away around it, a third finds nothing."""
    once, _ = run_pass(CanonicalizeLinear(), exported_conv1d())
    assert_idempotent(CanonicalizeLinear(), once)


def test_mm_of_a_transposed_constant():
    def function(self, x):
        return torch.mm(x.reshape(-1, 8), self.weight.t()).reshape(x.shape[0], x.shape[1], 6)

    before = export_body(function, weight=(6, 8))
    after, _ = run_pass(CanonicalizeLinear(), before, CanonicalizeLinear())
    assert calls(after) == ["aten.embedding.default", "aten.linear.default"]
    assert_same_numbers(before, after)


def test_no_weight_is_copied():
    before = exported_conv1d()
    after, _ = run_pass(CanonicalizeLinear(), before)
    stored, turned = before.constants["body.weight"].blocks[0], after.constants["body.weight.T"].blocks[0]
    assert turned.untyped_storage().data_ptr() == stored.untyped_storage().data_ptr()
    assert after.weight_bytes() == before.weight_bytes()


@pytest.mark.parametrize("scale", [{"alpha": 2}, {"beta": 0.5}], ids=["alpha", "beta"])
def test_declines_when_addmm_scales(scale):
    program = export_body(
        lambda self, x: torch.addmm(self.bias, x.reshape(-1, 8), self.weight, **scale), weight=(8, 6), bias=(6,)
    )
    assert_declines(CanonicalizeLinear(), program, reason="addmm scales its operands")


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x @ x.transpose(1, 2),
        lambda self, x: x @ self.stack,
        lambda self, x: torch.addmm(self.bias, self.bias.reshape(8, 1) * x[0, :1], x[0, :1].t() * x[0, :1]),
    ],
    ids=["values", "stack_of_matrices", "addmm_of_values"],
)
def test_is_not_interested_in_other_products(function):
    assert_declines(CanonicalizeLinear(), export_body(function, stack=(1, 8, 8), bias=(8,)), reason=None)


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: F.linear(x.reshape(-1, 8), self.weight),
        lambda self, x: F.linear(x.reshape(-1, 8), self.weight).reshape(x.shape[0], x.shape[1], 2, 3),
        lambda self, x: F.linear(x.reshape(-1, 4), self.narrow_weight).reshape(x.shape[0], x.shape[1], -1),
        lambda self, x: (lambda y: y.reshape(x.shape[0], x.shape[1], 6).sum() + y)(
            F.linear(x.reshape(-1, 8), self.weight)
        ),
    ],
    ids=["stays_flat", "other_axes", "other_width", "flat_is_read"],
)
def test_keeps_reshapes_that_do_more_than_flatten(function):
    program = export_body(function, weight=(6, 8), narrow_weight=(6, 4))
    assert_declines(CanonicalizeLinear(), program, reason=None)


@pytest.mark.parametrize(
    "function",
    [lambda self, x: x @ self.weight.permute(0, 1), lambda self, x: x @ self.weight.transpose(1, 1)],
    ids=["permute", "transpose"],
)
def test_a_permutation_that_changes_nothing_is_not_a_transposition(function):
    before = export_body(function, weight=(8, 8))
    after, _ = run_pass(CanonicalizeLinear(), before)
    assert_same_numbers(before, after)


@pytest.mark.parametrize("bias", [(1, 6), (1,), ()], ids=["row", "one_element", "number"])
def test_declines_when_addmm_adds_something_else_than_a_bias(bias):
    """addmm broadcasts what it adds; a linear's bias has one axis."""
    program = export_body(
        lambda self, x: torch.addmm(self.bias, x.reshape(-1, 8), self.weight), weight=(8, 6), bias=bias
    )
    assert_declines(CanonicalizeLinear(), program, reason="addmm adds something else than one bias per column")


def test_declines_when_addmm_adds_a_residual():
    def function(self, x):
        flat = x.reshape(-1, 8)
        return torch.addmm(flat * 3, flat, self.weight).reshape(x.shape[0], x.shape[1], 8)

    program = export_body(function, weight=(8, 8))
    assert_declines(CanonicalizeLinear(), program, reason="addmm adds something else than one bias per column")
