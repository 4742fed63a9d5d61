"""Weights that are codes into a table: no CPU kernel of ONNX Runtime reads them fast, so they are decoded at load.

The file holds the packed codes. The nodes that decode them depend on constants alone, so ONNX Runtime computes them
once, when a session is made (benchmarks/results/lut_linear.json has what the alternatives cost per token):

- With scales (nf4), the table is rounded to 8-bit levels and its codes become those of an 8-bit `MatMulNBits`: the
  speed and the memory of 8-bit weights. Levels are off by up to 1/254 of the scale, NF4 itself rounds by up to 1/6.6.
- Without (palettes), the weight becomes an fp32 matrix: exact, with the speed and the memory of an fp32 weight.

`com.microsoft::MatMulBnb4`, the kernel for NF4, decodes the whole weight at every call.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.onnx.ops import symbolic

from jettison.ir.ops.lut_linear import group_scales

# What MatMulNBits takes as groups.
KERNEL_GROUPS = (16, 32, 64, 128, 256)


def lut_linear(
    x: Tensor, codes: Tensor, lut: Tensor, scales: Tensor | None, steps: Tensor | None, bias: Tensor | None, bits: int,
    group: int, in_features: int,
) -> Tensor:  # fmt: skip
    """An 8-bit `MatMulNBits`, or a product with the decoded weight; see the module."""
    rows, k_blocks = codes.shape[:2]
    tables = torch.arange(rows) * lut.shape[0] // rows
    index = _indices(codes, tables[:, None, None] if lut.shape[0] > 1 else None, bits)
    numbers = group_scales(scales, steps)
    if numbers is None or group not in KERNEL_GROUPS:
        weight = _gather(lut.reshape(-1), index, (rows, k_blocks, group))
        if numbers is not None:
            weight = weight * numbers.unsqueeze(-1)
        weight = weight.reshape(rows, k_blocks * group)[:, :in_features]
        product = torch.matmul(x, weight.t())
        return product if bias is None else product + bias
    largest = lut.abs().amax(1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    levels = ((lut / largest * 127).round() + 128).to(torch.uint8)
    wide = numbers * (largest / 127 if lut.shape[0] == 1 else (largest / 127)[tables])
    return symbolic(
        "com.microsoft::MatMulNBits",
        (x, _gather(levels.reshape(-1), index, (rows, k_blocks, group)), wide, None, None, bias),
        {"K": in_features, "N": rows, "bits": 8, "block_size": group, "accuracy_level": 4},
        dtype=x.dtype,
        shape=(*x.shape[:-1], rows),
        version=1,
    )


def lut_embedding(
    indices: Tensor, codes: Tensor, lut: Tensor, scales: Tensor | None, steps: Tensor | None, bits: int, group: int,
    embedding_dim: int,
) -> Tensor:  # fmt: skip
    """Gathers codes of the rows that are asked for, then their values."""
    rows, k_blocks, block_bytes = codes.shape
    found = _gather(codes, indices, (*indices.shape, k_blocks, block_bytes))
    tables = (indices * lut.shape[0] // rows)[..., None, None] if lut.shape[0] > 1 else None
    values = _gather(lut.reshape(-1), _indices(found, tables, bits), (*indices.shape, k_blocks, group))
    picked = (
        None if part is None else _gather(part, indices, (*indices.shape, part.shape[1])) for part in (scales, steps)
    )
    numbers = group_scales(*picked)
    if numbers is not None:
        values = values * numbers.unsqueeze(-1)
    return values.flatten(-2)[..., :embedding_dim]


def _indices(codes: Tensor, tables: Tensor | None, bits: int) -> Tensor:
    """Packed codes `[..., group * bits / 8]` u8 to positions in all tables, one after the other: `[..., group]` i32."""
    if bits < 8:
        parts = []
        for shift in range(0, 8, bits):
            amount = torch.tensor(shift, dtype=torch.uint8)
            moved = codes if shift == 0 else _bits("BitShift", codes, amount, {"direction": "RIGHT"})
            is_last = shift + bits == 8
            parts.append(moved if is_last else _bits("BitwiseAnd", moved, torch.tensor(2**bits - 1, dtype=torch.uint8)))
        codes = torch.stack(parts, -1).flatten(-2)
    index = codes.to(torch.int32)
    return index if tables is None else index + (tables * 2**bits).to(torch.int32)


def _bits(operator: str, left: Tensor, right: Tensor, attributes: dict[str, str] | None = None) -> Tensor:
    return symbolic(f"::{operator}", (left, right), attributes or {}, dtype=left.dtype, shape=left.shape)


def _gather(table: Tensor, index: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Rows of a table, or entries of a list: unlike `aten.embedding`, of any dtype."""
    return symbolic("::Gather", (table, index), {"axis": 0}, dtype=table.dtype, shape=shape)
