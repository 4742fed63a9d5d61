"""`jettison::low_rank_mlp` with PyTorch, some tokens at a time.

The neurons of a chunk are gone before those of the next one come, so that what is alive at once does not grow with the
tokens, and stays in the cache. Few tokens are one chunk, in the operations that they were before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from jettison.ir.token_chunks import chunk_tokens, even_chunks
from jettison.runtime.dense_linear import run_dense_linear
from jettison.runtime.processor_cache import cache_bytes

_IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": torch.ops.aten.gelu_.default,
    "gelu_tanh": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "relu": torch.relu_,
    "sigmoid": torch.sigmoid_,
    "silu": torch.ops.aten.silu_.default,
}


def run_low_rank_mlp(
    gate: Tensor | None, up: Tensor, gate_rows: Tensor | None, gate_bias: Tensor | None, up_rows: Tensor,
    up_bias: Tensor | None, columns: Tensor, rows: Tensor | None, bias: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """`jettison::low_rank_mlp`; see there."""
    neurons, width = len(up_rows), len(columns if rows is None else rows)
    activate = _IN_PLACE[activation]

    def some(gate: Tensor | None, up: Tensor) -> Tensor:
        hidden = run_dense_linear(up, up_rows, up_bias)
        if gate is None or gate_rows is None:
            activate(hidden)
        else:
            hidden.mul_(activate(run_dense_linear(gate, gate_rows, gate_bias)))
        if rows is None:
            return run_dense_linear(hidden, columns, bias)
        return run_dense_linear(run_dense_linear(hidden, columns), rows, bias)

    tokens = up.numel() // up.shape[-1]
    at_once = (1 if gate is None else 2) * neurons + len(columns)
    most = chunk_tokens(at_once * up.element_size(), cache_bytes())
    if tokens <= most:
        return some(gate, up)
    flat, flat_gate = up.reshape(tokens, -1), None if gate is None else gate.reshape(tokens, -1)
    out = up.new_empty(tokens, width)
    for start, stop in even_chunks(tokens, most):
        out[start:stop] = some(None if flat_gate is None else flat_gate[start:stop], flat[start:stop])
    return out.view(*up.shape[:-1], width)
