"""`window`: keep the last tokens only.

A layer whose attention has a sliding window W (Mistral, arXiv 2310.06825; every other layer of Gemma-2) never reads
further back, so its cache needs W slots: exact. `size` imposes a window on the other layers too: lossy, the model was
trained to see more.

Bytes per layer: B * Hkv * (W + 64) * (D + Dv) * itemsize, whatever the context. The 64 slots of slack let the cache
reclaim space in blocks instead of moving every token at every step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.ir.program import State
from jettison.passes.options import option
from jettison.passes.policies.base import SLOT_GRANULE, AttentionSite, Policy, Step, key_value_states


@dataclass(frozen=True)
class Window(Policy):
    """See the module docstring."""

    name: ClassVar[str] = "window"
    size: int | None = option(
        None, doc="tokens kept per layer; default the window of the model's own layers", range="at least 1"
    )

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise OptionError(f"[window] size={self.size}: needed at least 1 token, or leave it out.")

    @property
    def is_exact(self) -> bool:
        """Exact for the model's own window, which no layer reads beyond."""
        return self.size is None

    def applies_to(self, site: AttentionSite) -> str | None:
        """Needs a window shorter than the context."""
        window = self._window(site)
        if window == 0:
            return "the layer has no sliding window and no size was given"
        if window + SLOT_GRANULE >= site.context:
            return f"a window of {window} tokens saves nothing within a context of {site.context}"
        return None

    def _window(self, site: AttentionSite) -> int:
        return min((size for size in (site.window, self.size) if size), default=0)

    def states(self, site: AttentionSite) -> dict[str, State]:
        """Keys and values of the window, and slack."""
        return key_value_states(site, self._window(site) + SLOT_GRANULE)

    def step(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Attend over what is kept and what is new, then keep the last tokens."""
        site = step.site
        out, key, value = torch.ops.jettison.windowed_attention(
            step.query, step.key, step.value, step.states["key"], step.states["value"], step.new_tokens,
            step.total_tokens, step.sinks, site.scale, self._window(site), site.softcap,
        )  # fmt: skip
        return out, {"key": key, "value": value}
