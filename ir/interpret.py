"""Run a program's entry node by node: the reference executor behind capture checks and drift measurements.

Constants are converted to the graph's dtype when they are read and dropped after, a few rows at a time where they are
large, so that a memory-mapped bf16 checkpoint can be computed in fp32 without a second copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from jettison.ir.constants import CHUNK_BYTES, Constant
from jettison.ir.ops.experts import experts, run_expert, sum_over_experts
from jettison.ir.program import Program, output_node

aten = torch.ops.aten


def linear_by_rows(x: Tensor, weight: Constant, bias: Tensor | None) -> Tensor:
    """`F.linear` with a constant weight `[N, K]`, converting a few megabytes of rows at a time."""
    pieces = []
    for start, stop in weight.row_chunks():
        pieces.append(F.linear(x, weight.rows(start, stop), None if bias is None else bias[start:stop]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)


def embedding_of(weight: Constant, indices: Tensor) -> Tensor:
    """`F.embedding` with a constant table, converting only the rows read."""
    if len(weight.blocks) > 1:
        return F.embedding(indices, weight.value())
    return F.embedding(indices, weight.blocks[0]).to(weight.dtype)


def experts_of(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Constant, down: Constant, activation: str
) -> Tensor:
    """`jettison::experts` with constant stacks, converting only the experts that were chosen."""

    def expert(number: int, rows: Tensor) -> Tensor:
        own = number, number + 1
        return run_expert(rows, gate_up.rows(*own)[0], down.rows(*own)[0], activation)

    return sum_over_experts(x, indices, weights, expert)


def _call(node: fx.Node, environment: dict[fx.Node, Any]) -> Any:
    operands = [environment.get(argument) if isinstance(argument, fx.Node) else argument for argument in node.args]
    if node.target is aten.linear.default and isinstance(operands[1], Constant):
        weight = operands[1]
        is_made_when_read = weight.stored_dtype != weight.dtype or len(weight.blocks) > 1
        if weight.nbytes > CHUNK_BYTES and is_made_when_read:
            bias = operands[2] if len(operands) > 2 else None
            return linear_by_rows(_value(operands[0]), weight, _value(bias))
    if node.target is aten.embedding.default and isinstance(operands[0], Constant):
        return embedding_of(operands[0], _value(operands[1]))
    if node.target is experts and all(isinstance(stack, Constant) for stack in operands[3:5]):
        return experts_of(*map(_value, operands[:3]), *operands[3:])
    args = fx.map_arg(node.args, lambda n: _value(environment[n]))
    kwargs = fx.map_arg(node.kwargs, lambda n: _value(environment[n]))
    return node.target(*args, **kwargs)


def _value(operand: Any) -> Any:
    return operand.value() if isinstance(operand, Constant) else operand


@torch.no_grad()
def run_entry(program: Program, entry: str, inputs: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Run one entry.

    Args:
        program: The program.
        entry: Name of the entry.
        inputs: Run-time inputs and states, by name.

    Returns:
        What the graph returns: outputs, then new states.
    """
    module = program.entries[entry]
    last_use: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        for operand in node.all_input_nodes:
            last_use[operand] = node
    environment: dict[fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            if "constant" in node.meta:
                environment[node] = program.constants[node.meta["constant"]]
            else:
                environment[node] = inputs[node.meta.get("state", node.name)]
        elif node.op == "output":
            break
        elif node.users:  # an assertion about a mapped weight must not convert it
            environment[node] = _call(node, environment)
        for operand in node.all_input_nodes:
            if last_use[operand] is node:
                del environment[operand]
    return tuple(_value(environment[value]) for value in output_node(module).args[0])
