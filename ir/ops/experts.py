"""`jettison::experts`: the routed experts of a mixture-of-experts layer, each a gated MLP.

A router has chosen `k` of X experts for every token; the operator computes those and no others:

    out[t] = sum over j of weights[t, j] * down[e] @ (activation(gate) * up),  e = indices[t, j]
    gate, up = the two halves of gate_up[e] @ x[t]

The weights come from a softmax or a sigmoid: none is negative. Kernels may leave out experts whose weight is not
positive.

Source: Mixtral of Experts (arXiv 2401.04088); the stacks are those of transformers' `integrations/moe.py`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.ir.ops.registration import define_op


def sum_over_experts(x: Tensor, indices: Tensor, weights: Tensor, expert: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Run the experts that some token chose, each once on all of its tokens, in ascending order.

    Args:
        x: `[T, E]` floating point.
        indices: `[T, k] i64`, experts of each token.
        weights: `[T, k]` floating point.
        expert: Takes the number of an expert and its tokens `[n, E]`; returns `[n, E]`.

    Returns:
        `[T, E]` in the dtype of x, contiguous; summed in fp32.
    """
    total = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    if len(x) == 1:  # a decode step: no token needs to be looked for
        for number, weight in sorted(zip(indices[0].tolist(), weights[0].unbind(), strict=True), key=lambda p: p[0]):
            total += expert(number, x).to(torch.float32) * weight.to(torch.float32)
        return total.to(x.dtype)
    for number in indices.unique().tolist():
        tokens, places = (indices == number).nonzero(as_tuple=True)
        out = expert(number, x[tokens]).to(torch.float32)
        total.index_add_(0, tokens, out * weights[tokens, places, None].to(torch.float32))
    return total.to(x.dtype)


def run_expert(x: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """One expert.

    Args:
        x: `[n, E]`.
        gate_up: `[2 * F, E]`, gate before up.
        down: `[E, F]`.
        activation: A key of `ACTIVATIONS`.

    Returns:
        `[n, E]`.
    """
    gate, up = F.linear(x, gate_up).chunk(2, dim=-1)
    return F.linear(ACTIVATIONS[activation](gate) * up, down)


def _experts(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str) -> Tensor:
    """Compute the experts that were chosen.

    Args:
        x: `[T, E]` f32, bf16 or f16.
        indices: `[T, k] i64`, each in `[0, X)`.
        weights: `[T, k]` floating point.
        gate_up: `[X, 2 * F, E]`, gate before up, in the dtype of x.
        down: `[X, E, F]` in the dtype of x.
        activation: A key of `ACTIVATIONS`.

    Returns:
        `[T, E]` in the dtype of x, contiguous.
    """
    _check_stacks(x, gate_up, down)
    check_routing(x, indices, weights)
    return sum_over_experts(
        x, indices, weights, lambda number, rows: run_expert(rows, gate_up[number], down[number], activation)
    )


def _fake_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor, activation: str
) -> Tensor:
    _check_stacks(x, gate_up, down)
    check_routing(x, indices, weights)
    return x.new_empty(x.shape)


experts = define_op(
    "experts(Tensor x, Tensor indices, Tensor weights, Tensor gate_up, Tensor down, str activation) -> Tensor",
    _experts,
    _fake_experts,
)


def check_routing(x: Tensor, indices: Tensor, weights: Tensor) -> None:
    """Check the operands that say which expert reads which token, as an operator's own argument check.

    Raises:
        RuntimeError: through `torch._check`, as ATen operators do, so that it also works on symbolic shapes.
    """
    torch._check(
        x.dim() == 2 and indices.dim() == 2 and weights.dim() == 2,
        lambda: (
            f"x, indices and weights must have one row per token, found {x.dim()}, {indices.dim()} and "
            f"{weights.dim()} axes"
        ),
    )
    torch._check(
        not indices.is_floating_point() and weights.is_floating_point() and indices.shape[1] == weights.shape[1],
        lambda: (
            f"indices must be integers and weights floating point of one shape, found {indices.dtype}"
            f"{list(indices.shape)} and {weights.dtype}{list(weights.shape)}"
        ),
    )


def _check_stacks(x: Tensor, gate_up: Tensor, down: Tensor) -> None:
    torch._check(
        gate_up.dim() == 3 and down.dim() == 3 and gate_up.dtype == x.dtype == down.dtype,
        lambda: (
            f"stacks must have three axes and the dtype of x, found {gate_up.dtype}{list(gate_up.shape)} and "
            f"{down.dtype}{list(down.shape)}"
        ),
    )
    count, rows, width = gate_up.shape
    torch._check(
        x.shape[-1] == width and tuple(down.shape) == (count, width, rows // 2) and rows % 2 == 0,
        lambda: (
            f"stacks must be [X, 2 * F, {x.shape[-1]}] and [X, {x.shape[-1]}, F], found {list(gate_up.shape)} and "
            f"{list(down.shape)}"
        ),
    )
