"""What policies that drop tokens have in common: a cache that grows at its end, and a choice of what to drop.

Attention needs to know which tokens a cache holds, not in which order. So the tokens of a call are written behind the
others, as in `full`, by the same graph and the same kernels; positions stay the true ones, since keys are rotated
before they are stored. Dropping is an entry of its own over the states of a layer, which the session calls for each
when a cache holds more than it may: it moves the tokens to keep from the end into the slots of those to drop, every key
head by itself, and the cache is as long as its budget again.

Bytes per layer: B * Hkv * C * ((D + Dv) * itemsize + 4) and what a policy adds, where C is the budget plus `every`
with `evict=always`, and the budget plus the tokens to generate with `evict=prefill`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.ir.program import State, state_name
from jettison.passes.options import option
from jettison.passes.policies.base import AttentionSite, Policy, Step, key_value_states
from jettison.passes.policies.storing import StoringPolicy

# Slots of the positions, each with one added: zero is empty, and what came after the last dropping is not noted.
POSITIONS = "positions"


@dataclass
class Cached:
    """What a layer's cache holds when some tokens must go, in C slots.

    Attributes:
        site: The attention.
        states: States of the layer by short name, `[B, Hkv, C, ...]`.
        held: `[B] i64`, slots of each row that hold a token: the first ones.
        token_count: `[B] i64`, tokens that each row has seen; the last of them is always held.
        constants: What `EvictingPolicy.constants` gave.
    """

    site: AttentionSite
    states: dict[str, Tensor] = field(repr=False)
    held: Tensor
    token_count: Tensor
    constants: dict[str, Tensor] = field(default_factory=dict)

    @property
    def positions(self) -> Tensor:
        """`[B, Hkv, C] i64`, from `token_count` on where a slot is empty.

        Tokens that came after the last dropping are in order at the end.
        """
        noted = self.states[POSITIONS].to(torch.int64)
        slots = torch.arange(noted.shape[2], device=noted.device)
        return torch.where(noted > 0, noted - 1, ((self.token_count - self.held)[:, None] + slots)[:, None])

    @property
    def age(self) -> Tensor:
        """`[B, Hkv, C] i64`, 1 for the newest token, below it where a slot is empty."""
        return self.token_count[:, None, None] - self.positions


@dataclass(frozen=True)
class EvictingPolicy(Policy):
    """A policy that keeps `budget` tokens; see the module docstring. Subclasses give `importance`."""

    budget: int = option(doc="tokens kept per layer and key head", range="at least 1")
    evict: Literal["prefill", "always"] = option("prefill", doc="drop after each prompt only, or also while generating")
    every: int = option(
        16, doc="with evict=always: tokens generated between two droppings, held on top", range="at least 1"
    )

    # States that hold one value per slot, beside keys, values and positions; dropping moves them too.
    per_slot: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        for name, number in (("budget", self.budget), ("every", self.every)):
            if number < 1:
                raise OptionError(f"[{self.name}] {name}={number}: needed at least 1.")

    @property
    def why_alone(self) -> str | None:
        """Why the tokens that stay cannot be compressed; None if they can."""
        return None

    def constants(self, site: AttentionSite) -> dict[str, Tensor]:
        """What dropping needs to know beside the states, by short name."""
        return {}

    @property
    def demotes(self) -> StoringPolicy | None:
        """How the tokens that lose their slots are compressed; None if they are gone."""
        return None

    @property
    def dropped_every(self) -> int | None:
        """Tokens between two droppings while generating; None for no dropping then."""
        return self.every if self.evict == "always" else None

    def applies_to(self, site: AttentionSite) -> str | None:
        """Declines layers with a window: they forget by themselves, and slots do not show who is inside it."""
        if site.window:
            return (
                f"the layer attends to a window of {site.window} tokens, which cache-kv{{policy=window}} keeps exactly"
            )
        if self.budget >= site.context:
            return f"a budget of {self.budget} tokens drops nothing within a context of {site.context}"
        return None

    def states(self, site: AttentionSite) -> dict[str, State]:
        """Keys, values, and positions as noted at the last dropping."""
        states = key_value_states(site, "slots")
        name = state_name(site.layer, POSITIONS)
        return {**states, POSITIONS: State(name, ("batch", site.kv_heads, "slots"), torch.int32)}

    def step(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Append, attend to everything held, and note what `importance` needs to know."""
        key, value = step.append()
        return step.attend(key, value), {"key": key, "value": value}

    def importance(self, cached: Cached) -> Tensor:
        """What each token is worth, `[B, Hkv, C]`: the least important ones are dropped; infinite means never.

        Values of empty slots are not read.
        """
        raise NotImplementedError

    def drop(self, cached: Cached, *, in_order: bool = False) -> dict[str, Tensor]:
        """Keep the `budget` most important tokens in the first slots; every state of the layer that changes.

        Of the tokens to keep, those already in the first slots stay where they are, or with `in_order` all move
        together and keep their order. A row must hold at least as many.
        """
        is_kept = self._kept(cached)
        kept = _in_front(is_kept).narrow(-1, 0, self.budget)
        if in_order:
            targets = torch.arange(self.budget, device=kept.device).expand(kept.shape)
        else:  # kept slots first, then holes, each in order: beside `kept`, whose last ones lie behind the first slots
            targets = _in_front(is_kept.narrow(-1, 0, self.budget))
        return self._moved(cached, kept, targets)

    def split(self, cached: Cached) -> dict[str, Tensor]:
        """As `drop`, but the other tokens follow behind the budget, in order, to be compressed from there."""
        source = _in_front(self._kept(cached))
        return self._moved(cached, source, torch.arange(source.shape[2], device=source.device).expand(source.shape))

    def _moved(self, cached: Cached, source: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """New states with what some slots `[B, Hkv, N]` held in others, empty where nothing is moved to.

        Everything is read before anything is written: a new state may lie where the old one does.
        """
        new = {}
        for short in ("key", "value"):
            state = cached.states[short]
            rows = state.gather(2, source[..., None].expand(-1, -1, -1, state.shape[3]))
            new[short] = torch.ops.jettison.write_slots(state, rows, targets)
        values = {short: cached.states[short] for short in self.per_slot}
        values[POSITIONS] = (cached.positions + 1).to(torch.int32)
        for short, each in values.items():
            new[short] = torch.zeros_like(each).scatter(-1, targets, each.gather(-1, source))
        return new

    def _kept(self, cached: Cached) -> Tensor:
        """Ones for the slots of the `budget` most important tokens, `[B, Hkv, C] i64`."""
        return _largest(self.importance(cached).masked_fill(cached.age < 1, -torch.inf), self.budget)


def _largest(values: Tensor, count: int) -> Tensor:
    """Which are the `count` largest along the last dimension, as ones; of equals the first.

    Kernels differ in which of equals they return, and a max pool makes equals of neighbours.
    """
    least = values.topk(count, -1, sorted=False).values.amin(-1, keepdim=True)
    more, equal = (values > least).to(torch.int64), (values == least).to(torch.int64)
    return more + equal * (equal.cumsum(-1) + more.sum(-1, keepdim=True) <= count)


def _in_front(marks: Tensor) -> Tensor:
    """Indices along the last dimension: of the ones first, then of the zeros, each in order."""
    indices = torch.arange(marks.shape[-1], device=marks.device)
    return (indices - marks * marks.shape[-1]).sort(-1).indices
