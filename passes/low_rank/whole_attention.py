"""What a low-rank attention was made of: its keys and values in full width, as a cache holds them."""

from __future__ import annotations

import torch
from torch import fx

from jettison.ir.edit import Edit
from jettison.ir.match import arguments, is_call
from jettison.ir.ops import attention, low_rank_attention, rotary_embedding
from jettison.ir.program import Program

aten = torch.ops.aten


def with_whole_attention(program: Program, made_by: str) -> Program:
    """The program with linears and `jettison.attention` in place of every low-rank attention.

    Args:
        program: Left as it is.
        made_by: Text id of the pass.

    Returns:
        A copy that shares its constants; the program itself where there is nothing to do.
    """
    nodes = (node for entry in program.entries.values() for node in entry.graph.nodes)
    if not any(is_call(node, low_rank_attention) for node in nodes):
        return program
    copy = program.copy()
    take_apart(copy, made_by)
    return copy


def take_apart(program: Program, made_by: str) -> None:
    """The same in place."""
    for entry in program.entries:
        edit = Edit(program, entry, made_by)
        for node in list(edit.graph.nodes):
            if is_call(node, low_rank_attention):
                _whole_attention(node, edit)


def _whole_attention(node: fx.Node, edit: Edit) -> None:
    read = arguments(node)
    with edit.before(node):
        heads = [_heads(read, name, edit) for name in ("query", "key", "value")]
        if read["cos"] is not None:
            angles = (read["cos"], read["sin"], read["interleaved"])
            heads[:2] = [edit.call(rotary_embedding, each, *angles) for each in heads[:2]]
        names = ("query_positions", "key_positions", "key_valid", "sinks", "scale", "causal", "window", "softcap")
        out = edit.call(attention, *heads, *(read[name] for name in names))
        by_token = edit.call(aten.transpose.int, out, 1, 2)
    edit.replace(node, by_token)


def _heads(read: dict[str, fx.Node], name: str, edit: Edit) -> fx.Node:
    """Queries, keys or values, `[B, heads, S, D]`."""
    rows, bias = read[f"{name}_rows"], read[f"{name}_bias"]
    wide = edit.call(aten.linear.default, read[name], rows, *([] if bias is None else [bias]))
    count = read["heads" if name == "query" else "kv_heads"]
    batch, steps = (edit.call(aten.sym_size.int, read[name], axis) for axis in (0, 1))
    split = edit.call(aten.reshape.default, wide, [batch, steps, count, -1])
    return edit.call(aten.transpose.int, split, 1, 2)
