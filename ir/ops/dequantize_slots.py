"""`jettison::dequantize_slots`: what `jettison::quantize_slots` made, as values again."""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.ir.ops.quantize_slots import split_in_groups
from jettison.ir.ops.registration import define_op


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The codes in `[..., W] u8`, as `[..., W * 8 / bits] f32`."""
    if bits == 8:
        return packed.to(torch.float32)
    per_byte, width = 8 // bits, packed.shape[-1]
    codes = torch.empty(*packed.shape[:-1], per_byte * width, dtype=torch.float32, device=packed.device)
    for index in range(per_byte):
        shifted = packed >> bits * index if index else packed
        part = shifted & 2**bits - 1 if index < per_byte - 1 else shifted
        codes[..., index * width : (index + 1) * width] = part
    return codes


def _dequantize_slots(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, tokens: int, rows: int) -> Tensor:
    """The values that `quantize_slots` quantised.

    Args:
        codes: `[B, Hkv, N, tokens * D * bits / 8] u8`.
        scales: `[B, Hkv, N, rows * columns] f16`.
        zeros: As `scales`.
        bits: 2, 4 or 8.
        tokens: Per slot.
        rows: Groups along the tokens.

    Returns:
        `[B, Hkv, N * tokens, D] f32`.
    """
    values = unpack(codes.unflatten(3, (tokens, -1)), bits)
    groups = split_in_groups(values, rows, scales.shape[3] // rows)
    scales, zeros = (
        each.to(torch.float32).unflatten(3, (rows, -1))[:, :, :, :, None, :, None] for each in (scales, zeros)
    )
    groups.mul_(scales).add_(zeros)
    return values.flatten(2, 3)


def _fake_dequantize_slots(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, tokens: int, rows: int) -> Tensor:
    batch, heads, slots, width = codes.shape
    return codes.new_empty(batch, heads, slots * tokens, width * 8 // bits // tokens, dtype=torch.float32)


dequantize_slots = define_op(
    "dequantize_slots(Tensor codes, Tensor scales, Tensor zeros, int bits, int tokens, int rows) -> Tensor",
    _dequantize_slots,
    _fake_dequantize_slots,
)
