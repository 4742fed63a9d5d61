"""What an approximate language-model head becomes in `prefill` and `decode`, and the entry `head` beside them.

`decode` returns what a session needs to choose a token, instead of all logits:

| output             | shape               | what it is                                                                     |
|--------------------|---------------------|--------------------------------------------------------------------------------|
| `candidates`       | `[B, P, k]` i64     | tokens whose logits were computed, in no particular order                      |
| `candidate_logits` | `[B, P, k]` f32     | their logits, as the whole head computes them up to the order of sums          |
| `bound`            | `[B, P]` f32        | no other token has a larger logit; left out where nothing is proven            |
| `head_input`       | `[B, P, E]`         | what the entry `head` takes to compute all logits                              |
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from jettison.ir.edit import Edit
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.ops import quantized_embedding, quantized_linear, selected_linear
from jettison.ir.program import HEAD, HEAD_INPUT, output_node
from jettison.passes.select_logits import head_chain

aten = torch.ops.aten


def row_reader(completed: fx.Node) -> fx.Node | None:
    """What reads rows of the head for a `jettison.complete_logits`: a `selected_linear` or a `quantized_embedding`."""
    node = completed.args[2]
    while isinstance(node, fx.Node) and not is_call(node, selected_linear, quantized_embedding):
        node = node.args[0] if node.args else None
    return node if isinstance(node, fx.Node) else None


def _choice(completed: fx.Node) -> fx.Node:
    """The `jettison.head_candidates` of a `jettison.complete_logits`."""
    chosen = completed.args[1]
    assert isinstance(chosen, fx.Node), "made so"
    assert isinstance(chosen.args[0], fx.Node), "made so"
    return chosen.args[0]


def _whole_head(edit: Edit, completed: fx.Node, x: fx.Node) -> fx.Node:
    """The linear that the head was, on x, in the entry of `edit`; inside `with edit.before(node)`."""
    reader = row_reader(completed)
    assert reader is not None, "the pass ensures it"
    read = {
        name: edit.constant(edit.program.constants[constant_name(value) or ""]) if isinstance(value, fx.Node) else value
        for name, value in arguments(reader).items()
        if name not in ("x", "rows", "indices")
    }
    if is_call(reader, selected_linear):
        bias = () if read["bias"] is None else (read["bias"],)
        return edit.call(aten.linear.default, x, read["weight"], *bias)
    parts = (read[name] for name in ("codes", "scales", "zeros"))
    return edit.call(quantized_linear, x, *parts, None, read["bits"], read["group"], read["embedding_dim"])


def read_whole_head(completed: fx.Node, edit: Edit) -> None:
    """Compute all logits as before: a prompt reads the head once, for all of its tokens.

    Args:
        completed: `jettison.complete_logits`.
        edit: Of `prefill`.
    """
    with edit.before(completed):
        logits = _whole_head(edit, completed, _choice(completed).args[1])
    edit.replace(completed, logits)


def return_candidates(completed: fx.Node, edit: Edit) -> None:
    """Return candidates instead of all logits, and add the entry that computes the latter.

    Args:
        completed: `jettison.complete_logits`.
        edit: Of `decode`.
    """
    program, choice = edit.program, _choice(completed)
    candidates, exact, x = completed.args[1], completed.args[2], choice.args[1]
    returned = list(output_node(edit.entry).args[0])
    states = returned[len(program.outputs) :]
    chain = head_chain(returned[0])
    tail = chain[: chain.index(completed)]
    _add_head(edit, completed, tail, x)
    has_bound, count = choice.args[2] is not None, exact.meta["val"].shape[-1]
    joined = exact
    if has_bound:
        # What follows the head keeps the order of logits, so it is done to the bound as well.
        with edit.before(completed):
            bound = edit.call(aten.unsqueeze.default, edit.call(operator.getitem, choice, 1), -1)
            joined = edit.call(aten.cat.default, [exact, _cast(edit, bound, exact.meta["val"].dtype)], -1)
    edit.replace(completed, joined)
    for node in reversed(tail):
        edit.refresh(node)
    with edit.before(output_node(edit.entry)):
        last = _cast(edit, tail[0] if tail else joined, torch.float32)
        outputs = {"candidates": candidates, "candidate_logits": last}
        if has_bound:
            outputs["candidate_logits"] = edit.call(aten.slice.Tensor, last, -1, 0, count)
            outputs["bound"] = edit.call(aten.select.int, last, -1, count)
    outputs[HEAD_INPUT] = x
    program.entry_outputs["decode"] = tuple(outputs)
    edit.set_outputs([*outputs.values(), *states])


def _add_head(edit: Edit, completed: fx.Node, tail: list[fx.Node], x: fx.Node) -> None:
    """Add the entry `head`: the whole head, and what follows it.

    Args:
        edit: Of `decode`.
        completed: `jettison.complete_logits`.
        tail: From the logits back, what follows the head.
        x: What the head reads.
    """
    program, graph = edit.program, fx.Graph()
    graph.output(())
    program.entries[HEAD] = fx.GraphModule(torch.nn.Module(), graph)
    own = Edit(program, HEAD, edit.made_by, like=edit.entry_name)
    hidden = own.input(HEAD_INPUT, x.meta["val"])
    known = {}

    def operand(old: fx.Node) -> fx.Node:
        name = constant_name(old)
        return known[old] if name is None else own.constant(program.constants[name])

    with own.before(output_node(own.entry)):
        known[completed] = _whole_head(own, completed, hidden)
        for node in reversed(tail):
            args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
            known[node] = own.call(node.target, *args, **kwargs)
    own.set_outputs([known[tail[0] if tail else completed]])


def _cast(edit: Edit, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if node.meta["val"].dtype == dtype else edit.call(aten.to.dtype, node, dtype)
