"""Plain truncation: every input is as likely as any other, and no text is needed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jettison.passes.factorizers.base import Factorizer
from jettison.passes.methods.base import InputStatistics


@dataclass(frozen=True)
class SVD(Factorizer):
    """See the module docstring; no options."""

    name: ClassVar[str] = "svd"
    needs_inputs: ClassVar[bool] = False

    def second_moment(self, columns: int, statistics: InputStatistics | None) -> Tensor:
        """Ones."""
        return torch.ones(columns)
