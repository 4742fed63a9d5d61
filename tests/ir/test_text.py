"""The canonical text: what golden files, dumps, diffs and the change check of every pass are made of."""

from __future__ import annotations

import operator
import re

import torch
import torch.nn.functional as F
from torch import nn

from jettison.ir.constants import Constant, Packed
from jettison.ir.edit import Edit
from jettison.ir.ops import attention
from jettison.ir.program import State, copy_graph, output_node
from jettison.ir.text import dtype_text, node_text, program_text, target_text, window_text
from tests.helpers import Apply, EmbeddedWithPositions, export_body, export_tiny

aten = torch.ops.aten


def body_lines(program):
    return [line for line in str(program).splitlines() if line.startswith("  ")]


def test_a_program_prints_names_numbers_symbols_and_hashes():
    def function(self, x, positions):
        return F.linear(x + positions.unsqueeze(2), self.weight)

    program = export_tiny(EmbeddedWithPositions(Apply(function, weight=(3, 8))))
    digests = [program.constants[name].digest for name in ("body.weight", "embed.weight")]
    assert str(program).splitlines() == [
        "program decoder EmbeddedWithPositions context=64 vocab=61",
        f"constant @body.weight: f32[3,8] #{digests[0]}",
        f"constant @embed.weight: f32[61,8] #{digests[1]}",
        "entry forward(%input_ids: i64[s0,s1], %position_ids: i64[s0,s1]):",
        "  %0: f32[s0,s1,8] = aten.embedding(@embed.weight, %input_ids)",
        "  %1: i64[s0,s1,1] = aten.unsqueeze(%position_ids, 2)",
        "  %2: f32[s0,s1,8] = aten.add.Tensor(%0, %1)",
        "  %3: f32[s0,s1,3] = aten.linear(%2, @body.weight)",
        "  return %3",
    ]
    assert str(program).endswith("\n")


def test_nothing_of_torchs_own_naming_appears():
    """The same module traced twice, the second time after other traces have moved torch's counters."""

    def function(self, x):
        return (x + 1 + x.sin() + 1).reshape(x.shape[0], -1)

    first = str(export_body(function))
    export_body(lambda self, x: x.exp() + x.exp() + 2)
    second = str(export_body(function))
    assert first == second
    assert not re.search(r"add_\d|sin_\d|\bs\d\d|0x[0-9a-f]+", first.split("entry", 1)[1])


def test_every_kind_of_argument_has_one_spelling():
    program = export_body(lambda self, x: x * 2)
    edit = Edit(program, "forward", "test")
    x = next(node for node in edit.graph.nodes if node.target is aten.embedding.default)
    with edit.before(output_node(edit.entry)):
        cast = edit.call(aten.to.dtype, x, torch.float16)
        size = edit.call(aten.sym_size.int, x, 1)
        twice = edit.call(operator.mul, size, 2)
        shaped = edit.call(aten.reshape.default, cast, [size, -1, 8])
        pieces = edit.call(aten.split.Tensor, x, 4, -1)
        piece = edit.call(operator.getitem, pieces, 1)
        full = edit.call(aten.full.default, [twice], True, dtype=torch.bool, device=torch.device("cpu"))
        heads = edit.call(aten.unsqueeze.default, x, 1)
        args = (heads, heads, heads, None, None, None, None, 0.5, True, 0, 0.0)
        attended = edit.call(attention, *args)
    edit.set_outputs([shaped, piece, full, attended])
    edit.eliminate_dead_code()
    assert body_lines(program)[1:] == [
        "  %1: f16[s0,s1,8] = aten.to.dtype(%0, f16)",
        "  %2: sym[s1] = aten.sym_size.int(%0, 1)",
        "  %3: sym[2*s1] = mul(%2, 2)",
        "  %4: f16[s1,s0,8] = aten.reshape(%1, [%2, -1, 8])",
        "  %5: (f32[s0,s1,4], f32[s0,s1,4]) = aten.split.Tensor(%0, 4, -1)",
        "  %6: f32[s0,s1,4] = getitem(%5, 1)",
        "  %7: bool[2*s1] = aten.full([%3], True, dtype=bool, device=cpu)",
        "  %8: f32[s0,1,s1,8] = aten.unsqueeze(%0, 1)",
        "  %9: f32[s0,1,s1,8] = jettison.attention(%8, %8, %8, None, None, None, None, 0.5, True, 0, 0.0)",
        "  return %4, %6, %7, %9",
    ]


