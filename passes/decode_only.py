"""What operators that read less for a token become in the entries that `cache-kv` makes.

`forward` computes every token as a decode step will, so that a check sees what a pass costs. Of the two entries made
from it, `prefill` reads all weights again: a prompt needs nearly all of them anyway, and its keys and values are
better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from jettison.ir.edit import Edit
from jettison.ir.match import arguments, is_call
from jettison.ir.ops import gated_activation, quantized_linear, quantized_sparse_mlp, sparse_linear, sparse_mlp
from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.ir.program import Program

Form = Callable[[fx.Node, Edit], None]
"""Rewrites a node in its entry."""


def _all_groups(node: fx.Node, edit: Edit) -> None:
    """A sparse feed-forward layer over the same matrices, with every group."""
    given = arguments(node) | {"indices": None, "absent": None}
    edit.set_arguments(node, *given.values())


def _all_channels(node: fx.Node, edit: Edit) -> None:
    """A sparse linear over the same weight, with every channel."""
    given = arguments(node) | {"indices": None}
    edit.set_arguments(node, *given.values())


def _linears_again(node: fx.Node, edit: Edit) -> None:
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


FORMS: Mapping[Any, Mapping[str, Form]] = {
    sparse_linear: {"prefill": _all_channels},
    sparse_mlp: {"prefill": _all_groups},
    quantized_sparse_mlp: {"prefill": _linears_again},
}
"""By operator and entry; an entry that is not named keeps the operator as it is."""


def is_decode_only(program: Program) -> bool:
    """Whether some token is computed in another way than a token of a prompt."""
    return any(is_call(node, *FORMS) for entry in program.entries.values() for node in entry.graph.nodes)


def specialize_entries(program: Program, made_by: str) -> None:
    """Give each entry its form of the operators, in place.

    Args:
        program: With `prefill` and `decode`, which are copies of one graph but for this.
        made_by: Text id of the pass.
    """
    for entry in ("prefill", "decode"):
        edit = Edit(program, entry, made_by)
        for node in list(edit.graph.nodes):
            form = next((forms.get(entry) for target, forms in FORMS.items() if is_call(node, target)), None)
            if form is not None:
                form(node, edit)
        edit.eliminate_dead_code()
