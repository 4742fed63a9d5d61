"""Weights become zero column by column, and the columns to come make up for what each of them took away.

With `H = sum x xT` over the tokens that a linear reads and `UT U = (H + damping * mean(diag H) * I)^-1`, U upper
triangular, leaving out `w_i` costs `w_i^2 / U_ii^2`. Columns are taken from left to right in blocks of 128. At the
start of a block the weights with the smallest costs are chosen, over all rows, from what earlier columns made of them;
n:m is chosen at the start of each group. Column i then gives the error `e = (w_i - q_i) / U_ii`, with `q_i` zero where
chosen, and the columns behind it become `w_j - e * U_ij`, at once within the block and in one product behind it.

Where no factor exists, the damping grows by ten. Channels that were always zero cost nothing, so their weights go
first, but no more than asked for: the reference code takes all of them, and another text may use them.

Source: SparseGPT (arXiv 2301.00774).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.passes.methods.base import InputStatistics
from jettison.passes.methods.gptq import inverse_factor
from jettison.passes.options import option
from jettison.passes.pruners.base import Pattern, Pruner, Statistics, lowest, lowest_of_groups

BLOCK = 128


class InputProducts(InputStatistics):
    """Products of the inputs of a linear."""

    def is_finite(self) -> bool:
        """See `Statistics`."""
        return bool(self.products.isfinite().all())


@dataclass(frozen=True)
class SparseGPT(Pruner):
    """See the module docstring."""

    name: ClassVar[str] = "sparsegpt"
    damping: float = option(0.01, doc="added to the diagonal, as a part of its mean", range="above 0, at most 1")

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise OptionError(
                f"[sparsegpt] damping={self.damping!r}: needs a number above 0 and at most 1, because the products of "
                "correlated inputs have no inverse without. 0.01 is usual."
            )

    def statistics(self, columns: int) -> InputProducts:
        """See `Pruner`."""
        return InputProducts(columns)

    def prune(self, weight: Tensor, pattern: Pattern, statistics: Statistics | None) -> Tensor:
        """See `Pruner`."""
        assert isinstance(statistics, InputProducts), "made above"
        products = statistics.products
        factor = inverse_factor(products, torch.arange(len(products)), self.damping)
        costs = factor.diagonal().square().reciprocal_().masked_fill_(products.diagonal() == 0, 0.0)
        # Transposed, so that a column is contiguous.
        left = weight.T.contiguous()
        # Blocks of whole groups.
        size = BLOCK - BLOCK % pattern.group if 0 < pattern.group <= BLOCK else max(BLOCK, pattern.group)
        for start in range(0, len(left), size):
            stop = min(start + size, len(left))
            _prune_block(left, start, stop, factor, costs, pattern)
        return left.T.contiguous()


def _prune_block(left: Tensor, start: int, stop: int, factor: Tensor, costs: Tensor, pattern: Pattern) -> None:
    """Make weights of some columns zero and correct all behind them.

    Args:
        left: `[K, N] f32`, the weight transposed; changed.
        start: First column.
        stop: Behind the last one.
        factor: U, `[K, K] f32`.
        costs: `[K] f32`, what a weight of 1 costs.
        pattern: Which become zero.
    """
    rows = left.shape[1]
    errors = torch.empty(stop - start, rows)
    if not pattern.group:
        scores = left[start:stop].square() * costs[start:stop, None]
        # In the order of the rows, so that of equal ones the first row's go first.
        chosen = lowest(scores.T.reshape(1, -1), pattern.count(scores.numel())).view(rows, -1).T
    for column in range(start, stop):
        if pattern.group and (column - start) % pattern.group == 0:
            part = slice(column, column + pattern.group)
            chosen = lowest_of_groups((left[part].square() * costs[part, None]).T, pattern).T
        index = (column - start) % pattern.group if pattern.group else column - start
        error = errors[column - start]
        torch.mul(left[column], chosen[index], out=error).div_(factor[column, column])
        left[column].masked_fill_(chosen[index], 0.0)
        left[column + 1 : stop].addr_(factor[column, column + 1 : stop], error, alpha=-1)
    left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
