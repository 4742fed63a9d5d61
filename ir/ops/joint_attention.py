"""`jettison::joint_attention`: attention over tokens that are stored in a compressed form and those that are not."""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.ir.ops.registration import define_op


def joint_positions(
    stored: int | torch.SymInt, stored_tokens: Tensor, recent: int | torch.SymInt, slots: Tensor
) -> tuple[Tensor, Tensor]:
    """Both parts one behind the other, as `jettison::attention` wants to hear of them: `query` and `key_positions`.

    Args:
        stored: T.
        stored_tokens: `[B] i64`.
        recent: C.
        slots: `[B, S] i64`.

    Returns:
        `[B, S] i64` and `[B, T + C] i64`; negative where nothing is stored.
    """
    indices = torch.arange(stored, device=slots.device)
    of_stored = torch.where(indices < stored_tokens[:, None], indices, -1)
    of_recent = (stored + torch.arange(recent, device=slots.device))[None].expand(slots.shape[0], -1)
    return stored + slots, torch.cat([of_stored, of_recent], 1)


def _joint_attention(
    query: Tensor,
    stored_key: Tensor,
    stored_value: Tensor,
    stored_tokens: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    scale: float,
) -> Tensor:
    """One softmax over both parts; where nothing is stored, `jettison::attention` over `key` and `value` alone.

    Args:
        query: `[B, H, S, D]`.
        stored_key: `[B, Hkv, T, D]`, decompressed; T may be 0.
        stored_value: `[B, Hkv, T, D]`.
        stored_tokens: `[B] i64`, how many of the T a row has: the first ones, all older than the queries.
        key: `[B, Hkv, C, D]`.
        value: `[B, Hkv, C, D]`.
        slots: `[B, S] i64`, where among the C the tokens of this call are; a query sees the slots up to its own.
        scale: Factor on the scores.

    Returns:
        `[B, H, S, D]`, contiguous.
    """
    if not stored_key.shape[2] or not int(stored_tokens.max()):
        return torch.ops.jettison.attention(query, key, value, slots, None, None, None, scale, True, 0, 0.0)
    keys, values = torch.cat([stored_key, key], 2), torch.cat([stored_value, value], 2)
    positions = joint_positions(stored_key.shape[2], stored_tokens, key.shape[2], slots)
    return torch.ops.jettison.attention(query, keys, values, *positions, None, None, scale, True, 0, 0.0)


def _fake_joint_attention(
    query: Tensor,
    stored_key: Tensor,
    stored_value: Tensor,
    stored_tokens: Tensor,
    key: Tensor,
    value: Tensor,
    slots: Tensor,
    scale: float,
) -> Tensor:
    return query.new_empty(query.shape[0], query.shape[1], query.shape[2], value.shape[3])


joint_attention = define_op(
    "joint_attention(Tensor query, Tensor stored_key, Tensor stored_value, Tensor stored_tokens, Tensor key, "
    "Tensor value, Tensor slots, float scale) -> Tensor",
    _joint_attention,
    _fake_joint_attention,
)
