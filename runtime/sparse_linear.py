"""`jettison::sparse_linear` with PyTorch.

The rows that one token names are added up where they lie. Tokens that run together name nearly all rows between them,
so their product reads the whole weight, and each drops what it did not name.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.ir.ops.sparse_linear import keep_channels
from jettison.runtime.sparse_mlp import sum_of_rows


def run_sparse_linear(x: Tensor, indices: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`jettison::sparse_linear`; see there."""
    rows = x.reshape(-1, x.shape[-1])
    if indices is not None and len(rows) == 1:
        named = indices.reshape(-1)
        out = sum_of_rows(rows.index_select(1, named), weight, named)
        if bias is not None:
            out += bias
    else:
        kept = rows if indices is None else keep_channels(rows, indices.reshape(-1, indices.shape[-1]))
        out = kept @ weight if bias is None else torch.addmm(bias, kept, weight)
    return out.view(*x.shape[:-1], weight.shape[1])
