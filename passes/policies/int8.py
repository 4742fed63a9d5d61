"""`int8`: every key and value in 8 bits, with one range per token and key head; a plain baseline.

Channels that are large for every token cost all others of the head their resolution, which is why `kivi` groups keys
the other way.

Bytes per layer: B * Hkv * (residual * (D + Dv) * itemsize + T * (D + Dv + 8)), T the tokens stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jettison.passes.options import option
from jettison.passes.policies.base import AttentionSite
from jettison.passes.policies.storing import StoringPolicy


@dataclass(frozen=True)
class Int8(StoringPolicy):
    """See the module docstring."""

    name: ClassVar[str] = "int8"
    bits: ClassVar[int] = 8
    residual: int = option(32, doc="newest tokens in full precision, at most", range="at least 1")

    def groups(self, site: AttentionSite) -> dict[str, tuple[int, int]]:
        """All channels of a token."""
        return {"key": (1, 1), "value": (1, 1)}
