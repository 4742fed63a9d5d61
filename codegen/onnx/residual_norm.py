"""A residual sum and the RMS norm behind it as `com.microsoft::SkipSimplifiedLayerNormalization`: one pass, not two."""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.onnx.ops import symbolic_multi_out

from jettison.ir.match import arguments, constant_name, is_call

aten = torch.ops.aten
OPERATOR = "com.microsoft::SkipSimplifiedLayerNormalization"


def norm_of_sum(node: fx.Node) -> fx.Node | None:
    """The norm that can be computed together with `node`, a sum of two tensors `[B, S, E]`."""
    if not is_call(node, aten.add.Tensor) or arguments(node)["alpha"] != 1:
        return None
    values = [operand.meta["val"] if isinstance(operand, fx.Node) else None for operand in node.args[:2]]
    result = node.meta["val"]
    # Sizes by their text: comparing symbols while the exporter traces would enter its graph.
    if any(not isinstance(value, Tensor) or _sizes(value) != _sizes(result) for value in values):
        return None
    if result.dim() != 3 or result.dtype != torch.float32:
        return None
    for user in node.users:
        if is_call(user, aten.rms_norm.default):
            operands = arguments(user)
            weight = operands["weight"]
            is_over_channels = [str(size) for size in operands["normalized_shape"]] == _sizes(result)[-1:]
            if (
                is_over_channels
                and operands["eps"] is not None
                and isinstance(weight, fx.Node)
                and constant_name(weight) is not None
            ):
                return user
    return None


def _sizes(value: Tensor) -> list[str]:
    return [str(size) for size in value.shape]


def sum_and_norm(residual: Tensor, update: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """The sum `[B, S, E]` and its norm.

    Args:
        residual: `[B, S, E]`.
        update: `[B, S, E]`.
        weight: `[E]`.
        epsilon: Of the norm.
    """
    statistics = (*residual.shape[:2], 1)  # for training; the CPU kernel leaves them alone
    norm, _, _, total = symbolic_multi_out(
        OPERATOR,
        (residual, update, weight),
        {"epsilon": epsilon},
        dtypes=(residual.dtype, torch.float32, torch.float32, residual.dtype),
        shapes=(residual.shape, statistics, statistics, residual.shape),
        version=1,
    )
    return total, norm
