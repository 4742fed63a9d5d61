"""What policies that compress tokens have in common: the newest in full precision, the others packed.

A prompt is attended to exactly. Behind it, and whenever the full-precision slots of a row are all taken, the session
calls an entry that compresses the oldest tokens of a layer and frees their slots; a step attends to both parts under
one softmax. Keys are stored as attention reads them, rotated by their true positions. Slots of the compressed states
hold `granule` tokens each, so that a group of a key channel is one slot.

Bytes per layer: B * Hkv * residual * (D + Dv) * itemsize, and the stored form of the other tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.ir.program import State, state_name
from jettison.passes.options import option
from jettison.passes.policies.base import AttentionSite, Policy, Step, key_value_states


@dataclass(frozen=True)
class StoringPolicy(Policy):
    """A policy that keeps `residual` tokens in full precision; see the module docstring."""

    residual: int = option(128, doc="newest tokens in full precision, at most", range="at least 1")

    bits: ClassVar[int]
    # States of the policy that drops, which `prepare` reads.
    reads: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self) -> None:
        if self.residual < 1:
            raise OptionError(f"[{self.name}] residual={self.residual}: needed at least 1.")

    @property
    def granule(self) -> int:
        """Tokens of a slot of the compressed states."""
        return 1

    @property
    def keep(self) -> int:
        """Tokens that stay in full precision when others are compressed."""
        return 0

    def applies_to(self, site: AttentionSite) -> str | None:
        """Declines what `joint_attention` does not compute, and contexts that never leave the residual."""
        if site.window:
            return (
                f"the layer attends to a window of {site.window} tokens, which cache-kv{{policy=window}} keeps exactly"
            )
        if site.softcap or site.has_sinks:
            what = "caps its scores" if site.softcap else "has learned sinks"
            return f"the layer {what}, which attention over compressed tokens does not compute"
        for _, dim in self.forms(site).values():
            if dim * self.bits % 8:
                return f"heads of {dim} values of {self.bits} bits do not fill whole bytes"
        if self.residual >= site.context:
            return f"{self.residual} tokens in full precision are all of a context of {site.context}"
        return None

    def states(self, site: AttentionSite) -> dict[str, State]:
        """Keys and values in full precision."""
        return key_value_states(site, "slots")

    def step(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """Append, and attend to everything."""
        key, value = step.append()
        return step.attend(key, value), {"key": key, "value": value}

    @property
    def why_not_behind(self) -> str | None:
        """Why what a policy that drops tokens leaves cannot be compressed; None if it can."""
        return None

    def forms(self, site: AttentionSite) -> dict[str, tuple[int, int]]:
        """Heads and channels of what is compressed; by short name."""
        return {"key": (site.kv_heads, site.key_dim), "value": (site.kv_heads, site.value_dim)}

    def groups(self, site: AttentionSite) -> dict[str, tuple[int, int]]:
        """Groups along the tokens and along the channels of a slot that have a range, for each of `forms`."""
        raise NotImplementedError

    def constants(self, site: AttentionSite) -> dict[str, Tensor]:
        """What the layer needs to know beside the states, by short name; of one shape for equal sites."""
        return {}

    def stored_states(self, site: AttentionSite) -> dict[str, State]:
        """The compressed states of a layer by short name, `[B, heads, stored, width]`: codes, scales and zeros."""
        states = {}
        for short, (heads, dim) in self.forms(site).items():
            rows, columns = self.groups(site)[short]
            widths = {"codes": (self.granule * dim * self.bits // 8, torch.uint8)}
            widths |= dict.fromkeys(("scales", "zeros"), (rows * columns, torch.float16))
            for kind, (width, dtype) in widths.items():
                name = f"{short}_{kind}"
                shape = ("batch", heads, "stored", width)
                states[name] = State(state_name(site.layer, name), shape, dtype)
        return states

    def prepare(self, states: dict[str, Tensor], slots: Tensor) -> dict[str, Tensor]:
        """New values of states that have no slots, before tokens go to `slots [B, N] i64`."""
        return {}

    def compress(
        self, site: AttentionSite, key: Tensor, value: Tensor, states: dict[str, Tensor], slots: Tensor
    ) -> dict[str, Tensor]:
        """What is stored of some tokens.

        Args:
            site: The attention.
            key: `[B, Hkv, N, granule, D]`.
            value: `[B, Hkv, N, granule, Dv]`.
            states: Of the layer, by short name.
            slots: `[B, N] i64`, where it is stored.

        Returns:
            `[B, heads, N, width]` by short name.
        """
        return self.packed(site, {"key": key, "value": value})

    def decompress(self, site: AttentionSite, stored: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Keys and values `[B, Hkv, N * granule, D]` of the stored states, in `site.dtype`."""
        key, value = self.unpacked(site, stored).values()
        # A cast to the dtype that it has would stay in the graph.
        return (key, value) if site.dtype == torch.float32 else (key.to(site.dtype), value.to(site.dtype))

    def packed(self, site: AttentionSite, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """Codes, scales and zeros of `[B, heads, N, granule, channels]` for each of `forms`."""
        found: dict[str, Tensor] = {}
        for short, tensor in values.items():
            parts = torch.ops.jettison.quantize_slots(tensor, self.bits, *self.groups(site)[short])
            found |= {f"{short}_{kind}": part for kind, part in zip(("codes", "scales", "zeros"), parts, strict=True)}
        return found

    def unpacked(self, site: AttentionSite, stored: dict[str, Tensor]) -> dict[str, Tensor]:
        """`[B, heads, N * granule, channels] f32` for each of `forms`."""
        return {
            short: torch.ops.jettison.dequantize_slots(
                *(stored[f"{short}_{kind}"] for kind in ("codes", "scales", "zeros")),
                self.bits, self.granule, self.groups(site)[short][0],
            )
            for short in self.forms(site)
        }  # fmt: skip


class GroupingPolicy(StoringPolicy):
    """A policy of which `group` tokens leave full precision at a time and fill a slot; subclasses have that option."""

    group: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.group < 1 or self.residual % self.group:
            raise OptionError(
                f"[{self.name}] group={self.group}: needed a divisor of residual={self.residual}, because so many "
                "tokens leave it at a time."
            )

    @property
    def granule(self) -> int:
        """A group of tokens."""
        return self.group

    @property
    def keep(self) -> int:
        """All but a group."""
        return self.residual - self.group
