"""Which sparse feed-forward layers become two launches, and what is said about the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from jettison.codegen.triton.kernels.gather_down import GatherDown
from jettison.codegen.triton.kernels.gather_packed_down import GatherPackedDown
from jettison.codegen.triton.sparse_step import sparse_step
from jettison.ir import ops
from jettison.ir.ops.quantized_linear import pack_codes

WIDTH, NEURONS, KEPT = 64, 256, 3


def layer(*, group: int = 32, is_gated: bool = False, dtype: torch.dtype = torch.float32, **changed: Any) -> fx.Node:
    """A call of `jettison::sparse_mlp`; operands that are changed to `computed` are results of other nodes."""
    graph = fx.Graph()
    shapes = {"up": (NEURONS, WIDTH), "up_bias": (NEURONS,), "down": (NEURONS, WIDTH), "down_bias": (WIDTH,),
              "absent": (NEURONS // group + 1, WIDTH)} | ({"gate": (NEURONS, WIDTH)} if is_gated else {})  # fmt: skip
    given = {name: _constant(graph, name, torch.empty(*shape, dtype=dtype)) for name, shape in shapes.items()}
    given["x"] = _value(graph, "x", torch.empty(1, 1, WIDTH, dtype=dtype))
    given["indices"] = _value(graph, "indices", torch.empty(1, 1, KEPT, dtype=torch.int64))
    for name, value in changed.items():
        given[name] = graph.call_function(torch.relu, (given[name],)) if value == "computed" else value
    order = ("x", "indices", "gate", "up", "up_bias", "down", "down_bias", "absent")
    node = graph.call_function(ops.sparse_mlp, (*(given.get(name) for name in order), "relu", group))
    node.meta["val"] = torch.empty(1, 1, WIDTH, dtype=dtype)
    return node


def quantised(*, bits: int = 4, group: int = 32, columns: int = 32, gate_zeros: bool | None = None) -> fx.Node:
    """A call of `jettison::quantized_sparse_mlp`, gated if it is said whether the gate has zero points."""
    graph = fx.Graph()

    def stack(name: str, rows: int, width: int, has_zeros: bool) -> list[fx.Node | None]:
        blocks = -(-width // columns)
        codes = pack_codes(torch.zeros(rows, blocks, columns, dtype=torch.uint8), bits)
        zeros = _constant(graph, f"{name}.zeros", torch.empty(rows, blocks, dtype=torch.uint8)) if has_zeros else None
        scales = _constant(graph, f"{name}.scales", torch.empty(rows, blocks))
        return [_constant(graph, f"{name}.codes", codes), scales, zeros]

    x = _value(graph, "x", torch.empty(2, 1, WIDTH))
    indices = _value(graph, "indices", torch.empty(2, 1, KEPT, dtype=torch.int64))
    gate = [None] * 3 if gate_zeros is None else stack("gate", NEURONS, WIDTH, gate_zeros)
    up, down = stack("up", NEURONS, WIDTH, True), stack("down", WIDTH, NEURONS, False)
    layout = (bits, columns, bits, columns, WIDTH, NEURONS)
    node = graph.call_function(
        ops.quantized_sparse_mlp, (x, indices, *gate, *up, None, *down, None, None, "silu", group, *layout)
    )
    node.meta["val"] = torch.empty(2, 1, WIDTH)
    return node


def _value(graph: fx.Graph, name: str, value: torch.Tensor) -> fx.Node:
    node = graph.placeholder(name.replace(".", "_"))
    node.meta["val"] = value
    return node


def _constant(graph: fx.Graph, name: str, value: torch.Tensor) -> fx.Node:
    node = _value(graph, name, value)
    node.meta["constant"] = name
    return node


def test_dense():
    step = sparse_step(layer(is_gated=True), None)
    assert (step.up, step.down) == (("gate", "up"), "down")
    assert (step.up_bias, step.down_bias, step.absent) == (("up_bias",), ("down_bias",), ("absent",))
    first, second = step.kernels()
    assert (first.is_gated, first.has_bias, first.kept, first.neurons) == (True, True, KEPT, NEURONS)
    assert isinstance(second, GatherDown)
    assert second.has_stand_ins


def test_the_residual_is_the_last_operand():
    node = layer(up_bias=None, absent=None)
    other = _value(node.graph, "other", torch.empty(1, 1, WIDTH))
    added = node.graph.call_function(torch.ops.aten.add.Tensor, (node, other))
    step = sparse_step(node, (added, other))
    assert (step.nodes, step.outputs, step.inputs[2:]) == ([node, added], [added], [other])
    assert step.second.epilogue.has_residual
    assert not step.second.has_stand_ins


def test_quantised():
    step = sparse_step(quantised(gate_zeros=True, group=64), None)
    assert [each.codes for each in step.up] == ["gate.codes", "up.codes"]
    first, second = step.kernels()
    assert isinstance(second, GatherPackedDown)
    assert (first.weight.has_offsets, second.weight.has_offsets) == (True, False)
    assert step.reason == "each token reads the slabs that it names"


def test_short_runs_are_told():
    assert "of down, 16 bytes of a row where memory hands over 32" in sparse_step(quantised(), None).reason


@pytest.mark.parametrize(("node", "reason"), [
    (lambda: layer(group=8), "groups of 8 neurons do not fill the tiles of the kernels: needed a multiple of 16"),
    (lambda: layer(indices=None), "every group is named"),
    (lambda: layer(dtype=torch.float64), "kernels do not compute in float64"),
    (lambda: layer(down="computed"), "a weight, a bias or what stands in for groups is computed"),
    (lambda: layer(absent="computed"), "a weight, a bias or what stands in for groups is computed"),
    (lambda: quantised(gate_zeros=False), "gate and up are quantised in different forms"),
    (lambda: quantised(columns=16), "groups of 16 columns do not fill the tiles"),
])  # fmt: skip
def test_refusals(node, reason):
    assert reason in sparse_step(node(), None)


def test_how_many_groups_must_be_known():
    node, shapes = layer(), ShapeEnv()
    with FakeTensorMode(shape_env=shapes):
        node.args[1].meta["val"] = torch.empty(1, 1, shapes.create_unbacked_symint(), dtype=torch.int64)
    assert sparse_step(node, None) == "how many groups a token names is not fixed"
