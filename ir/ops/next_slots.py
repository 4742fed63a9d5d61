"""`jettison::next_slots`: where the tokens of a call go in a cache that has dropped some of the earlier ones."""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.ir.ops.registration import define_op


def _next_slots(mask: Tensor, input_ids: Tensor) -> Tensor:
    """The slots behind those that a row holds, one for each token of the call.

    Args:
        mask: `[B, T] i64`, ones for the tokens that a row holds, this call included, then zeros.
        input_ids: `[B, S] i64`; every token of the call is real, none is padding.

    Returns:
        `[B, S] i64`.
    """
    steps = input_ids.shape[1]
    return mask.sum(1)[:, None] - steps + torch.arange(steps, device=mask.device)[None]


def _fake_next_slots(mask: Tensor, input_ids: Tensor) -> Tensor:
    return input_ids.new_empty(input_ids.shape)


next_slots = define_op("next_slots(Tensor mask, Tensor input_ids) -> Tensor", _next_slots, _fake_next_slots)
