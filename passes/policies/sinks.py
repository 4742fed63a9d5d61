"""`sinks`: keep the first tokens of a sequence and the last ones.

Models put attention that finds nothing better on the first tokens: a window without them breaks, a window with a few of
them goes on for ever. It forgets what is in between.

With `positions=true` the first tokens stay where they were, ever further away. With `positions=cache` the distances are
those in the cache, as in the source: the token behind the first ones is next to them. Neither the tokens of the window
(neighbours either way) nor the queries are rotated otherwise for that: when tokens are dropped, the keys of the first
ones are rotated on by the number of tokens missing between them and the window, every time from what they were.

Source: StreamingLLM, arXiv 2309.17453. The first tokens are the first real ones of each row (its reference code takes
padding for them). A sequence still ends at the model's context.

Bytes per layer beside those of `evicting`, with `positions=cache`: B * Hkv * first * D * itemsize.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.ir.program import State, state_name
from jettison.passes.options import option
from jettison.passes.policies.base import AttentionSite
from jettison.passes.policies.evicting import Cached, EvictingPolicy

FIRST_KEYS, FREQUENCIES = "first_keys", "frequencies"


@dataclass(frozen=True)
class Sinks(EvictingPolicy):
    """See the module docstring."""

    name: ClassVar[str] = "sinks"
    first: int = option(4, doc="first tokens that always stay", range="0 to less than the budget")
    positions: Literal["true", "cache"] = option(
        "true", doc="how far away the first tokens are: where they were, or next"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.first < self.budget:
            raise OptionError(f"[sinks] first={self.first}: needed 0 to {self.budget - 1}, less than the budget.")

    def importance(self, cached: Cached) -> Tensor:
        """The later, the more important; the first ones most of all."""
        positions = cached.positions
        return torch.where(positions < self.first, torch.inf, positions.to(torch.float32))

    @property
    def rotates(self) -> bool:
        """For distances in the cache."""
        return self.positions == "cache" and self.first > 0

    @property
    def why_alone(self) -> str | None:
        """Compressed keys cannot be rotated on."""
        return "with positions=cache rotates keys again, which compressed ones cannot be" if self.rotates else None

    def applies_to(self, site: AttentionSite) -> str | None:
        """See `EvictingPolicy.applies_to`; distances in the cache need rotated keys."""
        reason = super().applies_to(site)
        if reason is None and self.rotates and site.frequencies is None:
            return "positions=cache needs keys that are rotated in proportion to their position"
        return reason

    def states(self, site: AttentionSite) -> dict[str, State]:
        """For distances in the cache, also the first keys as they were."""
        states = super().states(site)
        if self.rotates:
            shape = ("batch", site.kv_heads, self.first, site.key_dim)
            states[FIRST_KEYS] = State(state_name(site.layer, FIRST_KEYS), shape, site.dtype)
        return states

    def constants(self, site: AttentionSite) -> dict[str, Tensor]:
        """How fast keys turn, in fp64: fp32 is off by a degree at a distance of 100,000."""
        return {FREQUENCIES: torch.tensor(site.frequencies, dtype=torch.float64)} if self.rotates else {}

    def drop(self, cached: Cached, *, in_order: bool = False) -> dict[str, Tensor]:
        """See `EvictingPolicy.drop`; the first tokens have the first slots."""
        new = super().drop(cached, in_order=in_order)
        if not self.rotates:
            return new
        known, current = cached.states[FIRST_KEYS], cached.states["key"].narrow(2, 0, self.first)
        # Zeros until tokens were dropped for the first time, as every state.
        original = torch.where((known != 0).any(-1, keepdim=True), known, current)
        missing = (cached.token_count - self.budget).to(torch.float64)
        angles = missing[:, None, None] * cached.constants[FREQUENCIES]
        cos, sin = (turned.to(original.dtype).expand(-1, self.first, -1) for turned in (angles.cos(), angles.sin()))
        rotated = torch.ops.jettison.rotary_embedding(original, cos, sin, cached.site.is_interleaved)
        slots = torch.arange(self.first, device=rotated.device).expand(rotated.shape[:3])
        return {**new, "key": torch.ops.jettison.write_slots(new["key"], rotated, slots), FIRST_KEYS: original}
