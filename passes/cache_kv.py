"""Give the attention of a decoder a KV cache: `forward` becomes `prefill` and `decode`.

Before:
    entry forward(%input_ids: i64[s0,s1], %position_ids: i64[s0,s1], %attention_mask: i64[s0,s2], ...):
      %20: f32[s0,8,s1,32] = jettison.attention(%18, %19, %15, None, None, None, None, 0.17, True, 0, 0.0)
      return %99
After:
    state %past_key_values.0.key: f32[batch,4,capacity,32]
    entry prefill(%past_key_values.0.key: f32[s0,4,s4,32], ..., %input_ids: i64[s0,s1], ...):
      %20: f32[s0,4,s4,32] = jettison.write_slots(%past_key_values.0.key, %19, %position_ids)
      %21: f32[s0,4,s4,32] = jettison.write_slots(%past_key_values.0.value, %15, %position_ids)
      %22: f32[s0,8,s1,32] = jettison.attention(%18, %20, %21, %position_ids, None, None, None, 0.17, True, 0, 0.0)
      return %99, %20, %21, ...
    entry decode(...): the same, one token at a time
    entry evict, store, load(...): where tokens are dropped or compressed, what moves them in the states of one layer

Fires when: every attention of the program is causal self-attention, and tokens meet nowhere else.
Declines when: a policy does not apply to a layer (the layer keeps `full`, and the report says why).
Numerics: `full` and the model's own window are exact; a policy that drops or rounds says so in its file.
Saves: per generated token, the T - 1 earlier tokens are read from the cache instead of computed again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from jettison.ir.edit import Edit
from jettison.ir.errors import OptionError, UnsupportedError
from jettison.ir.match import arguments, is_call
from jettison.ir.ops import attention, rotary_embedding
from jettison.ir.position_mixing import position_mixer
from jettison.ir.program import (
    MissRecord,
    Program,
    copy_graph,
    input_placeholders,
    output_node,
    state_placeholders,
)
from jettison.ir.projected_heads import KeyValueProjection
from jettison.ir.rotary_table import angle_table, frequencies
from jettison.passes.base import Pass, describe_node
from jettison.passes.decode_only import specialize_entries
from jettison.passes.low_rank.whole_attention import take_apart, with_whole_attention
from jettison.passes.options import ByRange, option
from jettison.passes.policies import Full, Policy
from jettison.passes.policies.base import AttentionSite
from jettison.passes.policies.cache import Cache, LayerPolicy
from jettison.passes.policies.evicting import EvictingPolicy
from jettison.passes.policies.storing import StoringPolicy

aten = torch.ops.aten
Angles = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class CacheKV(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "cache-kv"
    policy: Policy | tuple[Policy, ...] = option(
        Full(), doc="what is kept of keys and values; one that drops + one that stores what is left", flat=True
    )
    layers: ByRange[Policy | tuple[Policy, ...]] = option(
        ByRange(), doc="policies of single layers, by their number from 0"
    )

    def __post_init__(self) -> None:
        for given in (self.policy, *self.layers.values()):
            if isinstance(given, tuple):
                _check_composition(given)

    @property
    def is_exact(self) -> bool:  # type: ignore[override]
        """As exact as the policies."""
        return all(policy.is_exact for policy in self._policies)

    @property
    def _policies(self) -> list[Policy]:
        return [policy for given in (self.policy, *self.layers.values()) for policy in _parts(given)]

    def requires(self, program: Program) -> None:
        """A decoder that has no cache yet."""
        if program.info.kind != "decoder":
            raise OptionError(
                f"[cache-kv] {program.info.name} is an encoder: it attends in both directions and generates nothing, "
                "so there is nothing to cache. Drop cache-kv from the pipeline."
            )
        if "forward" not in program.entries:
            raise OptionError("[cache-kv] the program already has a KV cache. Give cache-kv once in the pipeline.")
        program = with_whole_attention(program, self.name)
        inputs = input_placeholders(program.entries["forward"])
        if "position_ids" not in inputs:
            raise UnsupportedError(
                f"[cache-kv] {program.info.name}.forward computes positions itself: a cached step would always be "
                "position 0. Give forward a `position_ids` [B, S] parameter and use it."
            )
        if "attention_mask" not in inputs:
            raise UnsupportedError(
                f"[cache-kv] the language-model head of {program.info.name} was not recognised (see the misses of "
                "select-logits), so the length of a row is unknown."
            )
        nodes = program.entries["forward"].graph.nodes
        if not any(is_call(node, attention, aten.scaled_dot_product_attention.default) for node in nodes):
            raise UnsupportedError(
                f"[cache-kv] no attention was recognised in {program.info.name}, so there is nothing to cache and it "
                "cannot generate step by step. A decoder must call scaled_dot_product_attention, or write "
                "softmax(q @ k^T) @ v out in a way that raise-attention recognises."
            )
        for node in nodes:
            reason = _not_cacheable(node)
            if reason is not None:
                raise UnsupportedError(
                    f"[cache-kv] {node.meta.get('where', node.name)} in {program.info.name}: {reason}. Only causal "
                    "self-attention has a KV cache; export without generation is possible for encoders."
                )
        mixer = position_mixer(program)
        if mixer is not None:
            raise UnsupportedError(
                f"[cache-kv] {describe_node(mixer)} in {program.info.name}: a token reads earlier tokens outside "
                "attention (a convolution, a token shift, a recurrence), and only keys and values survive between "
                "calls. jettison caches models whose layers mix tokens by attention alone."
            )

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        """Rewrite every attention, copy the graph for the second entry, and make those that drop tokens."""
        # Whatever computes keys and values from few dimensions: a cache holds them in full width.
        take_apart(program, self.name)
        edit = Edit(program, "forward", self.name)
        sites = [node for node in edit.graph.nodes if is_call(node, attention)]
        made = _Sites(program, self._policies)
        misses: list[MissRecord] = []
        caches: dict[Any, Cache] = {}
        produced: dict[str, fx.Node] = {}
        for layer, node in enumerate(sites):
            site = made.site(layer, node)
            policy = _applicable(self.layers.at(layer) or self.policy, site, node, misses)
            kind = None if policy.keeps_slots else (policy, replace(site, layer=0))
            if kind not in caches:
                caches[kind] = Cache.open(edit, policy, len(caches.keys() - {None}))
            produced.update(caches[kind].insert(edit, node, site, policy))
        logits = list(output_node(edit.entry).args[0])[: len(program.outputs)]
        edit.set_outputs([*logits, *(produced[name] for name in state_placeholders(edit.entry))])
        edit.eliminate_dead_code()
        entry = program.entries.pop("forward")
        program.entries = {"prefill": entry, "decode": copy_graph(entry), **program.entries}
        specialize_entries(program, self.name)
        for cache in caches.values():
            cache.add_entries(program, self.name)
        return len(sites), misses

    def ensures(self, program: Program) -> str | None:
        """Both entries take the same states, and no state is taken by none."""
        prefill, decode = (set(state_placeholders(program.entries[entry])) for entry in ("prefill", "decode"))
        moving = {
            kept.name_in(layer, state)
            for kept in program.retentions.values()
            for entry in program.state_entries
            for state in state_placeholders(program.entries[entry])
            if f".{kept.layers[0]}." in state
            for layer in kept.layers
        }
        is_whole = prefill == decode and prefill | moving == set(program.states)
        return None if is_whole else "an entry does not take every state"


def _parts(given: Policy | tuple[Policy, ...]) -> tuple[Policy, ...]:
    return given if isinstance(given, tuple) else (given,)


def _check_composition(parts: tuple[Policy, ...]) -> None:
    """Refuse what cannot work together."""
    names = "+".join(policy.name for policy in parts)
    if [isinstance(policy, EvictingPolicy | StoringPolicy) for policy in parts] != [True, True] or not (
        isinstance(parts[0], EvictingPolicy) and isinstance(parts[1], StoringPolicy)
    ):
        raise OptionError(
            f"[cache-kv] policy={names}: needed one policy, or one that drops tokens and then one that compresses "
            "those it keeps, as snapkv{budget=512}+kivi{bits=4}."
        )
    first = parts[0]
    if first.why_alone is not None:
        raise OptionError(f"[cache-kv] policy={names}: {first.name} {first.why_alone}. Use snapkv or sinks before it.")
    last = parts[1]
    if last.why_not_behind is not None:
        raise OptionError(
            f"[cache-kv] policy={names}: {last.name} {last.why_not_behind}. Use kivi, int8 or int4 behind {first.name}."
        )
    if first.evict != "prefill":
        raise OptionError(
            f"[cache-kv] policy={names}: {first.name} would have to drop tokens that are compressed already. Use "
            "evict=prefill."
        )


def _applicable(
    given: Policy | tuple[Policy, ...], site: AttentionSite, node: fx.Node, misses: list[MissRecord]
) -> LayerPolicy:
    """The policies of a layer without those that do not apply to it, which are missed."""
    reasons = [(policy, policy.applies_to(site)) for policy in _parts(given)]
    left = [policy for policy, reason in reasons if reason is None] or [Full()]
    for policy, reason in reasons:
        if reason is not None:
            instead = "full" if isinstance(left[0], Full) else f"{left[0].name}, not {policy.name}"
            misses.append(MissRecord(node.meta.get("where") or f"attention {site.layer}", f"kept {instead}: {reason}"))
    return LayerPolicy.of(*left)


def _not_cacheable(node: fx.Node) -> str | None:
    if is_call(node, aten.scaled_dot_product_attention.default):
        return "its attention was not recognised (see the misses of raise-attention)"
    if not is_call(node, attention):
        return None
    operands = arguments(node)
    if not operands["causal"] or operands["key_valid"] is not None:
        return "attends to later positions"
    if operands["query_positions"] is not None or operands["key_positions"] is not None:
        return "has positions of its own"
    return None


class _Sites:
    """Makes sites of the attentions of a program; angles that layers share are looked at once.

    Args:
        program: Has the attentions.
        policies: Those that may get them.
    """

    def __init__(self, program: Program, policies: Sequence[Policy]) -> None:
        self._program = program
        self._rotates = any(policy.rotates for policy in policies)
        self._projects = any(policy.projects for policy in policies)
        self._known: dict[tuple[fx.Node, fx.Node], tuple[Angles, tuple[float, ...]] | None] = {}

    def site(self, layer: int, node: fx.Node) -> AttentionSite:
        """Of one attention."""
        operands, program = arguments(node), self._program
        rotation = operands["key"] if is_call(operands["key"], rotary_embedding) else None
        turned = self._turned(*rotation.args[1:3]) if self._rotates and rotation is not None else None
        projection: KeyValueProjection | str | None = None
        if self._projects and rotation is not None and turned is None:
            projection = "its keys are not rotated in proportion to their position"
        elif self._projects:
            made = operands["key"] if rotation is None else rotation.args[0]
            projection = KeyValueProjection.of(made, operands["value"], program)
        key, value = operands["key"].meta["val"], operands["value"].meta["val"]
        return AttentionSite(
            layer, operands["query"].meta["val"].shape[1], key.shape[1], key.shape[3], value.shape[3],
            operands["scale"], operands["window"], operands["softcap"], program.info.context, key.dtype,
            operands["sinks"] is not None, None if turned is None else turned[1],
            rotation is not None and bool(rotation.args[3]), None if turned is None else turned[0], projection,
        )  # fmt: skip

    def _turned(self, cos: fx.Node, sin: fx.Node) -> tuple[Angles, tuple[float, ...]] | None:
        """Tables of two angles and their frequencies, if they have such."""
        if (cos, sin) not in self._known:
            context = self._program.info.context
            tables = angle_table(self._program, cos, context), angle_table(self._program, sin, context)
            found = None if tables[0] is None or tables[1] is None else frequencies(tables[0], tables[1])
            self._known[cos, sin] = None if found is None else (tables, found)
        return self._known[cos, sin]
