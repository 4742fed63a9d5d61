from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jettison.ir.compare import assert_close, example_input_ids, run_program
from jettison.ir.constants import Constant
from jettison.ir.edit import Edit, placeholder_name
from jettison.ir.interpret import run_entry
from jettison.ir.ops import attention
from jettison.ir.program import (
    Program,
    State,
    constant_placeholders,
    input_placeholders,
    output_node,
    placeholders,
    state_placeholders,
)
from jettison.ir.verify import verify
from tests.helpers import assert_same_numbers, export_body, export_tiny

aten = torch.ops.aten


def doubled() -> tuple[Program, Edit]:
    program = export_body(lambda self, x: x * 2)
    return program, Edit(program, "forward", "test")


def find(edit: Edit, target):
    return next(node for node in edit.graph.nodes if node.target is target)


def test_a_new_node_has_metadata_and_provenance():
    _, edit = doubled()
    x = find(edit, aten.embedding.default)
    with edit.before(output_node(edit.entry)):
        node = edit.call(aten.transpose.int, x, 1, 2)
    assert list(node.meta["val"].shape) == [x.meta["val"].shape[0], 8, x.meta["val"].shape[1]]
    assert node.meta["val"].stride()[1] == 1
    assert node.meta["made_by"] == "test"
    assert node.meta["where"] == "embed"


def test_nodes_go_where_the_block_says():
    _, edit = doubled()
    mul, end = find(edit, aten.mul.Tensor), output_node(edit.entry)
    with edit.before(end):
        last = edit.call(aten.sin.default, mul)
        with edit.before(mul):
            first = edit.call(aten.cos.default, mul.args[0])
        after_inner = edit.call(aten.exp.default, last)
    order = [node for node in edit.graph.nodes if node in (first, mul, last, after_inner, end)]
    assert order == [first, mul, last, after_inner, end]


def test_a_call_outside_of_a_block_is_refused():
    _, edit = doubled()
    with pytest.raises(ValueError, match="outside"):
        edit.call(aten.sin.default, find(edit, aten.mul.Tensor))


def test_a_call_that_cannot_be_evaluated_raises():
    """Shapes that do not fit are found when the node is made, not when the program runs."""
    _, edit = doubled()
    narrow = edit.constant(Constant("w", torch.zeros(5)))
    with edit.before(output_node(edit.entry)), pytest.raises(RuntimeError, match="must match the size"):
        edit.call(aten.mul.Tensor, find(edit, aten.mul.Tensor), narrow)


def test_replace_moves_every_user():
    program, edit = doubled()
    mul = find(edit, aten.mul.Tensor)
    with edit.before(mul):
        new = edit.call(aten.add.Tensor, mul.args[0], mul.args[0])
    edit.replace(mul, new)
    verify(program)
    assert "aten.mul" not in str(program)
    assert_same_numbers(export_body(lambda self, x: x * 2), program)


def test_replace_keeps_where_the_old_value_came_from():
    _, edit = doubled()
    mul = find(edit, aten.mul.Tensor)
    with edit.before(mul):
        new = edit.call(aten.full.default, [2], 1.0)
    edit.replace(mul, new)
    assert new.meta["where"] == "body"


def test_set_arguments_refreshes_metadata():
    program, edit = doubled()
    mul = find(edit, aten.mul.Tensor)
    with edit.before(mul):
        half = edit.call(aten.slice.Tensor, mul.args[0], 2, 0, 4)
    edit.set_arguments(mul, half, 3)
    assert mul.meta["val"].shape[-1] == 4
    assert run_program(program, example_input_ids(program, 1, 3))[0].shape == (1, 3, 4)


def test_refresh_follows_an_operand():
    _, edit = doubled()
    mul = find(edit, aten.mul.Tensor)
    with edit.before(output_node(edit.entry)):
        user = edit.call(aten.exp.default, mul)
    with edit.before(mul):
        cast = edit.call(aten.to.dtype, mul.args[0], torch.float64)
    edit.set_arguments(mul, cast, 2)
    assert user.meta["val"].dtype == torch.float32
    edit.refresh(user)
    assert user.meta["val"].dtype == torch.float64


def test_erase_refuses_a_node_that_is_read():
    _, edit = doubled()
    with pytest.raises(RuntimeError, match="users"):
        edit.erase(find(edit, aten.embedding.default))


def test_dead_code_goes_with_the_constants_only_it_reads():
    program = export_body(lambda self, x: x * self.w + x, w=(8,))
    edit = Edit(program, "forward", "test")
    add = find(edit, aten.add.Tensor)
    edit.set_arguments(add, add.args[1], add.args[1])
    assert edit.eliminate_dead_code() == 2
    assert list(program.used_constants()) == ["embed.weight"]
    assert "body.w" in program.constants
    assert edit.eliminate_dead_code() == 0
    verify(program)


def test_dead_code_elimination_keeps_inputs_and_states():
    program, edit = doubled()
    state = edit.state(State("seen", ("batch",), torch.int64), edit.dynamic_tensor([None], torch.int64))
    edit.input("unread", edit.dynamic_tensor([None], torch.float32))
    edit.set_outputs([*output_node(edit.entry).args[0], state])
    assert edit.eliminate_dead_code() == 0
    assert list(input_placeholders(edit.entry)) == ["input_ids", "unread"]
    verify(program)


