"""Find out whether tokens read each other in any way but attention: only keys and values survive between calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from jettison.ir.interpret import run_entry
from jettison.ir.match import is_call
from jettison.ir.ops import attention
from jettison.ir.program import Program, input_placeholders, output_node


def _silent(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    """An attention that reads nothing."""
    return query.new_zeros((*query.shape[:3], value.shape[3]))


def _first(values: Tensor, k: int, dim: int = -1, *_: Any) -> tuple[Tensor, Tensor]:
    """A choice that does not look at values: rounding, which differs between rows, turns others around."""
    shape = [1] * values.dim()
    shape[dim] = k
    first = values.narrow(dim, 0, k)
    return first, torch.arange(k).view(shape).expand(first.shape)


@torch.no_grad()
def position_mixer(program: Program) -> fx.Node | None:
    """The first value in which a token reads an earlier one other than through `jettison.attention`.

    Rows that differ in their first token run with silent attention, and always choose the first of several values:
    every value of the second token must be equal. The weights are read once.

    Args:
        program: With the entry `forward`, its attention raised.

    Returns:
        The node in `program`, or None.
    """
    probe = program.copy()
    entry = probe.entries["forward"]
    inputs = input_placeholders(entry)
    batch_and_length = inputs["input_ids"].meta["val"].shape
    watched = []
    for node in entry.graph.nodes:
        if is_call(node, attention):
            node.target = _silent
        elif is_call(node, torch.ops.aten.topk.default):
            node.target = _first
        if node.op == "call_function" and _is_per_token(node.meta["val"], batch_and_length):
            watched.append(node)
    output_node(entry).args = (tuple(watched),)
    entry.graph.eliminate_dead_code()
    # Ids far apart: rows of reserved tokens at either end of a vocabulary may be equal.
    vocab = program.info.vocab_size
    ids = torch.tensor([[1, vocab // 4], [vocab // 3, vocab // 4], [vocab // 2, vocab // 4]]) % vocab
    columns = torch.arange(2)[None].repeat(len(ids), 1)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    given.update(position_ids=columns, logits_positions=columns)
    names = {node.name: node for node in program.entries["forward"].graph.nodes}
    values = run_entry(probe, "forward", {name: given[name] for name in inputs})
    # Rounding differs between rows of a product, by the coarsest dtype on the way, whatever a value is cast to; another
    # token makes a difference of the size of the value.
    rounding = max([1e-3, *(8 * torch.finfo(value.dtype).eps for value in values)])
    for node, value in zip(watched, values, strict=True):
        second = value[:, 1].double()
        if not (second - second[:1]).abs().max() <= rounding * second.abs().max():
            return names[node.name]
    return None


def _is_per_token(value: Any, batch_and_length: torch.Size) -> bool:
    is_real = isinstance(value, Tensor) and value.is_floating_point()
    return is_real and [str(size) for size in value.shape[:2]] == [str(size) for size in batch_and_length]
