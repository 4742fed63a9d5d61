"""Remove operations that return their input, and spell every view as `aten.reshape`.

Before:
    %1: f32[s0,s1,8] = aten.to.dtype(%x, f32)
    %2: f32[s0,s1,8] = aten.slice.Tensor(%1, 0, 0, 9223372036854775807)
    %3: f32[s0,s1,8] = aten.mul.Tensor(%2, 1.0)
    %4: f32[s0,s1,2,4] = aten.view(%3, [%0, -1, 2, 4])
After:
    %1: f32[s0,s1,2,4] = aten.reshape(%x, [%0, -1, 2, 4])

Fires when: a cast to the dtype it has, a slice, view or expand to the shape it has, a factor of exactly 1, a dropout in
    eval mode, a concatenation with nothing, an alias, detach, clone or contiguous (values are immutable here, so a copy
    cannot be observed).
Declines when: the result is an output of the graph and the input is an input (a new alias the caller could see).
Numerics: exact, NaN included. x + 0 stays: it turns -0.0 into 0.0.
Saves: one read and write of the tensor per cast or clone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from jettison.ir.edit import Edit
from jettison.ir.match import Miss, arguments, is_call
from jettison.ir.program import Program
from jettison.passes.base import Pass

aten = torch.ops.aten
_COPIES = (
    aten.alias.default, aten.clone.default, aten.contiguous.default, aten.detach.default, aten.detach_.default,
    aten.lift_fresh_copy.default,
)  # fmt: skip
_CASTS = (
    aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.to.other, aten._to_copy.default, aten.type_as.default,
)  # fmt: skip
_VIEWS = (aten.view.default, aten._unsafe_view.default)
_RESHAPES = (aten.reshape.default, aten.expand.default, aten.slice.Tensor)


@dataclass(frozen=True)
class NoOp:
    """A node to replace by its input, or a view to spell as a reshape."""

    node: fx.Node
    replacement: fx.Node | None


@dataclass(frozen=True)
class EliminateNoOps(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "eliminate-no-ops"

    def match(self, node: fx.Node, program: Program) -> NoOp | Miss | None:
        """A node that computes its first operand, or a view."""
        if is_call(node, aten.cat.default):
            only = _only_part(node)
            return None if only is None else NoOp(node, only)
        if node.op != "call_function" or not node.args or not isinstance(node.args[0], fx.Node):
            return None
        source = _operand_returned(node)
        if source is not None:
            is_new_alias = source.op == "placeholder" and any(user.op == "output" for user in node.users)
            return None if is_new_alias else NoOp(node, source)
        return NoOp(node, None) if node.target in _VIEWS else None

    def rewrite(self, match: NoOp, edit: Edit) -> None:
        """Let the users read the operand."""
        if match.replacement is not None:
            edit.replace(match.node, match.replacement)
            return
        with edit.before(match.node):
            reshape = edit.call(aten.reshape.default, *match.node.args)
        edit.replace(match.node, reshape)


def _operand_returned(node: fx.Node) -> fx.Node | None:
    source = node.args[0]
    before, after = source.meta.get("val"), node.meta.get("val")
    if is_call(node, *_COPIES):
        return source
    if is_call(node, aten.dropout.default):
        return source if not node.args[2] else None
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return None
    if is_call(node, *_CASTS):
        return source if before.dtype == after.dtype and before.device == after.device else None
    if is_call(node, *_RESHAPES, *_VIEWS):
        return source if _same_shape(before, after) and _covers(node) else None
    if is_call(node, aten.mul.Tensor, aten.div.Tensor):
        operands = arguments(node)
        is_one = isinstance(operands["other"], (int, float)) and operands["other"] == 1
        return source if is_one and before.dtype == after.dtype else None
    return None


def _only_part(node: fx.Node) -> fx.Node | None:
    """The part that a concatenation is, if all others are empty (Phi-3 joins what it rotates with no channels)."""
    # Any axis: PyTorch also accepts an empty part of one axis among parts of several.
    kept = [part for part in node.args[0] if not any(_same_size(size, 0) for size in part.meta["val"].shape)]
    is_same = len(kept) == 1 and kept[0].meta["val"].dtype == node.meta["val"].dtype
    return kept[0] if is_same and kept[0].op != "placeholder" else None


def _covers(node: fx.Node) -> bool:
    """Whether a slice starts at zero with step one (a shape alone does not tell for symbolic sizes)."""
    if node.target is not aten.slice.Tensor:
        return True
    operands = arguments(node)
    return operands["start"] in (0, None) and operands["step"] == 1


def _same_shape(left: Any, right: Any) -> bool:
    if left.dim() != right.dim():
        return False
    return all(_same_size(a, b) for a, b in zip(left.shape, right.shape, strict=True))


def _same_size(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    if isinstance(left, torch.SymInt) and isinstance(right, torch.SymInt):
        return left.node.expr == right.node.expr
    return type(left) is type(right) and left == right
