"""`jettison::lut_linear`: a linear layer that reads its weight as codes into a table of values.

Codes lie as in `jettison::quantized_linear`: the K columns of a row are cut into `k_blocks = ceil(K / group)` groups,
the last one padded, first code in the low bits of a byte. Rows share a table, or have tables of their own:

    w[n, k] = lut[n * T // N, code[n, k]] * scale[n, k // group]

| operand | shape                             | dtype                                              |
|---------|-----------------------------------|----------------------------------------------------|
| codes   | `[N, k_blocks, group * bits / 8]` | u8                                                 |
| lut     | `[T, 2**bits]`, T divides N       | floating point                                     |
| scales  | `[N, k_blocks]` or None           | floating point, or u8 with steps; None means 1     |
| steps   | `[N, 1]` or None                  | floating point: scale = (scales[n, i] * step[n])^2 |

Scales in 8 bits are codes of their square roots, which span the range that a scale per group has within a row better
than codes of the scales themselves.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.ops.quantized_linear import check_linear, row_chunks, unpack_codes
from jettison.ir.ops.registration import define_op

LUT_BITS = (2, 4, 8)
# All codes of a byte are looked up at once, as one element: several values of fp32 read as one wider number.
_BYTE_DTYPE = {2: torch.complex128, 4: torch.float64, 8: torch.float32}


def lut_linear_reference(
    x: Tensor,
    codes: Tensor,
    lut: Tensor,
    scales: Tensor | None,
    steps: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    in_features: int,
) -> Tensor:
    """Define `jettison::lut_linear`: look the whole weight up in fp32, then one fp32 linear.

    Args:
        x: `[..., K]` f32, bf16 or f16.
        codes: `[N, k_blocks, group * bits / 8]` u8.
        lut: `[T, 2**bits]` floating point, T divides N.
        scales: `[N, k_blocks]` floating point, or u8 with steps, or None.
        steps: `[N, 1]` floating point where scales are u8, else None.
        bias: `[N]` floating point, or None.
        bits: 2, 4 or 8 bits per code.
        group: columns that share a scale.
        in_features: K, without the padding of the last group.

    Returns:
        `[..., N]` in the dtype of x, contiguous.
    """
    weight = look_up_reference(codes, lut, group_scales(scales, steps), bits, group, in_features)
    wide_bias = None if bias is None else bias.to(torch.float32)
    return F.linear(x.to(torch.float32), weight, wide_bias).to(x.dtype).contiguous()


def look_up_reference(
    codes: Tensor, lut: Tensor, scales: Tensor | None, bits: int, group: int, in_features: int
) -> Tensor:
    """Define the layout: shift, mask, look up, scale, drop the padding.

    Args:
        codes: As in `lut_linear_reference`, like the rest.
        lut: Values.
        scales: `[N, k_blocks]` floating point, or None.
        bits: Per code.
        group: Columns that share a scale.
        in_features: K.

    Returns:
        `[N, K]` f32.
    """
    rows, k_blocks = codes.shape[:2]
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
    code = ((codes.unsqueeze(-1) >> shifts) & (2**bits - 1)).reshape(rows, k_blocks, group).to(torch.int64)
    tables = torch.arange(rows, device=codes.device) * lut.shape[0] // rows
    weight = lut.to(torch.float32)[tables[:, None, None], code]
    if scales is not None:
        weight = weight * scales.to(torch.float32).unsqueeze(-1)
    return weight.reshape(rows, k_blocks * group)[:, :in_features]


def _lut_linear(
    x: Tensor,
    codes: Tensor,
    lut: Tensor,
    scales: Tensor | None,
    steps: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    in_features: int,
) -> Tensor:
    """Compute `x @ w.T + bias`, a chunk of rows of the weight looked up at a time, as `quantized_linear` does."""
    check_table(codes, lut, scales, steps, bits, group, in_features)
    check_linear(x, codes, bias, in_features)
    n = codes.shape[0]
    wide = x.reshape(-1, in_features).to(torch.float32)
    wide_bias = None if bias is None else bias.to(torch.float32)
    out = torch.empty(wide.shape[0], n, dtype=x.dtype, device=x.device)
    tables = table_of_rows(n, lut.shape[0], codes.device)
    for rows in row_chunks(n, codes.shape[1] * group):
        chunk_scales = None if scales is None else group_scales(scales[rows], None if steps is None else steps[rows])
        weight = look_up_rows(codes[rows], lut, tables[rows], chunk_scales, bits, in_features)
        out[:, rows] = F.linear(wide, weight, None if wide_bias is None else wide_bias[rows])
    return out.view(*x.shape[:-1], n)


def _fake_lut_linear(
    x: Tensor,
    codes: Tensor,
    lut: Tensor,
    scales: Tensor | None,
    steps: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    in_features: int,
) -> Tensor:
    check_table(codes, lut, scales, steps, bits, group, in_features)
    check_linear(x, codes, bias, in_features)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


lut_linear = define_op(
    "lut_linear(Tensor x, Tensor codes, Tensor lut, Tensor? scales, Tensor? steps, Tensor? bias, "
    "int bits, int group, int in_features) -> Tensor",
    _lut_linear,
    _fake_lut_linear,
)


def group_scales(scales: Tensor | None, steps: Tensor | None) -> Tensor | None:
    """Scales as numbers: `[N, k_blocks]` f32, or None.

    Args:
        scales: As in the table of this module.
        steps: Likewise.
    """
    if scales is None or steps is None:
        return scales
    return (scales.to(torch.float32) * steps.to(torch.float32)).square()


def table_of_rows(rows: int, tables: int, device: torch.device) -> Tensor:
    """Index of the table that each row uses: `[N] i64`."""
    return torch.arange(rows, device=device) * tables // rows


def look_up_rows(
    codes: Tensor, lut: Tensor, tables: Tensor, scales: Tensor | None, bits: int, in_features: int
) -> Tensor:
    """Look every given row up: bit for bit `look_up_reference`, many times faster.

    Args:
        codes: `[n, k_blocks, group * bits / 8]` u8.
        lut: `[T, 2**bits]` floating point.
        tables: `[n] i64`, the table of each row, rising.
        scales: `[n, k_blocks]` floating point, or None.
        bits: 2, 4 or 8 bits per code.
        in_features: K.

    Returns:
        `[n, K]` f32; a view with row stride `k_blocks * group` if K is not a multiple of the group.
    """
    rows, k_blocks, _ = codes.shape
    # Only the tables of these rows are spread to bytes.
    first, last = (int(tables[0]), int(tables[-1])) if rows else (0, -1)
    every_byte = unpack_codes(torch.arange(256, dtype=torch.uint8, device=codes.device), bits).to(torch.int64)
    by_byte = lut[first : last + 1].to(torch.float32)[:, every_byte].contiguous()
    index = codes.reshape(rows, -1).to(torch.int32)
    if last > first:
        index += (tables - first).to(torch.int32).mul_(256)[:, None]
    wide = by_byte.view(_BYTE_DTYPE[bits]).view(-1).index_select(0, index.view(-1))
    weight = wide.view(torch.float32).view(rows, k_blocks, -1)
    if scales is not None:
        weight *= scales.to(torch.float32).unsqueeze(-1)
    return weight.view(rows, -1)[:, :in_features]


def check_table(
    codes: Tensor,
    lut: Tensor,
    scales: Tensor | None,
    steps: Tensor | None,
    bits: int,
    group: int,
    in_features: int,
) -> None:
    """Check a weight against the layout of this module, as an operator's own argument check.

    Raises:
        RuntimeError: through `torch._check`, as ATen operators do, so that it also works on symbolic shapes.
    """
    torch._check(bits in LUT_BITS, lambda: f"bits must be one of {LUT_BITS}, found {bits}")
    torch._check(
        group > 0 and group * bits % 8 == 0, lambda: f"a group must fill whole bytes, found {group} x {bits} bits"
    )
    k_blocks, block_bytes = -(-in_features // group), group * bits // 8
    torch._check(
        codes.dtype == torch.uint8 and codes.dim() == 3 and tuple(codes.shape[1:]) == (k_blocks, block_bytes),
        lambda: f"codes must be u8[N, {k_blocks}, {block_bytes}], found {codes.dtype}{list(codes.shape)}",
    )
    rows = codes.shape[0]
    torch._check(
        lut.is_floating_point()
        and lut.dim() == 2
        and lut.shape[1] == 2**bits
        and lut.shape[0] > 0
        and rows % lut.shape[0] == 0,
        lambda: f"lut must be floating point [T, {2**bits}], T dividing {rows}, found {lut.dtype}{list(lut.shape)}",
    )
    if scales is not None:
        has_dtype = scales.is_floating_point() if steps is None else scales.dtype == torch.uint8
        torch._check(
            has_dtype and tuple(scales.shape) == (rows, k_blocks),
            lambda: (
                f"scales must be {'floating point' if steps is None else 'u8'} [{rows}, {k_blocks}], "
                f"found {scales.dtype}{list(scales.shape)}"
            ),
        )
    if steps is not None:
        torch._check(
            scales is not None and steps.is_floating_point() and tuple(steps.shape) == (rows, 1),
            lambda: f"steps must be floating point [{rows}, 1] beside scales, found {steps.dtype}{list(steps.shape)}",
        )
