"""Operators on states as the torch runtime runs them: in place, reading only the slots that some query sees.

The operators in `ir/ops` define what these must compute.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir import ops
from jettison.ir.ops.joint_attention import joint_positions
from jettison.ir.ops.windowed_attention import resident_tokens
from jettison.ir.ops.write_slots import write_slots_


@dataclass(frozen=True)
class SlotRange:
    """The slots of one call, looked at once for all layers.

    Attributes:
        slots: `[B, S] i64`.
        first: Smallest slot.
        last: Largest slot.
        is_run: Whether every row has the slots `first, ..., last` in this order.
    """

    slots: Tensor
    first: int
    last: int
    is_run: bool


def slot_range(slots: Tensor) -> SlotRange:
    """Look at the slots of a call.

    Args:
        slots: `[B, S] i64`, B and S at least 1; a negative slot drops its value.
    """
    rows, steps = slots.shape
    first = int(slots[0, 0])
    if rows == steps == 1:
        return SlotRange(slots, first, first, first >= 0)
    if first >= 0 and bool((slots == torch.arange(first, first + steps, device=slots.device)).all()):
        return SlotRange(slots, first, first + steps - 1, True)
    return SlotRange(slots, int(slots.min()), int(slots.max()), False)


def write_range_(state: Tensor, values: Tensor, found: SlotRange) -> Tensor:
    """`jettison::write_slots` into `state` itself.

    Args:
        state: `[B, Hkv, C, D]`.
        values: `[B, Hkv, S, D]`, converted to the dtype of `state`.
        found: Where.

    Returns:
        `state` itself.
    """
    if not found.is_run:
        return write_slots_(state, values, found.slots)
    state[:, :, found.first : found.last + 1] = values
    return state


def attend_slots(
    query: Tensor, key: Tensor, value: Tensor, found: SlotRange, key_positions: None, key_valid: None,
    sinks: Tensor | None, scale: float, causal: bool, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """`jettison::attention` where the slot of a token is its position; reads the slots that some query sees.

    Arguments as there, but for the positions.

    Returns:
        `[B, H, S, Dv]`.
    """
    first, last = found.first, found.last
    start = max(0, first + 1 - window) if window else 0
    key, value = key[:, :, start : last + 1], value[:, :, start : last + 1]
    if first == last and not softcap and sinks is None:
        return _attend_all(query, key, value, scale)
    slots = torch.arange(start, last + 1, device=query.device)[None]
    return ops.attention(query, key, value, found.slots, slots, None, sinks, scale, True, window, softcap)


def attend_both(
    query: Tensor, stored_key: Tensor, stored_value: Tensor, stored_tokens: Tensor, key: Tensor, value: Tensor,
    found: SlotRange, scale: float,
) -> Tensor:  # fmt: skip
    """`jettison::joint_attention`; reads the slots that some query sees.

    Arguments as there, but for the slots.

    Returns:
        `[B, H, S, D]`.
    """
    most = int(stored_tokens.max()) if stored_key.shape[2] else 0
    if not most:
        return attend_slots(query, key, value, found, None, None, None, scale, True, 0, 0.0)
    keys, values = (
        torch.cat([stored[:, :, :most], own[:, :, : found.last + 1]], 2)
        for stored, own in ((stored_key, key), (stored_value, value))
    )
    if found.first == found.last and bool((stored_tokens == most).all()):
        return _attend_all(query, keys, values, scale)
    positions = joint_positions(most, stored_tokens, found.last + 1, found.slots)
    return ops.attention(query, keys, values, *positions, None, None, scale, True, 0, 0.0)


def windowed_attention_(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, new_tokens: Tensor,
    total_tokens: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`jettison::windowed_attention` that updates the cache in place; the window moves only when the cache is full.

    Arguments as there.

    Returns:
        The output, and `past_key` and `past_value` themselves.
    """
    new, total = new_tokens.tolist(), total_tokens.tolist()
    if len(set(new)) > 1 or len(set(total)) > 1:
        rows = [slice(row, row + 1) for row in range(len(new))]
        outs = [
            windowed_attention_(
                query[row], key[row], value[row], past_key[row], past_value[row], new_tokens[row], total_tokens[row],
                sinks, scale, window, softcap,
            )[0]
            for row in rows
        ]  # fmt: skip
        return torch.cat(outs), past_key, past_value
    steps, capacity, before = query.shape[2], past_key.shape[2], total[0] - new[0]
    resident = int(resident_tokens(torch.tensor(before), capacity, window))
    stop = resident + steps
    if new[0] != steps or stop > capacity:
        out, new_key, new_value = ops.windowed_attention(
            query, key, value, past_key, past_value, new_tokens, total_tokens, sinks, scale, window, softcap
        )
        return out, past_key.copy_(new_key), past_value.copy_(new_value)
    past_key[:, :, resident:stop] = key
    past_value[:, :, resident:stop] = value
    start = max(0, resident + 1 - window)
    keys, values = past_key[:, :, start:stop].to(query.dtype), past_value[:, :, start:stop].to(query.dtype)
    if steps == 1 and not softcap and sinks is None:
        return _attend_all(query, keys, values, scale), past_key, past_value
    positions = torch.arange(before, before + steps)[None]
    slots = torch.arange(before - resident + start, before + steps)[None]
    out = ops.attention(query, keys, values, positions, slots, None, sinks, scale, True, window, softcap)
    return out, past_key, past_value


def _attend_all(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of one position that sees every key given: no mask to build and none to read.

    The query heads that share a key head go as rows of one head: the kernel then reads each key once, not once for each
    of them (1.9 times faster at 1,000 keys and 4 heads on a key head).
    """
    rows, heads, steps, _ = query.shape
    shared = query.reshape(rows, key.shape[1], -1, query.shape[3])
    out = F.scaled_dot_product_attention(shared, key, value, scale=scale)
    return out.reshape(rows, heads, steps, value.shape[3]).contiguous()
