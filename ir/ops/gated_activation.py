"""`jettison::gated_activation`: the element-wise middle of a gated MLP (GLU variants, arXiv 2002.05202)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.ops.registration import define_op

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


def _gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """`activation(gate) * up`.

    Args:
        gate: `[..., F]`.
        up: `[..., F]`, the same shape as `gate`.
        activation: A key of `ACTIVATIONS`.

    Returns:
        `[..., F]`, contiguous.
    """
    return (ACTIVATIONS[activation](gate) * up).contiguous()


def _fake_gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    return torch.empty_like(gate, memory_format=torch.contiguous_format)


gated_activation = define_op(
    "gated_activation(Tensor gate, Tensor up, str activation) -> Tensor", _gated_activation, _fake_gated_activation
)
