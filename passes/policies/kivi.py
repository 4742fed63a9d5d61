"""`kivi`: keys quantised per channel, values per token, the newest tokens in full precision.

Some channels of the keys are large for every token, so a group of keys is one channel over `group` tokens; values have
no such channels, so a group of values is `group` channels of one token. Both ranges are asymmetric.

Source: KIVI, arXiv 2402.02750. Keys and values leave full precision together, `group` tokens at a time and the oldest
first, where its reference code empties the residual keys at once and moves one value per step: between
`residual - group` and `residual` tokens are exact here. Its division by the zero range of a constant group (which gives
NaN) does not happen.

Bytes per layer: B * Hkv * (D + Dv) * (residual * itemsize + T * (bits / 8 + 4 / group)), T the tokens stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from jettison.ir.errors import OptionError
from jettison.passes.options import option
from jettison.passes.policies.base import AttentionSite
from jettison.passes.policies.storing import GroupingPolicy


@dataclass(frozen=True)
class Kivi(GroupingPolicy):
    """See the module docstring."""

    name: ClassVar[str] = "kivi"
    bits: Literal[2, 4] = option(2, doc="bits of a code")  # type: ignore[misc]
    group: int = option(32, doc="values that share a range", range="a divisor of the head dimension and the residual")

    def applies_to(self, site: AttentionSite) -> str | None:
        """See `StoringPolicy.applies_to`; a group must divide the head dimension."""
        for dim in (site.key_dim, site.value_dim):
            if dim % self.group:
                raise OptionError(f"[kivi] group={self.group}: needed a divisor of the head dimension, which is {dim}.")
        return super().applies_to(site)

    def groups(self, site: AttentionSite) -> dict[str, tuple[int, int]]:
        """Keys: every channel of the slot. Values: some channels of every token."""
        return {"key": (1, site.key_dim), "value": (self.group, site.value_dim // self.group)}
