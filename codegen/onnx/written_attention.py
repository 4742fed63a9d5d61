"""Attention written out in standard operators, for the shapes that `GroupQueryAttention` refuses.

The slower way: scores of a call are a tensor. Still no operator copies a cache of `full`: its slots are written by one
`ScatterND`, which works in place where past and present are one buffer, and read where they lie.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.onnx.ops import symbolic

from jettison.ir.ops.attention import visible_keys
from jettison.ir.ops.windowed_attention import resident_tokens


def attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, sinks: Tensor | None, scale: float, softcap: float
) -> tuple[Tensor, Tensor]:
    """What `jettison.ir.ops.attention.attend` computes, without repeating keys for the heads that share them.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, Hkv, T, D]`.
        value: `[B, Hkv, T, Dv]`.
        visible: `[B or 1, S, T] bool`.
        sinks: `[H]` or None.
        scale: Factor on the scores.
        softcap: 0 for none.

    Returns:
        `[B, H, S, Dv]`; a query that sees nothing gets zeros. And its weights, `[B, Hkv, H / Hkv, S, T]`.
    """
    kv_heads, keys = key.shape[1], key.shape[2]
    # [B, Hkv, H / Hkv, S, D] against [B, Hkv, 1, D, T]: the product broadcasts. Splitting an axis asks nothing of the
    # strides, where joining H / Hkv and S would make the exporter guard on them.
    grouped = (query * scale).unflatten(1, (kv_heads, -1))
    sizes = grouped.shape[:4]
    scores = _matmul(grouped, key.unsqueeze(2).transpose(3, 4), (*sizes, keys))
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible[:, None, None], torch.finfo(scores.dtype).min)
    if sinks is None:
        weights = scores.softmax(-1)
    else:
        column = sinks.to(scores.dtype).reshape(1, kv_heads, -1, 1, 1).expand(*sizes, 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    weights = weights.masked_fill(~visible.any(-1)[:, None, None, :, None], 0.0)
    return _matmul(weights, value.unsqueeze(2), (*sizes, value.shape[3])).flatten(1, 2), weights


def _matmul(left: Tensor, right: Tensor, shape: tuple[int | torch.SymInt, ...]) -> Tensor:
    return symbolic("::MatMul", (left, right), {}, dtype=left.dtype, shape=shape)


def attention(
    query: Tensor, key: Tensor, value: Tensor, query_positions: Tensor | None, key_positions: Tensor | None,
    key_valid: Tensor | None, sinks: Tensor | None, scale: float, causal: bool, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """`jettison::attention` over an explicit mask."""
    return scored_attention(
        query, key, value, query_positions, key_positions, key_valid, sinks, scale, causal, window, softcap
    )[0]


def scored_attention(
    query: Tensor, key: Tensor, value: Tensor, query_positions: Tensor | None, key_positions: Tensor | None,
    key_valid: Tensor | None, sinks: Tensor | None, scale: float, causal: bool, window: int, softcap: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`jettison::scored_attention` likewise."""
    query_positions = torch.arange(query.shape[2])[None] if query_positions is None else query_positions
    key_positions = torch.arange(key.shape[2])[None] if key_positions is None else key_positions
    visible = visible_keys(query_positions, key_positions, key_valid, causal, window)
    out, weights = attend(query, key, value, visible, sinks, scale, softcap)
    return out, weights.sum((2, 3))


def received(probabilities: Tensor, mask: Tensor, key: Tensor) -> Tensor:
    """What each slot received: the second result of `jettison::scored_attention`.

    Args:
        probabilities: `[B, H, S, T]`, T at most C; the operator leaves what is behind a row's tokens as it was.
        mask: `[B, T] i64`, ones for a row's tokens.
        key: `[B, Hkv, C, D]`.

    Returns:
        `[B, Hkv, C] f32`.
    """
    batch, kv_heads, slots, _ = key.shape
    sums = probabilities.unflatten(1, (kv_heads, -1)).sum((2, 3)).masked_fill(mask[:, None] == 0, 0.0)
    # Behind the tokens that there are, slots have received nothing. By hand: the exporter would want to know whether
    # there are any.
    count = symbolic("::Shape", (key,), {"start": 2, "end": 3}, dtype=torch.int64, shape=(1,))
    known = symbolic("::Shape", (sums,), {"start": 2, "end": 3}, dtype=torch.int64, shape=(1,))
    pads = torch.cat([torch.zeros(5, dtype=torch.int64), count - known])
    return symbolic("::Pad", (sums, pads), {}, dtype=sums.dtype, shape=(batch, kv_heads, slots))


def write_slots(state: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """`jettison::write_slots` as `ScatterND`. Every slot must be at least 0; `LoweredGraph` refuses others.

    Args:
        state: `[B, Hkv, C, D]`.
        values: `[B, Hkv, S, D]`.
        slots: `[B, S] i64`; or `[B, Hkv, S] i64`, which becomes `ScatterElements`.

    Returns:
        The new state.
    """
    batch, kv_heads, rows, _ = values.shape
    if slots.dim() == 3:
        operands = (state, slots.unsqueeze(3).expand(values.shape), values.to(state.dtype))
        return symbolic("::ScatterElements", operands, {"axis": 2}, dtype=state.dtype, shape=tuple(state.shape))
    shape = (batch, kv_heads, rows)
    row_index = torch.arange(batch)[:, None, None].expand(shape)
    head_index = torch.arange(kv_heads)[None, :, None].expand(shape)
    where = torch.stack([row_index, head_index, slots[:, None, :].expand(shape)], -1)
    return symbolic(
        "::ScatterND", (state, where, values.to(state.dtype)), {}, dtype=state.dtype, shape=tuple(state.shape)
    )


def next_slots(mask: Tensor, input_ids: Tensor) -> Tensor:
    """`jettison::next_slots`, for caches that no fused operator writes."""
    steps = input_ids.shape[1]
    return mask.sum(1, keepdim=True) - steps + torch.arange(steps)[None]


def windowed_attention(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, new_tokens: Tensor,
    total_tokens: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`jettison::windowed_attention`; see there for the layout.

    Unlike the slots of `full`, the window is copied at every call: only the fused operator can shift it in place.
    """
    steps, capacity = query.shape[2], past_key.shape[2]
    before = total_tokens - new_tokens
    resident = resident_tokens(before, capacity, window)[:, None]
    slots, columns = torch.arange(capacity)[None], torch.arange(steps)[None]
    past_positions = torch.where(slots < resident, before[:, None] - resident + slots, -1)
    new_positions = torch.where(columns < new_tokens[:, None], before[:, None] + columns, -1)
    # The past is read here and nowhere else: the new one is written into the same buffer.
    keys, values = torch.cat([past_key, key], 2), torch.cat([past_value, value], 2)
    positions = torch.cat([past_positions, new_positions], 1)
    visible = visible_keys(before[:, None] + columns, positions, None, True, window)
    out, _ = attend(query, keys, values, visible, sinks, scale, softcap)
    wanted = total_tokens[:, None] - resident_tokens(total_tokens, capacity, window)[:, None] + slots
    source = torch.where(
        wanted < before[:, None], wanted - before[:, None] + resident, capacity + wanted - before[:, None]
    )
    source = source.clamp(0, capacity + steps - 1)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    return out, keys.gather(2, source), values.gather(2, source)
