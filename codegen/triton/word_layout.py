"""Quantised weights as the Triton kernels read them: 32-bit words whose fields lie far apart in the row.

A group of `group` columns in `bits` bits is `group * bits / 32` words. Field i of word j holds column `j + words * i`
of its group, so that one field of neighbouring words is a run of neighbouring columns: kernels take fields out of a
register with a shift and a mask, and read x in runs, without ever moving codes between lanes. With 3 bits, the two low
bits stand in words as with 2 bits, and the high bits of the 16 codes of a word in a half word beside it.

| tensor  | shape                                | dtype                                                           |
|---------|--------------------------------------|-----------------------------------------------------------------|
| words   | `[N, k_blocks * group * bits / 32]`  | i32; 16 codes of 2 bits each for 3 bits                         |
| highs   | `[N, k_blocks * group / 16]`         | i16, 3 bits alone                                               |
| scales  | `[N, k_blocks]`                      | that of the kernel                                              |
| offsets | `[N, k_blocks]` or None              | that of the kernel: `(middle - zero) * scale`, None for none    |

The bytes are those of `jettison::quantized_linear` but for scales and zero points, which stand next to each other in
the dtype that the kernel computes with, instead of fp32 and packed bits. `w = (code - middle) * scale + offset`, with
the middle `2**(bits - 1)`: sums of centred codes lose less to rounding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from jettison.ir.ops.quantized_linear import row_chunks, unpack_codes, unpack_zeros

GROUPS = (32, 64, 128)
BITS = (8, 4, 3, 2)
# Codes of a word whose high bits stand in a half word.
_CODES_OF_HIGHS = 16


def word_bits(bits: int) -> int:
    """Bits of a field of a word."""
    return 2 if bits == 3 else bits


def fields(bits: int) -> int:
    """Codes in a word."""
    return 32 // word_bits(bits)


def group_words(bits: int, group: int) -> int:
    """Words of a group."""
    return group // fields(bits)


def refusal(bits: int, group: int) -> str | None:
    """Why no kernel reads such a weight, or None if they do."""
    if bits not in BITS:
        return f"kernels read {', '.join(map(str, sorted(BITS)))} bits, not {bits}"
    if group not in GROUPS:
        return f"groups of {group} columns do not fill the tiles of the kernels: needed {', '.join(map(str, GROUPS))}"
    return None


def scale_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of scales and offsets, for a kernel that computes in `dtype`.

    Half precision keeps 11 bits of them, which no rounding to 8 bits or less notices.
    """
    return torch.float32 if dtype == torch.float32 else torch.float16


@dataclass(frozen=True)
class WordWeight:
    """A weight in this layout; see the table of the module.

    Attributes:
        words: Codes.
        highs: High bits of 3-bit codes, or None.
        scales: Per group.
        offsets: Per group, or None.
        table: Of the values of codes, f32, where they are no numbers themselves.
    """

    words: Tensor
    highs: Tensor | None
    scales: Tensor
    offsets: Tensor | None
    table: Tensor | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """What a kernel takes, in the order of its parameters."""
        parts = (self.words, self.highs, self.scales, self.offsets, self.table)
        return [each for each in parts if each is not None]

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(each.nbytes for each in self.tensors)


def to_words(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, dtype: torch.dtype,
    device: torch.device, table: Tensor | None = None,
) -> WordWeight:  # fmt: skip
    """Copy a weight into this layout, some rows at a time.

    Args:
        codes: As in `jettison::quantized_linear`, like the next four.
        scales: Per group.
        zeros: Per group, or None.
        bits: Per code.
        group: Columns that share a scale.
        dtype: Of scales and offsets.
        device: Of the result.
        table: `[2**bits]` values of the codes, or None.
    """
    rows, k_blocks = scales.shape
    n_fields, width = fields(bits), group_words(bits, group)
    words = torch.empty(rows, k_blocks * width, dtype=torch.int32, device=device)
    highs = torch.empty(rows, k_blocks * width, dtype=torch.int16, device=device) if bits == 3 else None
    for part in row_chunks(rows, k_blocks * group):
        code = unpack_codes(codes[part], bits).reshape(-1, k_blocks, n_fields, width)
        words[part] = _joined(code & (2 ** word_bits(bits) - 1), word_bits(bits))
        if highs is not None:
            highs[part] = _joined(code >> 2, 1).to(torch.int16)
    own_scales = scales.to(device=device, dtype=dtype)
    offsets = None
    if zeros is not None:
        wide = scales.to(torch.float32)
        centred = float(2 ** (bits - 1)) - unpack_zeros(zeros, bits, k_blocks)
        offsets = (centred * wide).to(device=device, dtype=dtype)
    own_table = None if table is None else table.to(device=device, dtype=torch.float32).contiguous()
    return WordWeight(words, highs, own_scales.contiguous(), offsets, own_table)


def _joined(code: Tensor, bits: int) -> Tensor:
    """`[n, k_blocks, F, W] u8` to `[n, k_blocks * W] i32`, field i `bits * i` bits up."""
    word = torch.zeros(code.shape[0], code.shape[1], code.shape[3], dtype=torch.int64)
    for index in range(code.shape[2]):
        word |= code[:, :, index].to(torch.int64) << bits * index
    # Of 32 bits the highest is the sign.
    return word.to(torch.int32).flatten(1)
