from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jettison.ir.edit import Edit
from jettison.ir.program import output_node
from jettison.passes.eliminate_no_ops import EliminateNoOps
from jettison.passes.strip_export_asserts import StripExportAsserts
from tests.helpers import (
    assert_declines,
    assert_golden,
    assert_idempotent,
    assert_same_numbers,
    export_body,
    export_tiny,
    run_pass,
)

aten = torch.ops.aten


def every_no_op(self, x):
    copied = x.clone().contiguous().detach()
    viewed = copied[:, 0:].view(x.shape[0], x.shape[1], 2, 4).expand(-1, -1, 2, 4)
    scaled = viewed * 1.0 / 1
    return F.dropout(scaled.float(), 0.1, training=False).type_as(x) + 0


def targets(program):
    return [node.target for node in program.entries["forward"].graph.nodes if node.op == "call_function"]


def test_golden_every_no_op(snapshot):
    before = export_body(every_no_op)
    after, _ = assert_golden(snapshot, EliminateNoOps(), before, "every_no_op")
    assert_same_numbers(before, after)


def test_runs_twice_like_once():
    assert_idempotent(EliminateNoOps(), export_body(every_no_op))


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x[..., 1:],
        lambda self, x: x[..., :-1],
        lambda self, x: x[..., ::2],
        lambda self, x: x.to(torch.float64),
        lambda self, x: x * 2 / 2,
        lambda self, x: x + 0,
        lambda self, x: x.reshape(x.shape[0], -1),
        lambda self, x: x.unsqueeze(1).expand(-1, 3, -1, -1),
    ],
    ids=["tail", "all_but_last", "every_other", "cast", "factor_2", "plus_0", "reshape", "expand"],
)
def test_keeps_what_changes_its_input(function):
    program, _ = run_pass(StripExportAsserts(), export_body(function))
    assert_declines(EliminateNoOps(), program, reason=None)


def test_keeps_a_factor_of_one_that_changes_the_dtype():
    class Ids(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(61, 8)

        def forward(self, input_ids):
            return self.embed(input_ids) + (input_ids * 1.0).unsqueeze(-1)

    assert_declines(EliminateNoOps(), export_tiny(Ids()), reason=None)


def test_spells_views_as_reshapes():
    before = export_body(lambda self, x: x.view(x.shape[0], x.shape[1], 4, 2))
    after, record = run_pass(EliminateNoOps(), before)
    assert record.rewrites == 1
    assert targets(before)[-1] is aten.view.default
    assert targets(after)[-1] is aten.reshape.default
    assert_same_numbers(before, after)


def test_keeps_a_copy_that_stands_between_an_input_and_an_output():
    """Without it the output would be the caller's own tensor."""
    program = export_body(lambda self, x: x * 2)
    edit = Edit(program, "forward", "test")
    returned = output_node(edit.entry)
    input_ids = next(node for node in edit.graph.nodes if node.name == "input_ids")
    with edit.before(returned):
        copy = edit.call(aten.clone.default, input_ids)
    edit.set_outputs([copy])
    edit.eliminate_dead_code()
    assert_declines(EliminateNoOps(), program, reason=None)


def test_keeps_dropout_that_is_on():
    """Capture refuses a model that draws random numbers, so this one is put into the graph."""
    program = export_body(lambda self, x: x * 2)
    edit = Edit(program, "forward", "test")
    returned = output_node(edit.entry)
    with edit.before(returned):
        edit.set_outputs([edit.call(aten.dropout.default, returned.args[0][0], 0.5, True)])
    assert_declines(EliminateNoOps(), program, reason=None)


def test_keeps_minus_zero():
    """x + 0 is not x: minus zero plus zero is zero."""
    before = export_body(lambda self, x: torch.atan2(x * 0 + 0, x))
    after, _ = run_pass(EliminateNoOps(), before)
    assert_same_numbers(before, after)
    assert aten.add.Tensor in targets(after)
