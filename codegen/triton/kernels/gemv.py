"""A linear layer on one row of x: each program sums some rows of the weight, read once, front to back.

The sum over K is split over the lanes of a program and never over programs: no partial sums in memory, and the same
result each time. RMS norm as a prologue costs nothing but its weight: the sum of squares is made on the way, and
`1 / rms`, which all columns share, multiplies the finished sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from jettison.codegen.triton.kernels.base import ELEMENTS, TRITON_TYPES, Kernel, Tuning, block, deeper, lines, name_of
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.kernels.row_sums import RowSums, longest_run
from jettison.codegen.triton.kernels.weight_form import ONE, WeightForm

# Rows of a program that every weight may be cut into without a mask.
_ROWS = 16
# Rows of each half of a gate, and of codes that are looked up in a table.
_GATED_ROWS, _LOOKED_UP_ROWS = 8, 4
# Words of a tile in the interpreter.
_WIDEST = 1 << 18


@dataclass(frozen=True)
class Gemv(Kernel):
    """`y = epilogue(norm(x) @ w.T)`.

    Attributes:
        weight: Form of the weight `[N, K]`; `[2 N, K]` of a gate and its other half.
        columns: K.
        rows: N.
        dtype: Of x and the result.
        norm_eps: Of an RMS norm of x; None without one.
        epilogue: What follows.
    """

    weight: WeightForm
    columns: int
    rows: int
    dtype: torch.dtype
    norm_eps: float | None = None
    epilogue: Epilogue = field(default_factory=Epilogue)

    @property
    def name(self) -> str:
        """See `Kernel`."""
        norm = "" if self.norm_eps is None else f"rms_norm{name_of(self.norm_eps)}_"
        after = f"_{self.epilogue.name}" if self.epilogue.name else ""
        return f"{norm}gemv_{self.weight.name}{after}_k{self.columns}_n{self.rows}_{ELEMENTS[self.dtype]}"

    @property
    def title(self) -> str:
        """See `Kernel`."""
        norm = "" if self.norm_eps is None else "RMS norm, then "
        return f"{norm}a linear layer of {self.columns} to {self.rows} on one row: {self.weight.name}."

    @property
    def parameters(self) -> dict[str, str]:
        """See `Kernel`."""
        element = ELEMENTS[self.dtype]
        norm = {} if self.norm_eps is None else {"norm_ptr": f"*{element}"}
        after = self.epilogue.parameters(element)
        return {"x_ptr": f"*{element}", **norm, **self.weight.parameters, **after, "out_ptr": f"*{element}"}

    def tunings(self) -> list[Tuning]:
        """See `Kernel`."""
        wanted = [(8, 512, 4), (4, 512, 4), (4, 1024, 8), (16, 256, 4), (8, 256, 4), (2, 1024, 4), (1, 2048, 4)]
        if not self.weight.bits:
            wanted = [(4, 1024, 4), (8, 512, 4), (2, 2048, 8), (4, 2048, 8)]
        if self.weight.has_table:  # a value that is looked up takes an address, too
            wanted = [each for each in wanted if each[0] <= _LOOKED_UP_ROWS]
        if self.epilogue.is_gated:  # twice the sums, scales and offsets: more rows do not fit into registers
            wanted = [each for each in wanted if each[0] <= _GATED_ROWS]
        most = longest_run(self.weight.row_words(self.columns))
        found = [Tuning.of(warps, BLOCK_N=rows, BLOCK_W=min(words, most)) for rows, words, warps in wanted]
        return list(dict.fromkeys(found))

    def widest(self) -> Tuning:
        """See `Kernel`."""
        run = max(tuning["BLOCK_W"] for tuning in self.tunings())
        # Without a mask, tiles must fill the rows.
        rows = 1 << (self.rows - 1).bit_length() if self.rows % _ROWS else self.rows & -self.rows
        return Tuning.of(BLOCK_N=min(rows, max(_ROWS, _WIDEST // run)), BLOCK_W=run)

    @property
    def _is_masked(self) -> bool:
        return any(self.weight.row_words(self.columns) % tuning["BLOCK_W"] for tuning in self.tunings())

    def grid(self, tuning: Tuning, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """See `Kernel`."""
        return (-(-self.rows // tuning["BLOCK_N"]),)

    def body(self) -> str:
        """See `Kernel`."""
        is_even = not self.rows % _ROWS
        row_mask = "" if is_even else "row < N"
        sums = self._sums
        norm = []
        if self.norm_eps is not None:
            norm = [
                "# aten.rms_norm",
                f"inverse_rms = 1.0 / tl.sqrt(tl.sum(squares, 0) / {self.columns} + {self.norm_eps!r})",
                *(f"{name} *= inverse_rms" for name in sums.sums),
            ]
        guard = f", mask={row_mask}" if row_mask else ""
        # Offsets in elements past 2**31 need wide integers.
        wide = ".to(tl.int64)" if len(sums.halves) * self.rows * self.weight.row_words(self.columns) >= 2**31 else ""
        return block(
            f"N: tl.constexpr = {self.rows}",
            self.weight.shape_lines(self.columns),
            f"row = tl.program_id(0){wide} * BLOCK_N + tl.arange(0, BLOCK_N)",
            sums.start_lines(),
            ONE if self.weight.bits and not self.weight.has_table else "",
            f"# {self.weight.operator}, and the squares that the norm needs" if norm else f"# {self.weight.operator}",
            "for first in range(0, ROW_WORDS, BLOCK_W):",
            deeper(self._step(row_mask, sums)),
            sums.finish_lines(),
            norm,
            self.epilogue.lines("row", "row", row_mask, row_mask),
            f"tl.store(out_ptr + row, y.to({TRITON_TYPES[self.dtype]}){guard})",
        )

    @property
    def _sums(self) -> RowSums:
        halves = ("", "_up") if self.epilogue.is_gated else ("",)
        return RowSums(self.weight, self.columns, halves, self._is_masked, has_norm=self.norm_eps is not None)

    def _step(self, row_mask: str, sums: RowSums) -> list[str]:
        """What is added for one run of words of each row."""
        masks = ["in_row[None, :]"] * self._is_masked + [f"({row_mask})[:, None]"] * bool(row_mask)
        loads = [self.weight.load_lines(" & ".join(masks), half, "N" if half else "") for half in sums.halves]
        return lines(
            "at = first + tl.arange(0, BLOCK_W)",
            "in_row = at < ROW_WORDS" if self._is_masked else "",
            self.weight.column_line("at"),
            self.weight.offset_lines(),
            *loads,
            sums.add_lines(),
        )
