"""HiRE: estimate every neuron with a smaller copy of the first matrix, and keep the groups that look largest.

    z = A @ (B @ x) + up_bias   (rank r: A [F, r], B [r, E])
    score[g] = sum over the neurons of g of (activation(z) * norm of its row of the second matrix) ^ 2

A and B are the truncation of the matrix that is best for the inputs seen (passes/whitening.py). With a gate there are
two estimates, and their product. Nothing is trained. It reads `r * (E + F)` weights, where a network of the same rank
(`dejavu`) reads `r * (E + G)`: better recall for more bytes. With `estimator=int4` the smaller copy is the matrix in 4
bits, groups of 32: a quarter of the bytes of a bf16 matrix, and none saved where the matrix has 4 bits itself.

Source: HiRE (arXiv 2402.09360), which trains its factors and keeps more candidates than it uses; the exact values that
would tell them apart are those of the group, and once they are read it is used. It also computes neurons that nearly
every token needs without asking the estimate; groups like that are rare: of tiny-opt's layers, some have one, of the
16 groups of 8 that a token keeps, and none has of the 4 of 32 (`hot` in benchmarks/results/contextual_sparsity.json).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch.nn.functional as F
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.ir.ops import quantized_linear
from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.passes.formats import IntGroups
from jettison.passes.options import option
from jettison.passes.predictors.base import Predictor, Samples
from jettison.passes.whitening import Spectrum, Whitening

# Of the mean of the second moment's diagonal, added to it: what no input of the sample has still counts a little.
_DAMPING = 1e-4
_COPY = IntGroups(4, 32)


@dataclass(frozen=True)
class HiRE(Predictor):
    """See the module docstring."""

    name: ClassVar[str] = "hire"
    rank: int | None = option(None, doc="of the estimate; E / 8 unless given", range="1 or more")
    estimator: Literal["lowrank", "int4"] = option("lowrank", doc="what the smaller copy is")

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise OptionError(f"[hire] rank={self.rank}: needs 1 or more.")
        if self.rank is not None and self.estimator == "int4":
            raise OptionError("[hire] rank with estimator=int4: a copy in 4 bits has the full rank. Leave it out.")

    def fit(self, samples: Samples, kept: int, seed: int) -> dict[str, Tensor]:
        """Factorise; see `Predictor.fit`."""
        rank = min(self.rank or max(1, samples.inputs.shape[1] // 8), *samples.up.shape)
        whitening = second_moment(samples.inputs) if self.estimator == "lowrank" else None
        # The norms by group: the graph learns from their shape how many groups there are.
        made = {"norms": samples.norms.reshape(samples.scores.shape[1], -1)}
        for name, matrix in (("up", samples.up), ("gate", samples.gate)):
            if matrix is not None and whitening is not None:
                made[f"{name}_rows"], made[f"{name}_columns"] = truncated(matrix, whitening, rank)
            elif matrix is not None:
                made |= {f"{name}_{part}": values for part, values in _COPY.encode(matrix, name).items()}
        if samples.up_bias is not None:
            made["up_bias"] = samples.up_bias
        return made

    def scores(self, x: Tensor, constants: Mapping[str, Tensor], activation: str) -> Tensor:
        """See `Predictor.scores`."""

        def estimate(name: str, bias: Tensor | None) -> Tensor:
            if self.estimator == "int4":
                parts = (constants[f"{name}_{part}"] for part in ("codes", "scales", "zeros"))
                return quantized_linear(x, *parts, bias, _COPY.bits, _COPY.group, x.shape[-1])
            return F.linear(F.linear(x, constants[f"{name}_columns"]), constants[f"{name}_rows"], bias)

        hidden = estimate("up", constants.get("up_bias"))
        activate, has_gate = ACTIVATIONS[activation], any(name.startswith("gate") for name in constants)
        hidden = activate(estimate("gate", None)) * hidden if has_gate else activate(hidden)
        norms = constants["norms"]
        worth = hidden.unflatten(-1, tuple(norms.shape)) * norms
        return worth.square().sum(-1)


def second_moment(inputs: Tensor) -> Whitening:
    """Of inputs `[T, E]`, slightly damped."""
    moment = inputs.T @ inputs / len(inputs)
    moment.diagonal().add_(_DAMPING * moment.diagonal().mean().clamp_min(1e-30))
    return Whitening(moment)


def truncated(matrix: Tensor, whitening: Whitening, rank: int) -> tuple[Tensor, Tensor]:
    """The factors of a matrix that keep most of its products with the inputs seen.

    Args:
        matrix: `[N, E]`.
        whitening: Of the inputs.
        rank: Of the factors.

    Returns:
        `[N, rank]` and `[rank, E]`.
    """
    shape = (matrix.shape[0], matrix.shape[1])
    return Spectrum(lambda start, stop: matrix[start:stop], shape, whitening, most=rank).factors(rank)
