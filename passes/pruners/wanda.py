"""The weights of each row become zero whose products with the inputs seen are smallest; the others stay as they are.

`score = |w_nk| * ||x_k||`, with the norm of channel k over all tokens, and the rows compete for themselves: every row
keeps equally many. Channels that were always zero go first.

Source: Wanda (arXiv 2306.11695).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jettison.passes.pruners.base import Pattern, Pruner, Statistics, lowest, lowest_of_groups


class ChannelNorms:
    """Sums of squares over the tokens that a linear reads.

    Attributes:
        squares: `[K] f64`.

    Args:
        columns: K.
    """

    def __init__(self, columns: int) -> None:
        self.squares = torch.zeros(columns, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Count the tokens `[..., K]` of a batch."""
        self.squares += x.reshape(-1, x.shape[-1]).to(torch.float32).square().sum(0)

    def is_finite(self) -> bool:
        """See `Statistics`."""
        return bool(self.squares.isfinite().all())


@dataclass(frozen=True)
class Wanda(Pruner):
    """See the module docstring; no options."""

    name: ClassVar[str] = "wanda"

    def statistics(self, columns: int) -> ChannelNorms:
        """See `Pruner`."""
        return ChannelNorms(columns)

    def prune(self, weight: Tensor, pattern: Pattern, statistics: Statistics | None) -> Tensor:
        """See `Pruner`."""
        assert isinstance(statistics, ChannelNorms), "made above"
        # Only ratios count, and these stay in the range of fp32.
        norms = statistics.squares.sqrt()
        scores = weight.abs() * (norms / norms.max().clamp_min(1e-300)).to(torch.float32)
        if pattern.group:
            return weight.masked_fill_(lowest_of_groups(scores, pattern), 0.0)
        return weight.masked_fill_(lowest(scores, pattern.count(weight.shape[1])), 0.0)
