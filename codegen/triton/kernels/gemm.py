"""A linear layer on several rows of x, with tensor cores: each program makes one tile of the result.

A quantised weight is decoded to the dtype of x in registers, a field of its words at a time; each field is a product of
its own over the columns that belong to it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from jettison.codegen.triton.kernels.base import ELEMENTS, TRITON_TYPES, Kernel, Tuning, block, deeper, lines
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.kernels.weight_form import ONE, WeightForm

# `tl.dot` wants tiles of at least this many rows and columns.
LEAST_TILE = 16
# Rows of x up to which a launch counts as decoding: tiles as low as possible, and more of the weight each.
DECODE_ROWS = 16


@dataclass(frozen=True)
class Gemm(Kernel):
    """`y = epilogue(x @ w.T)`.

    Attributes:
        weight: Form of the weight `[N, K]`; `[2 N, K]` of a gate and its other half.
        columns: K.
        rows: N.
        dtype: Of x and the result.
        is_decode: Whether x has at most `DECODE_ROWS` rows.
        epilogue: What follows.
    """

    weight: WeightForm
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
        many = f"up to {DECODE_ROWS}" if self.is_decode else "many"
        return f"A linear layer of {self.columns} to {self.rows} on {many} rows: {self.weight.name}."

    @property
    def parameters(self) -> dict[str, str]:
        """See `Kernel`."""
        element = ELEMENTS[self.dtype]
        after = self.epilogue.parameters(element)
        return {"x_ptr": f"*{element}", **self.weight.parameters, **after, "out_ptr": f"*{element}", "M": "i32"}

    def tunings(self) -> list[Tuning]:
        """See `Kernel`."""
        is_half = self.dtype != torch.float32
        if self.is_decode and self.epilogue.is_gated:
            wanted = [(16, 32, 32, 4, 3), (16, 32, 16, 4, 3), (16, 64, 16, 8, 3)]
        elif self.is_decode:
            wanted = [(16, 64, 32, 4, 3), (16, 32, 64, 4, 3), (16, 128, 32, 4, 3), (16, 32, 32, 2, 4)]
        elif is_half and not self.epilogue.is_gated:
            wanted = [(64, 128, 16, 4, 3), (128, 128, 16, 8, 3), (64, 64, 32, 4, 3), (128, 64, 16, 4, 3)]
        elif is_half:
            wanted = [(64, 64, 16, 4, 2), (32, 64, 16, 4, 2), (64, 32, 16, 4, 2)]
        else:  # without tensor cores every number of a tile is in a register
            wanted = [(32, 32, 16, 4, 2), (32, 64, 16, 8, 2), (16, 64, 16, 4, 2)]
        return [Tuning.of(warps, stages, BLOCK_M=m, BLOCK_N=n, BLOCK_W=words) for m, n, words, warps, stages in wanted]

    def widest(self) -> Tuning:
        """See `Kernel`."""
        rows = min(1 << (self.rows - 1).bit_length(), 1024)
        return Tuning.of(BLOCK_M=DECODE_ROWS if self.is_decode else 64, BLOCK_N=max(LEAST_TILE, rows), BLOCK_W=64)

    def grid(self, tuning: Tuning, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """See `Kernel`."""
        return (-(-sizes["M"] // tuning["BLOCK_M"]), -(-self.rows // tuning["BLOCK_N"]))

    def body(self) -> str:
        """See `Kernel`."""
        halves = ["", "_up"] if self.epilogue.is_gated else [""]
        wide = ".to(tl.int64)" if len(halves) * self.rows * self.weight.row_words(self.columns) >= 2**31 else ""
        inside = "(m < M)[:, None] & (row < N)[None, :]"
        return block(
            f"K: tl.constexpr = {self.columns}",
            f"N: tl.constexpr = {self.rows}",
            self.weight.shape_lines(self.columns),
            # Wide: rows of x times K may pass 2**31.
            "m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)",
            f"row = tl.program_id(1){wide} * BLOCK_N + tl.arange(0, BLOCK_N)",
            [f"{name} = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)" for name in ("sums", "up_sums")[: len(halves)]],
            ONE if self.weight.bits and not self.weight.has_table else "",
            f"# {self.weight.operator}",
            "for first in range(0, ROW_WORDS, BLOCK_W):",
            deeper(self._step(halves)),
            "to = m[:, None] * N + row[None, :]",
            f"inside = {inside}",
            self.epilogue.lines("row[None, :]", "to", "(row < N)[None, :]", "inside"),
            f"tl.store(out_ptr + to, y.to({TRITON_TYPES[self.dtype]}), mask=inside)",
        )

    def _step(self, halves: list[str]) -> list[str]:
        """What is added for one run of words of each row."""
        loads = [
            self.weight.load_lines("in_weight", half, "N" if half else "")
            for half in halves
        ]  # fmt: skip
        return lines(
            "at = first + tl.arange(0, BLOCK_W)",
            "in_row = at < ROW_WORDS",
            "in_weight = (row < N)[:, None] & in_row[None, :]",
            self.weight.column_line("at"),
            self.weight.offset_lines(),
            *loads,
            self._grouped(halves) if self.weight.bits else self._product("column", halves),
        )

    def _product(self, column: str, halves: list[str]) -> list[str]:
        """A product over some columns, whose weights are `packed` or `w`."""
        kind = TRITON_TYPES[self.dtype]
        variable = "w" if self.weight.bits else "packed"
        products = [
            f"{name} = tl.dot(x, tl.trans({variable}{half}.to({kind})), {name}, input_precision='ieee')"
            for name, half in zip(("sums", "up_sums"), halves, strict=False)
        ]
        return [
            f"in_x = (m < M)[:, None] & (in_row & ({column} < K))[None, :]",
            f"x = tl.load(x_ptr + m[:, None] * K + {column}[None, :], mask=in_x, other=0)",
            *products,
        ]

    def _grouped(self, halves: list[str]) -> list[str]:
        weight = self.weight
        return lines(
            f"for chunk in tl.static_range({weight.chunks}):",
            deeper(lines(*(weight.chunk_lines(half) for half in halves))),
            f"    for field in tl.static_range({weight.chunk_fields}):",
            deeper(deeper(lines(
                f"of_field = column + (chunk * {weight.chunk_fields} + field) * GROUP_WORDS",
                *([*weight.code_lines(half), *weight.value_lines(half)] for half in halves),
                self._product("of_field", halves),
            ))),
        )  # fmt: skip
