"""Compute equal values once.

Before:
    %1: f32[s0,1,s1,32] = aten.unsqueeze(%0, 1)
    %2: f32[s0,1,s1,32] = aten.unsqueeze(%0, 1)
    %3: f32[s0,1,s1,32] = aten.add.Tensor(%1, %2)
After:
    %1: f32[s0,1,s1,32] = aten.unsqueeze(%0, 1)
    %2: f32[s0,1,s1,32] = aten.add.Tensor(%1, %1)

Fires when: two calls have the same target and the same arguments, or two sizes are the same symbolic expression.
Declines when: the operator is random.
Numerics: exact.
Saves: the repeated work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from jettison.ir.edit import Edit
from jettison.ir.program import MissRecord, Program
from jettison.passes.base import Pass


@dataclass(frozen=True)
class EliminateCommonSubexpressions(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "eliminate-common-subexpressions"

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        """Keep the first of each group of equal values."""
        rewrites = 0
        for entry in program.entries:
            edit = Edit(program, entry, self.name)
            first: dict[Any, fx.Node] = {}
            in_entry = 0
            for node in list(edit.graph.nodes):
                key = _key(node)
                if key is None:
                    continue
                known = first.setdefault(key, node)
                if known is not node:
                    edit.replace(node, known)
                    in_entry += 1
            if in_entry:
                edit.eliminate_dead_code()
            rewrites += in_entry
        return rewrites, []


def _key(node: fx.Node) -> Any:
    """What identifies the value of a node, or None if it may not be shared."""
    if node.op != "call_function":
        return None
    if isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags:
        return None
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        return ("size", value.node.expr)
    return (node.target, _hashable(node.args), _hashable(node.kwargs))


def _hashable(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(_hashable(item) for item in value)
    if isinstance(value, dict):
        return tuple(sorted((key, _hashable(item)) for key, item in value.items()))
    if isinstance(value, float):
        return (float, value.hex())  # 0.0 == -0.0, but not to atan2
    # 1, 1.0 and True are equal to Python but not to an operator.
    return (type(value), value)
