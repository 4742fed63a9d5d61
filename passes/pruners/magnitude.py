"""The smallest weights of a matrix become zero, without data; the others stay as they are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from jettison.passes.pruners.base import Pattern, Pruner, Statistics, lowest, lowest_of_groups


@dataclass(frozen=True)
class Magnitude(Pruner):
    """See the module docstring; no options."""

    name: ClassVar[str] = "magnitude"
    needs_inputs: ClassVar[bool] = False

    def prune(self, weight: Tensor, pattern: Pattern, statistics: Statistics | None) -> Tensor:
        """See `Pruner`; the whole matrix is one competition."""
        scores = weight.abs()
        if pattern.group:
            return weight.masked_fill_(lowest_of_groups(scores, pattern), 0.0)
        chosen = lowest(scores.view(1, -1), pattern.count(weight.numel()))
        return weight.masked_fill_(chosen.view(weight.shape), 0.0)
