"""Queries, keys and values of an attention as one projection, which `GroupQueryAttention` reads as it is.

The small products of keys and values use a CPU badly: on two cores one joint product of 3072 rows takes two thirds of
the time of three. Done here and not by a pass, so that pipelines, reports and graph diffs speak of the model's own
weights. No byte is copied: the joint constant is made of the blocks of the three.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from jettison.codegen.onnx.cached_attention import flat_heads, is_fused, rotated_operands
from jettison.ir import ops
from jettison.ir.constants import Constant, joined_constant
from jettison.ir.edit import Edit
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.program import Program, constant_placeholders

aten = torch.ops.aten
# Operands of a projection that have one row per output.
_CONSTANT_OPERANDS = {
    aten.linear.default: {"weight": "weight", "bias": "bias"},
    ops.quantized_linear: {
        "codes": "weight.codes", "scales": "weight.scales", "zeros": "weight.zeros", "bias": "bias",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Projections:
    """The three projections of one attention.

    Attributes:
        names: Operand to the names of its constants, for queries, keys and values.
        nodes: The three calls.
    """

    names: tuple[tuple[str, tuple[str, ...]], ...]
    nodes: tuple[fx.Node, ...]


def pack_projections(program: Program) -> Program:
    """A copy of the program in which projections are joint wherever every entry can read them so.

    Args:
        program: Left as it is; the copy shares its constants.

    Returns:
        The copy.
    """
    program = program.copy()
    found = {name: _projections(entry) for name, entry in program.entries.items()}
    shared = set.intersection(*({each.names for each in in_entry} for in_entry in found.values()))
    joint: dict[tuple[str, ...], Constant] = {}
    for entry_name, in_entry in found.items():
        edit = Edit(program, entry_name, "pack-projections")
        for projections in in_entry:
            if projections.names in shared:
                _join(projections, joint, edit)
        edit.eliminate_dead_code()
    return program


def _projections(entry: fx.GraphModule) -> list[Projections]:
    """Those of the attentions that would read them right away."""
    found = []
    for node in entry.graph.nodes:
        if is_call(node, ops.attention) and is_fused(node):
            projections = _of_attention(node)
            if projections is not None:
                found.append(projections)
    return found


def _of_attention(node: fx.Node) -> Projections | None:
    rotated = rotated_operands(node)
    value = node.args[2].args[1]
    query, key = (node.args[0], node.args[1].args[1]) if rotated is None else (rotated.query, rotated.key)
    sources = (flat_heads(query), flat_heads(key), flat_heads(value))
    nodes = tuple(source for source in sources if source is not None)
    if len(set(nodes)) < 3 or nodes[0].target not in _CONSTANT_OPERANDS:
        return None
    if any(each.target != nodes[0].target for each in nodes):
        return None
    kinds = _CONSTANT_OPERANDS[nodes[0].target]
    names = []
    for operand, *of_all in zip(arguments(nodes[0]), *(arguments(each).values() for each in nodes), strict=True):
        if operand not in kinds or None in of_all:
            if any(each != of_all[0] for each in of_all):
                return None
            continue
        constants = [constant_name(each) for each in of_all]
        known = tuple(name for name in constants if name is not None)
        if len(known) < 3 or any(len(each.users) > 1 for each in of_all):
            return None
        names.append((operand, known))
    return Projections(tuple(names), nodes)


def _join(projections: Projections, joint: dict[tuple[str, ...], Constant], edit: Edit) -> None:
    """One call and its three parts in the place of three calls."""
    first = next(node for node in edit.graph.nodes if node in projections.nodes)
    sizes = [node.meta["val"].shape[-1] for node in projections.nodes]
    operands = dict(arguments(first))
    kinds = _CONSTANT_OPERANDS[first.target]
    present = constant_placeholders(edit.entry)
    for operand, names in projections.names:
        constants = [edit.program.constants[name] for name in names]
        if names not in joint and len({(each.dtype, each.stored_dtype, each.shape[1:]) for each in constants}) > 1:
            return
        if names not in joint:
            joint[names] = joined_constant(names, f"qkv_proj.{kinds[operand]}", edit.program.constants)
        assert all(name in present for name in names), "a projection's constants belong to it alone"
        operands[operand] = edit.constant(joint[names])
    with edit.before(first):
        whole = edit.call(first.target, *operands.values())
        parts = edit.call(aten.split_with_sizes.default, whole, sizes, -1)
        pieces = [edit.call(operator.getitem, parts, index) for index in range(3)]
    for node, piece in zip(projections.nodes, pieces, strict=True):
        edit.replace(node, piece)
