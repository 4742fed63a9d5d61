"""Which fused factored layers become kernels, and what is said about the others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from jettison.codegen.triton import low_rank_step
from jettison.codegen.triton.emit import emit, fallbacks, plan_text
from jettison.codegen.triton.low_rank_step import low_rank_attention_step, low_rank_mlp_step
from jettison.ir import ops
from jettison.ir.compare import assert_close, example_input_ids
from jettison.ir.interpret import run_entry
from jettison.passes.fuse_low_rank import FuseLowRank
from jettison.passes.pipeline import apply
from jettison.runtime.triton_executor import TritonExecutor
from tests.models.tiny_low_rank import Attention, Mlp, encoder

WIDTH, NEURONS, HEADS, TOKENS = 24, 64, 4, 20


def value(graph: fx.Graph, name: str, given: torch.Tensor, *, is_constant: bool) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["val"] = given
    if is_constant:
        node.meta["constant"] = name
    return node


def mlp(dtype: torch.dtype = torch.float32, width: int = 6, **changed: Any) -> fx.Node:
    """A call of `jettison::low_rank_mlp`; operands that are `computed` are results of other nodes."""
    graph = fx.Graph()
    shapes = {"gate_rows": (NEURONS, 5), "gate_bias": (NEURONS,), "up_rows": (NEURONS, 7), "up_bias": (NEURONS,),
              "columns": (width, NEURONS), "rows": (WIDTH, width), "bias": (WIDTH,)}  # fmt: skip
    given: dict[str, Any] = {
        name: value(graph, name, torch.empty(*shape, dtype=dtype), is_constant=True) for name, shape in shapes.items()
    }
    for name, rank in (("gate", 5), ("up", 7)):
        given[name] = value(graph, name, torch.empty(2, TOKENS, rank, dtype=dtype), is_constant=False)
    _change(graph, given, changed)
    order = ("gate", "up", "gate_rows", "gate_bias", "up_rows", "up_bias", "columns", "rows", "bias")
    node = graph.call_function(ops.low_rank_mlp, (*(given[name] for name in order), "silu"))
    node.meta["val"] = torch.empty(2, TOKENS, width if given["rows"] is None else WIDTH, dtype=dtype)
    return node


def attention(dtype: torch.dtype = torch.float32, dim: int = 8, **changed: Any) -> fx.Node:
    """A call of `jettison::low_rank_attention`, likewise."""
    graph = fx.Graph()
    given: dict[str, Any] = {}
    for name in ("query", "key", "value"):
        given[name] = value(graph, name, torch.empty(2, TOKENS, 3, dtype=dtype), is_constant=False)
        rows = torch.empty(HEADS * dim, 3, dtype=dtype)
        given[f"{name}_rows"] = value(graph, f"{name}_rows", rows, is_constant=True)
        given[f"{name}_bias"] = value(graph, f"{name}_bias", rows[:, 0], is_constant=True)
    _change(graph, given, changed)
    order = [f"{name}{part}" for name in ("query", "key", "value") for part in ("_rows", "_bias")]
    masks = ("cos", "sin", "query_positions", "key_positions", "key_valid", "sinks")
    operands = [*(given[name] for name in ("query", "key", "value", *order)), *(given.get(name) for name in masks)]
    node = graph.call_function(ops.low_rank_attention, (*operands, HEADS, HEADS, False, 0.5, True, 0, 0.0))
    node.meta["val"] = torch.empty(2, TOKENS, HEADS, dim, dtype=dtype)
    return node


def _change(graph: fx.Graph, given: dict[str, Any], changed: dict[str, Any]) -> None:
    for name, other in changed.items():
        if isinstance(other, str):
            new = graph.call_function(torch.relu, (given[name],))
            new.meta["val"] = given[name].meta["val"]
        else:
            new = None if other is None else value(graph, f"given_{name}", other, is_constant=True)
        given[name] = new


def test_gate_and_up_of_different_dimensions_are_two_products():
    step = low_rank_mlp_step(mlp(), None)
    up, gate = step.neurons
    assert (up.weights, gate.weights) == (("up_rows",), ("gate_rows",))
    assert (up.epilogue.name, gate.epilogue.name) == ("bias", "bias_silu_factor")
    assert (up.columns, gate.columns, up.rows) == (7, 5, NEURONS)
    assert (step.sums.epilogue.name, step.last.epilogue.name) == ("", "bias")
    assert (step.kernel.gate_rank, step.kernel.up_rank, step.kernel.width) == (5, 7, 6)


def test_the_residual_is_added_by_the_last_product():
    node = mlp()
    other = value(node.graph, "other", torch.empty(2, TOKENS, WIDTH), is_constant=False)
    added = node.graph.call_function(torch.ops.aten.add.Tensor, (node, other))
    step = low_rank_mlp_step(node, (added, other))
    assert (step.nodes, step.outputs, step.inputs[2:]) == ([node, added], [added], [other])
    assert step.last.epilogue.name == "bias_residual"
    assert not step.kernel.epilogue.name


def test_one_bias_of_two():
    """Gate and up of one bias between them are no single product."""
    step = low_rank_mlp_step(mlp(gate_bias=None), None)
    assert [each.epilogue.name for each in step.neurons] == ["bias", "silu_factor"]
    assert (step.kernel.has_gate_bias, step.kernel.has_up_bias) == (False, True)


def test_a_second_linear_that_is_whole():
    step = low_rank_mlp_step(mlp(rows=None, width=WIDTH), None)
    assert step.last is None
    assert (step.sums.epilogue.name, step.kernel.epilogue.name) == ("bias", "bias")


def test_neurons_that_are_made_several_times_are_told():
    assert "its neurons are made for each" not in low_rank_mlp_step(mlp(), None).reason
    assert "2100 sums of a token are cut in 5, and" in low_rank_mlp_step(mlp(width=2100), None).reason


@pytest.mark.parametrize(("node", "reason"), [
    (lambda: mlp(torch.float64), "kernels do not compute in float64"),
    (lambda: mlp(up_rows="computed"), "a factor or a bias is computed"),
    (lambda: mlp(bias="computed"), "a factor or a bias is computed"),
    (lambda: mlp(up_bias=torch.empty(NEURONS, dtype=torch.float64)), "a bias has another dtype than the weights"),
])  # fmt: skip
def test_refused_layers(node, reason):
    assert low_rank_mlp_step(node(), None) == reason


@pytest.mark.parametrize(("node", "reason"), [
    (lambda: attention(torch.float64), "kernels do not compute in float64"),
    (lambda: attention(key_rows="computed"), "a factor or a bias is computed"),
    (lambda: attention(dim=136), "heads of 136 channels do not fit a tile: at most 128"),
    (lambda: attention(query_positions=torch.zeros(1, TOKENS, dtype=torch.int32)), "positions are not int64"),
    (lambda: attention(cos=torch.zeros(1, TOKENS, 4), sin=torch.zeros(1, TOKENS, 4, dtype=torch.bfloat16)),
     "cosines and sines are not in one dtype that kernels compute in"),
])  # fmt: skip
def test_refused_attentions(node, reason):
    assert low_rank_attention_step(node()) == reason


def test_what_is_refused_runs_on_pytorch_and_says_why(monkeypatch):
    monkeypatch.setattr(low_rank_step, "_MOST_CHANNELS", 4)
    before = encoder(Attention(drops=True))
    program = before.copy()
    apply(program, [FuseLowRank()])
    emitted = emit(program)
    assert {
        "operator": "jettison.low_rank_attention", "count": 1,
        "reason": "heads of 8 channels do not fit a tile: at most 4",
    } in fallbacks(emitted, "forward")  # fmt: skip
    assert "torch jettison.low_rank_attention  # heads of 8 channels do not fit" in plan_text(program, emitted)
    inputs = {"input_ids": example_input_ids(before, 2, 9)}
    (out,) = TritonExecutor(program, emitted=emitted).run("forward", inputs, {}).values()
    assert_close(out, run_entry(before, "forward", inputs)[0])


def test_what_has_kernels_says_what_they_cost():
    program = encoder(Attention(), Mlp())
    apply(program, [FuseLowRank()])
    emitted = emit(program)
    assert not [each for each in fallbacks(emitted, "forward") if "low_rank" in str(each["operator"])]
    text = plan_text(program, emitted)
    assert "# heads are made on chip, those of keys and values anew for each tile and head of queries" in text
    assert "# up to 512 tokens are a chain of products; the neurons of more stay on chip" in text
