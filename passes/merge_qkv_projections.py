"""Compute queries, keys and values of an attention with one product instead of three.

Before:
    %1: f32[s0,s1,8] = aten.linear(%0, @attn.q_proj.weight)
    %2: f32[s0,s1,4] = aten.linear(%0, @attn.k_proj.weight)
    %3: f32[s0,s1,4] = aten.linear(%0, @attn.v_proj.weight)
After:
    %1: f32[s0,s1,16] = aten.linear(%0, @attn.qkv_proj.weight)
    %2: (f32[s0,s1,8], f32[s0,s1,4], f32[s0,s1,4]) = aten.split_with_sizes(%1, [8, 4, 4], -1)
    %3: f32[s0,s1,8] = getitem(%2, 0)
    %4: f32[s0,s1,4] = getitem(%2, 1)
    %5: f32[s0,s1,4] = getitem(%2, 2)

Fires when: query, key and value of a `jettison.attention` or `jettison.windowed_attention` come from one linear each,
    whatever stands between (rotary embedding, norms, slot writes), and the three linears read one value. In every entry
    at once.
Declines when: the three read different values, only some have biases, weights are computed, differ in dtype, or have
    other readers: then both forms would have to be stored. A model whose own projection is merged is left alone.
Numerics: exact up to the order of the sums inside the matrix product.
Saves: two kernel launches and two reads of [B, S, E] per attention. The merged weight is made of the stored ones; no
    byte is copied.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from jettison.ir.constants import Constant, joined_constant
from jettison.ir.edit import Edit
from jettison.ir.errors import OptionError
from jettison.ir.match import Miss, arguments, constant_name, is_call
from jettison.ir.ops import attention, windowed_attention
from jettison.ir.program import MissRecord, Program, constant_placeholders
from jettison.passes.base import Pass, describe_node

aten = torch.ops.aten


@dataclass(frozen=True)
class Projections:
    """The three linears of one attention by the names of their constants; `biases` is empty if they have none."""

    weights: tuple[str, ...]
    biases: tuple[str, ...]


@dataclass(frozen=True)
class MergeQkvProjections(Pass):
    """See the module docstring; no options."""

    name: ClassVar[str] = "merge-qkv-projections"

    def requires(self, program: Program) -> None:
        """Weights are still in their own dtype."""
        if program.packed:
            raise OptionError(
                "[merge-qkv-projections] the weights are already packed, and packed weights cannot be joined. Write "
                "merge-qkv-projections before quantize-weights: `merge-qkv-projections,quantize-weights`; leave it out "
                "for a checkpoint that came packed."
            )

    def match(self, node: fx.Node, program: Program) -> Projections | Miss | None:
        """Start from the attention; None where the model itself has one projection for all three."""
        if not is_call(node, attention, windowed_attention):
            return None
        linears = []
        for role, many in (("query", "queries"), ("key", "keys"), ("value", "values")):
            sources = _source_linears(arguments(node)[role])
            if len(sources) != 1:
                return Miss(f"the {many} come from {len(sources) or 'no'} linears, not from one", node)
            linears.append(sources.pop())
        if len(set(linears)) == 1:
            return None
        if len(set(linears)) < 3:
            return Miss("two of queries, keys and values share a projection", node)
        if len({linear.args[0] for linear in linears}) > 1:
            return Miss("queries, keys and values are projections of different values", node)
        return _mergeable(node, linears, program)

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        """Merge each set of projections in every entry: an entry left out would need the single weights as well."""
        found: list[Projections] = []
        misses: list[MissRecord] = []
        for node in (node for entry in program.entries.values() for node in entry.graph.nodes):
            match = self.match(node, program)
            if isinstance(match, Projections) and match not in found:
                if any(set(match.weights) & set(other.weights) for other in found):
                    match = Miss("its keys are merged with those of other queries", node)
                else:
                    found.append(match)
            if isinstance(match, Miss):
                record = MissRecord(describe_node(match.node), match.reason)
                misses += [record] if record not in misses else []
        for projections in found:
            weight = joined_constant(projections.weights, "qkv_proj.weight", program.constants)
            bias = (
                joined_constant(projections.biases, "qkv_proj.bias", program.constants) if projections.biases else None
            )
            for entry_name in program.entries:
                edit = Edit(program, entry_name, self.name)
                self._merge(projections, weight, bias, edit)
                edit.eliminate_dead_code()
            for name in (*projections.weights, *projections.biases):
                del program.constants[name]
        return len(found) * len(program.entries), misses

    def _merge(self, projections: Projections, weight: Constant, bias: Constant | None, edit: Edit) -> None:
        """One linear and its three parts, where the first of the three linears stood."""
        placeholders = constant_placeholders(edit.entry)
        linears = [next(iter(placeholders[name].users)) for name in projections.weights]
        first = next(node for node in edit.graph.nodes if node in linears)
        operands = [first.args[0], edit.constant(weight)] + ([edit.constant(bias)] if bias is not None else [])
        sizes = [edit.program.constants[name].shape[0] for name in projections.weights]
        with edit.before(first):
            merged = edit.call(aten.linear.default, *operands)
            parts = edit.call(aten.split_with_sizes.default, merged, sizes, -1)
            pieces = [edit.call(operator.getitem, parts, index) for index in range(3)]
        for linear, piece in zip(linears, pieces, strict=True):
            edit.replace(linear, piece)

    def ensures(self, program: Program) -> str | None:
        """A constant of several blocks is not also read block by block."""
        used = program.used_constants().values()
        inside = {id(block): merged.name for merged in used if len(merged.blocks) > 1 for block in merged.blocks}
        for constant in used:
            if len(constant.blocks) == 1 and id(constant.blocks[0]) in inside:
                return f"{constant.name} is read beside {inside[id(constant.blocks[0])]}, which contains it"
        return None


def _source_linears(node: fx.Node) -> set[fx.Node]:
    """The nearest linears that a value is computed from; merging is correct whatever stands between."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    pending = [node]
    while pending:
        current = pending.pop()
        if current in seen:
            continue
        seen.add(current)
        if is_call(current, aten.linear.default):
            found.add(current)
        else:
            pending += current.all_input_nodes
    return found


