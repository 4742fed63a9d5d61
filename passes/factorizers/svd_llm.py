"""Truncation that loses least on the inputs seen: whitened by their second moment, `sum x x^T`.

Source: SVD-LLM (arXiv 2403.07378).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from jettison.passes.factorizers.base import Factorizer
from jettison.passes.methods.base import InputStatistics


@dataclass(frozen=True)
class SVDLLM(Factorizer):
    """See the module docstring; no options."""

    name: ClassVar[str] = "svd-llm"

    def second_moment(self, columns: int, statistics: InputStatistics | None) -> Tensor:
        """The sum of the products of inputs."""
        assert statistics is not None, "it needs inputs"
        return statistics.products
