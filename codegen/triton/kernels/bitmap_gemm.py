"""A linear layer on several rows of x whose weight is a bitmap and values: each program makes one tile of the result.

The weight is expanded to the dtype of x in registers, 64 columns at a time, for a product with tensor cores; the dense
weight is never written to memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from jettison.codegen.triton.kernels.base import ELEMENTS, TRITON_TYPES, Kernel, Tuning, block, deeper, lines
from jettison.codegen.triton.kernels.bitmap_tile import BitmapForm
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.kernels.gemm import LEAST_TILE


@dataclass(frozen=True)
class BitmapGemm(Kernel):
    """`y = epilogue(x @ w.T)`.

    Attributes:
        weight: Form of the weight `[N, K]`.
        columns: K.
        rows: N.
        dtype: Of x and the result.
        is_decode: Whether x has few rows.
        epilogue: What follows.
    """

    weight: BitmapForm
    columns: int
    rows: int
    dtype: torch.dtype
    is_decode: bool = False
    epilogue: Epilogue = field(default_factory=Epilogue)

    @property
    def name(self) -> str:
        """See `Kernel`."""
        after = f"_{self.epilogue.name}" if self.epilogue.name else ""
        of = "few_rows" if self.is_decode else "gemm"
        return f"{of}_{self.weight.name}{after}_k{self.columns}_n{self.rows}_{ELEMENTS[self.dtype]}"

    @property
    def title(self) -> str:
        """See `Kernel`."""
        many = "few" if self.is_decode else "many"
        return f"A linear layer of {self.columns} to {self.rows} on {many} rows: {self.weight.name}."

    @property
    def parameters(self) -> dict[str, str]:
        """See `Kernel`."""
        element = ELEMENTS[self.dtype]
        after = self.epilogue.parameters(element)
        return {"x_ptr": f"*{element}", **self.weight.parameters, **after, "out_ptr": f"*{element}", "M": "i32"}

    def tunings(self) -> list[Tuning]:
        """See `Kernel`."""
        if self.is_decode:
            wanted = [(16, 16, 4), (16, 32, 8)]
        elif self.dtype == torch.float32:  # without tensor cores every number of a tile is in a register
            wanted = [(32, 32, 8), (16, 32, 4), (32, 64, 8)]
        else:
            wanted = [(64, 64, 8), (64, 32, 8), (128, 32, 8)]
        return [Tuning.of(warps, BLOCK_M=m, BLOCK_N=n) for m, n, warps in wanted]

    def widest(self) -> Tuning:
        """See `Kernel`."""
        rows = min(1 << (self.rows - 1).bit_length(), 1024)
        return Tuning.of(BLOCK_M=16 if self.is_decode else 64, BLOCK_N=max(LEAST_TILE, rows))

    def grid(self, tuning: Tuning, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """See `Kernel`."""
        return (-(-sizes["M"] // tuning["BLOCK_M"]), -(-self.rows // tuning["BLOCK_N"]))

    def body(self) -> str:
        """See `Kernel`."""
        kind = TRITON_TYPES[self.dtype]
        return block(
            f"K: tl.constexpr = {self.columns}",
            f"N: tl.constexpr = {self.rows}",
            # Wide: rows of x times K may pass 2**31.
            "m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)",
            "row = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)",
            self.weight.start_lines("row < N"),
            "sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)",
            "# jettison.bitmap_linear",
            "for number in range(0, BLOCKS):",
            deeper(
                lines(
                    self.weight.block_lines("row < N"),
                    "in_x = (m < M)[:, None] & (column < K)[None, :]",
                    "x = tl.load(x_ptr + m[:, None] * K + column[None, :], mask=in_x, other=0)",
                    f"sums = tl.dot(x, tl.trans(w.to({kind})), sums, input_precision='ieee')",
                )
            ),
            "to = m[:, None] * N + row[None, :]",
            "inside = (m < M)[:, None] & (row < N)[None, :]",
            self.epilogue.lines("row[None, :]", "to", "(row < N)[None, :]", "inside"),
            f"tl.store(out_ptr + to, y.to({kind}), mask=inside)",
        )
