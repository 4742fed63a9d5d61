"""What the kernels that sum rows of a weight against one x share: runs of words, and what is added for each.

A run is `[BLOCK_N, BLOCK_W]`: some words of some rows. Every lane keeps its own sum until the rows end.
"""

from __future__ import annotations

from dataclasses import dataclass

from jettison.codegen.triton.kernels.base import deeper, lines
from jettison.codegen.triton.kernels.weight_form import WeightForm

# Words, one for each lane of a warp.
LEAST_RUN = 32


def longest_run(words: int) -> int:
    """Words of the longest run that fills the words of a row without a mask; if that is too short, with one."""
    most = words & -words
    return most if most >= LEAST_RUN else max(LEAST_RUN, 1 << (words - 1).bit_length())


@dataclass(frozen=True)
class RowSums:
    """Lines that add a run of words.

    Attributes:
        weight: Form of the weight.
        columns: K, numbers of x.
        halves: Suffix of the variables of each matrix: one, or the two of a gate.
        is_masked: Whether runs end behind the row: `in_row` says which words are in it.
        x: Expression of where x begins.
        has_norm: Whether x is multiplied by the weight of an RMS norm, and its squares are summed.
    """

    weight: WeightForm
    columns: int
    halves: tuple[str, ...]
    is_masked: bool
    x: str = "x_ptr"
    has_norm: bool = False

    @property
    def sums(self) -> list[str]:
        """Variables of the finished sums `[BLOCK_N]`."""
        return ["sums", "up_sums"][: len(self.halves)]

    def start_lines(self) -> list[str]:
        """Nothing summed yet."""
        return lines(
            [f"total{half} = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)" for half in self.halves],
            "squares = tl.zeros([BLOCK_W], tl.float32)" if self.has_norm else "",
        )

    def add_lines(self) -> list[str]:
        """Add the words that are loaded (`packed` and what belongs to it), whose first columns are `column`."""
        return self._grouped() if self.weight.bits else self._dense()

    def finish_lines(self) -> list[str]:
        """Sums of the lanes."""
        return [f"{name} = tl.sum(total{half}, 1)" for name, half in zip(self.sums, self.halves, strict=True)]

    def _x_lines(self, column: str) -> list[str]:
        """`x`, and the sum of its squares."""
        masks = ["in_row"] * self.is_masked
        if self.weight.bits and self.columns % self.weight.group:
            masks.append(f"({column} < {self.columns})")
        guard = f", mask={' & '.join(masks)}, other=0" if masks else ""
        found = [f"x = tl.load({self.x} + {column}{guard}).to(tl.float32)"]
        if self.has_norm:
            found += ["squares += x * x", f"x *= tl.load(norm_ptr + {column}{guard}).to(tl.float32)"]
        return found

    def _dense(self) -> list[str]:
        return [*self._x_lines("column"), *(f"total{half} += packed{half} * x[None, :]" for half in self.halves)]

    def _grouped(self) -> list[str]:
        """Scales and offsets are applied to sums over the fields of a word, all of one group."""
        has_offsets, weight, halves = self.weight.has_offsets, self.weight, self.halves
        products = lines(
            "x_sum += x" if has_offsets else "",
            weight.x_lines(),
            *([*weight.code_lines(half), f"part{half} += code * x[None, :]"] for half in halves),
        )
        return lines(
            [f"part{half} = tl.zeros([BLOCK_N, BLOCK_W], tl.float32)" for half in halves],
            "" if weight.has_table else "x_bias = tl.zeros([BLOCK_W], tl.float32)",
            "x_sum = tl.zeros([BLOCK_W], tl.float32)" if has_offsets else "",
            f"for chunk in tl.static_range({weight.chunks}):",
            deeper(lines(*(weight.chunk_lines(half) for half in halves))),
            f"    for field in tl.static_range({weight.chunk_fields}):",
            deeper(deeper(lines(
                f"of_field = column + (chunk * {weight.chunk_fields} + field) * GROUP_WORDS",
                self._x_lines("of_field"),
                products,
            ))),
            [
                f"total{half} += scale{half} * part{half}" if weight.has_table else
                f"total{half} += scale{half} * (part{half} - x_bias[None, :])"
                for half in halves
            ],
            [f"total{half} += offset{half} * x_sum[None, :]" for half in halves if has_offsets],
        )  # fmt: skip