def test_packed_weights_and_states_are_declared():
    program = export_body(lambda self, x: x * 2)
    program.packed["head.weight"] = Packed("int4{group=32,symmetric=false}", (61, 8), {"codes": "c"})
    edit = Edit(program, "forward", "test")
    state = State("past.0.key", ("batch", 2, "capacity", 8), torch.bfloat16)
    past = edit.state(state, edit.dynamic_tensor([2, None], torch.bfloat16))
    edit.set_outputs([*output_node(edit.entry).args[0], past])
    lines = str(program).splitlines()
    assert "packed @head.weight: int4{group=32,symmetric=false}[61,8]" in lines
    assert "state %past.0.key: bf16[batch,2,capacity,8]" in lines
    assert "entry forward(%past.0.key: bf16[2,s0], %input_ids: i64[s1,s2]):" in lines
    assert lines[-1] == "  return %1, %past.0.key"


def test_a_stored_dtype_is_shown_where_it_differs():
    module = nn.Embedding(61, 8)
    module.to(torch.bfloat16)
    program = export_body(lambda self, x: x * 2)
    program.constants["embed.weight"] = Constant("embed.weight", module.weight.detach(), torch.float32)
    assert re.search(r"constant @embed.weight: f32\[61,8\] stored bf16 #\w{8}\n", str(program))


def test_constants_that_no_entry_reads_are_not_shown():
    program = export_body(lambda self, x: x * 2)
    before = str(program)
    program.constants["spare"] = Constant("spare", torch.zeros(3))
    assert str(program) == before


def test_values_count_from_zero_in_each_entry_and_symbols_through_all():
    program = export_body(lambda self, x: x * 2)
    program.entries = {"prefill": program.entries["forward"], "decode": copy_graph(program.entries["forward"])}
    prefill, decode = str(program).split("entry ")[1:]
    assert prefill.removeprefix("prefill") == decode.removeprefix("decode")


def test_content_and_identity_tell_constants_apart():
    """By content for files; by identity for the change check, which must not read a weight."""
    one, same, other = (export_body(lambda self, x: x * self.w, w=(8,)) for _ in range(3))
    value = other.constants["body.w"].value() + 1
    other.constants["body.w"] = Constant("body.w", value)
    assert program_text(one) == program_text(same) != program_text(other)
    assert program_text(one, by_identity=True) != program_text(same, by_identity=True)
    assert program_text(one, by_identity=True) == program_text(one.copy(), by_identity=True)
    assert one.constants["body.w"]._digest is not None
    fresh = export_body(lambda self, x: x * self.w, w=(8,))
    program_text(fresh, by_identity=True)
    assert fresh.constants["body.w"]._digest is None


def test_short_names():
    assert [dtype_text(d) for d in (torch.bfloat16, torch.uint8, torch.float8_e4m3fn)] == [
        "bf16",
        "u8",
        "float8_e4m3fn",
    ]
    assert target_text(aten.linear.default) == "aten.linear"
    assert target_text(aten.add.Tensor) == "aten.add.Tensor"
    assert target_text(attention) == "jettison.attention"
    assert target_text(operator.getitem) == "getitem"
    assert target_text(F.silu) == "torch.nn.functional.silu"


def test_a_window_shows_ten_nodes_on_either_side():
    def deep(self, x):
        for _ in range(30):
            x = x + 1
        return x

    entry = export_body(deep).entries["forward"]
    nodes = list(entry.graph.nodes)
    lines = window_text(entry, nodes[16]).splitlines()
    assert len(lines) == 21
    assert [index for index, line in enumerate(lines) if line.startswith("->")] == [10]
    assert lines[10] == "-> %14: f32[s0,s1,8] = aten.add.Tensor(%13, 1)"
    assert window_text(entry, nodes[0]).splitlines()[0].startswith("-> %embed.weight: f32[61,8] = input")
    assert window_text(entry, nodes[-1]).splitlines()[-1] == "-> return %30"


def test_a_node_alone_prints_with_torchs_names():
    node = next(n for n in export_body(lambda self, x: x * 2).entries["forward"].graph.nodes if n.name == "mul")
    assert node_text(node) == "%<mul>: f32[s0,s1,8] = aten.mul.Tensor(%<embedding>, 2)"
