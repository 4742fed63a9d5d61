"""Raise written-out rotary embeddings (arXiv 2104.09864) to `jettison.rotary_embedding`.

Before:
    %3: f32[s0,s1,8] = aten.cat([%2, %2], -1)
    %4: f32[s0,s1,8] = aten.cos(%3)
    %5: f32[s0,1,s1,8] = aten.unsqueeze(%4, 1)
    %8: f32[s0,2,s1,8] = aten.mul.Tensor(%x, %5)
    %9: f32[s0,2,s1,4] = aten.slice.Tensor(%x, 3, 0, 4)
    %10: f32[s0,2,s1,4] = aten.slice.Tensor(%x, 3, 4, 9223372036854775807)
    %11: f32[s0,2,s1,4] = aten.neg(%10)
    %12: f32[s0,2,s1,8] = aten.cat([%11, %9], -1)
    %13: f32[s0,2,s1,8] = aten.mul.Tensor(%12, %7)
    %14: f32[s0,2,s1,8] = aten.add.Tensor(%8, %13)
After:
    %3: f32[s0,s1,4] = aten.cos(%2)
    %5: f32[s0,2,s1,8] = jettison.rotary_embedding(%x, %3, %4, False)

Fires when: x * cos + turned(x) * sin, where turned is the half layout (Llama, GPT-NeoX) or the interleaved one (GPT-J,
    Cohere, GLM), on `[B, H, S, D]` or `[B, S, H, D]`; the half layout written as cat([a * cos - b * sin, b * cos +
    a * sin]) over the halves a and b of x (gpt-oss); and where the rotated channels are joined again with the others
    (partial rotary). The angles must be repeated visibly (cat([y, y]) or repeat_interleave(y, 2)), or not at all.
Declines when: cosine and sine are not visibly one angle per channel pair, or stand along other axes.
Numerics: exact up to the order of one addition.
Saves: five passes over x, and half of the cosines and sines.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from jettison.ir.edit import Edit
from jettison.ir.match import Miss, arguments, is_call, only_user
from jettison.ir.ops import rotary_embedding
from jettison.ir.program import Program
from jettison.passes.base import Pass

aten = torch.ops.aten
# bf16 * f32 is f32, and the operator returns the dtype of its operand.
_OTHER_DTYPE = "the rotation is not computed in the dtype of its operand"
_ANGLE_OPS = (aten.cos.default, aten.sin.default, aten.mul.Tensor, aten.to.dtype, aten._to_copy.default)


@dataclass(frozen=True)
class Rotation:
    """A whole rotation and where its heads stand (axis 1 or 2)."""

    last: fx.Node
    x: fx.Node
    cos: fx.Node
    sin: fx.Node
    is_interleaved: bool
    head_axis: int
    has_one_angle_per_pair: bool = False


@dataclass(frozen=True)
class Joined:
    """Rotated channels of x joined with the rest of x, and where the heads of x stand (axis 1 or 2)."""

    last: fx.Node
    x: fx.Node
    rotation: fx.Node
    head_axis: int


@dataclass(frozen=True)
class RaiseRotaryEmbedding(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "raise-rotary-embedding"

    def match(self, node: fx.Node, program: Program) -> Rotation | Joined | Miss | None:
        """Start from the sum of the two products, or from the concatenation behind it."""
        if is_call(node, aten.cat.default):
            return _joined(node) or _rotated_halves(node)
        if not _is_sum(node) or not all(is_call(a, aten.mul.Tensor) for a in node.args[:2]):
            return None
        for plain, turned in (node.args[:2], node.args[1::-1]):
            for position in (0, 1):
                candidate = turned.args[position]
                found = _turned_value(candidate)
                if found is not None and found[0] in plain.args:
                    x, is_interleaved = found
                    cos = plain.args[1 - plain.args.index(x)]
                    return _rotation(node, x, cos, turned.args[1 - position], is_interleaved)
        return None

    def rewrite(self, match: Rotation | Joined, edit: Edit) -> None:
        """Emit one rotary embedding; angles are computed once per channel pair."""
        with edit.before(match.last):
            if isinstance(match, Joined):
                cos, sin, is_interleaved = match.rotation.args[1:]
            else:
                cos, sin = (_per_pair(angle, match, edit) for angle in (match.cos, match.sin))
                is_interleaved = match.is_interleaved
            x = match.x if match.head_axis == 1 else edit.call(aten.transpose.int, match.x, 1, 2)
            out = edit.call(rotary_embedding, x, cos, sin, is_interleaved)
            out = out if match.head_axis == 1 else edit.call(aten.transpose.int, out, 1, 2)
        edit.replace(match.last, out)


def _is_sum(node: Any, target: Any = aten.add.Tensor) -> bool:
    """Whether `node` is a sum (or difference) without a factor on its second operand."""
    return is_call(node, target) and node.kwargs.get("alpha", 1) == 1


def _rotation(last: fx.Node, x: fx.Node, cos: Any, sin: Any, is_interleaved: bool) -> Rotation | Miss:
    if x.meta["val"].dim() != 4:
        return Miss("the rotated value does not have four axes", last)
    if last.meta["val"].dtype != x.meta["val"].dtype:
        return Miss(_OTHER_DTYPE, last)
    axis = _head_axis(cos)
    if axis is None or axis != _head_axis(sin):
        return Miss("cosine and sine do not stand along the positions of [B, H, S, D] or [B, S, H, D]", last)
    for angle in (cos, sin):
        if _one_per_pair(_without_head_axis(angle), is_interleaved) is None:
            return Miss("cosine and sine are not visibly one angle per channel pair", last)
    return Rotation(last, x, cos, sin, is_interleaved, axis)


def _turned_value(node: Any) -> tuple[fx.Node, bool] | None:
    """The value x and the layout, if `node` is x with each channel pair (a, b) replaced by (-b, a)."""
    if is_call(node, aten.cat.default) and len(node.args[0]) == 2 and _is_last_axis(node, node.args[1:]):
        negated, first = node.args[0]
        if is_call(negated, aten.neg.default):
            whole = _of_halves(first, negated.args[0])
            if whole is not None:
                return whole, False
    if is_call(node, aten.flatten.using_ints, aten.reshape.default) and is_call(node.args[0], aten.stack.default):
        stack = node.args[0]
        if len(stack.args[0]) == 2 and _is_last_axis(stack, stack.args[1:]):
            negated, first = stack.args[0]
            if is_call(negated, aten.neg.default) and is_call(first, aten.slice.Tensor):
                second, x = negated.args[0], first.args[0]
                is_of_x = is_call(second, aten.slice.Tensor) and second.args[0] is x
                if is_of_x and _slice_is(first, 0, None, 2) and _slice_is(second, 1, None, 2):
                    return x, True
    return None


def _slice_is(node: fx.Node, start: int, stop: int | None, step: int) -> bool:
    operands = arguments(node)
    width = node.args[0].meta["val"].shape[-1]
    last_axis = node.args[0].meta["val"].dim() - 1
    found_stop = width if operands["end"] is None else min(operands["end"], width)
    return (operands["dim"] in (-1, last_axis)) and (operands["start"] or 0, found_stop, operands["step"]) == (
        start,
        width if stop is None else stop,
        step,
    )


def _chunk_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The value x and the index, if `node` is one of two halves of x along the last axis."""
    if getattr(node.target, "__name__", "") != "getitem" or not is_call(
        node.args[0], aten.chunk.default, aten.split.Tensor
    ):
        return None
    source = node.args[0]
    operands = arguments(source)
    x = operands["self"]
    width, axis = x.meta["val"].shape[-1], operands["dim"]
    is_half = operands.get("chunks") == 2 or operands.get("split_size") == width // 2
    return (x, node.args[1]) if is_half and axis in (-1, x.meta["val"].dim() - 1) else None


