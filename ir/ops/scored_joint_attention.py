"""`jettison::scored_joint_attention`: `jettison::joint_attention` that also says what each key received."""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.ir.ops.joint_attention import joint_positions
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
    attend, stored = torch.ops.jettison.scored_attention, stored_key.shape[2]
    if not stored or not int(stored_tokens.max()):
        return attend(query, key, value, slots, None, None, None, scale, True, 0, 0.0)
    keys, values = torch.cat([stored_key, key], 2), torch.cat([stored_value, value], 2)
    positions = joint_positions(stored, stored_tokens, key.shape[2], slots)
    out, received = attend(query, keys, values, *positions, None, None, scale, True, 0, 0.0)
    return out, received[..., stored:].clone(memory_format=torch.contiguous_format)


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
