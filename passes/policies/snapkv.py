"""`snapkv`: keep the tokens of a prompt that its last queries attend to.

The last `window` queries vote with their attention; the votes of the query heads that share a key head are added up and
smoothed over neighbouring tokens, and the tokens with the most votes stay beside the window itself. The prompt itself
is attended to exactly. What is asked for must stand in the window: tokens that only a later question needs are gone.

Source: SnapKV, arXiv 2404.14469, with one choice per key head where its reference code repeats keys for every query
head, votes summed in fp32, and positions counted where the reference derives them from the length of the cache.

Bytes per layer beside those of `evicting`: B * H * window * D * itemsize for the queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.ir.program import State, state_name
from jettison.passes.options import option
from jettison.passes.policies.base import AttentionSite, Step
from jettison.passes.policies.evicting import Cached, EvictingPolicy

QUERIES = "queries"


@dataclass(frozen=True)
class SnapKV(EvictingPolicy):
    """See the module docstring."""

    name: ClassVar[str] = "snapkv"
    window: int = option(32, doc="last tokens, which vote and stay", range="1 to less than the budget")
    kernel: int = option(5, doc="neighbours over which votes are smoothed", range="an odd number")
    pool: Literal["avg", "max"] = option("avg", doc="how they are smoothed")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.window < self.budget:
            raise OptionError(f"[snapkv] window={self.window}: needed 1 to {self.budget - 1}, less than the budget.")
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise OptionError(f"[snapkv] kernel={self.kernel}: needed an odd number, so that it has a middle.")

    def states(self, site: AttentionSite) -> dict[str, State]:
        """Also the last queries, the newest at the end."""
        shape = ("batch", site.heads, self.window, site.key_dim)
        name = state_name(site.layer, QUERIES)
        return {**super().states(site), QUERIES: State(name, shape, site.dtype)}

    def step(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Also moves the queries up."""
        out, new = super().step(step)
        last = torch.cat([step.states[QUERIES], step.query], 2)
        return out, {**new, QUERIES: last.narrow(2, last.shape[2] - self.window, self.window)}

    def importance(self, cached: Cached) -> Tensor:
        """Smoothed votes; the window itself always stays."""
        site, age = cached.site, cached.age
        votes = self._votes(cached.states[QUERIES], cached.states["key"], age, site.scale, site.softcap)
        # Neighbours in the text: slots are out of order once tokens were dropped.
        order = age.sort(-1).indices
        smooth = self._smooth(votes.masked_fill(age <= self.window, 0.0).gather(-1, order))
        return torch.zeros_like(smooth).scatter(-1, order, smooth).masked_fill(age <= self.window, torch.inf)

    def _votes(self, queries: Tensor, key: Tensor, age: Tensor, scale: float, softcap: float) -> Tensor:
        """Attention of the window's queries on every slot, summed: `[B, Hkv, C] f32`."""
        kv_heads = key.shape[1]
        grouped = queries.to(torch.float32).unflatten(1, (kv_heads, -1)).flatten(2, 3)
        scores = torch.matmul(grouped, key.to(torch.float32).transpose(2, 3)) * scale
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        query_age = torch.arange(self.window, 0, -1, device=age.device)
        query_age = query_age.repeat(queries.shape[1] // kv_heads)[:, None]
        scores = scores.masked_fill(age[:, :, None] < query_age, torch.finfo(torch.float32).min)
        return scores.softmax(-1).sum(2)

    def _smooth(self, votes: Tensor) -> Tensor:
        """Pooling over neighbours; zeros beyond both ends count, as in the source."""
        side, slots = self.kernel // 2, votes.shape[2]
        padded = F.pad(votes, (side, side))
        neighbours = torch.stack([padded.narrow(-1, shift, slots) for shift in range(self.kernel)])
        return neighbours.amax(0) if self.pool == "max" else neighbours.sum(0) / self.kernel
