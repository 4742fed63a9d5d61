"""What a KV-cache policy is: states per layer, and what a step does with them, in plain torch operations.

A policy's functions are traced and inlined into the graph, so one definition is the reference, runs in the torch
runtime and is what the ONNX lowering and Triton kernels must match.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from jettison.ir.program import State, state_name
from jettison.ir.projected_heads import KeyValueProjection

# The rounding of a session's capacity, and the slack of a windowed cache, in slots.
SLOT_GRANULE = 64
# Constants of a site with the angles by which its keys are rotated.
COS, SIN = "cos", "sin"


@dataclass(frozen=True)
class AttentionSite:
    """One attention of the model, as a policy sees it.

    Attributes:
        layer: Index among the model's attentions.
        heads: H.
        kv_heads: Hkv.
        key_dim: D of the keys.
        value_dim: D of the values.
        scale: Factor on the scores.
        window: Positions a query sees back, itself included; 0 means all.
        softcap: 0 for none.
        context: Most positions of a sequence.
        dtype: Of keys and values.
        has_sinks: Whether every head has a learned logit that reads nothing.
        frequencies: Radians by which each pair of key channels turns from one position to the next; None where keys are
            not rotated like that, or no policy asks.
        is_interleaved: Whether a pair is two neighbours instead of halves apart.
        angles: Cosines and sines `[context, R/2] f32` where `frequencies` are known.
        projection: How keys, before they are rotated, and values are made; or why that is not known: a clause. None
            where no policy asks.
        constants: What a policy gave as constants of this layer, and `cos` and `sin`, as tensors of the graph.
    """

    layer: int
    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    scale: float
    window: int
    softcap: float
    context: int
    dtype: torch.dtype
    has_sinks: bool = False
    frequencies: tuple[float, ...] | None = None
    is_interleaved: bool = False
    angles: tuple[Tensor, Tensor] | None = field(default=None, compare=False)
    projection: KeyValueProjection | str | None = None
    constants: dict[str, Tensor] = field(default_factory=dict, compare=False)


@dataclass
class Stored:
    """Tokens that have left their slots for a compressed form, as a step attends to them.

    Attributes:
        key: `[B, Hkv, T, D]`, decompressed.
        value: `[B, Hkv, T, Dv]`, likewise.
        tokens: `[B] i64`, how many of the T each row has.
    """

    key: Tensor
    value: Tensor
    tokens: Tensor


@dataclass
class Step:
    """The tensors of one call at one attention.

    Attributes:
        site: The attention.
        query: `[B, H, S, D]`, rotated where the model rotates.
        key: `[B, Hkv, S, D]`, likewise.
        value: `[B, Hkv, S, Dv]`.
        positions: `[B, S] i64`, true positions.
        total_tokens: `[B] i64`, tokens of each row so far, this call included.
        sinks: `[H]` or None.
        states: Current value of each state of this policy at this layer, by short name.
        slots: `[B, S] i64`, the slot of each token in a cache that grows at its end: behind the tokens that it holds.
            Where nothing is dropped the slot of a token is its position, and so it is if this is left out.
        stored: Tokens that are attended to as well; None where nothing is ever compressed.
    """

    site: AttentionSite
    query: Tensor
    key: Tensor
    value: Tensor
    positions: Tensor
    total_tokens: Tensor
    sinks: Tensor | None
    states: dict[str, Tensor] = field(default_factory=dict)
    slots: Tensor = None
    stored: Stored | None = None

    def __post_init__(self) -> None:
        self.slots = self.positions if self.slots is None else self.slots

    @property
    def new_tokens(self) -> Tensor:
        """`[B] i64`: how many of the S tokens of each row are real; the rest is padding behind them.

        A row is padded only in its first call, where it has no other tokens.
        """
        return torch.clamp_max(self.total_tokens, self.query.shape[2])

    def append(self) -> tuple[Tensor, Tensor]:
        """The `key` and `value` states with this call's tokens written at their slots."""
        key = torch.ops.jettison.write_slots(self.states["key"], self.key, self.slots)
        value = torch.ops.jettison.write_slots(self.states["value"], self.value, self.slots)
        return key, value

    def attend(self, key: Tensor, value: Tensor) -> Tensor:
        """Attention of this call's queries over the slots up to their own, and over what is stored."""
        if self.stored is not None:
            return torch.ops.jettison.joint_attention(*self._joint_operands(self.stored, key, value))
        return torch.ops.jettison.attention(*self._operands(key, value))

    def attend_scored(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and what each slot received from all queries of its key head, `[B, Hkv, C] f32`."""
        if self.stored is not None:
            return torch.ops.jettison.scored_joint_attention(*self._joint_operands(self.stored, key, value))
        return torch.ops.jettison.scored_attention(*self._operands(key, value))

    def _joint_operands(self, stored: Stored, key: Tensor, value: Tensor) -> tuple[Any, ...]:
        return self.query, stored.key, stored.value, stored.tokens, key, value, self.slots, self.site.scale

    def _operands(self, key: Tensor, value: Tensor) -> tuple[Any, ...]:
        site = self.site
        return (
            self.query, key, value, self.slots, None, None, self.sinks, site.scale, True, site.window, site.softcap,
        )  # fmt: skip


@dataclass(frozen=True)
class Policy:
    """A KV-cache policy. Subclasses are frozen dataclasses whose fields are the options.

    Attributes:
        name: Text id.
    """

    name: ClassVar[str]

    @property
    def rotates(self) -> bool:
        """Whether it must know how keys are rotated."""
        return False

    @property
    def projects(self) -> bool:
        """Whether it must know how keys and values are made."""
        return False

    @property
    def is_exact(self) -> bool:
        """Whether the model computes the same with this policy as without a cache."""
        return False

    def applies_to(self, site: AttentionSite) -> str | None:
        """Why this attention must keep the `full` cache instead, or None if the policy applies."""

    def states(self, site: AttentionSite) -> dict[str, State]:
        """States of one layer by short name (`key`, `value`, ...); `State.name` is `past_key_values.LAYER.SHORT`."""
        raise NotImplementedError

    def step(self, step: Step) -> tuple[Tensor, dict[str, Tensor]]:
        """One call of S >= 1 tokens: the attention's output `[B, H, S, Dv]`, and the new value of each state."""
        raise NotImplementedError


def key_value_states(site: AttentionSite, slots: int | str) -> dict[str, State]:
    """The `key` and `value` states of a layer with `slots` slots."""
    return {
        "key": State(state_name(site.layer, "key"), ("batch", site.kv_heads, slots, site.key_dim), site.dtype),
        "value": State(state_name(site.layer, "value"), ("batch", site.kv_heads, slots, site.value_dim), site.dtype),
    }
