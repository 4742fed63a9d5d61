"""`jettison::quantized_embedding`: an embedding whose table is stored as packed integer groups.

The table has the layout of `jettison::quantized_linear`, so that a tied embedding and head are one set of tensors.
In ONNX it is `com.microsoft::GatherBlockQuantized` with `gather_axis=0, quantize_axis=1`, whose data operand is the
same bytes with shape `[V, k_blocks * group * bits / 8]`; there the padding of the last group is part of the result and
has to be sliced off.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.ops.quantized_linear import (
    check_indices,
    check_packed,
    dequantize_reference,
    dequantize_rows,
    row_chunks,
)
from jettison.ir.ops.registration import define_op


def quantized_embedding_reference(
    indices: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    embedding_dim: int,
) -> Tensor:
    """Define `jettison::quantized_embedding`: dequantise the whole table in fp32, then look the rows up.

    Args:
        indices: `[...]` int32 or int64, each in `[0, V)`.
        codes: `[V, k_blocks, group * bits / 8]` u8.
        scales: `[V, k_blocks]` floating point.
        zeros: `[V, ceil(k_blocks * bits / 8)]` u8, `[V, k_blocks]` floating point, or None for the middle of the codes.
        bits: 2, 3, 4 or 8 bits per code.
        group: columns that share a scale.
        embedding_dim: K, without the padding of the last group.

    Returns:
        `[..., K]` in the dtype of scales, contiguous.
    """
    table = dequantize_reference(codes, scales, zeros, bits, group, embedding_dim)
    return F.embedding(indices, table).to(scales.dtype)


def _quantized_embedding(
    indices: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    embedding_dim: int,
) -> Tensor:
    """Gather the packed rows, then dequantise only those: bit for bit `quantized_embedding_reference`.

    Operands and result as there. An index outside the table is an `IndexError` on CPU, as in `index_select`.
    """
    check_packed(codes, scales, zeros, bits, group, embedding_dim)
    check_indices(indices)
    flat = indices.reshape(-1)
    out = torch.empty(flat.shape[0], embedding_dim, dtype=scales.dtype, device=codes.device)
    for rows in row_chunks(flat.shape[0], codes.shape[1] * group):
        picked = flat[rows]
        picked_zeros = None if zeros is None else zeros.index_select(0, picked)
        out[rows] = dequantize_rows(
            codes.index_select(0, picked), scales.index_select(0, picked), picked_zeros, bits, group, embedding_dim
        )
    return out.view(*indices.shape, embedding_dim)


def _fake_quantized_embedding(
    indices: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    embedding_dim: int,
) -> Tensor:
    check_packed(codes, scales, zeros, bits, group, embedding_dim)
    check_indices(indices)
    return scales.new_empty((*indices.shape, embedding_dim))


quantized_embedding = define_op(
    "quantized_embedding(Tensor indices, Tensor codes, Tensor scales, Tensor? zeros, "
    "int bits, int group, int embedding_dim) -> Tensor",
    _quantized_embedding,
    _fake_quantized_embedding,
)
