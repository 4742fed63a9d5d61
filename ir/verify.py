"""Invariants of a program, as a table of (name, predicate).

A predicate returns None when the invariant holds, or the entry, the offending node and what is wrong.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from jettison.ir.errors import VerifyError
from jettison.ir.program import Program, input_placeholders, output_node, placeholders, state_placeholders
from jettison.ir.text import window_text

Failure = tuple[str, fx.Node, str]
Predicate = Callable[[Program], Failure | None]


def _nodes(program: Program) -> list[tuple[str, fx.GraphModule, fx.Node]]:
    return [(name, entry, node) for name, entry in program.entries.items() for node in entry.graph.nodes]


def _defined_before_use(program: Program) -> Failure | None:
    for name, entry in program.entries.items():
        seen: set[fx.Node] = set()
        for node in entry.graph.nodes:
            for operand in node.all_input_nodes:
                if operand not in seen:
                    return name, node, f"reads {operand.name}, which is not defined before it"
            seen.add(node)
    return None


def _only_calls(program: Program) -> Failure | None:
    for name, _, node in _nodes(program):
        if node.op not in ("placeholder", "call_function", "output"):
            return name, node, f"op {node.op}: a program holds placeholders, calls of functions and one output"
    return None


def _no_mutation(program: Program) -> Failure | None:
    for name, _, node in _nodes(program):
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            return name, node, "calls an operator that writes to its input; graphs are functional"
    return None


def _metadata_present(program: Program) -> Failure | None:
    for name, _, node in _nodes(program):
        if node.op != "output" and "val" not in node.meta:
            return name, node, "has no metadata"
    return None


def _constants_known(program: Program) -> Failure | None:
    for name, entry in program.entries.items():
        for node in placeholders(entry):
            constant = program.constants.get(node.meta.get("constant", ""))
            if "constant" in node.meta and constant is None:
                return name, node, f"names the constant {node.meta['constant']}, which the program does not have"
            if constant is not None and (tuple(node.meta["val"].shape), node.meta["val"].dtype) != (
                constant.shape,
                constant.dtype,
            ):
                return name, node, f"its type differs from its constant's {constant.dtype}{list(constant.shape)}"
    return None


def _states_returned(program: Program) -> Failure | None:
    for name, entry in program.entries.items():
        taken = [node for node in placeholders(entry) if "state" in node.meta]
        returned: tuple[Any, ...] = output_node(entry).args[0]
        for node in taken:
            if node.meta["state"] not in program.states:
                return name, node, f"names the state {node.meta['state']}, which the program does not have"
        outputs = len(program.outputs_of(name))
        if len(returned) != outputs + len(taken):
            return (
                name,
                output_node(entry),
                (f"returns {len(returned)} values, needed {outputs} outputs and {len(taken)} states"),
            )
        for node, value in zip(taken, returned[outputs:], strict=True):
            old, new = node.meta["val"], value.meta["val"]
            if old.dtype != new.dtype or old.dim() != new.dim():
                return name, value, f"returned for state {node.meta['state']} with another dtype or rank"
    return None


def _placeholder_order(program: Program) -> Failure | None:
    for name, entry in program.entries.items():
        ranks = [(0 if "constant" in n.meta else 1 if "state" in n.meta else 2, n) for n in placeholders(entry)]
        for (left, _), (right, node) in itertools.pairwise(ranks):
            if right < left:
                return name, node, "placeholders must come in the order constants, states, inputs"
    return None


def _retentions_have_entries(program: Program) -> Failure | None:
    for name, entry in program.entries.items():
        sizes = {size for state in state_placeholders(entry) for size in program.states[state].shape}
        for kept in program.retentions.values():
            if kept.name in sizes and kept.mask not in input_placeholders(entry):
                return name, output_node(entry), f"takes states of {kept.name} without its input {kept.mask}"
        for storage in program.storages.values():
            inputs = input_placeholders(entry)
            if storage.name in sizes and name not in (storage.name, storage.load) and storage.count not in inputs:
                return name, output_node(entry), f"takes states of {storage.name} without its input {storage.count}"
        for needed in program.state_entries:
            if needed not in program.entries:
                return name, output_node(entry), f"has no entry {needed} beside it, which its states need"
    return None


def _placement_known(program: Program) -> Failure | None:
    placement = program.placement
    if placement is None or not program.entries:
        return None
    name, entry = next(iter(program.entries.items()))
    used = program.used_constants()
    strange = [each for each in placement.tiers if each not in used]
    strange += [each for each in placement.states if each not in program.states]
    if strange:
        return name, output_node(entry), f"is placed with {strange[0]}, which no entry reads"
    for dense, packed in program.packed.items():
        if len({placement.of(part) for part in packed.parts.values() if part in used}) > 1:
            return name, output_node(entry), f"is placed with parts of {dense} on several tiers"
    return None


INVARIANTS: tuple[tuple[str, Predicate], ...] = (
    ("graphs hold only calls of functions", _only_calls),
    ("values are defined before use", _defined_before_use),
    ("graphs are functional", _no_mutation),
    ("every value has metadata", _metadata_present),
    ("placeholders come in order", _placeholder_order),
    ("constants exist with the type the graph sees", _constants_known),
    ("every state taken is returned", _states_returned),
    ("states that tokens leave have the entries that move them", _retentions_have_entries),
    ("a placement names what the program reads, weights as wholes", _placement_known),
)


def verify(program: Program, after: str = "capture") -> None:
    """Check every invariant.

    Args:
        program: What to check.
        after: Who changed it last; named in the error.

    Raises:
        VerifyError: An invariant fails; shows ten nodes on either side of the offender.
    """
    for invariant, predicate in INVARIANTS:
        failure = predicate(program)
        if failure is not None:
            entry, node, what = failure
            window = window_text(program.entries[entry], node)
            raise VerifyError(f"[{after}] {entry}: {node.name} {what}\nbroken invariant: {invariant}\n{window}")
    # After the table, whose messages say more: what is left for lint is damage to fx's own bookkeeping.
    for name, module in program.entries.items():
        try:
            module.graph.lint()
        except (RuntimeError, ValueError) as error:
            raise VerifyError(f"[{after}] {name}: torch.fx lint: {error}") from error
