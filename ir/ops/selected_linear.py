"""`jettison::selected_linear`: some outputs of a linear layer, for which only their rows of the weight are read."""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.ir.ops.registration import define_op


def _selected_linear(x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `(x @ weight.T + bias)[..., rows]`.

    Args:
        x: `[..., K]`.
        rows: `[..., R]` i64, each in `[0, N)`; other rows for each x.
        weight: `[N, K]` in the dtype of x.
        bias: `[N]`, or None.

    Returns:
        `[..., R]` in the dtype of x, rounded once from sums in fp32.
    """
    flat = rows.reshape(-1)
    found = weight.index_select(0, flat).to(torch.float32).view(*rows.shape, weight.shape[1])
    products = torch.matmul(found, x.to(torch.float32).unsqueeze(-1)).squeeze(-1)
    if bias is not None:
        products = products + bias.index_select(0, flat).view(rows.shape)
    return products.to(x.dtype)


def _fake_selected_linear(x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    torch._check(
        weight.dim() == 2 and weight.dtype == x.dtype and weight.shape[1] == x.shape[-1],
        lambda: f"weight must be {x.dtype}[N, {x.shape[-1]}], found {weight.dtype}{list(weight.shape)}",
    )
    torch._check(rows.dtype == torch.int64, lambda: f"rows must be i64, found {rows.dtype}")
    return x.new_empty(rows.shape)


selected_linear = define_op(
    "selected_linear(Tensor x, Tensor rows, Tensor weight, Tensor? bias) -> Tensor",
    _selected_linear,
    _fake_selected_linear,
)
