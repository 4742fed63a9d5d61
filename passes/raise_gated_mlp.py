"""Raise the element-wise middle of a gated MLP to `jettison.gated_activation`.

Before:
    %1: f32[s0,s1,16] = aten.silu(%gate)
    %2: f32[s0,s1,16] = aten.mul.Tensor(%1, %up)
After:
    %1: f32[s0,s1,16] = jettison.gated_activation(%gate, %up, 'silu')

Fires when: silu, gelu, relu or sigmoid of one linear (or of a part of one) times another value of the same shape.
Declines when: the activation has other users, or the shapes broadcast.
Numerics: exact.
Saves: one write and read of [B, S, F].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from jettison.ir.edit import Edit
from jettison.ir.match import Miss, is_call, only_user
from jettison.ir.ops import gated_activation
from jettison.ir.program import Program
from jettison.passes.base import Pass

aten = torch.ops.aten
_NAMES = {aten.silu.default: "silu", aten.relu.default: "relu", aten.sigmoid.default: "sigmoid"}


@dataclass(frozen=True)
class Gate:
    """`activation(gate) * up`."""

    product: fx.Node
    gate: fx.Node
    up: fx.Node
    activation: str


@dataclass(frozen=True)
class RaiseGatedMlp(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "raise-gated-mlp"

    def match(self, node: fx.Node, program: Program) -> Gate | Miss | None:
        """Start from the activation."""
        activation = activation_name(node)
        if activation is None or not any(is_call(user, aten.mul.Tensor) for user in node.users):
            return None
        product = only_user(node)
        if product is None:
            return Miss("the activation has other users", node)
        up = product.args[1] if product.args[0] is node else product.args[0]
        if not isinstance(up, fx.Node) or up is node:
            return None
        gate = node.args[0]
        if up is gate:
            return None  # x * sigmoid(x) is silu written out, not a gate
        if str(up.meta["val"].shape) != str(gate.meta["val"].shape):
            return Miss("the gate and the value have different shapes", product)
        if up.meta["val"].dtype != gate.meta["val"].dtype:
            return Miss("the gate and the value have different dtypes", product)
        return Gate(product, gate, up, activation)

    def rewrite(self, match: Gate, edit: Edit) -> None:
        """Emit the fused activation."""
        with edit.before(match.product):
            fused = edit.call(gated_activation, match.gate, match.up, match.activation)
        edit.replace(match.product, fused)


def activation_name(node: fx.Node) -> str | None:
    """The key in `ACTIVATIONS` of what a node computes; None for any other node."""
    if is_call(node, aten.gelu.default):
        return "gelu_tanh" if node.kwargs.get("approximate") == "tanh" else "gelu"
    return _NAMES.get(node.target) if node.op == "call_function" else None
