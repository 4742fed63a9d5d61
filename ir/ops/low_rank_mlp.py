"""`jettison::low_rank_mlp`: a feed-forward layer whose neurons are computed from, and summed up in, few dimensions.

A factored linear is two: `columns` `[r, K]`, then `rows` `[N, r]`. Of the layer

    up   = linear(linear(x, up_columns), up_rows, up_bias)         and the same for a gate, if there is one
    out  = linear(linear(activation(up), columns), rows, bias)     activation(gate) * up with a gate

the operator is everything from the first `rows` on: it is given `linear(x, up_columns)`, `r` numbers per token, and no
caller ever sees the F neurons. What is in front of it stays a linear, so that factors may be shared, and be stored and
multiplied as any other. A linear that is not factored has its whole weight for `rows`, and x as it is in front; a
second linear that is not factored has its whole weight for `columns`, and no `rows`.

Source: FlashSVD (arXiv 2508.01506), whose kernel begins at the same place.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.ir.ops.registration import define_op


def _low_rank_mlp(
    gate: Tensor | None, up: Tensor, gate_rows: Tensor | None, gate_bias: Tensor | None, up_rows: Tensor,
    up_bias: Tensor | None, columns: Tensor, rows: Tensor | None, bias: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """Define the operator: one linear after the other.

    Args:
        gate: `[..., Rg]`, what the gate is computed from; None without a gate.
        up: `[..., Ru]` f32, bf16 or f16; may be the same tensor.
        gate_rows: `[F, Rg]` in the dtype of up, as all weights; None without a gate.
        gate_bias: `[F]`, or None.
        up_rows: `[F, Ru]`.
        up_bias: `[F]`, or None.
        columns: `[R, F]`, first factor of the second linear, or all of it: `[E, F]`.
        rows: `[E, R]`, its second factor, or None.
        bias: `[E]`, or None.
        activation: A key of `ACTIVATIONS`.

    Returns:
        `[..., E]` in the dtype of up, contiguous.
    """
    _check(gate, up, gate_rows, gate_bias, up_rows, up_bias, columns, rows, bias)
    hidden = F.linear(up, up_rows, up_bias)
    if gate is None or gate_rows is None:
        hidden = ACTIVATIONS[activation](hidden)
    else:
        hidden = ACTIVATIONS[activation](F.linear(gate, gate_rows, gate_bias)) * hidden
    if rows is None:
        return F.linear(hidden, columns, bias).contiguous()
    return F.linear(F.linear(hidden, columns), rows, bias).contiguous()


def _fake_low_rank_mlp(
    gate: Tensor | None, up: Tensor, gate_rows: Tensor | None, gate_bias: Tensor | None, up_rows: Tensor,
    up_bias: Tensor | None, columns: Tensor, rows: Tensor | None, bias: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    _check(gate, up, gate_rows, gate_bias, up_rows, up_bias, columns, rows, bias)
    return up.new_empty((*up.shape[:-1], (columns if rows is None else rows).shape[0]))


low_rank_mlp = define_op(
    "low_rank_mlp(Tensor? gate, Tensor up, Tensor? gate_rows, Tensor? gate_bias, Tensor up_rows, Tensor? up_bias, "
    "Tensor columns, Tensor? rows, Tensor? bias, str activation) -> Tensor",
    _low_rank_mlp,
    _fake_low_rank_mlp,
)


def check_factor(x: Tensor, name: str, matrix: Tensor | None, shape: tuple[int, int]) -> None:
    """Check a factor of a linear, as an operator's own argument check.

    Raises:
        RuntimeError: through `torch._check`, as ATen operators do, so that it also works on symbolic shapes.
    """
    torch._check(
        matrix is None or (tuple(matrix.shape) == shape and matrix.dtype == x.dtype),
        lambda: f"{name} must be {x.dtype}{list(shape)}, found {matrix.dtype}{list(matrix.shape)}",  # type: ignore[union-attr]
    )


def check_bias(name: str, bias: Tensor | None, count: int) -> None:
    """Check a bias; see `check_factor`."""
    torch._check(
        bias is None or tuple(bias.shape) == (count,),
        lambda: f"{name} must have {count} values, found {list(bias.shape)}",  # type: ignore[union-attr]
    )


def _check(
    gate: Tensor | None, up: Tensor, gate_rows: Tensor | None, gate_bias: Tensor | None, up_rows: Tensor,
    up_bias: Tensor | None, columns: Tensor, rows: Tensor | None, bias: Tensor | None,
) -> None:  # fmt: skip
    neurons = up_rows.shape[0]
    torch._check((gate is None) == (gate_rows is None), lambda: "gate and gate_rows must be given together")
    torch._check(gate is not None or gate_bias is None, lambda: "gate_bias needs a gate")
    torch._check(
        gate is None or (gate.shape[:-1] == up.shape[:-1] and gate.dtype == up.dtype),
        lambda: f"gate must have the tokens and dtype of up, found {gate.dtype}{list(gate.shape)}",  # type: ignore[union-attr]
    )
    check_factor(up, "up_rows", up_rows, (neurons, up.shape[-1]))
    if gate is not None:
        check_factor(up, "gate_rows", gate_rows, (neurons, gate.shape[-1]))
    check_factor(up, "columns", columns, (columns.shape[0], neurons))
    if rows is not None:
        check_factor(up, "rows", rows, (rows.shape[0], columns.shape[0]))
    check_bias("gate_bias", gate_bias, neurons)
    check_bias("up_bias", up_bias, neurons)
    check_bias("bias", bias, (columns if rows is None else rows).shape[0])
