"""`h2o`: keep the heavy hitters, the tokens that received the most attention so far, and the most recent ones.

The attention that every query gave a token is added up, over the prompt and over generated tokens; query heads that
share a key head count together. Dropped tokens are gone, with what they received. Sums favour early tokens, which more
queries have seen: `age=true` divides by how many did.

Source: H2O, arXiv 2306.14048: its algorithm, in which a step attends to all that is held and drops afterwards. Its
reference code masks instead of dropping, forgets one column for a step, and adds the batch together.

Bytes per layer beside those of `evicting`: B * Hkv * C * 4 for what each slot received.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.ir.program import State, state_name
from jettison.passes.options import option
from jettison.passes.policies.base import AttentionSite, Step
from jettison.passes.policies.evicting import Cached, EvictingPolicy

RECEIVED = "received"


@dataclass(frozen=True)
class H2O(EvictingPolicy):
    """See the module docstring."""

    name: ClassVar[str] = "h2o"
    per_slot: ClassVar[tuple[str, ...]] = (RECEIVED,)
    recent: int | None = option(
        None, doc="most recent tokens that always stay; default half the budget", range="0 to the budget"
    )
    age: bool = option(False, doc="divide what a token received by the number of queries that saw it")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.recent is not None and not 0 <= self.recent <= self.budget:
            raise OptionError(f"[h2o] recent={self.recent}: needed 0 to {self.budget}, the budget.")

    @property
    def why_alone(self) -> str | None:
        """A step over compressed tokens does not tell what they received."""
        return "adds up the attention of every step, which a step over compressed tokens does not tell"

    def states(self, site: AttentionSite) -> dict[str, State]:
        """Also what each slot received."""
        name = state_name(site.layer, RECEIVED)
        return {**super().states(site), RECEIVED: State(name, ("batch", site.kv_heads, "slots"), torch.float32)}

    def step(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Append, attend, and add up what each slot received; an empty slot has received nothing."""
        key, value = step.append()
        out, received = step.attend_scored(key, value)
        return out, {"key": key, "value": value, RECEIVED: step.states[RECEIVED] + received}

    def importance(self, cached: Cached) -> Tensor:
        """What was received; the recent ones always stay."""
        received, age = cached.states[RECEIVED], cached.age
        if self.age:
            received = received / age
        recent = self.budget // 2 if self.recent is None else self.recent
        return received.masked_fill(age <= recent, torch.inf)
