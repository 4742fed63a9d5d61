"""How a policy gets into a graph: its states, its step in the place of an attention, its entry that drops tokens."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from jettison.ir.edit import Edit
from jettison.ir.match import arguments
from jettison.ir.ops import next_slots
from jettison.ir.program import Program, Retention, State, input_placeholders, output_node
from jettison.passes.policies.base import AttentionSite, Policy, Step
from jettison.passes.policies.evicting import Cached, EvictingPolicy

aten = torch.ops.aten
TOKEN_COUNT = "token_count"


@dataclass
class Cache:
    """The layers of one kind and one dropping policy, whose caches hold as many tokens; or those that drop none.

    Attributes:
        policy: What drops tokens; None for layers that keep the slot of every token they see.
        mask: Input that counts the tokens held, `[B, T] i64`.
        slots: Where the tokens of the call go, `[B, S] i64`.
        retention: Of the states of `policy`.
        sites: Layers of `policy`, with the names of their states by short name.
        examples: Fake tensors of the states by name.
        capacity: The symbol of the states' slots, once one of them was made.
    """

    policy: EvictingPolicy | None
    mask: fx.Node
    slots: fx.Node
    retention: Retention | None
    sites: list[tuple[AttentionSite, dict[str, str]]] = field(default_factory=list)
    examples: dict[str, Tensor] = field(default_factory=dict)
    capacity: Any = None

    @classmethod
    def open(cls, edit: Edit, policy: EvictingPolicy | None, number: int) -> Cache:
        """Prepare the inputs of a cache; `number` of its kind were opened before it."""
        inputs = input_placeholders(edit.entry)
        if policy is None:
            return cls(None, inputs["attention_mask"], inputs["position_ids"], None)
        suffix = f"_{number}" if number else ""
        retention = Retention(f"evict{suffix}", f"slot_mask{suffix}", policy.budget, policy.dropped_every, ())
        batch = inputs["input_ids"].meta["val"].shape[0]
        mask = edit.input(retention.mask, edit.dynamic_tensor([batch, None], torch.int64, hint=64))
        with edit.before(next(node for node in edit.graph.nodes if node.op != "placeholder")):
            slots = edit.call(next_slots, mask, inputs["input_ids"])
        return cls(policy, mask, slots, retention)

    def insert(self, edit: Edit, node: fx.Node, site: AttentionSite, policy: Policy) -> dict[str, fx.Node]:
        """Replace one attention by a policy's step.

        Returns:
            The new value of each state by name.
        """
        operands = arguments(node)
        states = self._named(policy.states(site))
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
        with edit.before(node):
            tensors["total_tokens"] = edit.call(aten.sum.dim_IntList, inputs["attention_mask"], [1])

            def traced(*values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
                named = dict(zip(tensors, values[: len(tensors)], strict=True))
                current = dict(zip(nodes, values[len(tensors) :], strict=True))
                return policy.step(Step(site=site, sinks=named.pop("sinks", None), states=current, **named))

            out, new = edit.inline(traced, *tensors.values(), *nodes.values())
        edit.replace(node, out)
        # What the step leaves alone is none of this entry's business.
        for short in states.keys() - new.keys():
            edit.erase(nodes[short])
        return {states[short].name: value for short, value in new.items()}

    def _named(self, states: dict[str, State]) -> dict[str, State]:
        """The states of a policy, their slots called by the retention that they belong to."""
        if self.retention is None:
            return states
        name = self.retention.name
        return {
            short: State(state.name, tuple(name if size == "slots" else size for size in state.shape), state.dtype)
            for short, state in states.items()
        }

    def _example(self, edit: Edit, state: State, batch: Any) -> Tensor:
        """A fake tensor for a state; every state with slots of this cache has the same number of them."""
        sizes = [size if isinstance(size, int) else batch if size == "batch" else self.capacity for size in state.shape]
        fake = edit.dynamic_tensor(sizes, state.dtype, hint=64 + (0 if self.policy is None else self.policy.budget))
        for size, got in zip(sizes, fake.shape, strict=True):
            if size is None:
                self.capacity = got
        return fake

    def add_dropping(self, program: Program, made_by: str) -> None:
        """Add the entry that drops tokens of a layer of this cache; nothing for layers that drop none."""
        if self.policy is None or self.retention is None:
            return
        site, names = self.sites[0]
        retention = replace(self.retention, layers=tuple(site.layer for site, _ in self.sites))
        program.retentions[retention.name] = retention
        graph = fx.Graph()
        graph.output(())
        program.entries[retention.name] = fx.GraphModule(torch.nn.Module(), graph)
        edit = Edit(program, retention.name, made_by, like="prefill")
        nodes = {short: edit.state(program.states[name], self.examples[name]) for short, name in names.items()}
        mask = edit.input(retention.mask, self.mask.meta["val"])
        count = edit.input(TOKEN_COUNT, edit.dynamic_tensor([self.mask.meta["val"].shape[0]], torch.int64))
        with edit.before(output_node(edit.entry)):
            new = edit.inline(self._traced(site, names), mask, count, *nodes.values())
        edit.set_outputs([new.get(short, node) for short, node in nodes.items()])

    def _traced(self, site: AttentionSite, names: dict[str, str]) -> Any:
        policy = self.policy
        assert policy is not None, "only caches that drop have an entry for it"

        def drop(mask: Tensor, count: Tensor, *values: Tensor) -> dict[str, Tensor]:
            states = dict(zip(names, values, strict=True))
            return policy.drop(Cached(site, states, mask.sum(1), count))

        return drop
