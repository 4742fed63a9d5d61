"""How heads are cut out of rows of tokens in a graph, and put side by side again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx

from jettison.ir import ops
from jettison.ir.match import is_call, only_user

aten = torch.ops.aten


def _is_swap(node: fx.Node) -> bool:
    """Whether a node exchanges heads and tokens."""
    return is_call(node, aten.transpose.int) and set(node.args[1:]) == {1, 2}


def side_by_side(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The exchange of heads and tokens behind an attention, and the reshape behind that."""
    swap = only_user(node)
    flat = only_user(swap) if swap is not None and _is_swap(swap) else None
    return (swap, flat) if swap is not None and is_call(flat, aten.reshape.default) else None


class Heads:
    """Heads cut out of rows of tokens: the nodes that do it, and where they come from."""

    def __init__(self, source: fx.Node, nodes: Iterable[fx.Node], angles: tuple[fx.Node, fx.Node, bool] | None) -> None:
        self.source, self.nodes, self.angles = source, list(nodes), angles


def peel(node: Any) -> Heads | None:
    """From `[B, H, S, D]` back to `[B, S, H * D]` or `[B, S, H, D]`, through a rotation."""
    nodes: list[fx.Node] = []
    angles = None
    if is_call(node, ops.rotary_embedding):
        nodes.append(node)
        node, angles = node.args[0], (node.args[1], node.args[2], bool(node.args[3]))
    if not isinstance(node, fx.Node) or not _is_swap(node):
        return None
    nodes.append(node)
    source = node.args[0]
    if is_call(source, aten.reshape.default, aten.view.default):
        nodes.append(source)
        source = source.args[0]
    return Heads(source, nodes, angles)
