"""Raise attention that a module writes out, and heads that it repeats by hand, to `jettison.attention`.

Before:
    %7: f32[s0,4,8,s1] = aten.transpose.int(%key, -1, -2)
    %8: f32[s0,4,s1,s1] = aten.matmul(%query, %7)
    %9: f32[s0,4,s1,s1] = aten.div.Tensor(%8, 2.8284271247461903)
    %10: f32[s0,4,s1,s1] = aten.add.Tensor(%9, %mask)
    %11: f32[s0,4,s1,s1] = aten.softmax.int(%10, -1)
    %12: f32[s0,4,s1,8] = aten.matmul(%11, %value)
After:
    %7: f32[s0,4,s1,8] = jettison.attention(%query, %key, %value, None, None, None, None, 0.35355, True, 0, 0.0)

Fires when: softmax(scores) @ value, where the scores are query @ key^T (matmul, bmm or baddbmm; heads apart or merged
    with the batch) and between them stand only factors, a softcap (c * tanh(scores / c)), casts, a lower bound that
    hides nothing, and masks: added, `where`, `masked_fill`, or multiplied and added as in OpenAI GPT. What the mask
    shows is proven as in `raise-attention`. And when the heads of both keys and values of a raised attention are
    visibly repeated for grouped queries (repeat_kv, also in front of a rotary embedding): they are handed over once.
Declines when: anything else stands between the two products, the weights are used elsewhere, a mask comes before the
    softcap, or hides by less than 1e4; heads are repeated in tiles, or keys otherwise than values.
Numerics: reassociates (1e-6 relative in fp32); see `raise-attention` for hidden scores.
Saves: scores and weights (2 * H * S * T elements), the mask, and for grouped queries 1 - Hkv / H of keys and values.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from jettison.ir.edit import Edit
from jettison.ir.match import Miss, arguments, constant_name, is_call, only_user
from jettison.ir.ops import attention, rotary_embedding
from jettison.ir.program import MissRecord, Program
from jettison.passes.base import Pass
from jettison.passes.raise_attention import (
    HIDDEN,
    AttentionMatch,
    AttentionOperands,
    MaskTerm,
    check_attention,
    emit_attention,
    is_same_size,
    mask_nodes,
    shared_proofs,
)

aten = torch.ops.aten
_RESHAPES = (aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int)
_EXCHANGES = (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default)
_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_PRODUCTS = (aten.matmul.default, aten.bmm.default)
_CASTS = (aten.to.dtype, aten._to_copy.default)
_MULTIPLY, _DIVIDE = (aten.mul.Tensor, aten.mul.Scalar), (aten.div.Tensor, aten.div.Scalar)
_CHANGES = (
    *_MULTIPLY, *_DIVIDE, aten.add.Tensor, aten.dropout.default, aten.masked_fill.Scalar, aten.where.self,
    aten.where.ScalarOther, aten.where.ScalarSelf, aten.nan_to_num.default,
)  # fmt: skip
_POINTWISE = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, *_CASTS)


@dataclass(frozen=True)
class RepeatedHeads:
    """A raised attention whose keys and values hold each head several times."""

    node: fx.Node


@dataclass(frozen=True)
class RaiseWrittenAttention(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "raise-written-attention"
    entries: ClassVar[tuple[str, ...] | None] = ("forward",)

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        """Raise what is written out, then look at the heads of what was raised."""
        with shared_proofs():
            raised, misses = super().transform(program)
            if not raised:
                return raised, misses
            grouped, misses = super().transform(program)
            return raised + grouped, misses

    def match(self, node: fx.Node, program: Program) -> AttentionMatch | RepeatedHeads | Miss | None:
        """Start from the softmax, or from a raised attention."""
        if is_call(node, attention):
            return _repeated_heads(node)
        if not is_call(node, *_SOFTMAX) or arguments(node)["dim"] not in (-1, node.meta["val"].dim() - 1):
            return None
        product, change = _product_with_values(node)
        if product is None:
            return None
        scores = _read_scores(node.args[0], program)
        if isinstance(scores, Miss):
            return scores
        if change is not None:
            return Miss(f"{_target(change)} stands between the softmax and the values", change)
        if only_user(node) is None or only_user(product.args[0]) is None:
            return Miss("the attention weights are used elsewhere", node)
        return _written_attention(product, scores, program)

    def rewrite(self, match: AttentionMatch | RepeatedHeads, edit: Edit) -> None:
        """Emit the operator, or compute each head once."""
        if isinstance(match, AttentionMatch):
            emit_attention(match, edit)
            return
        query, key, value, *others = match.node.args
        with edit.before(match.node):
            done: dict[fx.Node, fx.Node] = {}
            key, value = (_without_repeats(operand, 1, edit, done) for operand in (key, value))
        edit.set_arguments(match.node, query, key, value, *others)


@dataclass(frozen=True)
class _Scores:
    """The product behind a softmax and what happens to it, read backwards.

    Attributes:
        program: The program.
        node: How far the reading got; the product at the end.
        scale: Product of the factors so far.
        softcap: 0 for none.
        mask: Terms, with the factors that follow them.
    """

    program: Program
    node: fx.Node
    scale: float = 1.0
    softcap: float = 0.0
    mask: tuple[MaskTerm, ...] = ()

    def with_term(self, kind: str, node: fx.Node, scores: fx.Node, weight: float = 1.0) -> _Scores | Miss:
        if self.softcap:
            return Miss("the mask comes before the softcap", self.node)
        term = MaskTerm(kind, node, self.scale * weight, scores.meta["val"].dim() == 3)
        return replace(self, node=scores, mask=(*self.mask, term))

    def with_fill(self, kind: str, node: fx.Node, scores: fx.Node, fill: Any) -> _Scores | Miss:
        value = _number(fill, self.program)
        if value is None or not value * self.scale <= HIDDEN:
            found = "a tensor" if value is None else f"{value:.6g}"
            return Miss(f"masked scores become {found}, which does not hide them (needed: at most {HIDDEN:.0f})", node)
        return self.with_term(kind, node, scores)


def _target(node: fx.Node) -> str:
    return str(node.target).removesuffix(".default")


def _product_with_values(softmax: fx.Node) -> tuple[fx.Node | None, fx.Node | None]:
    """The product of the weights with the values, or None; and an operation before it that changes the weights."""
    node, change = softmax, None
    while True:
        product = next((user for user in node.users if is_call(user, *_PRODUCTS) and user.args[0] is node), None)
        if product is not None:
            return product, change
        user = only_user(node)
        if is_call(user, aten.einsum.default):
            return user, user
        if not is_call(user, *_CASTS, *_CHANGES, *_RESHAPES):
            return None, None
        change = user if is_call(user, *_CHANGES) else change
        node = user


def _read_scores(node: fx.Node, program: Program) -> _Scores | Miss:
    """Read backwards from the input of the softmax to the product of queries and keys."""
    scores: _Scores | Miss = _Scores(program, node)
    while isinstance(scores, _Scores) and not is_call(scores.node, *_PRODUCTS, aten.baddbmm.default):
        scores = _step_back(scores)
    if isinstance(scores, Miss) or not is_call(scores.node, aten.baddbmm.default):
        return scores
    given = arguments(scores.node)
    factor = scores.scale * given["alpha"]
    if given["beta"] and not is_call(given["self"], aten.zeros.default, aten.zeros_like.default):
        if isinstance(mask_nodes([given["self"]]), Miss):
            return Miss("baddbmm adds something computed from the tokens to the scores", scores.node)
        found = scores.with_term("add", given["self"], scores.node, given["beta"])
        return found if isinstance(found, Miss) else replace(found, scale=factor)
    return replace(scores, scale=factor)


def _step_back(scores: _Scores) -> _Scores | Miss:
    """Read one operation."""
    node = scores.node
    stopped = Miss(f"{_target(node)} stands between the product of queries and keys and the softmax", node)
    if node.op != "call_function":
        return stopped
    source = next((n for n in node.args if isinstance(n, fx.Node)), None)
    if source is None or not isinstance(source.meta["val"], Tensor):
        return stopped
    if is_call(node, *_CASTS):
        return replace(scores, node=source)
    if is_call(node, *_RESHAPES):
        return replace(scores, node=source) if _keeps_rows(node) else stopped
    if is_call(node, aten.tanh.default) and not scores.softcap:
        # c * tanh(g * x) is c * tanh((c * g) * x / c): the outer factor is the cap and a factor of the scale.
        return replace(scores, node=source, softcap=abs(scores.scale))
    if is_call(node, aten.add.Tensor, aten.sub.Tensor):
        return _step_back_sum(scores)
    if is_call(node, *_MULTIPLY, *_DIVIDE):
        return _step_back_factor(scores) or stopped
    given = arguments(node)
    if is_call(node, aten.masked_fill.Scalar, aten.masked_fill.Tensor):
        return scores.with_fill("hide", given["mask"], source, given["value"])
    if is_call(node, aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf):
        if _number(given["self"], scores.program) is None:
            return scores.with_fill("keep", given["condition"], given["self"], given["other"])
        return scores.with_fill("hide", given["condition"], given["other"], given["self"])
    if is_call(node, aten.maximum.default, aten.max.other, aten.clamp_min.default):
        bound = _number(given["other"] if "other" in given else given["min"], scores.program)
        # What it raises stays hidden.
        return replace(scores, node=source) if bound is not None and bound * scores.scale <= HIDDEN else stopped
    return stopped


def _step_back_sum(scores: _Scores) -> _Scores | Miss:
    given = arguments(scores.node)
    one, other = given["self"], given["other"]
    sign = -1.0 if is_call(scores.node, aten.sub.Tensor) else 1.0
    candidates = [(one, other, sign)] if sign < 0 else [(one, other, sign), (other, one, sign)]
    for rest, added, weight in candidates:
        if isinstance(added, fx.Node) and not isinstance(mask_nodes([added]), Miss):
            return scores.with_term("add", added, rest, weight * given["alpha"])
    return Miss("something computed from the tokens is added to the scores", scores.node)


def _step_back_factor(scores: _Scores) -> _Scores | Miss | None:
    node = scores.node
    for rest, other in (node.args[:2], node.args[1::-1]):
        factor = _number(other, scores.program)
        if factor is not None:
            factor = factor if is_call(node, *_MULTIPLY) else 1 / factor if factor else 0.0
            return replace(scores, node=rest, scale=scores.scale * factor) if factor else None
        if is_call(node, *_DIVIDE):
            return None
        if not isinstance(mask_nodes([other]), Miss):
            return scores.with_term("multiply", other, rest)
    return None


def _number(value: Any, program: Program) -> float | None:
    """The number that a literal or a tensor of one element holds, or None."""
    while is_call(value, *_CASTS):
        value = value.args[0]
    if is_call(value, aten.full.default, aten.full_like.default, aten.new_full.default):
        value = arguments(value)["fill_value"]
    name = constant_name(value)
    if name is not None and value.meta["val"].numel() == 1:
        return float(program.constants[name].value())
    return float(value) if isinstance(value, (int, float)) else None


def _written_attention(product: fx.Node, scores: _Scores, program: Program) -> AttentionMatch | Miss:
    """Put the two products together."""
    at = 1 if is_call(scores.node, aten.baddbmm.default) else 0
    query, query_factor, is_turned = _bare(scores.node.args[at], program)
    key, key_factor, is_key = _bare(scores.node.args[at + 1], program)
    value, value_factor, is_value_turned = _bare(product.args[1], program)
    if is_turned or is_value_turned or value_factor != 1:
        return Miss("queries or values are transposed or scaled right before their product", product)
    last = product
    if product.meta["val"].dim() == 3:
        last = only_user(product)
        if not is_call(last, *_RESHAPES) or not _keeps_rows(last) or last.meta["val"].dim() != 4:
            return Miss("heads stay merged with the batch behind the product", product)
    scale = scores.scale * query_factor * key_factor
    operands = AttentionOperands(last, query, key, value, scores.mask, scale, scores.softcap, not is_key)
    return check_attention(operands, program)


def _bare(node: fx.Node, program: Program) -> tuple[fx.Node, float, bool]:
    """An operand with heads apart and in its own dtype; the factor on it; whether its last axes are exchanged."""
    factor, is_turned = 1.0, False
    while node.op == "call_function" and isinstance(node.args[0], fx.Node):
        source, rank = node.args[0], node.meta["val"].dim()
        if is_call(node, *_CASTS):
            is_widened = source.meta["val"].dtype.itemsize < node.meta["val"].dtype.itemsize
            if not (is_widened and source.meta["val"].is_floating_point()):
                break
        elif is_call(node, *_MULTIPLY, *_DIVIDE):
            number = _number(node.args[1], program)
            if not number:
                break
            factor = factor * number if is_call(node, *_MULTIPLY) else factor / number
        elif _is_turn(node):
            is_turned = not is_turned
        elif not (is_call(node, *_RESHAPES) and _keeps_rows(node) and rank == 3):
            break
        node = source
    return node, factor, is_turned


def _is_turn(node: fx.Node) -> bool:
    """Whether a node exchanges the last two axes."""
    if not is_call(node, *_EXCHANGES):
        return is_call(node, aten.mT.default)
    rank = node.meta["val"].dim()
    return {axis % rank for axis in node.args[1:]} == {rank - 2, rank - 1}


def _keeps_rows(reshape: fx.Node) -> bool:
    """Whether a reshape between three and four axes keeps the last two."""
    before, after = reshape.args[0].meta["val"].shape, reshape.meta["val"].shape
    return {len(before), len(after)} == {3, 4} and all(map(is_same_size, before[-2:], after[-2:]))


# Grouped queries: which nodes only repeat heads.


def _repeated_heads(node: fx.Node) -> RepeatedHeads | Miss | None:
    key, value = (_head_repeats(operand, 1) for operand in node.args[1:3])
    if key == value == 1:
        return None
    if 0 in (key, value):
        return Miss("heads are repeated in tiles: neighbouring query heads read different key heads", node)
    if key != value:
        return Miss(f"key heads are repeated {key} times and value heads {value} times", node)
    return RepeatedHeads(node)


def _head_repeats(node: fx.Node, axis: int) -> int:
    """How often each head stands along `axis`, neighbouring; 1 if it is not known to repeat, 0 if in tiles."""
    repeated = _repeated(node, axis)
    if repeated is not None:
        return repeated[1]
    counts = {_head_repeats(operand, at) for operand, at in _head_operands(node, axis)}
    return counts.pop() if len(counts) == 1 else 1


def _repeated(node: fx.Node, axis: int) -> tuple[fx.Node, int, bool] | None:
    """What a node repeats, how often (0: in tiles), and whether that has an axis of size 1 behind `axis` to drop."""
    if is_call(node, aten.repeat_interleave.self_int):
        given = arguments(node)
        return (given["self"], given["repeats"], False) if given["dim"] == axis else None
    if _grown_axis(node) == axis:
        return node.args[0], node.meta["val"].shape[axis], False
    if is_call(node, aten.repeat.default):
        is_tiled = [at for at, count in enumerate(node.args[1]) if count != 1] == [axis]
        return (node.args[0], 0, False) if is_tiled else None
    if not is_call(node, *_RESHAPES):
        return None
    wide, grown = node.args[0], _grown_axis(node.args[0])
    before, after = ([str(size) for size in n.meta["val"].shape] for n in (wide, node))
    if grown not in (axis, axis + 1) or before[:axis] + before[axis + 2 :] != after[:axis] + after[axis + 1 :]:
        return None
    return wide.args[0], wide.meta["val"].shape[grown] if grown == axis + 1 else 0, True


def _grown_axis(node: fx.Node) -> int | None:
    """The only axis along which an expand or repeat makes many of one, or None."""
    if not is_call(node, aten.expand.default, aten.repeat.default):
        return None
    before, after = node.args[0].meta["val"].shape, node.meta["val"].shape
    grown = [at for at in range(len(after)) if len(before) == len(after) and not is_same_size(before[at], after[at])]
    is_one = len(grown) == 1 and is_same_size(before[grown[0]], 1) and isinstance(after[grown[0]], int)
    return grown[0] if is_one else None


def _head_operands(node: fx.Node, axis: int) -> list[tuple[fx.Node, int]]:
    """Operands of a node that works on each head alone, with their head axis; empty for any other node."""
    rank = node.meta["val"].dim() if isinstance(node.meta.get("val"), Tensor) else 0
    if is_call(node, rotary_embedding):
        return [(node.args[0], axis)] if axis == 1 else []
    if is_call(node, *_EXCHANGES):
        one, other = node.args[1] % rank, node.args[2] % rank
        return [(node.args[0], {one: other, other: one}.get(axis, axis))]
    if is_call(node, aten.permute.default):
        return [(node.args[0], node.args[1][axis] % rank)]
    if is_call(node, aten.slice.Tensor):
        return [(node.args[0], axis)] if arguments(node)["dim"] % rank != axis else []
    if is_call(node, aten.cat.default):
        return [(part, axis) for part in node.args[0]] if arguments(node)["dim"] % rank != axis else []
    if is_call(node, *_POINTWISE):
        # Operands of lower rank or of one head are the same for every head.
        ranked = [(n, axis - rank + n.meta["val"].dim()) for n in node.all_input_nodes]
        return [(operand, at) for operand, at in ranked if at >= 0 and operand.meta["val"].shape[at] != 1]
    return []


def _without_repeats(node: fx.Node, axis: int, edit: Edit, done: dict[fx.Node, fx.Node]) -> fx.Node:
    """The value of `node` with each repeated head once, computed that way from the start."""
    if node not in done:
        repeated = _repeated(node, axis)
        if repeated is None:
            narrow = {n: _without_repeats(n, at, edit, done) for n, at in _head_operands(node, axis)}
            args = fx.map_arg(node.args, lambda operand: narrow.get(operand, operand))
            done[node] = edit.call(node.target, *args, **node.kwargs)
        else:
            source, _, has_axis = repeated
            is_unsqueezed = (
                is_call(source, aten.unsqueeze.default) and source.args[1] % source.meta["val"].dim() == axis + 1
            )
            if has_axis:
                source = source.args[0] if is_unsqueezed else edit.call(aten.squeeze.dim, source, axis + 1)
            done[node] = source
    return done[node]
