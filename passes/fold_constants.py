"""Compute once what depends on constants alone.

Before:
    %1: f32[8] = aten.add.Tensor(@norm.weight, 1.0)
    %2: f32[s0,s1,8] = aten.mul.Tensor(%x, %1)
After:
    %1: f32[s0,s1,8] = aten.mul.Tensor(%x, @norm.weight.folded0)

Fires when: every operand is a constant or a literal and the result is at most 1 MiB.
Declines when: the result is larger (it would be held beside the mapped original), random, or not a tensor.
Numerics: exact.
Saves: the operation, per call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from jettison.ir.constants import Constant
from jettison.ir.edit import Edit
from jettison.ir.match import Miss, constant_name
from jettison.ir.program import Program
from jettison.passes.base import Pass

LARGEST_BYTES = 1 << 20


@dataclass(frozen=True)
class FoldConstants(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "fold-constants"

    def match(self, node: fx.Node, program: Program) -> fx.Node | Miss | None:
        """A call on constants whose result is small."""
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return None
        operands = node.all_input_nodes
        if not operands or not all(constant_name(operand) for operand in operands):
            return None
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or torch.Tag.nondeterministic_seeded in node.target.tags:
            return None
        is_small = (
            all(isinstance(size, int) for size in value.shape) and value.numel() * value.itemsize <= LARGEST_BYTES
        )
        return node if is_small else None

    def rewrite(self, match: fx.Node, edit: Edit) -> None:
        """Replace the call by a new constant."""
        constants = edit.program.constants

        def value_of(operand: fx.Node) -> Any:
            return constants[operand.meta["constant"]].value()

        with torch.no_grad():
            value = match.target(*fx.map_arg(match.args, value_of), **fx.map_arg(match.kwargs, value_of))
        stem = match.all_input_nodes[0].meta["constant"].split(".folded")[0]
        number = next(n for n in range(len(constants) + 1) if f"{stem}.folded{n}" not in constants)
        edit.replace(match, edit.constant(Constant(f"{stem}.folded{number}", value.contiguous().clone())))
