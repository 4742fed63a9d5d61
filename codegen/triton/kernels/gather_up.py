"""The first half of a sparse feed-forward layer: each program sums some rows of one slab that a token names.

A slab is the rows of a group of neurons, which follow each other, so a program reads one index and then whole rows,
front to back. Tokens name slabs of their own: a program belongs to one token, and a slab that several tokens name is
read by each, the later ones from the L2 cache if it is still there.

The matrices of a dense gate are two pointers, since prompts read them apart; quantised ones stand one below the other,
as the linears of prompts read them: no weight is held twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from jettison.codegen.triton.kernels.base import ELEMENTS, TRITON_TYPES, Kernel, Tuning, block, deeper, lines
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.kernels.row_sums import RowSums, longest_run
from jettison.codegen.triton.kernels.weight_form import ONE, WeightForm

# Slabs are whole tiles of so many rows.
TILE_ROWS = 16
_GATED_ROWS = 4


@dataclass(frozen=True)
class GatherUp(Kernel):
    """`hidden = activation(up[slabs] @ x + bias)`, or `activation(gate[slabs] @ x) * (up[slabs] @ x + bias)`.

    x `[M, E]` and indices `[M, k] i64`, groups of neurons, to `[M, k * group]`.

    Attributes:
        weight: Form of up `[F, E]`; `[2 F, E]` of a quantised gate and up.
        columns: E.
        neurons: F.
        kept: k, slabs of a token.
        group: Neurons of a slab; a multiple of `TILE_ROWS`.
        dtype: Of x, the bias and the result.
        activation: A key of `epilogue.ACTIVATIONS`.
        is_gated: Whether there is a gate.
        has_bias: Whether up has a bias `[F]`.
    """

    weight: WeightForm
    columns: int
    neurons: int
    kept: int
    group: int
    dtype: torch.dtype
    activation: str
    is_gated: bool = False
    has_bias: bool = False

    @property
    def name(self) -> str:
        """See `Kernel`."""
        after = "bias_" * self.has_bias + "gated_" * self.is_gated + self.activation
        sizes = f"k{self.columns}_n{self.neurons}_{self.kept}x{self.group}"
        return f"gather_up_{self.weight.name}_{after}_{sizes}_{ELEMENTS[self.dtype]}"

    @property
    def title(self) -> str:
        """See `Kernel`."""
        return (
            f"{self.kept} slabs of {self.group} of the {self.neurons} neurons of a layer, for each token its own: "
            f"{self.weight.name}."
        )

    @property
    def parameters(self) -> dict[str, str]:
        """See `Kernel`."""
        element = f"*{ELEMENTS[self.dtype]}"
        up = {"up_ptr": element} if self._is_apart else {}
        bias = {"bias_ptr": element} if self.has_bias else {}
        return {"x_ptr": element, "indices_ptr": "*i64", **self.weight.parameters, **up, **bias, "out_ptr": element}

    @property
    def _is_apart(self) -> bool:
        """Whether gate and up are two pointers."""
        return self.is_gated and not self.weight.bits

    def tunings(self) -> list[Tuning]:
        """See `Kernel`."""
        # Fewer rows per program than a whole matrix would have: there are fewer rows to go round.
        wanted = [(2, 512, 4), (4, 512, 4), (1, 1024, 4), (4, 256, 4), (8, 256, 4)]
        if not self.weight.bits:
            wanted = [(2, 1024, 4), (4, 1024, 4), (1, 2048, 4), (2, 2048, 8), (8, 512, 4)]
        if self.is_gated:  # twice the sums, scales and offsets
            wanted = [each for each in wanted if each[0] <= _GATED_ROWS]
        most = longest_run(self.weight.row_words(self.columns))
        found = [Tuning.of(warps, BLOCK_N=rows, BLOCK_W=min(words, most)) for rows, words, warps in wanted]
        return list(dict.fromkeys(found))

    def widest(self) -> Tuning:
        """See `Kernel`."""
        run = max(tuning["BLOCK_W"] for tuning in self.tunings())
        return Tuning.of(BLOCK_N=self.group & -self.group, BLOCK_W=run)

    def grid(self, tuning: Tuning, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """See `Kernel`."""
        return (self.kept * self.group // tuning["BLOCK_N"], sizes["M"])

    @property
    def _sums(self) -> RowSums:
        is_masked = any(self.weight.row_words(self.columns) % tuning["BLOCK_W"] for tuning in self.tunings())
        halves = ("", "_up") if self.is_gated else ("",)
        return RowSums(self.weight, self.columns, halves, is_masked, f"x_ptr + token * {self.columns}")

    def body(self) -> str:
        """See `Kernel`."""
        sums = self._sums
        numbers = len(sums.halves) * self.neurons * self.weight.row_words(self.columns)
        epilogue = Epilogue(self.has_bias and not self.is_gated, self.activation, self.is_gated)
        return block(
            f"F: tl.constexpr = {self.neurons}" if self.is_gated and self.weight.bits else "",
            f"KEPT: tl.constexpr = {self.kept}  # slabs of a token",
            f"SLAB: tl.constexpr = {self.group}  # neurons of a slab",
            self.weight.shape_lines(self.columns),
            "token = tl.program_id(1).to(tl.int64)",
            "# Where these neurons stand among those that the token names; all are of one slab.",
            "kept = tl.program_id(0) * BLOCK_N",
            f"slab = tl.load(indices_ptr + token * KEPT + kept // SLAB){'' if numbers >= 2**31 else '.to(tl.int32)'}",
            "row = slab * SLAB + kept % SLAB + tl.arange(0, BLOCK_N)",
            sums.start_lines(),
            ONE if self.weight.bits else "",
            "# jettison.quantized_sparse_mlp" if self.weight.bits else "# jettison.sparse_mlp",
            "for first in range(0, ROW_WORDS, BLOCK_W):",
            deeper(self._step(sums)),
            sums.finish_lines(),
            "up_sums += tl.load(bias_ptr + row).to(tl.float32)" if self.has_bias and self.is_gated else "",
            epilogue.lines("row", "row", "", ""),
            "to = token * (KEPT * SLAB) + kept + tl.arange(0, BLOCK_N)",
            f"tl.store(out_ptr + to, y.to({TRITON_TYPES[self.dtype]}))",
        )

    def _step(self, sums: RowSums) -> list[str]:
        """What is added for one run of words of each row."""
        mask = "in_row[None, :]" if sums.is_masked else ""
        loads = [self.weight.load_lines(mask)]
        if self._is_apart:
            loads.append(self.weight.load_lines(mask, "_up", pointer="up_ptr"))
        elif self.is_gated:
            loads.append(self.weight.load_lines(mask, "_up", "F"))
        return lines(
            "at = first + tl.arange(0, BLOCK_W)",
            "in_row = at < ROW_WORDS" if sums.is_masked else "",
            self.weight.column_line("at"),
            self.weight.offset_lines(),
            *loads,
            sums.add_lines(),
        )
