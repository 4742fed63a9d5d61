"""`jettison::low_rank_mlp` with PyTorch, some tokens at a time.

The neurons of a chunk are written over those of the chunk before, and results go where they stay, so that what is alive
at once does not grow with the tokens. Few tokens are one chunk, in the operations that they were before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.token_chunks import chunk_tokens, even_chunks
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
    tokens = up.numel() // up.shape[-1]
    at_once = (1 if gate is None else 2) * neurons + len(columns)
    most = chunk_tokens(at_once * up.element_size(), cache_bytes())
    if tokens <= most:
        hidden = F.linear(up, up_rows, up_bias)
        if gate is None or gate_rows is None:
            hidden = _IN_PLACE[activation](hidden)
        else:
            hidden = hidden.mul_(_IN_PLACE[activation](F.linear(gate, gate_rows, gate_bias)))
        return F.linear(hidden, columns, bias) if rows is None else F.linear(F.linear(hidden, columns), rows, bias)
    flat, flat_gate = up.reshape(tokens, -1), None if gate is None else gate.reshape(tokens, -1)
    out = up.new_empty(tokens, width)
    chunks = list(even_chunks(tokens, most))
    size = chunks[0][1]
    hidden_buffer = up.new_empty(size, neurons)
    gate_buffer = None if gate is None else up.new_empty(size, neurons)
    rank_buffer = None if rows is None else up.new_empty(size, len(columns))
    for start, stop in chunks:
        hidden = _linear(flat[start:stop], up_rows, up_bias, hidden_buffer[: stop - start])
        if flat_gate is None or gate_rows is None or gate_buffer is None:
            _IN_PLACE[activation](hidden)
        else:
            turned = _linear(flat_gate[start:stop], gate_rows, gate_bias, gate_buffer[: stop - start])
            hidden.mul_(_IN_PLACE[activation](turned))
        if rows is None or rank_buffer is None:
            _linear(hidden, columns, bias, out[start:stop])
        else:
            _linear(_linear(hidden, columns, None, rank_buffer[: stop - start]), rows, bias, out[start:stop])
    return out.view(*up.shape[:-1], width)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """A linear of rows `[N, K]` into a given tensor, which it returns."""
    if bias is None:
        return torch.mm(x, weight.t(), out=out)
    return torch.addmm(bias, x, weight.t(), out=out)
