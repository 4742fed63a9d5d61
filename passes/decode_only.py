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
from jettison.ir.match import is_call
from jettison.ir.ops import complete_logits, quantized_sparse_mlp, sparse_linear, sparse_mlp
from jettison.ir.program import HEAD, Program
from jettison.passes.dense_forms import all_channels, all_groups, linears_again
from jettison.passes.head_forms import read_whole_head, return_candidates

Form = Callable[[fx.Node, Edit], None]
"""Rewrites a node in its entry."""

FORMS: Mapping[Any, Mapping[str, Form]] = {
    complete_logits: {"prefill": read_whole_head, "decode": return_candidates},
    sparse_linear: {"prefill": all_channels},
    sparse_mlp: {"prefill": all_groups},
    quantized_sparse_mlp: {"prefill": linears_again},
}
"""By operator and entry; an entry that is not named keeps the operator as it is."""


def is_decode_only(program: Program) -> bool:
    """Whether some token is computed in another way than a token of a prompt."""
    if HEAD in program.entries:  # what it was made from is gone
        return True
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