def test_placeholders_are_made_once_and_in_order():
    program, edit = doubled()
    position = edit.input("position_ids", edit.dynamic_tensor([2, None], torch.int64))
    slots = State("past.key", ("batch", "capacity"), torch.float32)
    state = edit.state(slots, edit.dynamic_tensor([2, None], torch.float32))
    scale = edit.constant(Constant("scale", torch.full((8,), 3.0)))
    assert edit.constant(Constant("scale", torch.zeros(8))) is scale
    assert edit.state(slots, edit.dynamic_tensor([2, None], torch.float32)) is state
    assert edit.input("position_ids", edit.dynamic_tensor([2, None], torch.int64)) is position
    assert [node.meta.get("constant") or node.meta.get("state") or node.name for node in placeholders(edit.entry)] == [
        "embed.weight", "scale", "past.key", "input_ids", "position_ids"
    ]  # fmt: skip
    assert list(constant_placeholders(edit.entry)) == ["embed.weight", "scale"]
    assert list(state_placeholders(edit.entry)) == ["past.key"]
    edit.set_outputs([*output_node(edit.entry).args[0], state])
    verify(program)
    assert program.constants["scale"].value()[0] == 3


def test_the_first_constant_of_an_entry_comes_before_its_inputs():
    class Ids(nn.Module):
        vocab_size = 61

        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(61, 8)

        def forward(self, input_ids):
            return input_ids * 1.5

    program = export_tiny(Ids())
    edit = Edit(program, "forward", "test")
    edit.eliminate_dead_code()
    mul = find(edit, aten.mul.Tensor)
    edit.set_arguments(mul, mul.args[0], edit.constant(Constant("scale", torch.tensor(2.5))))
    verify(program)
    assert_close(run_program(program, torch.tensor([[2, 4]]))[0], torch.tensor([[5.0, 10.0]]))


def test_names_become_identifiers():
    assert placeholder_name("model.layers.0.self_attn.q_proj.weight") == "model_layers_0_self_attn_q_proj_weight"


def test_a_dynamic_tensor_has_new_symbols_where_asked():
    _, edit = doubled()
    batch = find(edit, aten.embedding.default).meta["val"].shape[0]
    first = edit.dynamic_tensor([batch, None, 4], torch.int64)
    second = edit.dynamic_tensor([batch, None, 4], torch.int64)
    assert first.shape[0].node.expr == batch.node.expr
    assert isinstance(first.shape[1], torch.SymInt)
    assert first.shape[1].node.expr != second.shape[1].node.expr
    assert first.shape[2] == 4
    assert first.dtype == torch.int64


def test_dynamic_sizes_stay_dynamic_through_a_new_node():
    """The trace-time size of a symbol must not leak into the graph: the program runs at any size."""
    program, edit = doubled()
    mul = find(edit, aten.mul.Tensor)
    batch = mul.meta["val"].shape[0]
    extra = edit.input("extra", edit.dynamic_tensor([batch, None, 8], torch.float32))
    with edit.before(output_node(edit.entry)):
        joined = edit.call(aten.cat.default, [mul, extra], 1)
    edit.set_outputs([joined])
    verify(program)
    ids = example_input_ids(program, 3, 5)
    for more in (1, 4, 11):
        out = run_program(program, ids, inputs={"extra": torch.ones(3, more, 8)})[0]
        assert out.shape == (3, 5 + more, 8)


def test_inline_inserts_what_a_function_does():
    program, edit = doubled()
    mul = find(edit, aten.mul.Tensor)

    def function(x, y):
        heads = (x + y).unsqueeze(1)
        out = attention(heads, heads, heads, None, None, None, None, 1.0, True, 0, 0.0)
        return {"out": out.squeeze(1), "also": [x.sum(-1), y]}

    with edit.before(output_node(edit.entry)):
        tree = edit.inline(function, mul, mul.args[0])
    assert set(tree) == {"out", "also"}
    assert tree["also"][1] is mul.args[0]
    edit.set_outputs([tree["out"], tree["also"][0]])
    program.outputs = ("logits", "sums")
    verify(program)
    assert str(program).count("jettison.attention") == 1
    for batch, length in ((1, 1), (2, 7), (3, 16)):
        ids = example_input_ids(program, batch, length)
        x = F.embedding(ids, program.constants["embed.weight"].value())
        expected = function(x * 2, x)
        out = run_program(program, ids)
        assert_close(out[0], expected["out"])
        assert_close(out[1], expected["also"][0])


def test_a_copy_is_edited_alone():
    program, _ = doubled()
    before = str(program)
    copy = program.copy()
    edit = Edit(copy, "forward", "test")
    mul = find(edit, aten.mul.Tensor)
    edit.set_arguments(mul, mul.args[0], 5)
    edit.constant(Constant("new", torch.zeros(2)))
    assert str(program) == before
    assert "new" not in program.constants
    ids = example_input_ids(program, 2, 3)
    outs = [run_entry(p, "forward", {"input_ids": ids})[0] for p in (program, copy)]
    assert_close(outs[1], outs[0] * 2.5)
