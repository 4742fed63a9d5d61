"""A tile of a bitmap weight, 64 columns of some rows, expanded in registers: it is loaded sparse and computed dense.

Layout and numbers are those of `jettison::bitmap_linear`; beside its parts a kernel reads where each row begins,
`begins` i64 `[N]`, which is made when a weight is loaded. Every lane counts the bits in front of its own in two words
of 32 columns and loads its value, so that no lane waits for another; rows of a tile go on from block to block by
counting all bits.

Source: Flash-LLM (arXiv 2309.10285) for loading sparse and computing dense; its words of 16-bit positions take more.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jettison.codegen.triton.kernels.base import ELEMENTS, lines

BLOCK = 64


@dataclass(frozen=True)
class BitmapForm:
    """How a weight is stored.

    Attributes:
        bits: Of a value: 4, 8, 16 or 32.
        group: Columns that share a scale, a multiple of 64.
        values: Dtype of stored values.
    """

    bits: int
    group: int
    values: torch.dtype = torch.uint8

    @property
    def has_scales(self) -> bool:
        """Whether values are codes."""
        return self.bits <= 8

    @property
    def name(self) -> str:
        """For names of kernels."""
        return f"bitmap_int{self.bits}_g{self.group}" if self.has_scales else f"bitmap_{ELEMENTS[self.values]}"

    @property
    def parameters(self) -> dict[str, str]:
        """Pointers, in the order of `tensors` of a step."""
        scales = {"scales_ptr": "*bf16"} if self.has_scales else {}
        return {"bitmap_ptr": "*i32", "begins_ptr": "*i64", "values_ptr": f"*{ELEMENTS[self.values]}", **scales}

    def start_lines(self, mask: str) -> list[str]:
        """Before the first block of the rows `row`; `N` and `K` are known."""
        guard = f", mask={mask}, other=0" if mask else ""
        return lines(
            f"BLOCKS: tl.constexpr = (K + {BLOCK - 1}) // {BLOCK}",
            f"GROUPS: tl.constexpr = (K + {self.group - 1}) // {self.group}" if self.has_scales else "",
            f"lane = tl.arange(0, {BLOCK})",
            "half = lane // 32",
            "# Bits in front of the own one, in the word where that is.",
            "before = (1 << (lane % 32)) - 1",
            f"begin = tl.load(begins_ptr + row{guard})",
        )

    def block_lines(self, mask: str) -> list[str]:
        """One block, number `number`: `w` f32 `[rows, 64]`, and `column` of its lanes; `begin` goes on to the next."""
        guard = f", mask={mask}, other=0" if mask else ""
        wide = f", mask=({mask})[:, None], other=0" if mask else ""
        kept = f"is_kept & ({mask})[:, None]" if mask else "is_kept"
        return lines(
            f"column = number * {BLOCK} + lane",
            "word_at = row.to(tl.int64) * (2 * BLOCKS) + 2 * number",
            f"first_word = tl.load(bitmap_ptr + word_at{guard})",
            f"second_word = tl.load(bitmap_ptr + word_at + 1{guard})",
            f"word = tl.load(bitmap_ptr + word_at[:, None] + half[None, :]{wide})",
            "is_kept = ((word >> (lane % 32)[None, :]) & 1) != 0",
            *_count_lines("first_count", "first_word"),
            *_count_lines("second_count", "second_word"),
            *_count_lines("rank", "(word & before[None, :])"),
            "rank += tl.where(half[None, :] > 0, first_count[:, None], 0)",
            *self._value_lines(kept, guard),
            "count = first_count + second_count",
            f"begin += {'(count + 1) // 2' if self.bits == 4 else 'count'}",
        )

    def _value_lines(self, kept: str, guard: str) -> list[str]:
        place = "begin[:, None] + rank // 2" if self.bits == 4 else "begin[:, None] + rank"
        load = f"tl.load(values_ptr + {place}, mask={kept}, other=0)"
        if not self.has_scales:
            return [f"w = {load}.to(tl.float32)"]
        code = [f"code = {load}.to(tl.int32)"]
        if self.bits == 4:
            code.append("code = (code >> (rank % 2 * 4)) & 15")
        middle = 1 << (self.bits - 1)
        return [
            *code,
            f"scale_at = row.to(tl.int64) * GROUPS + number // {self.group // BLOCK}",
            f"scale = tl.load(scales_ptr + scale_at{guard}).to(tl.float32)",
            f"number_of_code = tl.where(is_kept, (code ^ {middle}) - {middle}, 0)",
            "w = number_of_code.to(tl.float32) * scale[:, None]",
        ]


def _count_lines(name: str, word: str) -> list[str]:
    """The number of bits of words of 32; Triton has no operator for it that its interpreter runs."""
    return [
        f"{name} = {word} - (({word} >> 1) & 0x55555555)",
        f"{name} = ({name} & 0x33333333) + (({name} >> 2) & 0x33333333)",
        f"{name} = ({name} + ({name} >> 4)) & 0x0F0F0F0F",
        f"{name} = ({name} + ({name} >> 8)) & 0x00FF00FF",
        f"{name} = ({name} + ({name} >> 16)) & 0xFF",
    ]
