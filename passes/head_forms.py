"""What an approximate language-model head becomes in `prefill` and `decode`, and the entries beside them.

`decode` returns what a session needs to choose a token, instead of all logits:

| output             | shape             | what it is                                                               |
|--------------------|-------------------|--------------------------------------------------------------------------|
| `candidates`       | `[B, P, k]` i64   | tokens whose logits were computed                                        |
| `candidate_logits` | `[B, P, k]` f32   | their logits, as the whole head computes them up to the order of sums    |
| `reserve`          | `[B, P, R]` i64   | the next tokens, largest bound first; only with `certify`, as `bounds`   |
| `bounds`           | `[B, P, R+1]` f32 | entry j bounds the logits of reserve token j and of all not before it    |
| `head_input`       | `[B, P, E]`       | what the entries `head` and `head_rows` take                             |

`head` computes all logits, `head_rows` those of the tokens that it is given (`head_tokens [B, P, M] i64`).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from jettison.ir.edit import Edit
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.ops import quantized_embedding, quantized_linear, selected_linear
from jettison.ir.program import HEAD, HEAD_INPUT, HEAD_ROWS, HEAD_TOKENS, output_node
from jettison.passes.select_logits import head_chain

aten = torch.ops.aten


@dataclass(frozen=True)
class WholeHead:
    """The linear that a head is, by its operands but x: nodes of any entry, and numbers.

    Attributes:
        operands: Of `aten.linear` or `jettison.quantized_linear`.
    """

    operands: dict[str, Any]

    @classmethod
    def of_linear(cls, node: fx.Node) -> WholeHead:
        """From the linear itself."""
        return cls({name: value for name, value in arguments(node).items() if name not in ("input", "x")})

    @classmethod
    def of_candidates(cls, completed: fx.Node) -> WholeHead | None:
        """From a `jettison.complete_logits`: what reads its candidates' rows says where they are."""
        node = completed.args[2]
        while isinstance(node, fx.Node) and not is_call(node, selected_linear, quantized_embedding):
            node = node.args[0] if node.args else None
        if not isinstance(node, fx.Node):
            return None
        read = arguments(node)
        if is_call(node, selected_linear):
            return cls({name: read[name] for name in ("weight", "bias")})
        names = ("codes", "scales", "zeros", "bits", "group")
        return cls({name: read[name] for name in names} | {"bias": None, "in_features": read["embedding_dim"]})

    def _own(self, edit: Edit) -> dict[str, Any]:
        """The operands in the entry of `edit`."""
        constants = edit.program.constants
        return {
            name: edit.constant(constants[constant_name(value) or ""]) if isinstance(value, fx.Node) else value
            for name, value in self.operands.items()
        }

    def all_logits(self, edit: Edit, x: fx.Node) -> fx.Node:
        """`[..., K]` to `[..., V]`; inside `with edit.before(node)`."""
        read = self._own(edit)
        if "weight" in read:
            bias = () if read["bias"] is None else (read["bias"],)
            return edit.call(aten.linear.default, x, read["weight"], *bias)
        names = ("codes", "scales", "zeros", "bias", "bits", "group", "in_features")
        return edit.call(quantized_linear, x, *(read[name] for name in names))

    def logits_of(self, edit: Edit, x: fx.Node, tokens: fx.Node) -> fx.Node:
        """`[..., K]` and `[..., M]` i64 to `[..., M]`; inside `with edit.before(node)`."""
        read = self._own(edit)
        if "weight" in read:
            return edit.call(selected_linear, x, tokens, read["weight"], read["bias"])
        names = ("codes", "scales", "zeros", "bits", "group", "in_features")
        rows = edit.call(quantized_embedding, tokens, *(read[name] for name in names))
        column = edit.call(aten.unsqueeze.default, _cast(edit, x, rows.meta["val"].dtype), -1)
        products = edit.call(aten.squeeze.dim, edit.call(aten.matmul.default, rows, column), -1)
        return _cast(edit, products, x.meta["val"].dtype)


