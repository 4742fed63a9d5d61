"""Weights as products of two thin matrices, perhaps beside a remainder in few bits, and how they are made."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.constants import Constant, scratch_tensor
from jettison.ir.ops.quantized_linear import row_chunks
from jettison.passes.formats import IntGroups, format_from_text
from jettison.passes.methods import GPTQ, InputStatistics
from jettison.passes.methods.base import RowEncoder
from jettison.passes.methods.finished_layers import Encoded
from jettison.passes.whitening import RowReader, Spectrum, Whitening

# How often remainder and factors are made again, each for what the other leaves.
_TURNS = 3


@dataclass(frozen=True)
class LowRank:
    """What stands for the weights of linears that read one input and share a matrix of columns.

    Attributes:
        names: Of the weights.
        columns: `[r, K]`, in the dtype in which the weights are stored.
        rows: `[N, r]` of each, likewise.
        remainders: Of each, what is added to the product of the two; empty where there is none.
        loss: Share of what the factorizer minimises that is lost, the mean over the weights.
    """

    names: tuple[str, ...]
    columns: Tensor
    rows: tuple[Tensor, ...]
    remainders: tuple[Encoded, ...]
    loss: float

    @property
    def rank(self) -> int:
        """Of the product."""
        return len(self.columns)

    def product(self, index: int) -> Callable[[Tensor], Tensor]:
        """From what the linear of a weight reads to what it computes, without the bias."""
        rows, columns = self.rows[index], self.columns
        if not self.remainders:
            return lambda x: F.linear(F.linear(x, columns.to(x.dtype)), rows.to(x.dtype))
        dense = self.dense(index)
        return lambda x: F.linear(x, dense.to(x.dtype))

    def dense(self, index: int) -> Tensor:
        """The weight `[N, K] f32` that this stands for."""
        product = self.rows[index].to(torch.float32) @ self.columns.to(torch.float32)
        return product.add_(self.remainders[index].dense()) if self.remainders else product

    def tensors(self) -> dict[str, Tensor]:
        """Everything that is stored, by name."""
        found = {"columns": self.columns} | {f"rows.{index}": rows for index, rows in enumerate(self.rows)}
        for index, remainder in enumerate(self.remainders):
            found |= {f"remainder.{index}.{part}": values for part, values in remainder.parts.items()}
        return found

    def described(self) -> dict[str, Any]:
        """What else there is to know, as JSON."""
        shapes = [remainder.shape for remainder in self.remainders]
        formats = [remainder.format.name for remainder in self.remainders]
        return {"names": self.names, "loss": self.loss, "formats": formats, "shapes": shapes}

    @classmethod
    def of(cls, tensors: dict[str, Tensor], told: dict[str, Any]) -> LowRank:
        """Invert `tensors` and `described`."""
        remainders = []
        for index, (text, shape) in enumerate(zip(told["formats"], told["shapes"], strict=True)):
            start = f"remainder.{index}."
            parts = {name.removeprefix(start): values for name, values in tensors.items() if name.startswith(start)}
            remainders.append(Encoded(format_from_text(text), (shape[0], shape[1]), parts))
        rows = tuple(tensors[f"rows.{index}"] for index in range(len(told["names"])))
        return cls(tuple(told["names"]), tensors["columns"], rows, tuple(remainders), told["loss"])


def low_rank_bytes(shapes: Sequence[tuple[int, int]], rank: int, itemsize: int, remainder: IntGroups | None) -> int:
    """Stored bytes of what stands for weights `[N, K]` that share columns.

    Args:
        shapes: Of the weights.
        rank: Of the product.
        itemsize: Bytes of an element of the factors.
        remainder: Format of the remainders.
    """
    factors = rank * (shapes[0][1] + sum(shape[0] for shape in shapes)) * itemsize
    return factors + (0 if remainder is None else sum(remainder.bytes(shape) for shape in shapes))


@dataclass(frozen=True)
class Remainder:
    """How what is added to the product of the factors is stored.

    Attributes:
        format: Few bits.
        encode: Rounds rows of it; see `methods/base.py`.
    """

    format: IntGroups
    encode: RowEncoder

    @classmethod
    def of(cls, weight_format: IntGroups, statistics: InputStatistics | None) -> Remainder:
        """Rounded for the inputs seen, or to nearest where none were."""
        return cls(weight_format, GPTQ().row_encoder(weight_format, statistics))


def factorized(
    weights: Sequence[Constant], rank: int, whitening: Whitening, remainder: Remainder | None, seed: int,
    spectrum: Spectrum | None = None,
) -> LowRank:  # fmt: skip
    """The factors with which weights that read one input lose least.

    Weights that share columns count equally, whatever their sizes: what is lost is the mean of the shares that each
    loses.

    Args:
        weights: Each `[N, K]`, stored in one dtype.
        rank: Of the product.
        whitening: Of the input.
        remainder: What is added to the product, or None.
        seed: Of the randomised path.
        spectrum: What `spectrum_of` returned, if it was asked before.
    """
    scales = _scales(weights, whitening)
    shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    rank = min(rank, *shape)
    if remainder is None:
        spectrum = spectrum or Spectrum(_stacked(weights, scales), shape, whitening, most=rank, seed=seed)
        return _stored(weights, scales, spectrum.factors(rank), (), spectrum.lost(rank))
    total = sum(whitening.energy(weight) * scale**2 for weight, scale in zip(weights, scales, strict=True))
    best: LowRank | None = None
    product: list[Tensor | None] = [None] * len(weights)
    for _ in range(_TURNS):
        encoded = tuple(_rounded(weight, remainder, less) for weight, less in zip(weights, product, strict=True))
        left = [_Difference(weight, each) for weight, each in zip(weights, encoded, strict=True)]
        spectrum = Spectrum(_stacked(left, scales), shape, whitening, most=rank, seed=seed)
        loss = spectrum.lost(rank) * spectrum.total / total if total else 0.0
        made = _stored(weights, scales, spectrum.factors(rank), encoded, loss)
        best = made if best is None or made.loss < best.loss else best
        product = [rows.to(torch.float32) @ made.columns.to(torch.float32) for rows in made.rows]
    assert best is not None, "at least one turn"
    return best


def spectrum_of(weights: Sequence[Constant], whitening: Whitening, most: int | None = None, seed: int = 0) -> Spectrum:
    """What weights that share columns lose at every rank, or at those up to `most`; see `factorized`."""
    shape = (sum(weight.shape[0] for weight in weights), weights[0].shape[1])
    return Spectrum(_stacked(weights, _scales(weights, whitening)), shape, whitening, most, seed)


class _Difference:
    """A weight less its remainder, by rows."""

    def __init__(self, weight: Constant, encoded: Encoded) -> None:
        self.shape, self._weight, self._encoded = weight.shape, weight, encoded.dense()

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows of the difference, f32."""
        return self._weight.rows(start, stop).to(torch.float32) - self._encoded[start:stop]


