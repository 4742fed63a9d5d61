"""Linears that are read by channels, as ONNX."""

from __future__ import annotations

import torch
from torch import Tensor


def sparse_linear(x: Tensor, indices: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`Gather` of rows and a product for every token; without indices a product with the whole weight."""
    if indices is None:
        out = x @ weight
    else:
        rows, named = x.reshape(-1, x.shape[-1]), indices.reshape(-1, indices.shape[-1])
        product = torch.matmul(rows.gather(1, named).unsqueeze(1), weight[named]).squeeze(1)
        out = product.reshape(*x.shape[:-1], weight.shape[1])
    return out if bias is None else out + bias
