"""How a policy gets into a graph: its states, its step in the place of an attention, and entries that move tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from jettison.ir.constants import Constant
from jettison.ir.edit import Edit
from jettison.ir.match import arguments
from jettison.ir.ops import next_slots
from jettison.ir.program import (
    LAYER,
    Program,
    Retention,
    State,
    Storage,
    input_placeholders,
    output_node,
    state_name,
)
from jettison.passes.policies.base import COS, SIN, AttentionSite, Policy, Step, Stored
from jettison.passes.policies.evicting import Cached, EvictingPolicy
from jettison.passes.policies.storing import StoringPolicy

aten = torch.ops.aten
TOKEN_COUNT = "token_count"


@dataclass(frozen=True)
class LayerPolicy:
    """The policies of a layer.

    Attributes:
        attends: Whose `step` runs.
        drops: What drops tokens, or None.
        stores: What compresses tokens, or None.
    """

    attends: Policy
    drops: EvictingPolicy | None = None
    stores: StoringPolicy | None = None

    @classmethod
    def of(cls, *policies: Policy) -> LayerPolicy:
        """Of one policy, or of one that drops and one that compresses what is kept."""
        drops = next((policy for policy in policies if isinstance(policy, EvictingPolicy)), None)
        stores = next((policy for policy in policies if isinstance(policy, StoringPolicy)), None)
        if drops is not None and drops.demotes is not None:
            stores = drops.demotes
        return cls(policies[0], drops, stores)

    @property
    def keeps_slots(self) -> bool:
        """Whether every token keeps the slot that it is written to."""
        return self.drops is None and self.stores is None


@dataclass
class Cache:
    """The layers of one kind and one policy, whose caches hold as many tokens; or those where every token has a slot.

    Attributes:
        policy: Of the layers; None for those where every token has a slot.
        mask: Input that counts the tokens held, `[B, T] i64`.
        slots: Where the tokens of the call go, `[B, S] i64`.
        retention: Of the states with a slot per token held.
        storage: Of the compressed states, and the input that counts them.
        sites: Layers of `policy`, with the names of their states by short name.
        constants: Of what compresses, by short name: one for each of `sites`, or one for all of them.
        examples: Fake tensors of the states by name.
        capacities: The symbols of sizes that a session chooses, once a state with them was made.
    """

    policy: LayerPolicy | None
    mask: fx.Node
    slots: fx.Node
    retention: Retention | None
    storage: tuple[Storage, fx.Node] | None = None
    sites: list[tuple[AttentionSite, dict[str, str]]] = field(default_factory=list)
    constants: dict[str, list[Constant]] = field(default_factory=dict)
    examples: dict[str, Tensor] = field(default_factory=dict)
    capacities: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def open(cls, edit: Edit, policy: LayerPolicy, number: int) -> Cache:
        """Prepare the inputs of a cache; `number` of its kind were opened before it."""
        inputs = input_placeholders(edit.entry)
        if policy.keeps_slots:
            return cls(None, inputs["attention_mask"], inputs["position_ids"], None)
        suffix, drops, stores = f"_{number}" if number else "", policy.drops, policy.stores
        name = f"evict{suffix}" if drops is not None else f"recent{suffix}"
        budget, every = (None, None) if drops is None else (drops.budget, drops.dropped_every)
        retention = Retention(name, f"slot_mask{suffix}", budget, every, ())
        batch = inputs["input_ids"].meta["val"].shape[0]
        mask = edit.input(retention.mask, edit.dynamic_tensor([batch, None], torch.int64, hint=64))
        with edit.before(next(node for node in edit.graph.nodes if node.op != "placeholder")):
            slots = edit.call(next_slots, mask, inputs["input_ids"])
        cache = cls(policy, mask, slots, retention)
        if stores is not None:
            storage = Storage(
                f"store{suffix}", f"load{suffix}", name, f"stored_count{suffix}", stores.granule, stores.keep,
                stores.residual, drops is not None and drops.demotes is not None,
            )  # fmt: skip
            cache.storage = storage, edit.input(storage.count, edit.dynamic_tensor([batch], torch.int64))
        return cache

    def insert(self, edit: Edit, node: fx.Node, site: AttentionSite, policy: LayerPolicy) -> dict[str, fx.Node]:
        """Replace one attention by a policy's step.

        Returns:
            The new value of each state by name.
        """
        operands = arguments(node)
        stores = policy.stores
        stored = {} if stores is None else self._named(stores.stored_states(site))
        states = {**self._named(policy.attends.states(site)), **stored}
        batch = operands["query"].meta["val"].shape[0]
        for state in states.values():
            self.examples[state.name] = self._example(edit, state, batch)
        nodes = {short: edit.state(state, self.examples[state.name]) for short, state in states.items()}
        self.sites.append((site, {short: state.name for short, state in states.items()}))
        tensors = {"query": operands["query"], "key": operands["key"], "value": operands["value"]}
        inputs = input_placeholders(edit.entry)
        tensors["positions"], tensors["slots"] = inputs["position_ids"], self.slots
        if operands["sinks"] is not None:
            tensors["sinks"] = operands["sinks"]
        if self.storage is not None:
            tensors["count"] = self.storage[1]
        given = self._layer_constants(edit, site)
        with edit.before(node):
            tensors["total_tokens"] = edit.call(aten.sum.dim_IntList, inputs["attention_mask"], [1])

            def traced(*values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                named = dict(zip(tensors, values, strict=False))
                current = dict(zip(nodes, values[len(tensors) :], strict=False))
                count = named.pop("count", None)
                if stores is not None and count is not None:
                    known = replace(site, constants=dict(zip(given, values[len(tensors) + len(nodes) :], strict=True)))
                    key, value = stores.decompress(known, {short: current.pop(short) for short in stored})
                    named["stored"] = Stored(key, value, count * stores.granule)
                return policy.attends.step(Step(site=site, sinks=named.pop("sinks", None), states=current, **named))

            out, new = edit.inline(traced, *tensors.values(), *nodes.values(), *given.values())
        edit.replace(node, out)
        # Compressed states are read only.
        new = {**new, **{short: nodes[short] for short in stored}}
        # What the step leaves alone is none of this entry's business.
        for short in states.keys() - new.keys():
            edit.erase(nodes[short])
        return {states[short].name: value for short, value in new.items()}

    def _layer_constants(self, edit: Edit, site: AttentionSite) -> dict[str, fx.Node]:
        """What compressed tokens of a layer need to know, as constants of the entry."""
        stores = None if self.policy is None else self.policy.stores
        if stores is None or self.storage is None:
            return {}
        name = self.storage[0].name
        if stores.rotates and site.angles is not None and COS not in self.constants:
            self.constants |= {
                short: [Constant(state_name(name, short), table)]
                for short, table in zip((COS, SIN), site.angles, strict=True)
            }
        shared = {short: known[0] for short, known in self.constants.items() if short in (COS, SIN)}
        own = {
            short: Constant(state_name(site.layer, short), tensor) for short, tensor in stores.constants(site).items()
        }
        for short, constant in own.items():
            self.constants.setdefault(short, []).append(constant)
        return {short: edit.constant(constant) for short, constant in (shared | own).items()}

    def _named(self, states: dict[str, State]) -> dict[str, State]:
        """The states of a policy, their slots called by the retention or storage that they belong to."""
        if self.retention is None:
            return states
        names = {"slots": self.retention.name, "stored": self.storage[0].name if self.storage else ""}
        return {
            short: State(state.name, tuple(names.get(size, size) for size in state.shape), state.dtype)  # type: ignore[arg-type]
            for short, state in states.items()
        }

    def _example(self, edit: Edit, state: State, batch: Any) -> Tensor:
        """A fake tensor for a state; every state with slots of one kind has the same number of them."""
        chosen = next((size for size in state.shape if isinstance(size, str) and size != "batch"), "")
        sizes = [
            size if isinstance(size, int) else batch if size == "batch" else self.capacities.get(size)
            for size in state.shape
        ]
        drops = None if self.policy is None else self.policy.drops
        fake = edit.dynamic_tensor(sizes, state.dtype, hint=64 + (0 if drops is None else drops.budget))
        for size, got in zip(sizes, fake.shape, strict=True):
            if size is None:
                self.capacities[chosen] = got
        return fake

    def add_entries(self, program: Program, made_by: str) -> None:
        """Add the entries that move tokens of a layer of this cache; none where every token has a slot."""
        if self.policy is None or self.retention is None:
            return
        retention = replace(self.retention, layers=tuple(site.layer for site, _ in self.sites))
        program.retentions[retention.name] = retention
        site, names = self.sites[0]
        stores = self.policy.stores
        stored = {} if stores is None else stores.stored_states(site)
        if self.policy.drops is not None:
            own = {short: name for short, name in names.items() if short not in stored}
            self._add_dropping(program, made_by, self.policy.drops, site, own)
        if stores is not None and self.storage is not None:
            program.storages[self.storage[0].name] = self.storage[0]
            taken = {short: names[short] for short in (*stored, *stores.reads)}
            self._add_storing(program, made_by, stores, site, taken)

    def _new_entry(self, program: Program, name: str, made_by: str) -> Edit:
        graph = fx.Graph()
        graph.output(())
        program.entries[name] = fx.GraphModule(torch.nn.Module(), graph)
        return Edit(program, name, made_by, like="prefill")

    def _add_dropping(
        self, program: Program, made_by: str, policy: EvictingPolicy, site: AttentionSite, names: dict[str, str]
    ) -> None:
        assert self.retention is not None, "caches that drop have one"
        edit = self._new_entry(program, self.retention.name, made_by)
        nodes = {short: edit.state(program.states[name], self.examples[name]) for short, name in names.items()}
        mask = edit.input(self.retention.mask, self.mask.meta["val"])
        count = edit.input(TOKEN_COUNT, edit.dynamic_tensor([self.mask.meta["val"].shape[0]], torch.int64))
        constants = {
            short: edit.constant(Constant(state_name(self.retention.name, short), tensor, tensor.dtype))
            for short, tensor in policy.constants(site).items()
        }

        def drop(mask: Tensor, count: Tensor, *values: Tensor) -> dict[str, Tensor]:
            states = dict(zip(names, values, strict=False))
            given = dict(zip(constants, values[len(names) :], strict=True))
            cached = Cached(site, states, mask.sum(1), count, given)
            if policy.demotes is not None:
                return policy.split(cached)
            # Groups of neighbours are compressed together.
            return policy.drop(cached, in_order=self.storage is not None)

        with edit.before(output_node(edit.entry)):
            new = edit.inline(drop, mask, count, *nodes.values(), *constants.values())
        edit.set_outputs([new.get(short, node) for short, node in nodes.items()])

    def _add_storing(
        self, program: Program, made_by: str, policy: StoringPolicy, site: AttentionSite, names: dict[str, str]
    ) -> None:
        assert self.storage is not None, "caches that compress have one"
        storage, batch = self.storage[0], self.mask.meta["val"].shape[0]

        def known(chosen: tuple[Tensor, ...]) -> AttentionSite:
            """The site with the constants of the layer that the entry is called for."""
            given = dict(zip(constants, chosen, strict=False))
            for short in own:
                # Layers lie one behind the other.
                by_layer = given[short].unflatten(0, (len(self.sites), -1))
                given[short] = by_layer.index_select(0, chosen[-1]).squeeze(0)
            return replace(site, constants=given)

        def compress(key: Tensor, value: Tensor, slots: Tensor, *values: Tensor) -> list[Tensor]:
            states = dict(zip(names, values, strict=False))
            states |= policy.prepare(states, slots)
            for short, new in policy.compress(known(values[len(names) :]), key, value, states, slots).items():
                states[short] = torch.ops.jettison.write_slots(states[short], new, slots)
            return [*states.values()]

        def decompress(*values: Tensor) -> list[Tensor]:
            return [*policy.decompress(known(values[len(names) :]), dict(zip(names, values, strict=False)))]

        own = [short for short in self.constants if short not in (COS, SIN)]
        constants = {
            short: Constant(state_name(storage.name, short), [block for each in found for block in each.blocks])
            for short, found in self.constants.items()
        }

        def opened(name: str) -> tuple[Edit, list[fx.Node], list[fx.Node]]:
            """An empty entry, its states, and what `known` takes."""
            edit = self._new_entry(program, name, made_by)
            nodes = [edit.state(program.states[each], self.examples[each]) for each in names.values()]
            chosen = [edit.constant(constant) for constant in constants.values()]
            if own:
                chosen.append(edit.input(LAYER, edit.dynamic_tensor([1], torch.int64)))
            return edit, nodes, chosen

        edit, nodes, chosen = opened(storage.name)
        slots = edit.input("stored_slots", edit.dynamic_tensor([batch, None], torch.int64, hint=3))
        new = [
            edit.input(
                f"new_{short}",
                edit.dynamic_tensor(
                    [batch, site.kv_heads, slots.meta["val"].shape[1], policy.granule, dim], site.dtype
                ),
            )
            for short, dim in (("key", site.key_dim), ("value", site.value_dim))
        ]
        with edit.before(output_node(edit.entry)):
            edit.set_outputs(edit.inline(compress, *new, slots, *nodes, *chosen))
        names = {short: name for short, name in names.items() if short not in policy.reads}
        edit, nodes, chosen = opened(storage.load)
        with edit.before(output_node(edit.entry)):
            edit.set_outputs([*edit.inline(decompress, *nodes, *chosen), *nodes])
