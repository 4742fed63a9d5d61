"""HQQ: zero points between the codes, moved so that most weights are met closely and a few may be missed, without data.

Scales stay those of the range. The zero point z minimises `sum |w - (q - z) s| ^ 0.7` by half-quadratic splitting: 20
times `q = round(w / s + z)`, `e = shrink(w - (q - z) s)`, `z = mean over the group of (q - (w - e) / s)`, with
`shrink(x) = sign(x) max(0, |x| - |x|^-0.3 / beta)` and beta growing by 1 % from 10.

Zero points are stored in fp32, `b + 64 / group` bits per weight: rounded to whole codes they gain nothing over rounding
to nearest. Smaller groups are the better use of those bits: on tiny-llama, linears in 4 bits, groups of 128, come to a
KL of 0.0065 like this, and to 0.0054 rounded to nearest in groups of 64, which takes 0.8 % more bytes of the model
(`benchmarks/results/weights_quality.json`).

Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023), and mobiusml/hqq,
core/optimize.py. There the zero point returned is one update behind the best error and all groups stop together; here
each group keeps its best one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.passes.formats import Grid, IntGroups, WeightFormat
from jettison.passes.methods.base import InputStatistics, Method, RowEncoder

_NORM = 0.7
_ROUNDS = 20
_FIRST_BETA, _BETA_GROWTH = 10.0, 1.01


@dataclass(frozen=True)
class HQQ(Method):
    """See the module docstring."""

    name: ClassVar[str] = "hqq"

    def adapted(self, weight_format: WeightFormat) -> WeightFormat:
        """The same integer groups with zero points in fp32."""
        if not isinstance(weight_format, IntGroups) or weight_format.symmetric:
            raise OptionError(
                f"[hqq] format {weight_format}: needs integer groups with zero points, which are what the method "
                "chooses. Take symmetric=false, or another method."
            )
        return replace(weight_format, float_zeros=True)

    def row_encoder(self, weight_format: WeightFormat, statistics: InputStatistics | None) -> RowEncoder:
        """Moves the zero points of each group by itself."""

        def encode(rows: Tensor, where: str, first_row: int) -> dict[str, Tensor]:
            groups = weight_format.split_groups(rows)
            weight_format.check_values(groups, where, first_row)
            grid = moved_zeros(weight_format, groups)
            return weight_format.pack(weight_format.round(groups, grid), grid)

        return encode


def moved_zeros(weight_format: WeightFormat, groups: Tensor) -> Grid:
    """The grid of each group with the best of 20 zero points.

    Args:
        weight_format: Integer groups with zero points in fp32.
        groups: `[n, b, g]` f32.
    """
    best = grid = weight_format.fit(groups)
    assert grid.zeros is not None, "of integer groups with float zeros"
    scales, zeros = grid.scales.unsqueeze(-1), grid.zeros
    least = torch.full_like(grid.scales, torch.inf)
    beta = _FIRST_BETA
    for _ in range(_ROUNDS + 1):
        grid = Grid(best.scales, zeros)
        codes = weight_format.round(groups, grid)
        error = groups - weight_format.values(codes, grid)
        cost = error.abs().pow_(_NORM).sum(-1)
        is_better = cost < least
        least = torch.where(is_better, cost, least)
        assert best.zeros is not None, "as above"
        best = Grid(best.scales, torch.where(is_better, zeros, best.zeros))
        magnitudes = error.abs()
        # Where the error is zero its power is infinite and the difference minus infinity: nothing is left.
        shrunk = error.sign() * (magnitudes - magnitudes.pow(_NORM - 1) / beta).clamp_(min=0)
        zeros = (codes.to(torch.float32) - (groups - shrunk) / scales).mean(-1)
        beta *= _BETA_GROWTH
    return best
