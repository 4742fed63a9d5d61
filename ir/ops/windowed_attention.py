"""`jettison::windowed_attention`: attention over a cache that holds only the last tokens of each row.

The buffers have C slots, C at least the window W. After a step, slots `[0, L)` hold the L most recent positions in
order, where L depends on the row's token count T alone:

    L(T) = T                                    if T <= C
    L(T) = T - G * ceil((T - C) / G)            otherwise, with G = C - W + 1

so the whole window stays resident and slots are reclaimed G at a time. This is the layout that ONNX Runtime documents
for `GroupQueryAttention` with `sliding_window_cache=1`, so one saved state serves both targets.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.ir.ops.attention import QUERY_ROWS, attend, visible_keys
from jettison.ir.ops.registration import define_op


def resident_tokens(tokens: Tensor, capacity: int, window: int) -> Tensor:
    """L(T) of the module docstring: how many of `tokens` (`[B] i64`) are resident in `capacity` slots."""
    reclaimed = capacity - window + 1
    overflow = (tokens - capacity).clamp_min(0)
    return tokens - reclaimed * ((overflow + reclaimed - 1) // reclaimed)


def _windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    new_tokens: Tensor,
    total_tokens: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Append a step's keys and values to a windowed cache and attend.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, Hkv, S, D]`, already rotated.
        value: `[B, Hkv, S, D]`.
        past_key: `[B, Hkv, C, D]` in the layout of the module docstring.
        past_value: `[B, Hkv, C, D]`.
        new_tokens: `[B] i64`, how many of the S tokens of each row are real; padding stands behind them.
        total_tokens: `[B] i64`, tokens of each row so far, this step included.
        sinks: `[H]` or None; see `jettison::attention`.
        scale: Factor on the scores.
        window: Positions a query sees back, itself included; at least 1 and at most C.
        softcap: 0 for none.

    Returns:
        `[B, H, S, D]` contiguous, and the new `past_key` and `past_value`.
    """
    steps, capacity, device = query.shape[2], past_key.shape[2], query.device
    before = total_tokens - new_tokens
    resident = resident_tokens(before, capacity, window)[:, None]
    slots = torch.arange(capacity, device=device)[None]
    past_positions = torch.where(slots < resident, before[:, None] - resident + slots, -1)
    columns = torch.arange(steps, device=device)[None]
    new_positions = torch.where(columns < new_tokens[:, None], before[:, None] + columns, -1)
    positions = torch.cat([past_positions, new_positions], 1)
    keys = torch.cat([past_key, key.to(past_key.dtype)], 2)
    values = torch.cat([past_value, value.to(past_value.dtype)], 2)
    query_positions = before[:, None] + columns
    out = query.new_empty(query.shape)
    for start in range(0, steps, QUERY_ROWS):
        rows = slice(start, min(start + QUERY_ROWS, steps))
        visible = visible_keys(query_positions[:, rows], positions, None, True, window)
        out[:, :, rows] = attend(
            query[:, :, rows], keys.to(query.dtype), values.to(query.dtype), visible, sinks, scale, softcap
        )
    kept = resident_tokens(total_tokens, capacity, window)[:, None]
    wanted = total_tokens[:, None] - kept + slots
    # Column of each wanted position: the past holds a contiguous run, the new tokens follow it.
    first_past = before[:, None] - resident
    source = torch.where(wanted < before[:, None], wanted - first_past, capacity + wanted - before[:, None])
    source = source.clamp(0, capacity + steps - 1)[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[3])
    return out, keys.gather(2, source), values.gather(2, source)


def _fake_windowed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_key: Tensor,
    past_value: Tensor,
    new_tokens: Tensor,
    total_tokens: Tensor,
    sinks: Tensor | None,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return (
        torch.empty_like(query, memory_format=contiguous),
        torch.empty_like(past_key, memory_format=contiguous),
        torch.empty_like(past_value, memory_format=contiguous),
    )


windowed_attention = define_op(
    "windowed_attention(Tensor query, Tensor key, Tensor value, Tensor past_key, Tensor past_value, Tensor new_tokens, "
    "Tensor total_tokens, Tensor? sinks, float scale, int window, float softcap) -> (Tensor, Tensor, Tensor)",
    _windowed_attention,
    _fake_windowed_attention,
)
