"""`sinks`: keep the first tokens of a sequence and the last ones.

Models put attention that finds nothing better on the first tokens: a window without them breaks, a window with a few of
them goes on for ever. It forgets what is in between. Positions stay the true ones, so a sequence still ends at the
model's context.

Source: StreamingLLM, arXiv 2309.17453. The first tokens are the first real ones of each row (its reference code takes
padding for them).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.passes.options import option
from jettison.passes.policies.evicting import Cached, EvictingPolicy


@dataclass(frozen=True)
class Sinks(EvictingPolicy):
    """See the module docstring."""

    name: ClassVar[str] = "sinks"
    first: int = option(4, doc="first tokens that always stay", range="0 to less than the budget")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.first < self.budget:
            raise OptionError(f"[sinks] first={self.first}: needed 0 to {self.budget - 1}, less than the budget.")

    def importance(self, cached: Cached) -> Tensor:
        """The later, the more important; the first ones most of all."""
        positions = cached.positions
        return torch.where(positions < self.first, torch.inf, positions.to(torch.float32))
