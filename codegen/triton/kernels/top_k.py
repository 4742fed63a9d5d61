"""The largest logits of each row, so that a step hands over a few numbers and not a vocabulary.

A logit and where it stands are one integer that sorts like the logit, and, of equal logits, like the lower token: so
the largest integer is the first of the largest logits, which is what `argmax` of NumPy returns. Programs take blocks of
a row; the last one, by a counter that is zero again afterwards, picks from what all of them found. Logits that are not
numbers come first, as infinity: whoever draws refuses them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from jettison.codegen.triton.kernels.base import ELEMENTS, Kernel, Tuning, block, deeper, lines

# What a program holds in registers, with its integers.
MOST = 64
_NOTHING = "-(1 << 63)"


@dataclass(frozen=True)
class TopK(Kernel):
    """`[B, V]` to values `[B, k]`, descending, and tokens `[B, k]`.

    Attributes:
        count: k, at most 64; 1 is `argmax`.
        columns: V.
        dtype: Of the logits.
    """

    count: int
    columns: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """See `Kernel`."""
        return f"top_{self.count}_v{self.columns}_{ELEMENTS[self.dtype]}"

    @property
    def title(self) -> str:
        """See `Kernel`."""
        return f"The {self.count} largest of {self.columns} logits."

    @property
    def parameters(self) -> dict[str, str]:
        """See `Kernel`."""
        return {
            "logits_ptr": f"*{ELEMENTS[self.dtype]}", "found_ptr": "*i64", "counters_ptr": "*i32",
            "values_ptr": "*fp32", "tokens_ptr": "*i64",
        }  # fmt: skip

    @property
    def padded(self) -> int:
        """Candidates that a program leaves: k, and what is missing to a power of two."""
        return 1 << (self.count - 1).bit_length()

    def tunings(self) -> list[Tuning]:
        """See `Kernel`."""
        return [Tuning.of(warps, BLOCK_V=size) for size, warps in ((2048, 4), (4096, 8), (1024, 4))]

    def widest(self) -> Tuning:
        """See `Kernel`."""
        return Tuning.of(BLOCK_V=max(64, 1 << (-(-self.columns // 2) - 1).bit_length()))

    def blocks(self, tuning: Tuning) -> int:
        """Programs of a row."""
        return -(-self.columns // tuning["BLOCK_V"])

    def grid(self, tuning: Tuning, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """See `Kernel`."""
        return (sizes["B"], self.blocks(tuning))

    def body(self) -> str:
        """See `Kernel`."""
        return block(
            f"V: tl.constexpr = {self.columns}",
            f"COUNT: tl.constexpr = {self.count}",
            f"PADDED: tl.constexpr = {self.padded}",
            "BLOCKS: tl.constexpr = (V + BLOCK_V - 1) // BLOCK_V",
            "ALL: tl.constexpr = triton.next_power_of_2(BLOCKS * PADDED)",
            "row = tl.program_id(0).to(tl.int64)",
            "at = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)",
            "logit = tl.load(logits_ptr + row * V + at, mask=at < V, other=-float('inf')).to(tl.float32)",
            "# Of zeros there is one.",
            "logit = tl.where(logit == logit, logit, float('inf')) + 0.0",
            "# Bits of a float sort like integers, those of negative ones backwards.",
            "bits = logit.to(tl.int32, bitcast=True)",
            "bits = bits ^ ((bits >> 31) & 0x7FFFFFFF)",
            "key = (bits.to(tl.int64) << 32) | (V - 1 - at).to(tl.int64)",
            f"key = tl.where(at < V, key, {_NOTHING})",
            "of_found = (row * BLOCKS + tl.program_id(1)) * PADDED",
            "for place in range(PADDED):",
            deeper([
                "best = tl.max(key, 0)",
                "tl.store(found_ptr + of_found + place, best)",
                f"key = tl.where(key == best, {_NOTHING}, key)",
            ]),
            "tl.debug_barrier()",
            "finished = tl.atomic_add(counters_ptr + row, 1, sem='acq_rel')",
            "if finished == BLOCKS - 1:",
            deeper(lines(
                "tl.debug_barrier()",
                "other = tl.arange(0, ALL)",
                "left = tl.load(found_ptr + row * BLOCKS * PADDED + other, mask=other < BLOCKS * PADDED, "
                f"other={_NOTHING})",
                "for place in range(COUNT):",
                deeper([
                    "most = tl.max(left, 0)",
                    "high = (most >> 32).to(tl.int32)",
                    "high = high ^ ((high >> 31) & 0x7FFFFFFF)",
                    "tl.store(values_ptr + row * COUNT + place, high.to(tl.float32, bitcast=True))",
                    "tl.store(tokens_ptr + row * COUNT + place, V - 1 - (most & 0xFFFFFFFF))",
                    f"left = tl.where(left == most, {_NOTHING}, left)",
                ]),
                "tl.store(counters_ptr + row, 0)",
            )),
        )  # fmt: skip
