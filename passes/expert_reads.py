"""How `quantize-weights` finds and rewrites routed experts: both stacks of an operator at once.

A stack `[X, N, K]` is encoded as the matrix `[X * N, K]`, so that every format of groups along K applies, and its parts
get the axis of experts back.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import fx

from jettison.ir.constants import Constant
from jettison.ir.edit import Edit
from jettison.ir.match import Miss, arguments, constant_name, is_call
from jettison.ir.ops import experts, quantized_experts
from jettison.ir.program import Program, constant_reads
from jettison.ir.text import dtype_text, target_text

STACKS = ("gate_up", "down")
_STACK_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class ExpertsRead:
    """Routed experts, and the names of the constants they read, in the order of `STACKS`."""

    node: fx.Node
    weights: tuple[str, ...]


def match_experts(node: fx.Node, program: Program, is_skipped: Callable[[str], bool]) -> ExpertsRead | Miss | None:
    """Experts whose stacks are constants that nothing else reads in another way.

    Args:
        node: A call of `jettison.experts`.
        program: Its program.
        is_skipped: Whether a constant of this name is to stay as it is.
    """
    stacks = [arguments(node)[name] for name in STACKS]
    names = [constant_name(stack) for stack in stacks]
    if None in names:
        return Miss("the weights of the experts are not constants", node)
    weights = tuple(str(name) for name in names)
    skipped = [name for name in weights if is_skipped(name)]
    if skipped:
        missed = f"{skipped[0]} is left out, and one operator reads both stacks in packed form"
        return Miss(missed, node) if len(skipped) < len(weights) else None
    for stack in stacks:
        if stack.meta["val"].dtype not in _STACK_DTYPES:
            found = f"{dtype_text(stack.meta['val'].dtype)}{list(stack.meta['val'].shape)}"
            return Miss(f"the weight is {found}, not a stack of f32, bf16 or f16", node)
    for name in weights:
        other = _other_reader(name, program)
        if other is not None:
            return Miss(f"{target_text(other.target)} needs the float form of the weight too", node)
    return ExpertsRead(node, weights)


def _other_reader(name: str, program: Program) -> fx.Node | None:
    """A node of any entry that reads a stack otherwise than as that of experts."""
    for user, placeholder in constant_reads(program, name):
        if not is_call(user, experts) or sum(operand is placeholder for operand in user.args) > 1:
            return user
    return None


def chooses_experts(node: fx.Node) -> bool:
    """Whether a linear is a router: from its results follow, without another linear in between, a token's experts."""
    routed = [
        user
        for target in (experts, quantized_experts)
        for user in node.graph.find_nodes(op="call_function", target=target)
        if user.args[3].meta["val"].shape[0] == node.meta["val"].shape[-1]  # one result per expert
    ]
    waiting: list[fx.Node] = [arguments(user)["indices"] for user in routed]
    seen = set(waiting)
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if operand is node:
                return True
            if operand not in seen and not is_call(operand, torch.ops.aten.linear.default):
                seen.add(operand)
                waiting.append(operand)
    return False


def as_matrix(stack: Constant) -> Constant:
    """A stack `[X, N, K]` as `[X * N, K]`; no byte is copied. A matrix stays as it is."""
    if len(stack.shape) == 2:
        return stack
    return Constant(stack.name, [block.reshape(-1, stack.shape[-1]) for block in stack.blocks], stack.dtype)


def as_stack(part: Constant, shape: tuple[int, ...]) -> Constant:
    """A part `[X * N, ...]` of a packed stack as `[X, N, ...]`; that of a matrix stays as it is.

    Args:
        part: Of the packed form.
        shape: Of the dense weight.
    """
    if len(shape) == 2:
        return part
    return Constant(part.name, [block.unflatten(0, shape[:-1]) for block in part.blocks], part.dtype)


def rewrite_experts(match: ExpertsRead, layout: Mapping[str, tuple[int, int]], edit: Edit) -> None:
    """Read the packed parts instead of the stacks.

    Args:
        match: What was found.
        layout: Bits and group of each weight.
        edit: Of the entry.
    """
    operands = arguments(match.node)
    stored: list[fx.Node | None] = []
    for weight in match.weights:
        parts = edit.program.packed[weight].parts
        for part in ("codes", "scales", "zeros"):
            stored.append(edit.constant(edit.program.constants[parts[part]]) if part in parts else None)
    routing = [operands[name] for name in ("x", "indices", "weights")]
    layouts = [number for weight in match.weights for number in layout[weight]]
    with edit.before(match.node):
        new = edit.call(quantized_experts, *routing, *stored, operands["activation"], *layouts)
    edit.replace(match.node, new)