def _is_last_axis(node: fx.Node, rest: tuple[Any, ...]) -> bool:
    axis = rest[0] if rest else node.kwargs.get("dim", 0)
    return axis in (-1, node.meta["val"].dim() - 1)


def _head_axis(angle: Any) -> int | None:
    """Axis of the heads that an angle broadcasts over: 1 or 2 if it was unsqueezed there, 1 for plain [S, D]."""
    if is_call(angle, aten.unsqueeze.default):
        axis = angle.args[1] % angle.meta["val"].dim()
        return axis if angle.meta["val"].dim() == 4 and axis in (1, 2) else None
    if is_call(angle, aten.repeat_interleave.self_int, aten.slice.Tensor):
        return _head_axis(angle.args[0]) if angle.meta["val"].dim() == 4 else None
    if isinstance(angle, fx.Node) and angle.meta["val"].dim() == 2:
        return 1
    return None


def _without_head_axis(angle: fx.Node) -> fx.Node:
    return angle.args[0] if is_call(angle, aten.unsqueeze.default) else angle


def _one_per_pair(angle: Any, is_interleaved: bool) -> tuple[fx.Node, list[fx.Node]] | None:
    """A node with one angle per channel pair, and the element-wise functions that lead from it to `angle`.

    None if `angle` is not visibly each of these values twice, in the order of the layout.
    """
    chain = []
    while is_call(angle, *_ANGLE_OPS):
        if is_call(angle, aten.mul.Tensor) and not isinstance(angle.args[1], (int, float)):
            return None
        chain.append(angle)
        angle = angle.args[0]
    if not is_interleaved:
        if not is_call(angle, aten.cat.default) or not _is_last_axis(angle, angle.args[1:]):
            return None
        parts = angle.args[0]
        return (parts[0], chain) if len(parts) == 2 and parts[0] is parts[1] else None
    if not is_call(angle, aten.repeat_interleave.self_int) or angle.args[1] != 2:
        return None
    if arguments(angle)["dim"] not in (-1, angle.meta["val"].dim() - 1):
        return None
    once = angle.args[0]
    if is_call(once, aten.slice.Tensor):  # the first half of values that stand twice in the other layout
        twice = once.args[0]
        if not _slice_is(once, 0, twice.meta["val"].shape[-1] // 2, 1):
            return None
        inner = _one_per_pair(_without_head_axis(twice), False)
        return None if inner is None else (inner[0], chain + inner[1])
    return _without_head_axis(once), chain


def _per_pair(angle: fx.Node, match: Rotation, edit: Edit) -> fx.Node:
    """The same angle computed once per channel pair: `[B or 1, S, R/2]`."""
    angle = _without_head_axis(angle)
    if not match.has_one_angle_per_pair:
        found = _one_per_pair(angle, match.is_interleaved)
        assert found is not None, "checked by match"
        angle, chain = found
        for node in reversed(chain):
            angle = edit.call(node.target, angle, *node.args[1:], **node.kwargs)
    return edit.call(aten.unsqueeze.default, angle, 0) if angle.meta["val"].dim() == 2 else angle


def _rotated_halves(node: fx.Node) -> Rotation | Miss | None:
    """cat([a * cos - b * sin, b * cos + a * sin], -1) over the halves a and b of x."""
    if len(node.args[0]) != 2 or not _is_last_axis(node, node.args[1:]):
        return None
    minus, plus = node.args[0]
    if not _is_sum(minus, aten.sub.Tensor) or not _is_sum(plus):
        return None
    products = [*minus.args[:2], *plus.args[:2]]
    if not all(is_call(product, aten.mul.Tensor) for product in products):
        return None
    (first, cos), (second, sin), (second_again, cos_again), (first_again, sin_again) = (p.args[:2] for p in products)
    if (first, second, cos, sin) != (first_again, second_again, cos_again, sin_again):
        return None
    x = _of_halves(first, second)
    if x is None:
        return None
    if x.meta["val"].dim() != 4:
        return Miss("the rotated value does not have four axes", node)
    if node.meta["val"].dtype != x.meta["val"].dtype:
        return Miss(_OTHER_DTYPE, node)
    axis, width = _head_axis(cos), x.meta["val"].shape[-1]
    if axis is None or axis != _head_axis(sin) or {angle.meta["val"].shape[-1] for angle in (cos, sin)} != {width // 2}:
        return Miss("cosine and sine do not stand along the positions of [B, H, S, D] or [B, S, H, D]", node)
    return Rotation(node, x, cos, sin, False, axis, has_one_angle_per_pair=True)


def _of_halves(first: Any, second: Any) -> fx.Node | None:
    """The value x, if the nodes are its first and its second half along the last axis."""
    one, other = _half_of(first), _half_of(second)
    if one is None or other is None or one[0] is not other[0] or (one[1], other[1]) != (0, 1):
        return None
    return one[0]


def _half_of(node: Any) -> tuple[fx.Node, int] | None:
    """The value x and the index, if `node` is one of the two halves of x along the last axis."""
    if not is_call(node, aten.slice.Tensor):
        return _chunk_of(node) if isinstance(node, fx.Node) else None
    x = node.args[0]
    half = x.meta["val"].shape[-1] // 2
    if _slice_is(node, 0, half, 1):
        return x, 0
    return (x, 1) if _slice_is(node, half, None, 1) else None


def _joined(node: fx.Node) -> Joined | None:
    """cat([rotated(x[..., :R]), x[..., R:]], -1), in either order of heads and positions."""
    if len(node.args[0]) != 2 or not _is_last_axis(node, node.args[1:]):
        return None
    whole, rest = node.args[0]
    rotation, head_axis = (whole.args[0], 2) if _is_swap(whole) else (whole, 1)
    if not is_call(rotation, rotary_embedding) or not is_call(rest, aten.slice.Tensor):
        return None
    rotated, x = rotation.args[0], rest.args[0]
    if head_axis == 2:
        if not _is_swap(rotated) or only_user(rotation) is not whole:
            return None
        rotated = rotated.args[0]
    width = rotation.meta["val"].shape[-1]
    if not is_call(rotated, aten.slice.Tensor) or rotated.args[0] is not x or only_user(whole) is not node:
        return None
    is_split = _slice_is(rotated, 0, width, 1) and _slice_is(rest, width, None, 1)
    covers_angles = 2 * rotation.args[1].meta["val"].shape[-1] == width
    return Joined(node, x, rotation, head_axis) if is_split and covers_angles else None


def _is_swap(node: Any) -> bool:
    """Whether `node` swaps heads and positions."""
    return is_call(node, aten.transpose.int) and set(node.args[1:]) == {1, 2}
