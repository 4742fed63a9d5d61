"""`jettison::scored_joint_attention`: `jettison::joint_attention` that also says what each key received."""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.ir.ops.joint_attention import joint_visible
from jettison.ir.ops.registration import define_op


def _scored_joint_attention(
    query: Tensor,
    stored_key: Tensor,
    stored_value: Tensor,
    stored_tokens: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`jettison::joint_attention`, and what each of the C slots received; see there, and `jettison::scored_attention`.

    Returns:
        `[B, H, S, D]`, and `[B, Hkv, C] f32`.
    """
    plain = torch.ops.jettison.scored_attention
    if not stored_key.shape[2] or not int(stored_tokens.max()):
        return plain(query, key, value, slots, None, None, None, scale, True, 0, 0.0)
    stored = stored_key.shape[2]
    keys, values = torch.cat([stored_key, key], 2), torch.cat([stored_value, value], 2)
    visible = joint_visible(stored, stored_tokens, key.shape[2], slots)[:, None, None]
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = torch.matmul(grouped.float(), keys.float().unsqueeze(2).transpose(3, 4)) * scale
    weights = scores.masked_fill(~visible, torch.finfo(scores.dtype).min).softmax(-1)
    out = torch.matmul(weights.to(values.dtype), values.unsqueeze(2)).flatten(1, 2)
    return out.to(query.dtype).contiguous(), weights[..., stored:].sum((2, 3))


def _fake_scored_joint_attention(
    query: Tensor,
    stored_key: Tensor,
    stored_value: Tensor,
    stored_tokens: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor]:
    out = query.new_empty(query.shape[0], query.shape[1], query.shape[2], value.shape[3])
    return out, query.new_empty(query.shape[0], key.shape[1], key.shape[2], dtype=torch.float32)


scored_joint_attention = define_op(
    "scored_joint_attention(Tensor query, Tensor stored_key, Tensor stored_value, Tensor stored_tokens, Tensor key, "
    "Tensor value, Tensor slots, float scale) -> (Tensor, Tensor)",
    _scored_joint_attention,
    _fake_scored_joint_attention,
)
