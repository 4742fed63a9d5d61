"""The second half of a sparse feed-forward layer, quantised: rows of down `[E, F]`, of which a token names columns.

Slabs are runs of words in each row. A program sums some rows as a linear on one row of x does, over the words of the
named slabs one behind the other; so the sum is split over the lanes of a program and never over programs. Runs of a
slab are as long as its codes: 64 bytes for 128 neurons in 4 bits, and 16 for 32, half of what memory hands over at
least. Down is held as the linears of prompts read it, in rows; slab by slab would need a second copy.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from jettison.codegen.triton.kernels.base import ELEMENTS, TRITON_TYPES, Kernel, Tuning, block, deeper, lines
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.kernels.row_sums import LEAST_RUN, RowSums
from jettison.codegen.triton.kernels.stand_ins import sum_line, taken_off_lines
from jettison.codegen.triton.kernels.weight_form import ONE, WeightForm

# Rows of a program that every weight may be cut into without a mask.
_ROWS = 16
# Words of a tile in the interpreter.
_WIDEST = 1 << 18


@dataclass(frozen=True)
class GatherPackedDown(Kernel):
    """`out = hidden @ down.T[slabs] + bias + absent[-1] - absent[indices].sum() + residual`.

    hidden `[M, k * group]` and indices `[M, k] i64` to `[M, E]`.

    Attributes:
        weight: Form of down `[E, F]`, quantised.
        rows: E.
        neurons: F.
        kept: k, slabs of a token.
        group: Neurons of a slab, whole groups of the weight.
        dtype: Of everything else.
        has_stand_ins: Whether there is `absent [F / group + 1, E]`.
        epilogue: Bias and residual.
    """

    weight: WeightForm
    rows: int
    neurons: int
    kept: int
    group: int
    dtype: torch.dtype
    has_stand_ins: bool = False
    epilogue: Epilogue = field(default_factory=Epilogue)

    @property
    def name(self) -> str:
        """See `Kernel`."""
        after = "".join(f"{each}_" for each in ("absent" * self.has_stand_ins, self.epilogue.name) if each)
        sizes = f"k{self.neurons}_n{self.rows}_{self.kept}x{self.group}"
        return f"gather_down_{self.weight.name}_{after}{sizes}_{ELEMENTS[self.dtype]}"

    @property
    def title(self) -> str:
        """See `Kernel`."""
        return (
            f"{self.kept} slabs of {self.group} neurons to {self.rows} columns, for each token its own: "
            f"{self.weight.name}."
        )

    @property
    def parameters(self) -> dict[str, str]:
        """See `Kernel`."""
        element = f"*{ELEMENTS[self.dtype]}"
        absent = {"absent_ptr": element} if self.has_stand_ins else {}
        after = self.epilogue.parameters(ELEMENTS[self.dtype])
        return {
            "hidden_ptr": element, "indices_ptr": "*i64", **self.weight.parameters, **absent, **after,
            "out_ptr": element,
        }  # fmt: skip

    @property
    def slab_words(self) -> int:
        """Words of a slab in a row."""
        return self.weight.row_words(self.group)

    def tunings(self) -> list[Tuning]:
        """See `Kernel`."""
        wanted = [(4, 256, 4), (8, 256, 4), (8, 128, 4), (16, 128, 4), (4, 512, 4), (2, 512, 4)]
        # Named words seldom divide evenly, whatever the length of a run.
        most = max(LEAST_RUN, 1 << (self.kept * self.slab_words - 1).bit_length())
        found = [Tuning.of(warps, BLOCK_N=rows, BLOCK_W=min(words, most)) for rows, words, warps in wanted]
        return list(dict.fromkeys(found))

    def widest(self) -> Tuning:
        """See `Kernel`."""
        run = max(tuning["BLOCK_W"] for tuning in self.tunings())
        # Without a mask, tiles must fill the rows.
        rows = 1 << (self.rows - 1).bit_length() if self.rows % _ROWS else self.rows & -self.rows
        return Tuning.of(BLOCK_N=min(rows, max(_ROWS, _WIDEST // run)), BLOCK_W=run)

    def grid(self, tuning: Tuning, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """See `Kernel`."""
        return (-(-self.rows // tuning["BLOCK_N"]), sizes["M"])

    @property
    def _row_mask(self) -> str:
        return "row < E" if self.rows % _ROWS else ""

    @property
    def _sums(self) -> RowSums:
        words, columns = self.kept * self.slab_words, self.kept * self.group
        is_masked = any(words % tuning["BLOCK_W"] for tuning in self.tunings())
        return RowSums(self.weight, columns, ("",), is_masked, f"hidden_ptr + token * {columns}")

    def body(self) -> str:
        """See `Kernel`."""
        sums, row_mask = self._sums, self._row_mask
        guard = f", mask={row_mask}" if row_mask else ""
        # Offsets in words past 2**31 need wide integers.
        wide = ".to(tl.int64)" if self.rows * self.weight.row_words(self.neurons) >= 2**31 else ""
        return block(
            f"E: tl.constexpr = {self.rows}",
            f"KEPT: tl.constexpr = {self.kept}  # slabs of a token",
            f"SLAB_WORDS: tl.constexpr = {self.slab_words}",
            "KEPT_WORDS: tl.constexpr = KEPT * SLAB_WORDS",
            self.weight.shape_lines(self.neurons),
            "token = tl.program_id(1).to(tl.int64)",
            f"row = tl.program_id(0){wide} * BLOCK_N + tl.arange(0, BLOCK_N)",
            sums.start_lines(),
            ONE,
            "# jettison.quantized_sparse_mlp",
            "for first in range(0, KEPT_WORDS, BLOCK_W):",
            deeper(self._step(sums)),
            self._taken_off() if self.has_stand_ins else "",
            sums.finish_lines(),
            sum_line(self.neurons // self.group, "row", guard) if self.has_stand_ins else "",
            self.epilogue.lines("row", "token * E + row", row_mask, row_mask),
            f"tl.store(out_ptr + token * E + row, y.to({TRITON_TYPES[self.dtype]}){guard})",
        )

    def _step(self, sums: RowSums) -> list[str]:
        """What is added for one run of words of the named slabs of each row."""
        masks = ["in_row[None, :]"] * sums.is_masked + [f"({self._row_mask})[:, None]"] * bool(self._row_mask)
        guard = ", mask=in_row, other=0" if sums.is_masked else ""
        run = self.slab_words & -self.slab_words
        return lines(
            "kept = first + tl.arange(0, BLOCK_W)",
            "in_row = kept < KEPT_WORDS" if sums.is_masked else "",
            f"slab = tl.load(indices_ptr + token * KEPT + kept // SLAB_WORDS{guard}).to(tl.int32)",
            "# The compiler cannot see through an index that words stand side by side.",
            f"at = tl.max_contiguous(tl.multiple_of(slab * SLAB_WORDS + kept % SLAB_WORDS, {run}), {run})",
            self.weight.column_line("kept"),
            self.weight.offset_lines(),
            self.weight.load_lines(" & ".join(masks)),
            sums.add_lines(),
        )

    def _taken_off(self) -> list[str]:
        mask = "inside[None, :]" + (f" & ({self._row_mask})[:, None]" if self._row_mask else "")
        place = "begin + tl.arange(0, BLOCK_W)"
        return taken_off_lines("0, KEPT, BLOCK_W", place, "named[None, :] * E + row[:, None]", mask)
