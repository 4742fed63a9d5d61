"""`jettison::scored_attention`: attention that also says how much attention each key received."""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.ir.ops.attention import visible_keys
from jettison.ir.ops.registration import define_op

# Scores held at a time: bounds the memory of long prompts.
SCORE_BYTES = 64 << 20


def _scored_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    key_valid: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """`jettison::attention`, and the column sums of its probabilities.

    Args:
        query: `[B, H, S, D]`; this and all others as in `jettison::attention`.
        key: `[B, Hkv, T, D]`.
        value: `[B, Hkv, T, Dv]`.
        query_positions: `[B or 1, S] i64` or None.
        key_positions: `[B or 1, T] i64` or None.
        key_valid: `[B, T]` or None.
        sinks: `[H]` or None.
        scale: Factor on the scores.
        causal: Whether a query sees only keys at its own position or before.
        window: Number of positions a query sees back; 0 means all.
        softcap: 0 for none.

    Returns:
        `[B, H, S, Dv]` contiguous; and `[B, Hkv, T] f32`, what each key received from the S queries of the heads that
        share its key head.
    """
    device, (rows, heads, steps, _), (kv_heads, keys) = query.device, query.shape, key.shape[1:3]
    query_positions = torch.arange(steps, device=device)[None] if query_positions is None else query_positions
    key_positions = torch.arange(keys, device=device)[None] if key_positions is None else key_positions
    out = query.new_empty(rows, heads, steps, value.shape[3])
    received = torch.zeros(rows, kv_heads, keys, dtype=torch.float32, device=device)
    grouped = query.unflatten(1, (kv_heads, -1))
    at_once = max(1, SCORE_BYTES // (4 * rows * heads * keys))
    for start in range(0, steps, at_once):
        part = slice(start, min(start + at_once, steps))
        visible = visible_keys(query_positions[:, part], key_positions, key_valid, causal, window)[:, None, None]
        scores = torch.matmul(grouped[:, :, :, part].float(), key.float().unsqueeze(2).transpose(3, 4)) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        scores = scores.masked_fill_(~visible, torch.finfo(scores.dtype).min)
        if sinks is not None:
            column = sinks.float().reshape(1, kv_heads, -1, 1, 1).expand(*scores.shape[:4], 1)
            weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        weights = weights.masked_fill(~visible, 0.0)
        received += weights.sum((2, 3))
        out[:, :, part] = torch.matmul(weights.to(value.dtype), value.unsqueeze(2)).flatten(1, 2).to(out.dtype)
    return out, received


def _fake_scored_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor | None,
    key_positions: Tensor | None,
    key_valid: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape[0], query.shape[1], query.shape[2], value.shape[3])
    return out, query.new_empty(query.shape[0], key.shape[1], key.shape[2], dtype=torch.float32)


scored_attention = define_op(
    "scored_attention(Tensor query, Tensor key, Tensor value, Tensor? query_positions, Tensor? key_positions, "
    "Tensor? key_valid, Tensor? sinks, float scale, bool causal, int window, float softcap) -> (Tensor, Tensor)",
    _scored_attention,
    _fake_scored_attention,
)
