"""How single operators become ONNX: one function per operator, called while the exporter traces.

Everything without an entry here is ATen and is lowered by `torch.onnx` itself. Attention over a cache is usually fused
(see `cached_attention`); the entries here are for what the fused kernel refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.onnx.ops import rotary_embedding as onnx_rotary_embedding
from torch.onnx.ops import symbolic

from jettison.codegen.onnx.joint_attention import joint_attention, scored_joint_attention
from jettison.codegen.onnx.quantized_slots import dequantize_slots, quantize_slots
from jettison.codegen.onnx.routed_experts import experts, quantized_experts
from jettison.codegen.onnx.written_attention import (
    attention,
    next_slots,
    scored_attention,
    windowed_attention,
    write_slots,
)
from jettison.ir import ops
from jettison.ir.ops.gated_activation import ACTIVATIONS

aten = torch.ops.aten
# 4 lets the kernel quantise activations to int8, which is what makes it fast on a CPU.
DEFAULT_ACCURACY_LEVEL = 4
# ONNX Runtime's 8-bit kernel is fused only at this level; below it dequantises the whole weight at every call.
EIGHT_BIT_ACCURACY_LEVEL = 4


def quantized_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group: int,
    in_features: int, *, accuracy_level: int = DEFAULT_ACCURACY_LEVEL,
) -> Tensor:  # fmt: skip
    """`com.microsoft::MatMulNBits`."""
    attributes = {
        "K": in_features, "N": codes.shape[0], "bits": bits, "block_size": group,
        "accuracy_level": EIGHT_BIT_ACCURACY_LEVEL if bits != 4 else accuracy_level,
    }  # fmt: skip
    return symbolic(
        "com.microsoft::MatMulNBits",
        (x, codes, scales, zeros, None, bias),
        attributes,
        dtype=x.dtype,
        shape=(*x.shape[:-1], codes.shape[0]),
        version=1,
    )


def quantized_embedding(
    indices: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, embedding_dim: int
) -> Tensor:
    """`com.microsoft::GatherBlockQuantized`; `codes` must come in rank 2 (the same bytes in another shape)."""
    padded_dim = scales.shape[1] * group
    rows = symbolic(
        "com.microsoft::GatherBlockQuantized",
        (codes, indices, scales, zeros),
        {"bits": bits, "block_size": group, "gather_axis": 0, "quantize_axis": 1},
        dtype=scales.dtype,
        shape=(*indices.shape, padded_dim),
        version=1,
    )
    # The kernel also returns the padding of the last group.
    return rows if padded_dim == embedding_dim else rows[..., :embedding_dim]


def gated_activation(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The activation and a product, which the exporter knows."""
    return ACTIVATIONS[activation](gate) * up


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Standard `RotaryEmbedding` (opset 23)."""
    batch, rows = x.shape[0], x.shape[2]
    cos, sin = (angle.to(x.dtype).expand(batch, rows, angle.shape[-1]) for angle in (cos, sin))
    rotated = 2 * cos.shape[-1]
    if rotated == x.shape[-1]:
        return onnx_rotary_embedding(x, cos, sin, interleaved=interleaved)
    # The kernel's partial form reads the channels behind `rotary_embedding_dim` wrongly for rank 4: split and join.
    turned = onnx_rotary_embedding(x[..., :rotated], cos, sin, interleaved=interleaved)
    return torch.cat([turned, x[..., rotated:]], -1)


LOWERINGS: dict[Any, Callable[..., Any]] = {
    ops.attention: attention,
    ops.dequantize_slots: dequantize_slots,
    ops.experts: experts,
    ops.gated_activation: gated_activation,
    ops.joint_attention: joint_attention,
    ops.next_slots: next_slots,
    ops.quantized_embedding: quantized_embedding,
    ops.quantize_slots: quantize_slots,
    ops.quantized_experts: quantized_experts,
    ops.quantized_linear: quantized_linear,
    ops.rotary_embedding: rotary_embedding,
    ops.scored_attention: scored_attention,
    ops.scored_joint_attention: scored_joint_attention,
    ops.windowed_attention: windowed_attention,
    ops.write_slots: write_slots,
}
