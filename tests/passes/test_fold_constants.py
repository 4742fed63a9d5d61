from __future__ import annotations

import torch

from jettison.ir.edit import Edit
from jettison.ir.program import output_node
from jettison.passes.fold_constants import LARGEST_BYTES, FoldConstants
from tests.helpers import (
    assert_declines,
    assert_golden,
    assert_idempotent,
    assert_same_numbers,
    export_body,
    run_pass,
)


def shifted_scale(self, x):
    """Gemma's norms scale by one plus the stored weight; here the sum feeds another call on constants."""
    return x * (1.0 + self.weight) + (self.weight * 2 - self.bias)


def test_golden_shifted_scale(snapshot):
    before = export_body(shifted_scale, weight=(8,), bias=(8,))
    after, record = assert_golden(snapshot, FoldConstants(), before, "shifted_scale")
    assert record.rewrites == 3
    assert_same_numbers(before, after)
    assert [name for name in after.used_constants() if ".folded" in name] == [
        "body.weight.folded0",
        "body.weight.folded2",
    ]


def test_runs_twice_like_once():
    assert_idempotent(FoldConstants(), export_body(shifted_scale, weight=(8,), bias=(8,)))


def test_folds_on_top_of_an_earlier_fold():
    """What an earlier run folded is a constant like any other, and gets a name of its own."""

    def function(self, x):
        return x * (self.weight + 1) + (self.weight + 1) * (self.weight + 2)

    before = export_body(function, weight=(8,))
    after, _ = run_pass(FoldConstants(), before)
    assert_same_numbers(before, after)
    assert len({constant.serial for constant in after.constants.values()}) == len(after.constants)


def test_the_folded_value_does_not_alias_the_stored_one():
    before = export_body(lambda self, x: x + self.table[2:3].reshape(8), table=(4, 8))
    after, _ = run_pass(FoldConstants(), before)
    stored = before.constants["body.table"].blocks[0].untyped_storage().data_ptr()
    folded = [constant for name, constant in after.used_constants().items() if ".folded" in name]
    assert folded
    assert all(constant.blocks[0].untyped_storage().data_ptr() != stored for constant in folded)
    assert_same_numbers(before, after)


def test_keeps_a_result_that_is_too_large():
    rows = LARGEST_BYTES // (8 * 4)
    at_limit = export_body(lambda self, x: x + (self.table * 2).sum(0), table=(rows, 8))
    assert run_pass(FoldConstants(), at_limit)[1].rewrites == 2
    beyond = export_body(lambda self, x: x @ (self.table * 2).T @ self.table, table=(rows + 1, 8))
    assert_declines(FoldConstants(), beyond, reason=None)


def test_keeps_random_values():
    """Capture refuses a model that draws them, so this one is put into the graph."""
    program = export_body(lambda self, x: x * self.ones, ones=(8,))
    edit = Edit(program, "forward", "test")
    product = output_node(edit.entry).args[0][0]
    with edit.before(product):
        drawn = edit.call(torch.ops.aten.bernoulli.default, product.args[1])
    edit.set_arguments(product, product.args[0], drawn)
    assert_declines(FoldConstants(), program, reason=None)


def test_keeps_what_reads_an_input():
    assert_declines(FoldConstants(), export_body(lambda self, x: x * self.weight, weight=(8,)), reason=None)


def test_a_new_constant_is_provenanced():
    after, _ = run_pass(FoldConstants(), export_body(shifted_scale, weight=(8,), bias=(8,)))
    made = {
        node.meta["constant"]: node.meta.get("made_by")
        for node in after.entries["forward"].graph.nodes
        if ".folded" in node.meta.get("constant", "")
    }
    assert set(made.values()) == {"fold-constants"}
