"""Raise written-out RMS normalisation (arXiv 1910.07467) to `aten.rms_norm`.

Before:
    %1: f32[s0,s1,8] = aten.pow.Tensor_Scalar(%x, 2)
    %2: f32[s0,s1,1] = aten.mean.dim(%1, [-1], True)
    %3: f32[s0,s1,1] = aten.add.Tensor(%2, 1e-06)
    %4: f32[s0,s1,1] = aten.rsqrt(%3)
    %5: f32[s0,s1,8] = aten.mul.Tensor(%x, %4)
    %6: f32[s0,s1,8] = aten.mul.Tensor(@weight, %5)
After:
    %1: f32[s0,s1,8] = aten.rms_norm(%x, [8], @weight, 1e-06)

Fires when: x * rsqrt(mean(x*x) + eps) over the last axis, times a constant weight of that axis or times nothing; with
    casts between when the whole graph computes in fp32 (they are gone by then).
Declines when: epsilon is not a number in the graph.
Numerics: reassociates (1e-6 relative in fp32).
Saves: five element-wise passes over x become one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from jettison.ir.edit import Edit
from jettison.ir.match import Miss, constant_name, is_call, only_user
from jettison.ir.program import Program
from jettison.passes.base import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class Norm:
    """The last node of the pattern and its parts."""

    last: fx.Node
    x: fx.Node
    weight: fx.Node | None
    epsilon: float


@dataclass(frozen=True)
class RaiseRmsNorm(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "raise-rms-norm"

    def match(self, node: fx.Node, program: Program) -> Norm | Miss | None:
        """Start from rsqrt: it has one mean below it and one product above it."""
        if not is_call(node, aten.rsqrt.default) or not is_call(node.args[0], aten.add.Tensor):
            return None
        mean, epsilon = node.args[0].args[:2]
        x = _mean_of_squares(mean)
        if x is None:
            return None
        if not isinstance(epsilon, (int, float)):
            return Miss("epsilon is not a number in the graph", node.args[0])
        if node.args[0].kwargs:
            return Miss("epsilon has a factor", node.args[0])
        scaled = only_user(node)
        if not is_call(scaled, aten.mul.Tensor) or x not in scaled.args:
            return Miss("the reciprocal root does not multiply the value it normalises", node)
        last, weight = scaled, None
        product = only_user(scaled)
        if is_call(product, aten.mul.Tensor):
            other = product.args[0] if product.args[1] is scaled else product.args[1]
            if constant_name(other) is not None and list(other.meta["val"].shape) == [x.meta["val"].shape[-1]]:
                last, weight = product, other
        return Norm(last, x, weight, float(epsilon))

    def rewrite(self, match: Norm, edit: Edit) -> None:
        """Emit one norm."""
        with edit.before(match.last):
            width = match.x.meta["val"].shape[-1]
            norm = edit.call(aten.rms_norm.default, match.x, [width], match.weight, match.epsilon)
        edit.replace(match.last, norm)


def _mean_of_squares(node: fx.Node) -> fx.Node | None:
    """x, if `node` is mean(x*x) over the last axis, kept."""
    if not is_call(node, aten.mean.dim) or len(node.args) < 3 or not node.args[2] or node.kwargs:
        return None
    square, axes = node.args[0], list(node.args[1])
    if axes not in ([-1], [node.meta["val"].dim() - 1]):
        return None
    if is_call(square, aten.pow.Tensor_Scalar) and square.args[1] == 2:
        return square.args[0]
    if is_call(square, aten.mul.Tensor) and square.args[0] is square.args[1]:
        return square.args[0]
    return None
