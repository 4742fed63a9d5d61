"""Linears that a pass may read in another way: those of the layers, with a weight of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import fx

from jettison.ir.match import Miss, arguments, constant_name, is_call
from jettison.ir.program import Program, constant_reads
from jettison.ir.text import target_text
from jettison.passes.base import describe_node
from jettison.passes.expert_reads import chooses_experts
from jettison.passes.residual_stream import LINEARS, PACKED_LINEARS

aten = torch.ops.aten
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class InputSite:
    """What several linears read.

    Attributes:
        x: Their input, `[B, S, K]`.
        linears: All of them that can be rewritten, with the names of their weights, in the order of the graph.
    """

    x: fx.Node
    linears: tuple[tuple[fx.Node, str], ...]

    @property
    def channels(self) -> int:
        """K."""
        return int(self.x.meta["val"].shape[-1])

    @property
    def row_weights(self) -> int:
        """Weights that one channel meets."""
        return sum(int(linear.meta["val"].shape[-1]) for linear, _ in self.linears)


def by_input(linears: Iterable[tuple[fx.Node, str]]) -> list[InputSite]:
    """Linears and the names of their weights, those of one input together, in the order of the graph."""
    readers: dict[fx.Node, list[tuple[fx.Node, str]]] = {}
    for linear, weight in linears:
        readers.setdefault(arguments(linear)["input"], []).append((linear, weight))
    return [InputSite(x, tuple(reading)) for x, reading in readers.items()]


def find_linear(
    node: fx.Node, program: Program, is_skipped: Callable[[str], bool], packed: str
) -> tuple[fx.Node, str] | Miss | None:
    """A linear of a layer and the name of its weight, which nothing else reads.

    The language-model head, whose results nothing averages out, and the routers of experts are none.

    Args:
        node: Any.
        program: Its program.
        is_skipped: Whether a weight of this name is to stay as it is.
        packed: Why a quantised one cannot be taken.
    """
    if not is_call(node, aten.linear.default, *PACKED_LINEARS) or is_head(node, program) or chooses_experts(node):
        return None
    if is_skipped(describe_node(node)):
        return None
    if is_call(node, *PACKED_LINEARS):
        return Miss(packed, node)
    weight = arguments(node)["weight"]
    name = constant_name(weight)
    if name is None:
        return Miss("the weight is not a constant", node)
    value = weight.meta["val"]
    if value.dtype not in _DTYPES or value.dim() != 2:
        return Miss(f"the weight is {list(value.shape)}, not a matrix of f32, bf16 or f16", node)
    others = [user for user, _ in constant_reads(program, name) if user is not node]
    if others:
        return Miss(f"{target_text(others[0].target)} reads {name} too", node)
    return node, name


def is_head(node: fx.Node, program: Program) -> bool:
    """Whether a linear has no other behind it and makes logits: of a decoder any, else one of a result per token id."""
    if program.info.kind != "decoder" and int(node.meta["val"].shape[-1]) != program.info.vocab_size:
        return False
    waiting, seen = [node], {node}
    while waiting:
        for user in waiting.pop().users:
            if is_call(user, *LINEARS):
                return False
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    return True
