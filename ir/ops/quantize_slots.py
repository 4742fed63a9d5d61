"""`jettison::quantize_slots`: what a cache holds, in a few bits per value."""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.ir.ops.registration import define_op

HALF_MAX = torch.finfo(torch.float16).max


def split_in_groups(x: Tensor, rows: int, columns: int) -> Tensor:
    """`[B, Hkv, N, T, D]` as `[B, Hkv, N, rows, T / rows, columns, D / columns]`."""
    return x.unflatten(4, (columns, -1)).unflatten(3, (rows, -1))


def _quantize_slots(values: Tensor, bits: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Quantise the tokens of each slot in groups of tokens and channels.

    The range of a group is split evenly: `x = code * scale + zero`. Codes are rounded against scale and zero as they
    are stored; a constant group has scale 0 and codes 0.

    Args:
        values: `[B, Hkv, N, T, D]`, T tokens per slot.
        bits: 2, 4 or 8.
        rows: Groups along T; a divisor.
        columns: Groups along D; a divisor.

    Returns:
        Codes `[B, Hkv, N, T * D * bits / 8] u8`, within each token the first part of the channels in the lowest bits;
        scales and zeros `[B, Hkv, N, rows * columns] f16`.
    """
    groups = split_in_groups(values.to(torch.float32), rows, columns)
    low, high = groups.amin((4, 6), keepdim=True), groups.amax((4, 6), keepdim=True)
    zeros = low.clamp(-HALF_MAX, HALF_MAX).to(torch.float16)
    start = zeros.to(torch.float32)
    most = 2.0**bits - 1
    scales = ((high - start) / most).clamp(0, HALF_MAX).to(torch.float16)
    step = scales.to(torch.float32)
    codes = ((groups - start) / torch.where(step > 0, step, 1.0)).round().clamp(0, most)
    codes = torch.where(step > 0, codes, 0.0).to(torch.uint8).reshape(values.shape)
    parts = codes.chunk(8 // bits, -1)
    packed = parts[0]
    for index, part in enumerate(parts[1:], 1):
        packed = packed | part << bits * index
    return packed.flatten(3), scales.flatten(3), zeros.flatten(3)


def _fake_quantize_slots(values: Tensor, bits: int, rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, heads, slots, tokens, dim = values.shape
    ranges = [values.new_empty(batch, heads, slots, rows * columns, dtype=torch.float16) for _ in range(2)]
    return values.new_empty(batch, heads, slots, tokens * dim * bits // 8, dtype=torch.uint8), *ranges


quantize_slots = define_op(
    "quantize_slots(Tensor values, int bits, int rows, int columns) -> (Tensor, Tensor, Tensor)",
    _quantize_slots,
    _fake_quantize_slots,
)
