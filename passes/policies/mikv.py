"""`mikv`: keep the heavy hitters and the recent tokens in full precision, all others in few bits.

What `h2o` drops is compressed instead, and stays: its importance decides what moves, and nothing moves back. A balancer
takes the outliers out of the keys: channel c is multiplied with `sqrt(max |q_c| / max |k_c|)` over the tokens up to the
first demotion, before its range is split, and divided by it when it is read.

Source: MiKV, arXiv 2402.18096. For heads that share a key head, the largest query of all of them counts, and a channel
of zeros has factor 1. Attention received is added up over tokens in full precision only.

Bytes per layer beside those of `h2o`, whose C is the budget plus `every`: B * Hkv * T * ((D + Dv) * bits / 8 + 8 * D /
group), T the tokens demoted, and B * Hkv * 3 * D * 4 for the balancer.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.ir.program import State, state_name
from jettison.passes.options import option
from jettison.passes.policies.base import AttentionSite, Step
from jettison.passes.policies.h2o import H2O
from jettison.passes.policies.storing import StoringPolicy

LARGEST = ("query_max", "key_max")
FACTORS = "factors"


@dataclass(frozen=True)
class MiKV(H2O):
    """See the module docstring."""

    name: ClassVar[str] = "mikv"
    evict: Literal["prefill", "always"] = option(
        "always", doc="compress after each prompt only, or also while generating"
    )
    bits: Literal[2, 4, 8] = option(2, doc="bits of a code of the other tokens")
    group: int | None = option(
        None, doc="channels that share a range; default half the head", range="a divisor of the head dimension"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group is not None and self.group < 1:
            raise OptionError(f"[mikv] group={self.group}: needed at least 1.")

    @property
    def demotes(self) -> StoringPolicy:
        """Few bits for every token that loses its slot."""
        return Demoted(self.budget, self.bits, self.group)

    def applies_to(self, site: AttentionSite) -> str | None:
        """As for `h2o`, and what the compressed form can hold."""
        return super().applies_to(site) or self.demotes.applies_to(site)

    def states(self, site: AttentionSite) -> dict[str, State]:
        """Also the largest query and key of each channel."""
        shape = ("batch", site.kv_heads, site.key_dim)
        largest = {short: State(state_name(site.layer, short), shape, torch.float32) for short in LARGEST}
        return {**super().states(site), **largest}

    def step(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Also looks for larger queries and keys."""
        out, new = super().step(step)
        grouped = step.query.abs().unflatten(1, (step.site.kv_heads, -1)).amax((2, 3))
        found = dict(zip(LARGEST, (grouped, step.key.abs().amax(2)), strict=True))
        return out, new | {
            short: torch.maximum(step.states[short], found[short].to(torch.float32)) for short in LARGEST
        }


@dataclass(frozen=True)
class Demoted(StoringPolicy):
    """The compressed form of the other tokens, one range per `channels`; None means half the head."""

    name: ClassVar[str] = "mikv"
    bits: int = 2  # type: ignore[misc]
    channels: int | None = None
    reads: ClassVar[tuple[str, ...]] = LARGEST

    @property
    def keep(self) -> int:
        """The tokens in full precision."""
        return self.residual

    def applies_to(self, site: AttentionSite) -> str | None:
        """See `StoringPolicy.applies_to`; a group must divide the head dimension."""
        for dim in (site.key_dim, site.value_dim):
            if dim % (self.channels or 2):
                raise OptionError(
                    f"[mikv] group={self.channels}: needed a divisor of the head dimension, which is {dim}."
                )
        return super().applies_to(site)

    def groups(self, site: AttentionSite) -> dict[str, tuple[int, int]]:
        """Some channels of a token."""
        dims = {"key": site.key_dim, "value": site.value_dim}
        return {short: (1, 2 if self.channels is None else dim // self.channels) for short, dim in dims.items()}

    def stored_states(self, site: AttentionSite) -> dict[str, State]:
        """Also the factors of the balancer; zeros until there are any."""
        name = state_name(site.layer, FACTORS)
        factors = State(name, ("batch", site.kv_heads, site.key_dim), torch.float32)
        return {**super().stored_states(site), FACTORS: factors}

    def prepare(self, states: dict[str, Tensor], slots: Tensor) -> dict[str, Tensor]:
        """The balancer, before anything is stored with another one."""
        query, key = (states[short] for short in LARGEST)
        is_alive = (query > 0) & (key > 0)
        balanced = torch.where(is_alive, (query / torch.where(is_alive, key, 1.0)).sqrt(), 1.0)
        is_first = (slots[:, :1] == 0)[:, :, None]
        return {FACTORS: torch.where(is_first, balanced, states[FACTORS])}

    def compress(
        self, site: AttentionSite, key: Tensor, value: Tensor, states: dict[str, Tensor], slots: Tensor
    ) -> dict[str, Tensor]:
        """See `StoringPolicy.compress`."""
        factors = states[FACTORS][:, :, None, None]
        return self.packed(site, {"key": key.to(torch.float32) * factors, "value": value})

    def decompress(self, site: AttentionSite, stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """See `StoringPolicy.decompress`."""
        key, value = super().decompress(site, stored)
        factors = stored[FACTORS]
        return key / torch.where(factors > 0, factors, 1.0)[:, :, None].to(key.dtype), value
