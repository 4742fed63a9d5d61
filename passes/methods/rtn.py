"""Round to nearest: every weight by itself, without data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jettison.passes.formats import WeightFormat
from jettison.passes.methods.base import InputStatistics, Method, RowEncoder


@dataclass(frozen=True)
class RTN(Method):
    """See the module docstring."""

    name: ClassVar[str] = "rtn"

    def adapted(self, weight_format: WeightFormat) -> WeightFormat:
        """Any format as it is; what an exact one refuses, it refuses."""
        return weight_format

    def row_encoder(self, weight_format: WeightFormat, statistics: InputStatistics | None) -> RowEncoder:
        """The format's own rounding."""
        return weight_format.encode_rows