def _mergeable(node: fx.Node, linears: list[fx.Node], program: Program) -> Projections | Miss:
    """The names of the constants, if the same three linears stand alone in every entry."""
    weights = [constant_name(linear.args[1]) for linear in linears]
    if None in weights:
        return Miss("the weight of a projection is not a constant", node)
    bias_nodes = [arguments(linear)["bias"] for linear in linears]
    if None in bias_nodes and any(bias is not None for bias in bias_nodes):
        return Miss("only some of the projections have a bias", node)
    biases = [constant_name(bias) for bias in bias_nodes if bias is not None]
    if None in biases:
        return Miss("the bias of a projection is not a constant", node)
    for names, what in ((weights, "weights"), (biases, "biases")):
        constants = [program.constants[name] for name in names if name is not None]
        if len({(constant.dtype, constant.stored_dtype) for constant in constants}) > 1:
            return Miss(f"the {what} of the projections have different dtypes", node)
    projections = Projections(tuple(map(str, weights)), tuple(map(str, biases)))
    shared = next((name for name in (*projections.weights, *projections.biases) if _is_shared(name, program)), None)
    if shared is not None:
        return Miss(f"{shared} is read elsewhere too", node)
    for entry in program.entries.values():
        placeholders = constant_placeholders(entry)
        users = [next(iter(placeholders[name].users)) for name in projections.weights]
        if not all(is_call(user, aten.linear.default) for user in users) or len({user.args[0] for user in users}) > 1:
            return Miss("another entry uses the projections in another way", node)
    return projections


def _is_shared(name: str, program: Program) -> bool:
    readers = [constant_placeholders(entry).get(name) for entry in program.entries.values()]
    return any(reader is None or len(reader.users) != 1 for reader in readers)