def _cast(edit: Edit, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    return node if node.meta["val"].dtype == dtype else edit.call(aten.to.dtype, node, dtype)


def _parts(completed: fx.Node) -> tuple[WholeHead, fx.Node, fx.Node]:
    """Head, `jettison.head_candidates` and x of a `jettison.complete_logits`."""
    head, candidates = WholeHead.of_candidates(completed), completed.args[1]
    assert head is not None, "the pass ensures it"
    assert isinstance(candidates, fx.Node), "made so"
    choice = candidates.args[0]
    assert isinstance(choice, fx.Node), "made so"
    x = choice.args[1]
    assert isinstance(x, fx.Node), "made so"
    return head, choice, x


def read_whole_head(completed: fx.Node, edit: Edit) -> None:
    """Compute all logits as before: a prompt reads the head once, for all of its tokens.

    Args:
        completed: `jettison.complete_logits`.
        edit: Of `prefill`.
    """
    head, _, x = _parts(completed)
    with edit.before(completed):
        logits = head.all_logits(edit, x)
    edit.replace(completed, logits)


def return_candidates(completed: fx.Node, edit: Edit) -> None:
    """Return candidates instead of all logits, and add the entries that compute others.

    Args:
        completed: `jettison.complete_logits`.
        edit: Of `decode`.
    """
    program = edit.program
    head, choice, x = _parts(completed)
    candidates, exact = completed.args[1:]
    returned = list(output_node(edit.entry).args[0])
    states = returned[len(program.outputs) :]
    chain = head_chain(returned[0])
    tail = chain[: chain.index(completed)]
    _add_entries(edit, head, completed, tail, x)
    has_bounds, count = choice.args[2] is not None, exact.meta["val"].shape[-1]
    joined = exact
    if has_bounds:
        # What follows the head keeps the order of logits, so it is done to the bounds as well.
        with edit.before(completed):
            bounds = _cast(edit, edit.call(operator.getitem, choice, 2), exact.meta["val"].dtype)
            joined = edit.call(aten.cat.default, [exact, bounds], -1)
    edit.replace(completed, joined)
    for node in reversed(tail):
        edit.refresh(node)
    with edit.before(output_node(edit.entry)):
        last = _cast(edit, tail[0] if tail else joined, torch.float32)
        outputs = {"candidates": candidates, "candidate_logits": last}
        if has_bounds:
            outputs["candidate_logits"] = edit.call(aten.slice.Tensor, last, -1, 0, count)
            outputs["reserve"] = edit.call(operator.getitem, choice, 1)
            outputs["bounds"] = edit.call(aten.slice.Tensor, last, -1, count)
    outputs[HEAD_INPUT] = x
    program.entry_outputs["decode"] = tuple(outputs)
    edit.set_outputs([*outputs.values(), *states])


def _add_entries(edit: Edit, head: WholeHead, completed: fx.Node, tail: list[fx.Node], x: fx.Node) -> None:
    """Add `head` and `head_rows`, with what follows the head.

    Args:
        edit: Of `decode`.
        head: The head.
        completed: `jettison.complete_logits`.
        tail: From the logits back, what follows the head.
        x: What the head reads.
    """
    program = edit.program
    for name in (HEAD, HEAD_ROWS):
        graph = fx.Graph()
        graph.output(())
        program.entries[name] = fx.GraphModule(torch.nn.Module(), graph)
        own = Edit(program, name, edit.made_by, like=edit.entry_name)
        hidden = own.input(HEAD_INPUT, x.meta["val"])
        if name == HEAD_ROWS:
            sizes = x.meta["val"].shape[:-1]
            tokens = own.input(HEAD_TOKENS, own.dynamic_tensor([*sizes, None], torch.int64))
        with own.before(output_node(own.entry)):
            logits = head.all_logits(own, hidden) if name == HEAD else head.logits_of(own, hidden, tokens)
            own.set_outputs([_followed(own, logits, completed, tail)])


def _followed(edit: Edit, logits: fx.Node, completed: fx.Node, tail: list[fx.Node]) -> fx.Node:
    """Logits after what follows the head, in another entry; inside `with edit.before(node)`."""
    known = {completed: logits}

    def operand(old: fx.Node) -> fx.Node:
        name = constant_name(old)
        return known[old] if name is None else edit.constant(edit.program.constants[name])

    for node in reversed(tail):
        args, kwargs = fx.map_arg((node.args, node.kwargs), operand)
        known[node] = edit.call(node.target, *args, **kwargs)
    return known[tail[0] if tail else completed]
