"""Rows of a quantised table, decoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from jettison.codegen.triton.kernels.base import ELEMENTS, TRITON_TYPES, Kernel, Tuning, block, deeper, lines
from jettison.codegen.triton.kernels.weight_form import ONE, WeightForm


@dataclass(frozen=True)
class Embedding(Kernel):
    """`y[t] = table[indices[t]]`, one program per token.

    Attributes:
        weight: Form of the table `[N, K]`, quantised.
        columns: K.
        dtype: Of the result.
    """

    weight: WeightForm
    columns: int
    dtype: torch.dtype

    @property
    def name(self) -> str:
        """See `Kernel`."""
        return f"embedding_{self.weight.name}_k{self.columns}_{ELEMENTS[self.dtype]}"

    @property
    def title(self) -> str:
        """See `Kernel`."""
        return f"Rows of {self.columns} of a table: {self.weight.name}."

    @property
    def parameters(self) -> dict[str, str]:
        """See `Kernel`."""
        return {"indices_ptr": "*i64", **self.weight.parameters, "out_ptr": f"*{ELEMENTS[self.dtype]}"}

    def tunings(self) -> list[Tuning]:
        """See `Kernel`."""
        return [Tuning.of(4, BLOCK_N=1, BLOCK_W=1 << (self.weight.row_words(self.columns) - 1).bit_length())]

    def grid(self, tuning: Tuning, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """See `Kernel`."""
        return (sizes["M"],)

    def body(self) -> str:
        """See `Kernel`."""
        weight = self.weight
        column = f"column + (chunk * {weight.chunk_fields} + field) * GROUP_WORDS"
        to = "(token + tl.zeros([BLOCK_N, 1], tl.int64)) * K + of_field[None, :]"
        return block(
            f"K: tl.constexpr = {self.columns}",
            weight.shape_lines(self.columns),
            "token = tl.program_id(0).to(tl.int64)",
            "row = tl.load(indices_ptr + token) + tl.arange(0, BLOCK_N)",
            "at = tl.arange(0, BLOCK_W)",
            "in_row = at < ROW_WORDS",
            weight.column_line("at"),
            weight.offset_lines(),
            weight.load_lines("in_row[None, :]"),
            "" if weight.has_table else ONE,
            "# jettison.lut_embedding" if weight.has_table else "# jettison.quantized_embedding",
            f"for chunk in tl.static_range({weight.chunks}):",
            deeper(weight.chunk_lines()),
            f"    for field in tl.static_range({weight.chunk_fields}):",
            deeper(deeper(lines(
                f"of_field = {column}",
                weight.code_lines(),
                weight.value_lines(),
                f"to = {to}",
                f"tl.store(out_ptr + to, w.to({TRITON_TYPES[self.dtype]}), "
                "mask=(in_row & (of_field < K))[None, :])",
            ))),
        )  # fmt: skip
