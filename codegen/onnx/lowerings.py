"""How single operators become ONNX: one function per operator, called while the exporter traces.

Everything without an entry here is ATen and is lowered by `torch.onnx` itself. Attention over a cache is usually fused
(see `cached_attention`); the entries here are for what the fused kernel refuses.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.onnx.ops import rotary_embedding as onnx_rotary_embedding
from torch.onnx.ops import symbolic

from jettison.codegen.onnx.joint_attention import joint_attention, scored_joint_attention
from jettison.codegen.onnx.low_rank_attention import low_rank_attention
from jettison.codegen.onnx.low_rank_mlp import low_rank_mlp
from jettison.codegen.onnx.lut_weights import lut_embedding, lut_linear
from jettison.codegen.onnx.quantized_slots import dequantize_slots, quantize_slots
from jettison.codegen.onnx.routed_experts import experts, quantized_experts
from jettison.codegen.onnx.sparse_linear import sparse_linear
from jettison.codegen.onnx.sparse_mlp import sparse_mlp
from jettison.codegen.onnx.written_attention import (
    attention,
    next_slots,
    scored_attention,
    windowed_attention,
    write_slots,
)
from jettison.ir import ops
from jettison.ir.errors import UnsupportedError
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.ops.complete_logits import complete_logits_reference
from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.ir.ops.head_candidates import head_candidates_reference
from jettison.ir.program import Program

aten = torch.ops.aten
# 4 lets the kernel quantise activations to int8, which is what makes it fast on a CPU.
DEFAULT_ACCURACY_LEVEL = 4
# ONNX Runtime's 8-bit kernel is fused only at this level; below it dequantises the whole weight at every call.
EIGHT_BIT_ACCURACY_LEVEL = 4


# Bits for which a kernel exists; the schema of `MatMulNBits` has 2 to 8.
KERNEL_BITS = (2, 4, 8)


def require_kernels(program: Program) -> None:
    """Refuse weights that no kernel of ONNX Runtime reads, before any file is written.

    Raises:
        UnsupportedError: Names the first such weight.
    """
    for entry in program.entries.values():
        for node in entry.graph.nodes:
            if not is_call(node, ops.quantized_linear, ops.quantized_embedding):
                continue
            operands = arguments(node)
            if operands["bits"] not in KERNEL_BITS:
                where = constant_name(operands["codes"]) or node.meta.get("where") or node.name
                raise UnsupportedError(
                    f"[onnx] {where.removesuffix('.codes')}: found {operands['bits']}-bit codes, needs 2, 4 or 8 bits, "
                    "because the CPU kernels of MatMulNBits and GatherBlockQuantized take no others. Quantise it to "
                    'one of these, or use target="torch".'
                )


def quantized_linear(
    x: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, bits: int, group: int,
    in_features: int, *, accuracy_level: int = DEFAULT_ACCURACY_LEVEL,
) -> Tensor:  # fmt: skip
    """`com.microsoft::MatMulNBits`; see `_shift_of_zeros` for zero points between the codes."""
    attributes = {
        "K": in_features, "N": codes.shape[0], "bits": bits, "block_size": group,
        "accuracy_level": EIGHT_BIT_ACCURACY_LEVEL if bits != 4 else accuracy_level,
    }  # fmt: skip
    is_between = zeros is not None and zeros.is_floating_point()
    product = symbolic(
        "com.microsoft::MatMulNBits",
        (x, codes, scales, None if is_between else zeros, None, bias),
        attributes,
        dtype=x.dtype,
        shape=(*x.shape[:-1], codes.shape[0]),
        version=1,
    )
    if zeros is None or not is_between:
        return product
    padded = F.pad(x, (0, scales.shape[1] * group - in_features)) if in_features % group else x
    sums = padded.unflatten(-1, (scales.shape[1], group)).sum(-1)
    return product + sums @ _shift_of_zeros(zeros, scales, bits).t()


def _shift_of_zeros(zeros: Tensor, scales: Tensor, bits: int) -> Tensor:
    """What zero points between the codes add to each weight of a group that is decoded with the middle of the codes.

    `(code - zero) * scale = (code - middle) * scale + (middle - zero) * scale`, so that a linear is the symmetric one
    and a product of its sums over groups with the second term: 1 / group of the size. Given to the kernel as they are,
    float zero points make it decode the whole weight at every call (15 to 200 times the time for one row), and with 8
    bits it refuses them (benchmarks/results/lut_linear.json).

    Args:
        zeros: `[N, k_blocks]` floating point.
        scales: `[N, k_blocks]`.
        bits: Of the codes.

    Returns:
        `[N, k_blocks]`.
    """
    return (2.0 ** (bits - 1) - zeros) * scales


def quantized_embedding(
    indices: Tensor, codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, embedding_dim: int
) -> Tensor:
    """`com.microsoft::GatherBlockQuantized`; `codes` must come in rank 2 (the same bytes in another shape)."""
    padded_dim = scales.shape[1] * group
    is_between = zeros is not None and zeros.is_floating_point()
    rows = symbolic(
        "com.microsoft::GatherBlockQuantized",
        (codes, indices, scales, None if is_between else zeros),
        {"bits": bits, "block_size": group, "gather_axis": 0, "quantize_axis": 1},
        dtype=scales.dtype,
        shape=(*indices.shape, padded_dim),
        version=1,
    )
    if zeros is not None and is_between:
        # The kernel takes packed zero points only.
        shift = _shift_of_zeros(F.embedding(indices, zeros), F.embedding(indices, scales), bits)
        rows = (rows.unflatten(-1, (scales.shape[1], group)) + shift.unsqueeze(-1)).flatten(-2)
    # The kernel also returns the padding of the last group.
    return rows if padded_dim == embedding_dim else rows[..., :embedding_dim]


def selected_linear(x: Tensor, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`Gather` of rows and a product."""
    products = torch.matmul(F.embedding(rows, weight), x.unsqueeze(-1)).squeeze(-1)
    return products if bias is None else products + F.embedding(rows, bias.unsqueeze(-1)).squeeze(-1)


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
    # Operations that the exporter knows.
    ops.complete_logits: complete_logits_reference,
    ops.dequantize_slots: dequantize_slots,
    ops.experts: experts,
    ops.gated_activation: gated_activation,
    ops.head_candidates: head_candidates_reference,
    ops.joint_attention: joint_attention,
    ops.low_rank_attention: low_rank_attention,
    ops.low_rank_mlp: low_rank_mlp,
    ops.lut_embedding: lut_embedding,
    ops.lut_linear: lut_linear,
    ops.next_slots: next_slots,
    ops.quantized_embedding: quantized_embedding,
    ops.quantize_slots: quantize_slots,
    ops.quantized_experts: quantized_experts,
    ops.quantized_linear: quantized_linear,
    ops.rotary_embedding: rotary_embedding,
    ops.scored_attention: scored_attention,
    ops.scored_joint_attention: scored_joint_attention,
    ops.selected_linear: selected_linear,
    ops.sparse_linear: sparse_linear,
    ops.sparse_mlp: sparse_mlp,
    ops.windowed_attention: windowed_attention,
    ops.write_slots: write_slots,
}
