"""A factored feed-forward layer on a prompt: programs make some neurons of their tokens, sum them up, and forget them.

A program owns a tile of tokens and walks over all neurons, some at a time: it computes them from the few dimensions of
the first factors, with tensor cores, and multiplies them by the first factor of the second linear at once. What it sums
is as wide as that factor and stays in registers, in pieces whose widths are powers of two, so that a rank that is none
wastes little. The wider the sums, the fewer tokens a tile has, and the more often weights are read. A rank that is too
wide even for the smallest tile is cut over programs, each of which makes all neurons again: `copies` says how often.

Source: FlashSVD (arXiv 2508.01506), which cuts the rank into tiles whatever its width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from jettison.codegen.triton.kernels.base import ELEMENTS, TRITON_TYPES, Kernel, Tuning, block, deeper, lines
from jettison.codegen.triton.kernels.epilogue import ACTIVATIONS, Epilogue
from jettison.codegen.triton.kernels.gemm import LEAST_TILE

# Sums of a program, tokens times width: 64 registers for each thread of 8 warps, since twice as many spill; in fp32,
# whose products keep their operands in registers too, half of that.
_SUMS, _SUMS_FP32 = 1 << 14, 1 << 13
# Tokens up to which tiles are too few to fill a GPU, and the neurons few enough to be written.
FEW_TOKENS = 512
_NARROWEST_PIECE, _WIDEST_PIECE = 64, 128
_MOST_TOKENS = 128


def _sum_of(*terms: str | int) -> str:
    """Those that are not nothing, each with a plus behind it."""
    return "".join(f"{term} + " for term in terms if term)


@dataclass(frozen=True)
class LowRankMlp(Kernel):
    """`y = epilogue(activation(up @ up_rows.T + up_bias) @ columns.T)`, or with a gate, which is activated instead.

    up `[M, Ru]` and gate `[M, Rg]` to `[M, R]`.

    Attributes:
        up_rank: Ru.
        gate_rank: Rg; 0 without a gate.
        neurons: F.
        width: R, rows of `columns`.
        dtype: Of everything.
        activation: A key of `epilogue.ACTIVATIONS`.
        has_up_bias: Whether up has a bias `[F]`.
        has_gate_bias: Whether the gate has one.
        epilogue: What follows.
    """

    up_rank: int
    gate_rank: int
    neurons: int
    width: int
    dtype: torch.dtype
    activation: str
    has_up_bias: bool = False
    has_gate_bias: bool = False
    epilogue: Epilogue = field(default_factory=Epilogue)

    @property
    def name(self) -> str:
        """See `Kernel`."""
        gate = f"gate{self.gate_rank}_{'bias_' * self.has_gate_bias}" if self.gate_rank else ""
        up = f"up{self.up_rank}_{'bias_' * self.has_up_bias}"
        after = f"_{self.epilogue.name}" if self.epilogue.name else ""
        of = f"{gate}{up}{self.activation}_f{self.neurons}_n{self.width}"
        return f"low_rank_mlp_{of}{after}_{ELEMENTS[self.dtype]}"

    @property
    def title(self) -> str:
        """See `Kernel`."""
        made_of = f"{self.gate_rank} and {self.up_rank}" if self.gate_rank else str(self.up_rank)
        return f"{self.neurons} neurons, made of {made_of} dimensions and summed up in {self.width}."

    @property
    def parameters(self) -> dict[str, str]:
        """See `Kernel`."""
        element = f"*{ELEMENTS[self.dtype]}"
        names = [name for half in self._halves for name in (f"{half}_ptr", f"{half}_rows_ptr")]
        names += [f"{half}_bias_ptr" for half, _, has_bias in self._factors if has_bias]
        after = self.epilogue.parameters(ELEMENTS[self.dtype])
        return {**dict.fromkeys([*names, "columns_ptr"], element), **after, "out_ptr": element, "M": "i32"}

    @property
    def _factors(self) -> list[tuple[str, int, bool]]:
        """Name, rank and whether there is a bias, of gate and up."""
        gate = [("gate", self.gate_rank, self.has_gate_bias)] if self.gate_rank else []
        return [*gate, ("up", self.up_rank, self.has_up_bias)]

    @property
    def _halves(self) -> list[str]:
        return [name for name, _, _ in self._factors]

    @property
    def _most_sums(self) -> int:
        return _SUMS_FP32 if self.dtype == torch.float32 else _SUMS

    @property
    def copies(self) -> int:
        """Programs that make the same neurons: one, unless the sums of `LEAST_TILE` tokens do not fit."""
        return -(-self.width // (self._most_sums // LEAST_TILE))

    @property
    def pieces(self) -> list[int]:
        """Widths of the sums of a program: powers of two."""
        left, found = -(-self.width // self.copies), []
        while left > 0:
            piece = max(_NARROWEST_PIECE, min(_WIDEST_PIECE, 1 << (left.bit_length() - 1)))
            found.append(piece)
            left -= piece
        return found

    @property
    def most_tokens(self) -> int:
        """Of a tile: as many as have room for their sums."""
        most = self._most_sums // sum(self.pieces)
        return max(LEAST_TILE, min(_MOST_TOKENS, 1 << (most.bit_length() - 1)))

    def tunings(self) -> list[Tuning]:
        """See `Kernel`."""
        most = self.most_tokens
        if self.dtype == torch.float32:
            wanted = [(m, f, 16, 8, 1) for m, f in ((min(most, 32), 16), (LEAST_TILE, 16), (LEAST_TILE, 32))]
        elif most == _MOST_TOKENS:
            wanted = [(128, 64, 32, 8, 2), (64, 128, 32, 8, 2), (64, 64, 32, 8, 2), (32, 64, 64, 8, 2)]
        else:  # more neurons than tokens: warps share out the wide sums, not the few tokens
            less = max(LEAST_TILE, min(most, 32))  # on older GPUs, 64 tokens spill
            wanted = [(less, 2 * less, 64, 8, 2), (less, 64, 64, 8, 2), (less, 128, 32, 8, 2), (most, 128, 32, 8, 2)]
        found = [
            Tuning.of(warps, stages, BLOCK_M=m, BLOCK_F=neurons, BLOCK_K=ranks)
            for m, neurons, ranks, warps, stages in wanted
        ]
        return list(dict.fromkeys(found))

    def widest(self) -> Tuning:
        """See `Kernel`."""
        neurons = max(LEAST_TILE, min(1 << (self.neurons - 1).bit_length(), 512))
        ranks = max(LEAST_TILE, 1 << (max(self.up_rank, self.gate_rank) - 1).bit_length())
        return Tuning.of(BLOCK_M=64, BLOCK_F=neurons, BLOCK_K=min(ranks, 512))

    def grid(self, tuning: Tuning, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """See `Kernel`."""
        return (-(-sizes["M"] // tuning["BLOCK_M"]), self.copies)

    def body(self) -> str:
        """See `Kernel`."""
        names = [f"sums{index}" for index, _ in enumerate(self.pieces)]
        wide = ".to(tl.int64)" if max(self.width, self.up_rank, self.gate_rank) * self.neurons >= 2**31 else ""
        before = "first_column" if self.copies > 1 else ""
        starts = [sum(self.pieces[:index]) for index, _ in enumerate(self.pieces)]
        return block(
            f"F: tl.constexpr = {self.neurons}",
            f"N: tl.constexpr = {self.width}",
            # Wide: tokens times their dimensions may pass 2**31.
            "m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)",
            f"first_column = tl.program_id(1){wide} * {sum(self.pieces)}" if before else "",
            [
                f"column{index} = {_sum_of(before, start)}tl.arange(0, {piece})"
                for index, (start, piece) in enumerate(zip(starts, self.pieces, strict=True))
            ],
            [
                f"{name} = tl.zeros([BLOCK_M, {piece}], tl.float32)"
                for name, piece in zip(names, self.pieces, strict=True)
            ],
            "# jettison.low_rank_mlp",
            "for neurons in range(0, F, BLOCK_F):",
            deeper(self._neurons()),
            *(self._finish(index, name) for index, name in enumerate(names)),
        )

    def _neurons(self) -> list[str]:
        """Make some neurons, and add them to the sums."""
        kind = TRITON_TYPES[self.dtype]
        # Neurons that there are not meet zeros of `columns`.
        return lines(
            f"neuron = neurons{'.to(tl.int64)' if self.width * self.neurons >= 2**31 else ''} + tl.arange(0, BLOCK_F)",
            *(self._half(*factor) for factor in self._factors),
            f"y = {self._halves[0]}",
            f"y = {ACTIVATIONS[self.activation]}",
            "y *= up" if self.gate_rank else "",
            f"hidden = y.to({kind})",
            *(
                [
                    f"in_columns = (column{index} < N)[:, None] & (neuron < F)[None, :]",
                    f"of_columns = column{index}[:, None] * F + neuron[None, :]",
                    "columns = tl.load(columns_ptr + of_columns, mask=in_columns, other=0)",
                    f"sums{index} = tl.dot(hidden, tl.trans(columns), sums{index}, input_precision='ieee')",
                ]
                for index, _ in enumerate(self.pieces)
            ),
        )

    def _half(self, name: str, rank: int, has_bias: bool) -> list[str]:
        """The gate or up of some neurons, by that name, in fp32."""
        return lines(
            f"{name} = tl.zeros([BLOCK_M, BLOCK_F], tl.float32)",
            f"for first in range(0, {rank}, BLOCK_K):",
            deeper(lines(
                "at = first + tl.arange(0, BLOCK_K)",
                f"in_rank = at < {rank}",
                f"of_x = m[:, None] * {rank} + at[None, :]",
                f"x = tl.load({name}_ptr + of_x, mask=(m < M)[:, None] & in_rank[None, :], other=0)",
                f"of_rows = neuron[:, None] * {rank} + at[None, :]",
                "in_rows = (neuron < F)[:, None] & in_rank[None, :]",
                f"rows = tl.load({name}_rows_ptr + of_rows, mask=in_rows, other=0)",
                f"{name} = tl.dot(x, tl.trans(rows), {name}, input_precision='ieee')",
            )),
            f"{name} += tl.load({name}_bias_ptr + neuron, mask=neuron < F, other=0).to(tl.float32)[None, :]"
            if has_bias else "",
        )  # fmt: skip

    def _finish(self, index: int, name: str) -> list[str]:
        """Store a piece of the sums."""
        column = f"column{index}"
        return lines(
            f"to = m[:, None] * N + {column}[None, :]",
            f"inside = (m < M)[:, None] & ({column} < N)[None, :]",
            f"sums = {name}",
            self.epilogue.lines(f"{column}[None, :]", "to", f"({column} < N)[None, :]", "inside"),
            f"tl.store(out_ptr + to, y.to({TRITON_TYPES[self.dtype]}), mask=inside)",
        )
