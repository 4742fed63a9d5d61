"""`jettison::lut_embedding`: an embedding whose table is stored as codes into a table of values.

The layout is that of `jettison::lut_linear`, so that a tied embedding and head are one set of tensors.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.ops.lut_linear import check_table, group_scales, look_up_reference, look_up_rows, table_of_rows
from jettison.ir.ops.quantized_linear import check_indices, row_chunks
from jettison.ir.ops.registration import define_op


def lut_embedding_reference(
    indices: Tensor,
    codes: Tensor,
    lut: Tensor,
    scales: Tensor | None,
    steps: Tensor | None,
    bits: int,
    group: int,
    embedding_dim: int,
) -> Tensor:
    """Define `jettison::lut_embedding`: look the whole table up in fp32, then its rows.

    Args:
        indices: `[...]` int32 or int64, each in `[0, V)`.
        codes: `[V, k_blocks, group * bits / 8]` u8.
        lut: `[T, 2**bits]` floating point, T divides V.
        scales: `[V, k_blocks]` floating point, or u8 with steps, or None.
        steps: `[V, 1]` floating point where scales are u8, else None.
        bits: 2, 4 or 8 bits per code.
        group: columns that share a scale.
        embedding_dim: K, without the padding of the last group.

    Returns:
        `[..., K]` in the dtype of lut, contiguous.
    """
    table = look_up_reference(codes, lut, group_scales(scales, steps), bits, group, embedding_dim)
    return F.embedding(indices, table).to(lut.dtype)


def _lut_embedding(
    indices: Tensor,
    codes: Tensor,
    lut: Tensor,
    scales: Tensor | None,
    steps: Tensor | None,
    bits: int,
    group: int,
    embedding_dim: int,
) -> Tensor:
    """Look up only the rows that are asked for."""
    check_table(codes, lut, scales, steps, bits, group, embedding_dim)
    check_indices(indices)
    # Rows in rising order, so that the tables they use are neighbours.
    flat, order = indices.reshape(-1).to(torch.int64).sort()
    tables = table_of_rows(codes.shape[0], lut.shape[0], codes.device).index_select(0, flat)
    out = torch.empty(flat.shape[0], embedding_dim, dtype=lut.dtype, device=codes.device)
    for rows in row_chunks(flat.shape[0], codes.shape[1] * group):
        picked = flat[rows]
        picked_scales, picked_steps = (
            None if part is None else part.index_select(0, picked) for part in (scales, steps)
        )
        found = group_scales(picked_scales, picked_steps)
        weight = look_up_rows(codes.index_select(0, picked), lut, tables[rows], found, bits, embedding_dim)
        out[order[rows]] = weight.to(lut.dtype)
    return out.view(*indices.shape, embedding_dim)


def _fake_lut_embedding(
    indices: Tensor,
    codes: Tensor,
    lut: Tensor,
    scales: Tensor | None,
    steps: Tensor | None,
    bits: int,
    group: int,
    embedding_dim: int,
) -> Tensor:
    check_table(codes, lut, scales, steps, bits, group, embedding_dim)
    check_indices(indices)
    return lut.new_empty((*indices.shape, embedding_dim))


lut_embedding = define_op(
    "lut_embedding(Tensor indices, Tensor codes, Tensor lut, Tensor? scales, Tensor? steps, "
    "int bits, int group, int embedding_dim) -> Tensor",
    _lut_embedding,
    _fake_lut_embedding,
)
