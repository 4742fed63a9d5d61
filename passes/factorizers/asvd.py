"""Truncation with columns scaled by how large their inputs are: `mean |x| ^ alpha`, each channel by itself.

Source: ASVD (arXiv 2312.05821); its ranks by perplexity are `rank=auto` here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.passes.factorizers.base import Factorizer
from jettison.passes.methods.base import InputStatistics
from jettison.passes.options import option


@dataclass(frozen=True)
class ASVD(Factorizer):
    """See the module docstring."""

    name: ClassVar[str] = "asvd"
    alpha: float = option(0.5, doc="how much sizes count: 0 is svd", range="0 or more")

    def __post_init__(self) -> None:
        if not self.alpha >= 0:
            raise OptionError(f"[asvd] alpha={self.alpha}: needs 0 or more.")

    def second_moment(self, columns: int, statistics: InputStatistics | None) -> Tensor:
        """Squares of the scales; zero for channels that are always zero."""
        assert statistics is not None, "it needs inputs"
        means = statistics.magnitudes / max(1, statistics.tokens)
        return (means ** (2 * self.alpha)) * (means > 0)
