"""`jettison::quantized_sparse_mlp`: `jettison::sparse_mlp` over packed integer groups.

The matrices are those of the linears, packed as in `jettison::quantized_linear`: up and gate `[F, E]` with groups along
E, so that a group of neurons is rows of them; down `[E, F]` with groups along F, so that a group of neurons is columns
of whole groups of codes. `group` is therefore a multiple of `down_group`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.ir.ops.quantized_linear import check_packed, quantized_linear
from jettison.ir.ops.registration import define_op
from jettison.ir.ops.sparse_mlp import add_absent, check_absent, check_biases, check_groups, keep_groups


def _quantized_sparse_mlp(
    x: Tensor, indices: Tensor, gate_codes: Tensor | None, gate_scales: Tensor | None, gate_zeros: Tensor | None,
    up_codes: Tensor, up_scales: Tensor, up_zeros: Tensor | None, up_bias: Tensor | None, down_codes: Tensor,
    down_scales: Tensor, down_zeros: Tensor | None, down_bias: Tensor | None, absent: Tensor | None, activation: str,
    group: int, up_bits: int, up_group: int, down_bits: int, down_group: int, width: int, neurons: int,
) -> Tensor:  # fmt: skip
    """Define the operator: compute every neuron, and drop those that are not named.

    Args:
        x: `[..., E]` f32, bf16 or f16.
        indices: `[..., k] i64` in `[0, F / group)`, all of a token different.
        gate_codes: `[F, k_blocks of E, bytes]` u8, like the next two in the layout of up; or None, with both of them.
        gate_scales: `[F, k_blocks]` floating point.
        gate_zeros: `[F, bytes]` u8, or None.
        up_codes: `[F, k_blocks of E, bytes]` u8.
        up_scales: `[F, k_blocks]` floating point.
        up_zeros: `[F, bytes]` u8, or None.
        up_bias: `[F]`, or None.
        down_codes: `[E, k_blocks of F, bytes]` u8.
        down_scales: `[E, k_blocks]` floating point.
        down_zeros: `[E, bytes]` u8, or None.
        down_bias: `[E]`, or None.
        absent: `[F / group + 1, E]`, as in `jettison::sparse_mlp`, or None.
        activation: A key of `ACTIVATIONS`.
        group: Neurons of a group; divides F.
        up_bits: Bits per code of up and gate.
        up_group: Columns of up and gate that share a scale.
        down_bits: Bits per code of down.
        down_group: Columns of down that share a scale; divides `group`.
        width: E.
        neurons: F.

    Returns:
        `[..., E]` in the dtype of x, contiguous.
    """
    layout = (up_bits, up_group, width)
    _check(x, indices, up_codes, up_scales, up_zeros, down_codes, down_scales, down_zeros, group, layout,
           (down_bits, down_group, neurons))  # fmt: skip
    _check_gate(gate_codes, gate_scales, gate_zeros, up_codes, (up_bits, up_group, width))
    check_biases(up_bias, down_bias, neurons, width)
    check_absent(x, absent, neurons // group)
    hidden = quantized_linear(x, up_codes, up_scales, up_zeros, up_bias, *layout)
    if gate_codes is None:
        hidden = ACTIVATIONS[activation](hidden)
    else:
        assert gate_scales is not None, "checked"
        gate = quantized_linear(x, gate_codes, gate_scales, gate_zeros, None, *layout)
        hidden = ACTIVATIONS[activation](gate) * hidden
    kept = keep_groups(hidden, indices, group)
    out = quantized_linear(kept, down_codes, down_scales, down_zeros, down_bias, down_bits, down_group, neurons)
    return add_absent(out, indices, absent, None)


def _fake_quantized_sparse_mlp(
    x: Tensor, indices: Tensor, gate_codes: Tensor | None, gate_scales: Tensor | None, gate_zeros: Tensor | None,
    up_codes: Tensor, up_scales: Tensor, up_zeros: Tensor | None, up_bias: Tensor | None, down_codes: Tensor,
    down_scales: Tensor, down_zeros: Tensor | None, down_bias: Tensor | None, absent: Tensor | None, activation: str,
    group: int, up_bits: int, up_group: int, down_bits: int, down_group: int, width: int, neurons: int,
) -> Tensor:  # fmt: skip
    _check(x, indices, up_codes, up_scales, up_zeros, down_codes, down_scales, down_zeros, group,
           (up_bits, up_group, width), (down_bits, down_group, neurons))  # fmt: skip
    _check_gate(gate_codes, gate_scales, gate_zeros, up_codes, (up_bits, up_group, width))
    check_biases(up_bias, down_bias, neurons, width)
    check_absent(x, absent, neurons // group)
    return x.new_empty(x.shape)


quantized_sparse_mlp = define_op(
    "quantized_sparse_mlp(Tensor x, Tensor indices, Tensor? gate_codes, Tensor? gate_scales, Tensor? gate_zeros, "
    "Tensor up_codes, Tensor up_scales, Tensor? up_zeros, Tensor? up_bias, Tensor down_codes, Tensor down_scales, "
    "Tensor? down_zeros, Tensor? down_bias, Tensor? absent, str activation, int group, int up_bits, int up_group, "
    "int down_bits, int down_group, int width, int neurons) -> Tensor",
    _quantized_sparse_mlp,
    _fake_quantized_sparse_mlp,
)


def _check(
    x: Tensor, indices: Tensor, up_codes: Tensor, up_scales: Tensor, up_zeros: Tensor | None, down_codes: Tensor,
    down_scales: Tensor, down_zeros: Tensor | None, group: int, up: tuple[int, int, int], down: tuple[int, int, int],
) -> None:  # fmt: skip
    check_groups(x, indices, down[2], group)
    torch._check(
        up_codes.shape[0] == down[2] and down_codes.shape[0] == up[2] and x.shape[-1] == up[2],
        lambda: (
            f"up must have {down[2]} rows, down and x {up[2]} rows and columns, found {up_codes.shape[0]}, "
            f"{down_codes.shape[0]} and {x.shape[-1]}"
        ),
    )
    check_packed(up_codes, up_scales, up_zeros, *up)
    check_packed(down_codes, down_scales, down_zeros, *down)
    torch._check(
        group % down[1] == 0,
        lambda: f"groups of {group} neurons must be whole groups of {down[1]} columns of down",
    )


def _check_gate(
    codes: Tensor | None, scales: Tensor | None, zeros: Tensor | None, up_codes: Tensor, layout: tuple[int, int, int]
) -> None:
    torch._check((codes is None) == (scales is None), lambda: "gate_scales must be given with gate_codes")
    if codes is not None and scales is not None:
        torch._check(
            codes.shape == up_codes.shape,
            lambda: f"gate must have the codes of up, {list(up_codes.shape)}, found {list(codes.shape)}",
        )
        check_packed(codes, scales, zeros, *layout)
