"""`jettison::attention`: scaled dot-product attention whose mask is data, not a tensor of size S x T."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.ops.registration import define_op

# Query rows attended at a time: bounds the mask and the scores to 512 x T per head instead of S x T.
QUERY_ROWS = 512


def visible_keys(
    query_positions: Tensor, key_positions: Tensor, key_valid: Tensor | None, causal: bool, window: int
) -> Tensor:
    """Which key each query may see.

    Args:
        query_positions: `[B or 1, S] i64`, true positions of the queries.
        key_positions: `[B or 1, T] i64`, true positions of the keys; negative means an empty slot.
        key_valid: `[B, T]`, non-zero where the key is a real token, or None.
        causal: Whether a query sees only keys at its own position or before.
        window: Number of positions a query sees back, itself included; 0 means all.

    Returns:
        `[B or 1, S, T] bool`.
    """
    query, key = query_positions[:, :, None], key_positions[:, None, :]
    visible = (key >= 0).expand(-1, query.shape[1], -1)
    if causal:
        visible = visible & (key <= query)
    if window:
        visible = visible & (key > query - window)
    if key_valid is not None:
        visible = visible & (key_valid != 0)[:, None, :]
    return visible


def attend(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, sinks: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Attention of some query rows under an explicit mask.

    Args:
        query: `[B, H, S, D]`.
        key: `[B, Hkv, T, D]`, H a multiple of Hkv; query head h reads key head `h // (H / Hkv)`.
        value: `[B, Hkv, T, Dv]`.
        visible: `[B or 1, S, T] bool`.
        sinks: `[H]`, a learned logit per head that takes part in the softmax and reads nothing, or None.
        scale: Factor on the scores.
        softcap: `c` in `c * tanh(score / c)`, 0 for none.

    Returns:
        `[B, H, S, Dv]`; a query that sees nothing gets zeros.
    """
    if not softcap and sinks is None:
        out = F.scaled_dot_product_attention(
            query, key, value, attn_mask=visible[:, None], scale=scale, enable_gqa=query.shape[1] != key.shape[1]
        )
        # The kernels differ in what a fully masked row gives (NaN or zero): zero is the definition.
        return torch.where(visible.any(-1)[:, None, :, None], out, out.new_zeros(()))
    groups = query.shape[1] // key.shape[1]
    scores = torch.matmul(query, key.repeat_interleave(groups, 1).transpose(2, 3)) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~visible[:, None], torch.finfo(scores.dtype).min)
    if sinks is not None:
        column = sinks.to(scores.dtype).reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], 1)
        weights = torch.cat([scores, column], -1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    weights = weights.masked_fill(~visible[:, None], 0.0)
    return torch.matmul(weights, value.repeat_interleave(groups, 1))


def _attention(
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
) -> Tensor:
    """Attention of `query` over `key` and `value`.

    Positions default to row indices (0, 1, ...), so a captured sequence needs none. See `visible_keys` and `attend`
    for the arguments.

    Returns:
        `[B, H, S, Dv]`, contiguous.
    """
    device, rows, keys = query.device, query.shape[2], key.shape[2]
    if query_positions is None:
        query_positions = torch.arange(rows, device=device)[None]
    if key_positions is None:
        key_positions = torch.arange(keys, device=device)[None]
    out = query.new_empty(query.shape[0], query.shape[1], rows, value.shape[3])
    for start in range(0, rows, QUERY_ROWS):
        stop = min(start + QUERY_ROWS, rows)
        visible = visible_keys(query_positions[:, start:stop], key_positions, key_valid, causal, window)
        out[:, :, start:stop] = attend(query[:, :, start:stop], key, value, visible, sinks, scale, softcap)
    return out


def _fake_attention(
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
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], query.shape[2], value.shape[3])


attention = define_op(
    "attention(Tensor query, Tensor key, Tensor value, Tensor? query_positions, Tensor? key_positions, "
    "Tensor? key_valid, Tensor? sinks, float scale, bool causal, int window, float softcap) -> Tensor",
    _attention,
    _fake_attention,
)
