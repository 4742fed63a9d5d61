"""Attention over a KV cache as `com.microsoft::GroupQueryAttention`.

The operator writes the cache, rotates queries and keys and attends in one call, on `[B, S, H * D]`. So slot writes and
rotations are kept as promises while the graph is lowered; the attention that reads them redeems them all at once. What
the kernel refuses (it checks at the first call, not at load) is decided here, before anything is emitted.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.onnx.ops import symbolic, symbolic_multi_out

from jettison.ir.match import arguments, is_call
from jettison.ir.ops import (
    attention,
    joint_attention,
    rotary_embedding,
    scored_attention,
    scored_joint_attention,
    windowed_attention,
    write_slots,
)

aten = torch.ops.aten
# What onnxruntime 1.31 asks for on a CPU: D of any call, D of a call that rotates, and width of the angle tables.
HEAD_DIM_MULTIPLE, ROTATED_HEAD_DIM_MULTIPLE, ANGLES_MULTIPLE = 8, 16, 8
_JOINT = (joint_attention, scored_joint_attention)
_OVER_SLOTS = (attention, scored_attention, *_JOINT)
_PROBABILITIES = 2  # of `qk_output`: what the operator returns beside the usual


@dataclass
class RowLengths:
    """What the operator wants to know about the batch, computed once per graph.

    Attributes:
        last_index: `[B] i32`, tokens of each row so far, this call included, minus one.
        total: `i32` scalar, the longest row.
        mask: `[B, T] i64`, what they were read from.
    """

    last_index: Tensor
    total: Tensor
    mask: Tensor

    @classmethod
    def of_mask(cls, attention_mask: Tensor) -> RowLengths:
        """From `attention_mask [B, T] i64` whose rows are ones followed by zeros."""
        last_index = attention_mask.sum(1).to(torch.int32) - 1
        size = symbolic("::Shape", (attention_mask,), {"start": 1, "end": 2}, dtype=torch.int64, shape=(1,))
        return cls(last_index, size.squeeze(0).to(torch.int32), attention_mask)


def is_cached(node: fx.Node) -> bool:
    """Whether an attention node reads keys and values right out of two slot writes at its own positions."""
    operands = arguments(node)
    if is_call(node, *_JOINT):
        slots, is_plain = operands["slots"], True
    else:
        slots = operands["query_positions"]
        is_plain = operands["causal"] and operands["key_positions"] is None and operands["key_valid"] is None
    return is_plain and all(
        is_call(write, write_slots) and "state" in write.args[0].meta and write.args[2] is slots
        for write in (operands["key"], operands["value"])
    )


def is_fused(node: Any) -> bool:
    """Whether a node is an attention that one `GroupQueryAttention` computes."""
    if is_call(node, *_OVER_SLOTS) and is_cached(node):
        operands = arguments(node)
        key, value = operands["key"].args[0], operands["value"].args[0]
    elif is_call(node, windowed_attention):
        key, value = node.args[3], node.args[4]
    else:
        return False
    key_dim, value_dim = key.meta["val"].shape[3], value.meta["val"].shape[3]
    return key_dim == value_dim and key_dim % HEAD_DIM_MULTIPLE == 0


def fused_readers(node: fx.Node) -> list[fx.Node]:
    """Fused attentions among the readers of a slot write."""
    return [user for user in node.users if is_call(user, *_OVER_SLOTS) and is_fused(user)]


def heads_last(node: fx.Node, environment: dict[fx.Node, Any]) -> Tensor:
    """`[B, H, S, D]` as `[B, S, H * D]`, without a transpose where the graph made it from that."""
    flat = flat_heads(node)
    if flat is not None and flat in environment:
        return environment[flat]
    return environment[node].transpose(1, 2).flatten(2)


def flat_heads(node: fx.Node) -> fx.Node | None:
    """The value `[B, S, H * D]` that `node` is, with the heads split and brought to the front."""
    if not is_call(node, aten.transpose.int) or set(node.args[1:]) != {1, 2}:
        return None
    split = node.args[0]
    if not is_call(split, aten.reshape.default, aten.unflatten.int):
        return None
    flat = split.args[0].meta["val"]
    wide = split.meta["val"].shape[2] * split.meta["val"].shape[3]
    return split.args[0] if flat.dim() == 3 and flat.shape[2] == wide else None


def flat_readers(node: fx.Node) -> list[fx.Node]:
    """Readers of an attention `[B, H, S, D]` that bring it to `[B, S, H * D]`, which is what the operator returns."""
    # Sizes by their text: comparing symbols while the exporter traces would enter its graph.
    _, heads, length, head_dim = (str(size) for size in node.meta["val"].shape)
    wanted = [length, str(int(heads) * int(head_dim))]
    turned = [user for user in node.users if is_call(user, aten.transpose.int) and set(user.args[1:]) == {1, 2}]
    return [
        reader
        for each in turned
        for reader in each.users
        if is_call(reader, aten.reshape.default) and [str(size) for size in reader.meta["val"].shape[1:]] == wanted
    ]


def packed_projection(query: fx.Node, key: fx.Node, value: fx.Node, environment: dict[fx.Node, Any]) -> Tensor | None:
    """`[B, S, (H + 2 * Hkv) * D]` of which queries, keys and values `[B, H, S, D]` are the parts, in that order.

    The operator reads such a projection as it is; `merge-qkv-projections` makes it, Phi-3 and GPT-2 have it.

    Returns:
        None if there is no such value.
    """
    end, source = 0, None
    for node in (query, key, value):
        flat = flat_heads(node)
        part = None if flat is None else _columns(flat)
        if part is None or part[1] != end or source not in (None, part[0]):
            return None
        source, end = part[0], part[2]
    is_whole = source is not None and end == source.meta["val"].shape[-1]
    return environment.get(source) if is_whole else None


def _columns(node: fx.Node) -> tuple[fx.Node, int, int] | None:
    """The value `[B, S, E]`, first column and end, if `node` is some columns of it."""
    width = node.meta["val"].shape[-1]
    if is_call(node, aten.slice.Tensor):
        operands = arguments(node)
        start = operands["start"] or 0
        is_range = operands["dim"] in (-1, 2) and operands["step"] == 1 and start >= 0
        return (operands["self"], start, start + width) if is_range else None
    if not is_call(node, operator.getitem):
        return None
    parts, index = node.args
    if not is_call(parts, aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default):
        return None
    start = sum(part.shape[-1] for part in parts.meta["val"][:index])
    return (parts.args[0], start, start + width) if arguments(parts)["dim"] in (-1, 2) else None


@dataclass(frozen=True)
class Rotation:
    """Tables with which the operator rotates queries and keys itself.

    Attributes:
        cos: `[context, R/2] f32`.
        sin: `[context, R/2] f32`.
        is_interleaved: Channel layout.
    """

    cos: Tensor
    sin: Tensor
    is_interleaved: bool


def group_query_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor,
    past_value: Tensor,
    lengths: RowLengths,
    *,
    heads: int,
    position_ids: Tensor | None,
    rotation: Rotation | None,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
    is_windowed_cache: bool = False,
    is_scored: bool = False,
) -> tuple[Tensor, ...]:
    """One `GroupQueryAttention`.

    Args:
        query: `[B, S, H * D]`, or all three in one, `[B, S, (H + 2 * Hkv) * D]`.
        key: `[B, S, Hkv * D]`; None if `query` holds it.
        value: `[B, S, Hkv * D]`; None if `query` holds it.
        past_key: `[B, Hkv, C, D]`.
        past_value: `[B, Hkv, C, D]`.
        lengths: Of the rows.
        heads: H.
        position_ids: `[B, S] i64`, read when rotating.
        rotation: Given when `query` and `key` are not rotated yet.
        sinks: `[H]` or None.
        scale: Factor on the scores.
        window: 0 for none.
        softcap: 0 for none.
        is_windowed_cache: The cache holds the window only and the operator evicts.
        is_scored: Whether to return the probabilities too.

    Returns:
        `[B, S, H * D]`, the new past key and value, and if asked for `[B, H, S, T]`, T the tokens of the longest row.
    """
    attributes: dict[str, Any] = {
        "num_heads": heads, "kv_num_heads": past_key.shape[1], "scale": scale, "do_rotary": int(rotation is not None),
        "local_window_size": window or -1,
    }  # fmt: skip
    if softcap:
        attributes["softcap"] = softcap
    if is_windowed_cache:
        attributes["sliding_window_cache"] = 1
    tables = (None, None, None)
    if rotation is not None:
        attributes["rotary_interleaved"] = int(rotation.is_interleaved)
        tables = (rotation.cos, rotation.sin, position_ids)
    operands = [query, key, value, past_key, past_value, lengths.last_index, lengths.total, *tables, None, sinks]
    while operands[-1] is None:
        operands.pop()
    dtypes = [query.dtype, past_key.dtype, past_value.dtype]
    shapes = [(*query.shape[:2], heads * past_key.shape[3]), past_key.shape, past_value.shape]
    if is_scored:
        attributes["qk_output"] = _PROBABILITIES
        dtypes.append(query.dtype)
        shapes.append((query.shape[0], heads, query.shape[1], lengths.mask.shape[1]))
    return tuple(
        symbolic_multi_out(
            "com.microsoft::GroupQueryAttention", operands, attributes, dtypes=dtypes, shapes=shapes, version=1
        )
    )


@dataclass(frozen=True)
class RotatedOperands:
    """Query and key before the rotation that both went through.

    Attributes:
        query: `[B, H, S, D]`, not rotated.
        key: `[B, Hkv, S, D]`, not rotated.
        cos: `[B, S, R/2]`.
        sin: `[B, S, R/2]`.
        is_interleaved: Channel layout.
    """

    query: fx.Node
    key: fx.Node
    cos: fx.Node
    sin: fx.Node
    is_interleaved: bool


def rotated_operands(node: fx.Node) -> RotatedOperands | None:
    """What a fused attention could rotate itself: both operands are rotated by the same angles just before it.

    Args:
        node: An attention for which `is_fused` holds and that reads slot writes.

    Returns:
        None if the kernel does not rotate heads of this size.
    """
    # Of the stored keys, the queries must be rotated where they are read.
    if is_call(node, *_JOINT):
        return None
    query, key = node.args[0], node.args[1].args[1]
    if not is_call(query, rotary_embedding) or not is_call(key, rotary_embedding) or query.args[1:] != key.args[1:]:
        return None
    found = RotatedOperands(query.args[0], key.args[0], *query.args[1:])
    angles = found.cos.meta["val"].shape[-1]
    if query.meta["val"].shape[3] % ROTATED_HEAD_DIM_MULTIPLE or angles % ANGLES_MULTIPLE:
        return None
    return found
