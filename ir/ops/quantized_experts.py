"""`jettison::quantized_experts`: `jettison::experts` with both stacks as packed integer groups.

Every expert's matrix is packed as in `jettison::quantized_linear`; the parts of all experts are stacked along a first
axis. The two stacks may differ in bits and group:

| operand | shape                                       | dtype          |
|---------|---------------------------------------------|----------------|
| codes   | `[X, N, k_blocks, group * bits / 8]`        | u8             |
| scales  | `[X, N, k_blocks]`                          | floating point |
| zeros   | `[X, N, ceil(k_blocks * bits / 8)]` or None | u8             |
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from jettison.ir.ops.experts import check_routing, sum_over_experts
from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.ir.ops.quantized_linear import check_packed, quantized_linear
from jettison.ir.ops.registration import define_op


class _Stack(NamedTuple):
    """The packed matrices `[N, in_features]` of all experts."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int
    in_features: int

    def linear(self, expert: int, x: Tensor) -> Tensor:
        zeros = None if self.zeros is None else self.zeros[expert]
        layout = (self.bits, self.group, self.in_features)
        return quantized_linear(x, self.codes[expert], self.scales[expert], zeros, None, *layout)

    def check(self, name: str, experts: int, rows: int) -> None:
        torch._check(
            self.codes.dim() == 4 and tuple(self.codes.shape[:2]) == (experts, rows),
            lambda: f"{name}_codes must be u8[{experts}, {rows}, k_blocks, bytes], found {list(self.codes.shape)}",
        )
        for part, stacked in (("scales", self.scales), ("zeros", self.zeros)):
            torch._check(
                stacked is None or (stacked.dim() == 3 and stacked.shape[0] == experts),
                lambda part=part, stacked=stacked: (
                    f"{name}_{part} must have three axes, the first of {experts} experts, found {list(stacked.shape)}"
                ),
            )
        zeros = None if self.zeros is None else self.zeros[0]
        check_packed(self.codes[0], self.scales[0], zeros, self.bits, self.group, self.in_features)


def _stacks(
    x: Tensor, gate_up_codes: Tensor, gate_up_scales: Tensor, gate_up_zeros: Tensor | None, down_codes: Tensor,
    down_scales: Tensor, down_zeros: Tensor | None, gate_up_bits: int, gate_up_group: int, down_bits: int,
    down_group: int,
) -> tuple[_Stack, _Stack]:  # fmt: skip
    """Both stacks, checked."""
    torch._check(
        gate_up_codes.dim() == 4 and gate_up_codes.shape[1] % 2 == 0,
        lambda: f"gate_up_codes must be u8[X, 2 * F, k_blocks, bytes], found {list(gate_up_codes.shape)}",
    )
    count, rows = gate_up_codes.shape[:2]
    width = x.shape[-1]
    gate_up = _Stack(gate_up_codes, gate_up_scales, gate_up_zeros, gate_up_bits, gate_up_group, width)
    down = _Stack(down_codes, down_scales, down_zeros, down_bits, down_group, rows // 2)
    gate_up.check("gate_up", count, rows)
    down.check("down", count, width)
    return gate_up, down


def _quantized_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up_codes: Tensor, gate_up_scales: Tensor,
    gate_up_zeros: Tensor | None, down_codes: Tensor, down_scales: Tensor, down_zeros: Tensor | None, activation: str,
    gate_up_bits: int, gate_up_group: int, down_bits: int, down_group: int,
) -> Tensor:  # fmt: skip
    """Compute the experts that were chosen, decoding only their matrices and those a few rows at a time.

    Args:
        x: `[T, E]` f32, bf16 or f16.
        indices: `[T, k] i64`, each in `[0, X)`.
        weights: `[T, k]` floating point.
        gate_up_codes: `[X, 2 * F, k_blocks of E, bytes]` u8, gate before up.
        gate_up_scales: `[X, 2 * F, k_blocks]` floating point.
        gate_up_zeros: `[X, 2 * F, bytes]` u8 or None.
        down_codes: `[X, E, k_blocks of F, bytes]` u8.
        down_scales: `[X, E, k_blocks]` floating point.
        down_zeros: `[X, E, bytes]` u8 or None.
        activation: A key of `ACTIVATIONS`.
        gate_up_bits: 2, 4 or 8 bits per code.
        gate_up_group: Columns that share a scale.
        down_bits: 2, 4 or 8 bits per code.
        down_group: Columns that share a scale.

    Returns:
        `[T, E]` in the dtype of x, contiguous.
    """
    check_routing(x, indices, weights)
    gate_up, down = _stacks(
        x, gate_up_codes, gate_up_scales, gate_up_zeros, down_codes, down_scales, down_zeros, gate_up_bits,
        gate_up_group, down_bits, down_group,
    )  # fmt: skip

    def expert(number: int, rows: Tensor) -> Tensor:
        gate, up = gate_up.linear(number, rows).chunk(2, dim=-1)
        return down.linear(number, ACTIVATIONS[activation](gate) * up)

    return sum_over_experts(x, indices, weights, expert)


def _fake_quantized_experts(
    x: Tensor, indices: Tensor, weights: Tensor, gate_up_codes: Tensor, gate_up_scales: Tensor,
    gate_up_zeros: Tensor | None, down_codes: Tensor, down_scales: Tensor, down_zeros: Tensor | None, activation: str,
    gate_up_bits: int, gate_up_group: int, down_bits: int, down_group: int,
) -> Tensor:  # fmt: skip
    check_routing(x, indices, weights)
    _stacks(
        x, gate_up_codes, gate_up_scales, gate_up_zeros, down_codes, down_scales, down_zeros, gate_up_bits,
        gate_up_group, down_bits, down_group,
    )  # fmt: skip
    return x.new_empty(x.shape)


quantized_experts = define_op(
    "quantized_experts(Tensor x, Tensor indices, Tensor weights, Tensor gate_up_codes, Tensor gate_up_scales, "
    "Tensor? gate_up_zeros, Tensor down_codes, Tensor down_scales, Tensor? down_zeros, str activation, "
    "int gate_up_bits, int gate_up_group, int down_bits, int down_group) -> Tensor",
    _quantized_experts,
    _fake_quantized_experts,
)
