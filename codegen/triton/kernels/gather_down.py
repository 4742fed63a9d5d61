"""The second half of a sparse feed-forward layer, dense: columns of the rows of the slabs that a token names.

A row of down is what one neuron adds to the result, so a program takes some columns and sums over neurons. Columns
alone are too few programs for a GPU: `SPLITS` of them share the neurons, tile by tile in turn. Each leaves its sums in
fp32, and the last one, by a counter that is zero again afterwards, adds them up in the order of the splits: the result
does not depend on who is last.

What stands in for groups that are not named is the sum of all stand-ins less those of the named groups, which the
splits share, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from jettison.codegen.triton.kernels.base import ELEMENTS, TRITON_TYPES, Kernel, Tuning, block, deeper, lines
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.kernels.stand_ins import sum_line, taken_off_lines


@dataclass(frozen=True)
class GatherDown(Kernel):
    """`out = hidden @ down[slabs] + bias + absent[-1] - absent[indices].sum() + residual`.

    hidden `[M, k * group]` and indices `[M, k] i64` to `[M, E]`; of scratch, `parts [M, SPLITS, E] f32` and a counter
    for each token and block of columns.

    Attributes:
        columns: E.
        neurons: F, rows of down `[F, E]`.
        kept: k, slabs of a token.
        group: Neurons of a slab; a multiple of `TILE_ROWS`.
        dtype: Of everything else.
        has_stand_ins: Whether there is `absent [F / group + 1, E]`.
        epilogue: Bias and residual.
    """

    columns: int
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
        sizes = f"k{self.neurons}_n{self.columns}_{self.kept}x{self.group}"
        return f"gather_down_{after}{sizes}_{ELEMENTS[self.dtype]}"

    @property
    def title(self) -> str:
        """See `Kernel`."""
        return f"{self.kept} slabs of {self.group} neurons to {self.columns} columns, for each token its own."

    @property
    def parameters(self) -> dict[str, str]:
        """See `Kernel`."""
        element = f"*{ELEMENTS[self.dtype]}"
        absent = {"absent_ptr": element} if self.has_stand_ins else {}
        after = self.epilogue.parameters(ELEMENTS[self.dtype])
        return {
            "hidden_ptr": element, "indices_ptr": "*i64", "weight_ptr": element, **absent, **after,
            "parts_ptr": "*fp32", "counters_ptr": "*i32", "out_ptr": element,
        }  # fmt: skip

    def tunings(self) -> list[Tuning]:
        """See `Kernel`."""
        wanted = [(32, 16, 128, 4), (16, 16, 128, 4), (64, 16, 128, 4), (32, 8, 256, 4), (16, 16, 64, 4)]
        most = 1 << (self.columns - 1).bit_length()
        found = [Tuning.of(warps, SPLITS=s, BLOCK_N=n, BLOCK_E=min(e, most)) for s, n, e, warps in wanted]
        return list(dict.fromkeys(found))

    def widest(self) -> Tuning:
        """See `Kernel`."""
        # Without a mask, tiles must fill the columns.
        width = 1 << (self.columns - 1).bit_length() if self._is_masked else self.columns & -self.columns
        return Tuning.of(SPLITS=2, BLOCK_N=self.group & -self.group, BLOCK_E=width)

    @property
    def _is_masked(self) -> bool:
        return any(self.columns % tuning["BLOCK_E"] for tuning in self.tunings())

    def blocks(self, tuning: Tuning) -> int:
        """Programs of a token and a split."""
        return -(-self.columns // tuning["BLOCK_E"])

    def grid(self, tuning: Tuning, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """See `Kernel`."""
        return (self.blocks(tuning), tuning["SPLITS"], sizes["M"])

    def body(self) -> str:
        """See `Kernel`."""
        in_columns = "column < E" if self._is_masked else ""
        guard = f", mask={in_columns}" if in_columns else ""
        tile_guard = f", mask=({in_columns})[None, :], other=0" if in_columns else ""
        return block(
            f"E: tl.constexpr = {self.columns}",
            f"KEPT: tl.constexpr = {self.kept}  # slabs of a token",
            f"SLAB: tl.constexpr = {self.group}  # neurons of a slab",
            "token = tl.program_id(2).to(tl.int64)",
            "split = tl.program_id(1)",
            "column = tl.program_id(0) * BLOCK_E + tl.arange(0, BLOCK_E)",
            "total = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)",
            "# jettison.sparse_mlp",
            "for kept in range(split * BLOCK_N, KEPT * SLAB, SPLITS * BLOCK_N):",
            deeper(self._step(tile_guard)),
            self._taken_off() if self.has_stand_ins else "",
            "sums = tl.sum(total, 0)",
            f"tl.store(parts_ptr + (token * SPLITS + split) * E + column, sums{guard})",
            "tl.debug_barrier()",
            "counter = token * tl.num_programs(0) + tl.program_id(0)",
            "finished = tl.atomic_add(counters_ptr + counter, 1, sem='acq_rel')",
            "if finished == SPLITS - 1:",
            deeper(lines(
                "tl.debug_barrier()",
                "of_part = (token * SPLITS + tl.arange(0, SPLITS)[:, None]) * E + column[None, :]",
                f"sums = tl.sum(tl.load(parts_ptr + of_part{tile_guard}), 0)",
                sum_line(self.neurons // self.group, "column", guard) if self.has_stand_ins else "",
                self.epilogue.lines("column", "token * E + column", in_columns, in_columns),
                f"tl.store(out_ptr + token * E + column, y.to({TRITON_TYPES[self.dtype]}){guard})",
                "tl.store(counters_ptr + counter, 0)",
            )),
        )  # fmt: skip

    def _step(self, guard: str) -> list[str]:
        """What is added for some neurons of one slab."""
        narrow = "" if self.neurons * self.columns >= 2**31 else ".to(tl.int32)"
        return [
            f"slab = tl.load(indices_ptr + token * KEPT + kept // SLAB){narrow}",
            "neuron = tl.arange(0, BLOCK_N)",
            "of_weight = (slab * SLAB + kept % SLAB + neuron)[:, None] * E + column[None, :]",
            "hidden = tl.load(hidden_ptr + token * (KEPT * SLAB) + kept + neuron).to(tl.float32)",
            f"packed = tl.load(weight_ptr + of_weight{guard}).to(tl.float32)",
            "total += hidden[:, None] * packed",
        ]

    def _taken_off(self) -> list[str]:
        mask = "inside[:, None]" + (" & (column < E)[None, :]" if self._is_masked else "")
        return taken_off_lines(
            "split, KEPT, SPLITS * BLOCK_N", "begin + SPLITS * tl.arange(0, BLOCK_N)",
            "named[:, None] * E + column[None, :]", mask,
        )  # fmt: skip
