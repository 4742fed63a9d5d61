"""`full`: keep every key and value; the slot of a token is its position.

Bytes per layer: B * Hkv * C * (D + Dv) * itemsize, where C is the session's capacity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from jettison.ir.program import State
from jettison.passes.policies.base import AttentionSite, Policy, Step, key_value_states


@dataclass(frozen=True)
class Full(Policy):
    """See the module docstring; no options."""

    name: ClassVar[str] = "full"

    @property
    def is_exact(self) -> bool:
        """Nothing is dropped or rounded."""
        return True

    def states(self, site: AttentionSite) -> dict[str, State]:
        """Keys and values of every position."""
        return key_value_states(site, "capacity")

    def step(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Write at the positions, attend over all slots: those beyond a row's own position are never visible."""
        key, value = step.append()
        return step.attend(key, value), {"key": key, "value": value}
