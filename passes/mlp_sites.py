"""Feed-forward layers in a graph: a linear, an activation, perhaps a gate, and a second linear."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import fx

from jettison.ir.match import Miss, arguments, constant_name, is_call, only_user
from jettison.ir.ops import bitmap_linear, gated_activation, lut_linear, quantized_linear
from jettison.ir.program import Program, constant_reads
from jettison.ir.text import target_text
from jettison.passes.base import describe_node
from jettison.passes.raise_gated_mlp import activation_name

aten = torch.ops.aten
_LINEARS = (aten.linear.default, quantized_linear, lut_linear, bitmap_linear)


@dataclass(frozen=True)
class MlpSite:
    """A feed-forward layer.

    Attributes:
        down: The second linear, from F neurons to E.
        hidden: What it reads: the activations `[..., F]`.
        x: What the layer reads, `[..., E]`.
        up: The first linear.
        gate: The linear whose activation gates it, or None.
        activation: A key of `ACTIVATIONS`.
    """

    down: fx.Node
    hidden: fx.Node
    x: fx.Node
    up: fx.Node
    gate: fx.Node | None
    activation: str

    @property
    def linears(self) -> tuple[fx.Node, ...]:
        """All its linears, in the order in which they read."""
        return (self.up, self.down) if self.gate is None else (self.gate, self.up, self.down)

    @property
    def is_packed(self) -> bool:
        """Whether its weights are quantised."""
        return is_call(self.up, quantized_linear)

    @property
    def neurons(self) -> int:
        """F."""
        return int(self.hidden.meta["val"].shape[-1])

    @property
    def width(self) -> int:
        """E."""
        return int(self.x.meta["val"].shape[-1])

    def constant(self, linear: fx.Node, operand: str) -> str | None:
        """Name of the constant that is an operand of one of its linears; None where there is none."""
        return constant_name(arguments(linear)[operand])


def find_mlp(node: fx.Node, program: Program, group: int, skip: str | None) -> MlpSite | Miss | None:
    """The feed-forward layer that a linear ends.

    Args:
        node: Any node.
        program: Its program.
        group: Neurons that are to stay together.
        skip: Regular expression; where it is found in the name of the first matrix, the layer is not looked at.

    Returns:
        The layer; a Miss where there is one that cannot be taken apart; None where there is none.
    """
    if not is_call(node, *_LINEARS):
        return None
    hidden = node.args[0]
    gated = is_call(hidden, gated_activation)
    activation = hidden.args[2] if gated else activation_name(hidden)
    if activation is None:
        return None
    gate, up = hidden.args[:2] if gated else (None, hidden.args[0])
    linears = [each for each in (gate, up) if each is not None]
    if not all(is_call(each, *_LINEARS) for each in linears) or len({each.args[0] for each in linears}) != 1:
        return None
    site = MlpSite(node, hidden, up.args[0], up, gate, activation)
    if skip is not None and re.search(skip, describe_node(up)):
        return None
    if len({each.target for each in site.linears}) != 1:
        return Miss("one of its linears is quantised and another is not", node)
    if is_call(node, lut_linear):
        return Miss("its weights are codes into a table, which are not read by groups", node)
    if is_call(node, bitmap_linear):
        return Miss("its weights are a bitmap and values, which are not read by groups", node)
    for value in (hidden, *linears):
        if only_user(value) is None:
            return Miss("something else reads its neurons too", value)
    return _taken(site, program, group)


def _taken(site: MlpSite, program: Program, group: int) -> MlpSite | Miss:
    """The layer, unless its weights are computed or shared, or its neurons are no groups."""
    for linear in site.linears:
        for operand in ("weight", "codes", "scales", "zeros", "bias"):
            value = arguments(linear).get(operand)
            if value is None:
                continue
            name = constant_name(value)
            if name is None:
                return Miss("a weight is not a constant", linear)
            for user, _ in constant_reads(program, name):
                if user is not linear:
                    return Miss(f"{target_text(user.target)} reads {name} too", linear)
    if site.gate is not None and arguments(site.gate)["bias"] is not None:
        return Miss("the gate has a bias", site.gate)
    if site.neurons % group:
        return Miss(f"groups of {group} do not divide its {site.neurons} neurons", site.up)
    return site
