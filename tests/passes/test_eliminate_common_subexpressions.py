from __future__ import annotations

import operator

import pytest
import torch

from jettison.ir.edit import Edit
from jettison.ir.program import output_node
from jettison.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from tests.helpers import (
    assert_declines,
    assert_golden,
    assert_idempotent,
    assert_same_numbers,
    export_body,
    run_pass,
)

aten = torch.ops.aten


def repeats(self, x):
    """The same product three times (of a value, of a value of equal sizes, of an equal value), and equal sizes."""
    first = x.reshape(x.shape[0], x.shape[1], 2, 4) * 2
    second = x.reshape(x.size(0), x.size(1), 2, 4) * 2
    return first.exp() + second.exp()


def test_golden_repeats(snapshot):
    before = export_body(repeats)
    after, _ = assert_golden(snapshot, EliminateCommonSubexpressions(), before, "repeats")
    assert_same_numbers(before, after)


def test_equal_sizes_are_one_value():
    """The batch of the input and of its embedding are one number, however each is computed."""
    before = export_body(lambda self, x: x * x.shape[0])
    edit = Edit(before, "forward", "test")
    returned = output_node(edit.entry)
    product = returned.args[0][0]
    with edit.before(returned):
        batch = edit.call(aten.sym_size.int, product, 0)
        doubled = edit.call(operator.mul, batch, 2)
        again = edit.call(operator.add, batch, batch)
        scaled = edit.call(aten.mul.Tensor, edit.call(aten.mul.Tensor, product, doubled), again)
    edit.set_outputs([scaled])
    after, record = run_pass(EliminateCommonSubexpressions(), before)
    assert record.rewrites == 2
    assert str(after).count(": sym[") == 2
    assert_same_numbers(before, after)


def test_runs_twice_like_once():
    assert_idempotent(EliminateCommonSubexpressions(), export_body(repeats))


@pytest.mark.parametrize(
    "draw", [(aten.bernoulli.default,), (aten.dropout.default, 0.5, True)], ids=["bernoulli", "dropout"]
)
def test_keeps_random_numbers_apart(draw):
    """Capture refuses a model that draws them, so these are put into the graph."""
    program = export_body(lambda self, x: x.sigmoid())
    edit = Edit(program, "forward", "test")
    returned = output_node(edit.entry)
    with edit.before(returned):
        draws = [edit.call(draw[0], returned.args[0][0], *draw[1:]) for _ in range(2)]
        edit.set_outputs([edit.call(aten.add.Tensor, *draws)])
    assert_declines(EliminateCommonSubexpressions(), program, reason=None)


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: (x.long() * 2).float() + x.long() * 2.0,
        lambda self, x: x + ~torch.full((8,), True) - ~torch.full((8,), 1),
    ],
    ids=["int_and_float", "bool_and_int"],
)
def test_tells_literals_of_different_types_apart(function):
    """Python calls them equal; the operator promotes by their type."""
    before = export_body(function)
    after, _ = run_pass(EliminateCommonSubexpressions(), before)
    assert_same_numbers(before, after)


def test_tells_zeros_of_different_sign_apart():
    """atan2 of a zero and a negative number is pi or minus pi, by the sign of the zero."""
    before = export_body(
        lambda self, x: torch.atan2(torch.full_like(x, 0.0), x) - torch.atan2(torch.full_like(x, -0.0), x)
    )
    after, _ = run_pass(EliminateCommonSubexpressions(), before)
    assert_same_numbers(before, after)


def test_leaves_a_graph_without_repeats_alone():
    assert_declines(EliminateCommonSubexpressions(), export_body(lambda self, x: x * 2 + x * 3), reason=None)
