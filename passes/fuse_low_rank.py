"""Compute factored feed-forward layers and attentions without their full-width middle.

Before:
    %2: f32[s0,s1,9] = aten.linear(%1, @up.columns)
    %3: f32[s0,s1,48] = aten.linear(%2, @up.rows, @up.bias)
    %4: f32[s0,s1,48] = aten.gelu(%3)
    %5: f32[s0,s1,9] = aten.linear(%4, @down.columns)
    %6: f32[s0,s1,32] = aten.linear(%5, @down.rows, @down.bias)
After:
    %2: f32[s0,s1,9] = aten.linear(%1, @up.columns)
    %3: f32[s0,s1,32] = jettison.low_rank_mlp(None, %2, None, None, @up.rows, @up.bias, @down.columns, @down.rows,
        @down.bias, 'gelu')

and likewise the linears of queries, keys and values, their split into heads, their rotation and the attention:
    %7: f32[s0,s1,4,8] = jettison.low_rank_attention(%4, %5, %6, @q.rows, @q.bias, @k.rows, @k.bias, @v.rows, @v.bias,
        %cos, %sin, None, None, None, None, 4, 2, False, 0.35, True, 0, 0.0)

Fires when: a linear, an activation (perhaps a gated one) and a linear meet, or linears, perhaps a rotation, and an
    attention, at least one of the linears is factored, and nothing else reads what is between them. A linear that is
    not factored is read whole, from what it reads. Feed-forward layers stay fused in both entries of `cache-kv`, which
    takes attentions apart again: a cache has keys and values in full width.
Declines when: something else reads the neurons, or the queries, keys or values; a norm or anything else stands between
    a linear and the attention; queries and keys have different angles; weights are quantised or computed; the attention
    is over a cache.
Numerics: exact up to the order of the sums inside the matrix products.
Saves: a write and a read of [B, S, F] per linear of the first half and of its activation, and of [B, S, H * D] per
    projection; of what is alive at once, [B, S, F] less [512, F], and on ONNX the scores [B, H, S, S] less [H, S, S].
    That is most of the activations of an encoder (`benchmarks/results/low_rank_memory.json`).
Source: FlashSVD (arXiv 2508.01506).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from jettison.ir.edit import Edit
from jettison.ir.match import Miss, arguments, is_call
from jettison.ir.ops import low_rank_attention, low_rank_mlp
from jettison.ir.program import Program
from jettison.passes.base import Pass
from jettison.passes.low_rank.sites import LowRankAttention, LowRankMlp, find_attention, find_mlp

aten = torch.ops.aten


@dataclass(frozen=True)
class FuseLowRank(Pass):
    """See the module docstring; no options."""

    name: ClassVar[str] = "fuse-low-rank"

    def match(self, node: fx.Node, program: Program) -> LowRankMlp | LowRankAttention | Miss | None:
        """Start from the neurons behind the activation, or from the attention."""
        return find_attention(node) or find_mlp(node)

    def rewrite(self, match: LowRankMlp | LowRankAttention, edit: Edit) -> None:
        """Put the operator where the last of the nodes stood that it replaces."""
        if isinstance(match, LowRankMlp):
            _fuse_mlp(match, edit)
        else:
            _fuse_attention(match, edit)


def _fuse_mlp(match: LowRankMlp, edit: Edit) -> None:
    last = match.columns if match.rows is None else match.rows
    up, up_rows, up_bias = _read(match.up)
    gate, gate_rows, gate_bias = (None, None, None) if match.gate is None else _read(match.gate)
    columns, rows = match.columns.args[1], None if match.rows is None else match.rows.args[1]
    operands = (gate, up, gate_rows, gate_bias, up_rows, up_bias, columns, rows, arguments(last)["bias"])
    with edit.before(last):
        fused = edit.call(low_rank_mlp, *operands, match.activation)
    edit.replace(last, fused)


def _fuse_attention(match: LowRankAttention, edit: Edit) -> None:
    node, given = match.attention, arguments(match.attention)
    read = [_read(linear) for linear in (match.query, match.key, match.value)]
    ranks = [x for x, _, _ in read]
    factors = [part for _, rows, bias in read for part in (rows, bias)]
    masks = [given[name] for name in ("query_positions", "key_positions", "key_valid", "sinks")]
    heads, kv_heads = (int(given[name].meta["val"].shape[1]) for name in ("query", "key"))
    rest = (match.interleaved, match.scale, given["causal"], given["window"], given["softcap"])
    operands = (*ranks, *factors, match.cos, match.sin, *masks, heads, kv_heads, *rest)
    with edit.before(node):
        fused = edit.call(low_rank_attention, *operands)
    for user in list(node.users):
        if is_call(user, aten.transpose.int) and sorted(axis % 4 for axis in user.args[1:]) == [1, 2]:
            edit.replace(user, fused)
    if node.users:
        with edit.before(node):
            by_head = edit.call(aten.transpose.int, fused, 1, 2)
        edit.replace(node, by_head)


def _read(linear: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """What a linear reads, its weight and its bias."""
    operands = arguments(linear)
    return operands["input"], operands["weight"], operands["bias"]
