"""`jettison::write_slots`: the one way a program writes a KV cache."""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.ir.ops.registration import define_op


def write_slots_(state: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """Write `values` into `state` in place; the torch runtime calls this where the graph says `write_slots`.

    Args:
        state: `[B, Hkv, C, D]`, a buffer of C slots per row.
        values: `[B, Hkv, S, D]`, converted to the dtype of `state`.
        slots: `[B, S] i64`, the slot of each value; a negative slot drops the value. Or `[B, Hkv, S] i64`, where every
            head has slots of its own, none negative.

    Returns:
        `state` itself.
    """
    values = values.to(state.dtype)
    if slots.dim() == 3:
        return state.scatter_(2, slots[..., None].expand_as(values), values)
    if bool((slots >= 0).all()):
        batch = torch.arange(state.shape[0], device=state.device)[:, None].expand_as(slots)
        state.transpose(1, 2)[batch, slots] = values.transpose(1, 2)
        return state
    batch, column = (slots >= 0).nonzero(as_tuple=True)
    state.transpose(1, 2)[batch, slots[batch, column]] = values.transpose(1, 2)[batch, column]
    return state


def _write_slots(state: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    """A new state with `values` written at `slots`; see `write_slots_` for the arguments."""
    return write_slots_(state.clone(memory_format=torch.contiguous_format), values, slots)


def _fake_write_slots(state: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    return torch.empty_like(state, memory_format=torch.contiguous_format)


write_slots = define_op(
    "write_slots(Tensor state, Tensor values, Tensor slots) -> Tensor", _write_slots, _fake_write_slots
)
