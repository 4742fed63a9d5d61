"""What sparse linears and feed-forward layers become in a prompt: see `decode_only`."""

from __future__ import annotations

from torch import fx

from jettison.ir.edit import Edit
from jettison.ir.match import arguments
from jettison.ir.ops import gated_activation, quantized_linear
from jettison.ir.ops.gated_activation import ACTIVATIONS


def all_channels(node: fx.Node, edit: Edit) -> None:
    """A sparse linear over the same weight, with every channel."""
    given = arguments(node) | {"indices": None}
    edit.set_arguments(node, *given.values())


def all_groups(node: fx.Node, edit: Edit) -> None:
    """A sparse feed-forward layer over the same matrices, with every group."""
    given = arguments(node) | {"indices": None, "absent": None}
    edit.set_arguments(node, *given.values())


def linears_again(node: fx.Node, edit: Edit) -> None:
    """A sparse feed-forward layer over quantised matrices as the linears it was made of."""
    read = arguments(node)

    def linear(x: fx.Node, stack: str, layout: str, bias: fx.Node | None) -> fx.Node:
        parts = [read[f"{stack}_{part}"] for part in ("codes", "scales", "zeros")]
        columns = read["neurons" if stack == "down" else "width"]
        return edit.call(quantized_linear, x, *parts, bias, read[f"{layout}_bits"], read[f"{layout}_group"], columns)

    with edit.before(node):
        hidden = linear(read["x"], "up", "up", read["up_bias"])
        if read["gate_codes"] is None:
            hidden = edit.inline(ACTIVATIONS[read["activation"]], hidden)
        else:
            gate = linear(read["x"], "gate", "up", None)
            hidden = edit.call(gated_activation, gate, hidden, read["activation"])
        new = linear(hidden, "down", "down", read["down_bias"])
    edit.replace(node, new)