def _scales(weights: Sequence[Constant], whitening: Whitening) -> list[float]:
    """What weights are multiplied with so that the energies of their results are one; 1 for a single one."""
    if len(weights) == 1:
        return [1.0]
    energies = [whitening.energy(weight) for weight in weights]
    return [energy**-0.5 if energy > 0 else 1.0 for energy in energies]


def _stacked(weights: Sequence[Constant | _Difference], scales: Sequence[float]) -> RowReader:
    """Rows of weights one below the other, each times its scale."""

    def read(start: int, stop: int) -> Tensor:
        pieces, offset = [], 0
        for weight, scale in zip(weights, scales, strict=True):
            low, high = max(start - offset, 0), min(stop - offset, weight.shape[0])
            if low < high:
                pieces.append(weight.rows(low, high).to(torch.float32) * scale)
            offset += weight.shape[0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    return read


def _rounded(weight: Constant, remainder: Remainder, less: Tensor | None) -> Encoded:
    """A weight, less a product that will be added to it again, in few bits."""
    shape, stored = (weight.shape[0], weight.shape[1]), remainder.format
    parts = {part: scratch_tensor(size, dtype) for part, (size, dtype) in stored.part_specs(shape).items()}
    for rows in row_chunks(*shape, at_most=GPTQ.weights_at_once):
        values = weight.rows(rows.start, rows.stop).to(torch.float32)
        left = values if less is None else values - less[rows]
        for part, encoded in remainder.encode(left, weight.name, rows.start).items():
            parts[part][rows] = encoded
    return Encoded(stored, shape, parts)


def _stored(
    weights: Sequence[Constant], scales: Sequence[float], factors: tuple[Tensor, Tensor],
    remainders: tuple[Encoded, ...], loss: float,
) -> LowRank:  # fmt: skip
    """Factors as they will be stored."""
    rows, columns = factors
    keep = partial(_kept, dtype=weights[0].stored_dtype)
    parts = rows.split([weight.shape[0] for weight in weights])
    each = tuple(keep(part / scale) for part, scale in zip(parts, scales, strict=True))
    return LowRank(tuple(weight.name for weight in weights), keep(columns), each, remainders, loss)


def _kept(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Values in a dtype, in a file where they are large."""
    return scratch_tensor(values.shape, dtype).copy_(values)
