"""Factored linears in a graph, and the feed-forward layers and attentions that they surround.

A factored linear is a linear that reads a linear, `columns` `[r, K]` and then `rows` `[N, r]`, whoever made it so.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from jettison.ir.match import Miss, arguments, constant_name, is_call, only_user
from jettison.ir.ops import (
    attention,
    bitmap_linear,
    gated_activation,
    lut_linear,
    quantized_linear,
    rotary_embedding,
    write_slots,
)
from jettison.passes.low_rank.forms import is_remainder
from jettison.passes.raise_gated_mlp import activation_name

aten = torch.ops.aten
_QUANTIZED = (quantized_linear, lut_linear, bitmap_linear)
_LINEARS = (aten.linear.default, *_QUANTIZED)
_REMAINDER = "few bits are added to its factors (residual=), which the operator does not read"
_NEEDED = "the operator reads factors as they are: leave quantize-weights out, or this pass"


@dataclass(frozen=True)
class LowRankMlp:
    """A feed-forward layer.

    Attributes:
        hidden: Its neurons behind the activation, `[..., F]`.
        up: The linear in front of the activation, without its first factor.
        gate: The same of the gate, or None.
        columns: The linear that reads the neurons: the first factor of the second linear, or all of it.
        rows: The second factor, or None.
        activation: A key of `ACTIVATIONS`.
    """

    hidden: fx.Node
    up: fx.Node
    gate: fx.Node | None
    columns: fx.Node
    rows: fx.Node | None
    activation: str


@dataclass(frozen=True)
class LowRankAttention:
    """An attention.

    Attributes:
        attention: The node.
        query: The linear that queries come from, without its first factor.
        key: Of keys.
        value: Of values.
        cos: Angles of both rotations, or None.
        sin: Likewise.
        interleaved: Layout of the rotations.
        scale: Factor on the scores, with those that queries and keys were multiplied with.
    """

    attention: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    cos: fx.Node | None
    sin: fx.Node | None
    interleaved: bool
    scale: float


@dataclass(frozen=True)
class _Heads:
    """Queries, keys or values by head, and how they are made: a linear, perhaps a factor, a split, a transpose."""

    linear: fx.Node
    factor: float
    chain: tuple[fx.Node, ...]


def is_factored(linear: fx.Node) -> bool:
    """Whether a linear reads what another makes of something wider: its first factor."""
    first = linear.args[0]
    if not is_call(first, *_LINEARS):
        return False
    rank, width = (int(node.meta["val"].shape[-1]) for node in (first, first.args[0]))
    # Of two linears in a row that are no factors, neither has fewer dimensions in the middle.
    return rank <= width and rank <= int(linear.meta["val"].shape[-1])


def find_mlp(hidden: fx.Node) -> LowRankMlp | Miss | None:
    """The feed-forward layer whose neurons a node is, if any of its linears is factored.

    Args:
        hidden: Any node.

    Returns:
        The layer; a Miss where there is one that cannot be fused; None where there is none.
    """
    is_gated = is_call(hidden, gated_activation)
    activation = hidden.args[2] if is_gated else activation_name(hidden)
    if not isinstance(activation, str):
        return _unnamed_activation(hidden)
    gate, up = hidden.args[:2] if is_gated else (None, hidden.args[0])
    columns = next((user for user in hidden.users if is_call(user, *_LINEARS) and user.args[0] is hidden), None)
    ups = [up] if gate is None else [gate, up]
    beside = next((each for each in ups if _has_remainder(each)), None)
    if beside is not None:
        return Miss(_REMAINDER, beside)
    if columns is None or not all(is_call(each, *_LINEARS) for each in ups):
        return None
    rows = only_user(columns)
    if rows is None or not (is_call(rows, *_LINEARS) and rows.args[0] is columns and is_factored(rows)):
        rows = None
    if rows is not None and is_call(columns, aten.linear.default) and arguments(columns)["bias"] is not None:
        rows = None  # the operator has no bias between the factors
    if rows is None and not any(map(is_factored, ups)):
        return None
    linears = [*ups, columns, *([] if rows is None else [rows])]
    for value in (hidden, *ups):
        if only_user(value) is None:
            return Miss("something else reads its neurons too", value)
    return _unreadable(linears) or LowRankMlp(hidden, up, gate, columns, rows, activation)


def _unnamed_activation(columns: fx.Node) -> Miss | None:
    """A Miss for the second linear of a factored layer whose activation is written out in operations."""
    rows = only_user(columns)
    if not is_call(columns, *_LINEARS) or rows is None or not is_call(rows, *_LINEARS) or not is_factored(rows):
        return None
    hidden = columns.args[0]
    first: set[fx.Node] = set()
    pending, seen = [hidden], set()
    while pending:
        node = pending.pop()
        if is_call(node, *_LINEARS):
            first.add(node)
        elif node not in seen:
            seen.add(node)
            # One operation after the other on every neuron, and nothing that is not made of them.
            if node.op != "call_function" or _shape_text(node) != _shape_text(hidden):
                return None
            pending += node.all_input_nodes
    if hidden in first or len(first) != 1 or activation_name(hidden) is not None or not is_factored(first.pop()):
        return None
    return Miss("between its linears stands something else than an activation that has a name", columns)


def _shape_text(node: fx.Node) -> str | None:
    value = node.meta["val"]
    return str(value.shape) if isinstance(value, Tensor) else None


def find_attention(node: fx.Node) -> LowRankAttention | Miss | None:
    """The attention that a node is, if its queries, keys or values come from a factored linear.

    Args:
        node: Any node.

    Returns:
        The attention; a Miss where there is one that cannot be fused; None where there is none.
    """
    if not is_call(node, attention):
        return None
    operands = arguments(node)
    read = [operands[name] for name in ("query", "key", "value")]
    if any(is_call(each, write_slots) for each in read):
        kept = [each.args[1] if is_call(each, write_slots) else each for each in read]
        is_low = any(_comes_from_factors(each) for each in kept)
        return Miss("its keys and values are written to a cache in full width", node) if is_low else None
    rotations = [each if is_call(each, rotary_embedding) else None for each in read]
    heads = [each if turn is None else turn.args[0] for each, turn in zip(read, rotations, strict=True)]
    made = [_heads(each) for each in heads]
    found = [each for each in made if each is not None]
    if len(found) < len(made):
        beside = next((each for each in map(_whole, heads) if _has_remainder(each)), None)
        if beside is not None:
            return Miss(_REMAINDER, beside)
        if not any(_comes_from_factors(each) for each in heads):
            return None
        between = heads[made.index(None)]
        return Miss("between a linear and the attention stands more than a split into heads and a rotation", between)
    query, key, value = found
    linears = [each.linear for each in found]
    if not any(map(is_factored, linears)):
        return None
    if value.factor != 1:
        return Miss("its values are multiplied", value.chain[-1])
    if rotations[2] is not None or (rotations[0] is None) != (rotations[1] is None):
        return Miss("not queries and keys alone are rotated", node)
    if rotations[0] is not None and rotations[1] is not None and rotations[0].args[1:] != rotations[1].args[1:]:
        return Miss("queries and keys are rotated by different angles", node)
    between = [step for each in found for step in each.chain] + [turn for turn in rotations if turn is not None]
    for step in between:
        if only_user(step) is None:
            return Miss("something else reads its queries, keys or values too", step)
    cos, sin, interleaved = (None, None, False) if rotations[0] is None else rotations[0].args[1:4]
    scale = operands["scale"] * query.factor * key.factor
    sources = (query.linear, key.linear, value.linear)
    return _unreadable(linears) or LowRankAttention(node, *sources, cos, sin, bool(interleaved), scale)


def _heads(heads: fx.Node) -> _Heads | None:
    """The linear `[B, S, H * D]` whose heads `[B, H, S, D]` a node is; None where something else is done to them."""
    if not is_call(heads, aten.transpose.int) or sorted(axis % 4 for axis in heads.args[1:]) != [1, 2]:
        return None
    view = heads.args[0]
    if not is_call(view, aten.reshape.default, aten.unflatten.int):
        return None
    wide, factor = view.args[0], 1.0
    scaled: tuple[fx.Node, ...] = ()
    if is_call(wide, aten.mul.Tensor) and isinstance(wide.args[1], (int, float)):
        wide, factor, scaled = wide.args[0], float(wide.args[1]), (wide,)
    if not is_call(wide, *_LINEARS):
        return None
    whole, split = wide.meta["val"].shape, view.meta["val"].shape
    is_split = (
        len(whole) == 3 and len(split) == 4 and whole[2] == split[2] * split[3] and str(whole[:2]) == str(split[:2])
    )
    return _Heads(wide, factor, (wide, *scaled, view, heads)) if is_split else None


def _comes_from_factors(value: fx.Node) -> bool:
    """Whether the linear that a value is made from, if there is one and nothing else, is factored."""
    node: Any = value
    while isinstance(node, fx.Node) and node.op == "call_function" and not is_call(node, *_LINEARS):
        # Norms have weights, rotations angles, and views sizes.
        made_from = [each for each in node.all_input_nodes if each.op == "call_function" and not _is_size(each)]
        if is_call(node, rotary_embedding):
            made_from = made_from[:1]
        node = made_from[0] if len(made_from) == 1 else None
    return is_call(node, *_LINEARS) and is_factored(node)


def _whole(heads: fx.Node) -> fx.Node:
    """What was split into heads, if that is all there is between."""
    while is_call(heads, aten.transpose.int, aten.reshape.default, aten.unflatten.int):
        heads = heads.args[0]
    return heads


def _has_remainder(value: Any) -> bool:
    """Whether a value is what factors make and few bits beside them."""
    return is_call(value, aten.add.Tensor) and any(map(is_remainder, value.all_input_nodes))


def _is_size(node: fx.Node) -> bool:
    return not isinstance(node.meta["val"], (Tensor, tuple, list))


def _unreadable(linears: list[fx.Node]) -> Miss | None:
    """Why an operator cannot read the weights of linears, if it cannot."""
    for linear in linears:
        if is_call(linear, *_QUANTIZED):
            return Miss(f"its factors are quantised, and {_NEEDED}", linear)
        operands = arguments(linear)
        if constant_name(operands["weight"]) is None:
            return Miss("a weight is not a constant", linear)
    return None
