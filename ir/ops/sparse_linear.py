"""`jettison::sparse_linear`: a linear of which each token reads the rows of the weight whose channels it names.

With K as the channels that a token names,

    out = bias + sum over i in K of x[i] * weight[i]

so the weight has a row per input channel: it is the transposed weight of a linear, and what a channel needs is
contiguous. Every token has its own channels, whatever other tokens are computed with it.

Source: TEAL (arXiv 2408.14690) for inputs chosen per token by their size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.ir.ops.registration import define_op


def keep_channels(x: Tensor, indices: Tensor) -> Tensor:
    """Inputs with the channels that a token does not name at zero.

    Args:
        x: `[..., K]`.
        indices: `[..., k] i64`, channels that each token names; naming one twice is naming it.

    Returns:
        `[..., K]`.
    """
    return torch.zeros_like(x).scatter_(-1, indices, x.gather(-1, indices))


def _sparse_linear(x: Tensor, indices: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Define the operator: drop the channels that are not named, and read every row.

    Args:
        x: `[..., K]` f32, bf16 or f16.
        indices: `[..., k] i64` in `[0, K)`, all of a token different; None names every channel.
        weight: `[K, N]` in the dtype of x.
        bias: `[N]`, or None.

    Returns:
        `[..., N]` in the dtype of x, contiguous.
    """
    _check(x, indices, weight, bias)
    out = (x if indices is None else keep_channels(x, indices)).matmul(weight)
    return (out if bias is None else out + bias).contiguous()


def _fake_sparse_linear(x: Tensor, indices: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    _check(x, indices, weight, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


sparse_linear = define_op(
    "sparse_linear(Tensor x, Tensor? indices, Tensor weight, Tensor? bias) -> Tensor",
    _sparse_linear,
    _fake_sparse_linear,
)


def _check(x: Tensor, indices: Tensor | None, weight: Tensor, bias: Tensor | None) -> None:
    torch._check(
        weight.dim() == 2 and weight.shape[0] == x.shape[-1] and weight.dtype == x.dtype,
        lambda: f"weight must be {x.dtype}[{x.shape[-1]}, N], found {weight.dtype}{list(weight.shape)}",
    )
    torch._check(
        indices is None or (not indices.is_floating_point() and indices.dim() == x.dim()),
        lambda: f"indices must be integers with as many axes as x ({x.dim()})",
    )
    torch._check(
        bias is None or tuple(bias.shape) == (weight.shape[1],), lambda: f"bias must have {weight.shape[1]} values"
    )
