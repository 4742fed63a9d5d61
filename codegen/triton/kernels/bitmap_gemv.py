"""A linear layer on one row of x whose weight is a bitmap and values: each program sums some rows, front to back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from jettison.codegen.triton.kernels.base import ELEMENTS, TRITON_TYPES, Kernel, Tuning, block, deeper, lines
from jettison.codegen.triton.kernels.bitmap_tile import BLOCK, BitmapForm
from jettison.codegen.triton.kernels.epilogue import Epilogue


@dataclass(frozen=True)
class BitmapGemv(Kernel):
    """`y = epilogue(x @ w.T)`.

    Attributes:
        weight: Form of the weight `[N, K]`.
        columns: K.
        rows: N.
        dtype: Of x and the result.
        epilogue: What follows.
    """

    weight: BitmapForm
    columns: int
    rows: int
    dtype: torch.dtype
    epilogue: Epilogue = field(default_factory=Epilogue)

    @property
    def name(self) -> str:
        """See `Kernel`."""
        after = f"_{self.epilogue.name}" if self.epilogue.name else ""
        return f"gemv_{self.weight.name}{after}_k{self.columns}_n{self.rows}_{ELEMENTS[self.dtype]}"

    @property
    def title(self) -> str:
        """See `Kernel`."""
        return f"A linear layer of {self.columns} to {self.rows} on one row: {self.weight.name}."

    @property
    def parameters(self) -> dict[str, str]:
        """See `Kernel`."""
        element = ELEMENTS[self.dtype]
        after = self.epilogue.parameters(element)
        return {"x_ptr": f"*{element}", **self.weight.parameters, **after, "out_ptr": f"*{element}"}

    def tunings(self) -> list[Tuning]:
        """See `Kernel`."""
        return [Tuning.of(warps, BLOCK_N=rows) for rows, warps in ((8, 4), (4, 2), (16, 4), (2, 1), (16, 8))]

    def widest(self) -> Tuning:
        """See `Kernel`."""
        return Tuning.of(BLOCK_N=min(1 << (self.rows - 1).bit_length(), 1024))

    def grid(self, tuning: Tuning, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """See `Kernel`."""
        return (-(-self.rows // tuning["BLOCK_N"]),)

    def body(self) -> str:
        """See `Kernel`."""
        x_guard = ", mask=column < K, other=0" if self.columns % BLOCK else ""
        return block(
            f"K: tl.constexpr = {self.columns}",
            f"N: tl.constexpr = {self.rows}",
            "row = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)",
            self.weight.start_lines("row < N"),
            f"total = tl.zeros([BLOCK_N, {BLOCK}], tl.float32)",
            "# jettison.bitmap_linear",
            "for number in range(0, BLOCKS):",
            deeper(
                lines(
                    self.weight.block_lines("row < N"),
                    f"x = tl.load(x_ptr + column{x_guard}).to(tl.float32)",
                    "total += w * x[None, :]",
                )
            ),
            "sums = tl.sum(total, 1)",
            self.epilogue.lines("row", "row", "row < N", "row < N"),
            f"tl.store(out_ptr + row, y.to({TRITON_TYPES[self.dtype]}), mask=row < N)",
        )
