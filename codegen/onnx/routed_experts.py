"""Routed experts as ONNX: `com.microsoft::MoE` and `QMoE` where their CPU kernels fit, else linears over all tokens.

The kernels run the experts that were chosen and no others. On a CPU they take SwiGLU alone, with the rows of gate and
up in turn, so the gate_up stacks are stored in that order; packed rows stay whole. What they would do themselves with
the logits of a router is taken out of their hands: models differ in it, and the graph has computed it already.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from jettison.ir import ops
from jettison.ir.constants import Constant
from jettison.ir.edit import Edit
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.ir.program import Program

_PARTS = ("codes", "scales", "zeros")
_STACKS: dict[Any, tuple[str, ...]] = {
    ops.experts: ("gate_up", "down"),
    ops.quantized_experts: tuple(f"{stack}_{part}" for stack in ("gate_up", "down") for part in _PARTS),
}
# SwiGLU of the kernels is `g * sigmoid(alpha * g) * (l + beta)`; 1 is the order g0, l0, g1, l1, ...
_SWIGLU = {"activation_type": "swiglu", "activation_alpha": 1.0, "activation_beta": 0.0, "swiglu_fusion": 1}
# A logit beside which any other has no share.
_NEVER = -1e4


class InterleavedConstant(Constant):
    """A gate_up stack, or a part of a packed one, with the rows of gate and up in turn: `[X, 2 * F, ...]` to 3 axes.

    Args:
        name: Of the interleaved constant.
        constant: The stack, gate before up; equal ones are stored once (the serial is the stack's own).
    """

    def __init__(self, name: str, constant: Constant) -> None:
        super().__init__(name, constant.blocks, constant.dtype)
        self.shape = (*constant.shape[:2], math.prod(constant.shape[2:]))
        self.serial = constant.serial
        self._stack = constant

    def value(self) -> Tensor:
        """See `Constant.value`."""
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> Tensor:
        """See `Constant.rows`; a row is an expert."""
        halves = self._stack.rows(start, stop).reshape(stop - start, 2, self.shape[1] // 2, self.shape[2])
        return halves.transpose(1, 2).reshape(stop - start, *self.shape[1:])


def stack_layout(node: fx.Node, operand: fx.Node) -> str:
    """How a kernel wants a stack: `interleaved`, `stacked` (all of a row in one axis), or `plain`."""
    names = [name for name, value in arguments(node).items() if value is operand]
    if any(name.startswith("gate_up") for name in names):
        return "interleaved"
    return "stacked" if "down_codes" in names else "plain"


def experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """`com.microsoft::MoE`, with one row for each choice of a token.

    The kernel weights the results of its k experts with a softmax of its own. With k = 1 its only weight is one, and
    ours may be any numbers.
    """
    assert activation == "silu", "others are spelled out"
    tokens, choices = indices.shape
    rows = x.unsqueeze(1).expand(tokens, choices, x.shape[-1]).reshape(-1, x.shape[-1])
    chosen = indices.reshape(-1, 1) == torch.arange(down.shape[0])
    logits = torch.where(chosen, 0.0, _NEVER)
    operands = (rows, logits, gate_up, None, down)
    out = symbolic("com.microsoft::MoE", operands, {"k": 1, **_SWIGLU}, dtype=x.dtype, shape=rows.shape, version=1)
    # The kernel (ONNX Runtime 1.31) allows its result to take the place of x, and clears it before it reads x. What is
    # read again afterwards keeps its place.
    never = torch.zeros((), dtype=torch.bool)
    out = symbolic("::Where", (never, rows, out), {}, dtype=x.dtype, shape=rows.shape)
    by_choice = out.reshape(tokens, choices, x.shape[-1])
    return torch.matmul(weights.to(x.dtype).unsqueeze(1), by_choice).squeeze(1)


def quantized_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up_codes: Tensor, gate_up_scales: Tensor,
    gate_up_zeros: Tensor | None, down_codes: Tensor, down_scales: Tensor, down_zeros: Tensor | None, activation: str,
    gate_up_bits: int, gate_up_group: int, down_bits: int, down_group: int, *, accuracy_level: int = 4,
) -> Tensor:  # fmt: skip
    """`com.microsoft::QMoE`; gate_up parts come interleaved, and codes with three axes (see `stack_layout`).

    With `router_weights` the kernel takes our weights as they are, leaving out those that are not positive.
    """
    assert activation == "silu", "others are spelled out"
    assert gate_up_group == down_group, "others are spelled out"
    chosen = (indices.unsqueeze(-1) == torch.arange(down_codes.shape[0])).to(x.dtype)
    operands = (
        x, chosen.amax(1), gate_up_codes, gate_up_scales, None, down_codes, down_scales, None, None, None, None,
        gate_up_zeros, down_zeros, None, torch.matmul(weights.to(x.dtype).unsqueeze(1), chosen).squeeze(1),
    )  # fmt: skip
    attributes = {
        "k": indices.shape[1], "block_size": gate_up_group, "expert_weight_bits": gate_up_bits,
        "accuracy_level": accuracy_level, **_SWIGLU,
    }  # fmt: skip
    if down_bits != gate_up_bits:
        attributes["fc2_expert_weight_bits"] = down_bits
    return symbolic("com.microsoft::QMoE", operands, attributes, dtype=x.dtype, shape=x.shape, version=1)


def is_fused(node: fx.Node) -> bool:
    """Whether a kernel of ONNX Runtime for CPUs takes these experts as they are."""
    operands = arguments(node)
    x = operands["x"].meta["val"]
    if operands["activation"] != "silu" or x.dtype != torch.float32:
        return False
    stacks = [operands[name] for name in _STACKS[node.target]]
    if any(constant_name(stack) is None for stack in stacks if stack is not None):
        return False
    if is_call(node, ops.experts):
        return True
    group, inner = operands["gate_up_group"], operands["gate_up_codes"].meta["val"].shape[1] // 2
    has_whole_groups = operands["down_group"] == group and x.shape[-1] % group == 0 and inner % group == 0
    scales = (operands[f"{stack}_scales"].meta["val"].dtype for stack in ("gate_up", "down"))
    return has_whole_groups and all(dtype == torch.float32 for dtype in scales)


def spell_out_experts(program: Program) -> Program:
    """A copy of the program in which experts that no kernel takes are linears over all tokens.

    They are weighted with zero where a token did not choose them: X / k times the multiplications.

    Args:
        program: Left as it is; the copy shares its constants.

    Returns:
        The copy, or the program itself where there is nothing to do.
    """
    wanted = {
        name: [node for node in entry.graph.nodes if is_call(node, *_STACKS) and not is_fused(node)]
        for name, entry in program.entries.items()
    }
    if not any(wanted.values()):
        return program
    copy = program.copy()
    parts: dict[str, list[Constant]] = {}
    for name in wanted:
        edit = Edit(copy, name, "spell-out-experts")
        for node in list(edit.graph.nodes):
            if is_call(node, *_STACKS) and not is_fused(node):
                _spell_out(node, parts, edit)
        edit.eliminate_dead_code()
    return copy


def _spell_out(node: fx.Node, parts: dict[str, list[Constant]], edit: Edit) -> None:
    operands = arguments(node)
    names = [name for name in _STACKS[node.target] if operands[name] is not None]
    count = operands[names[0]].meta["val"].shape[0]
    matrices = [part for name in names for part in _by_expert(operands[name], parts, edit.program)]
    given = [operands[name] for name in ("x", "indices", "weights")]
    activation = ACTIVATIONS[operands["activation"]]

    def linear(x: Tensor, stack: str, own: dict[str, Tensor]) -> Tensor:
        if stack in own:
            return F.linear(x, own[stack])
        stored = (own.get(f"{stack}_{part}") for part in _PARTS)
        layout = (operands[f"{stack}_bits"], operands[f"{stack}_group"], x.shape[-1])
        return ops.quantized_linear(x, *stored, None, *layout)

    def all_experts(x: Tensor, indices: Tensor, weights: Tensor, *stacks: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for number in range(count):
            own = {name: stacks[place * count + number] for place, name in enumerate(names)}
            gate, up = linear(x, "gate_up", own).chunk(2, dim=-1)
            out = linear(activation(gate) * up, "down", own)
            share = torch.where(indices == number, weights, 0.0).sum(1, keepdim=True)
            total = total + out * share.to(x.dtype)
        return total

    placeholders = [edit.constant(part) for part in matrices]
    with edit.before(node):
        new = edit.inline(all_experts, *given, *placeholders)
    edit.replace(node, new)


def _by_expert(stack: fx.Node, parts: dict[str, list[Constant]], program: Program) -> list[Constant]:
    """The matrix of each expert as a constant of its own: a view, not a copy."""
    name = str(constant_name(stack))
    if name not in parts:
        constant = program.constants[name]
        rows = [row for block in constant.blocks for row in block.unbind(0)]
        parts[name] = [Constant(f"{name}.{number}", row, constant.dtype) for number, row in enumerate(rows)]
    return parts[name]
