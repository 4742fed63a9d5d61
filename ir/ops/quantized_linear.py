"""`jettison::quantized_linear`: a linear layer that reads its weight as packed integer groups.

The layout is that of the ONNX contrib operator `com.microsoft::MatMulNBits`. The K columns of a row are cut into
`k_blocks = ceil(K / group)` groups; the last one is padded. A group holds `group` codes of `bits` bits, first code in
the low bits of the first byte, one scale and one zero point:

    w[n, k] = (code[n, k] - zero[n, k // group]) * scale[n, k // group]

| operand | shape                                    | dtype                                             |
|---------|------------------------------------------|---------------------------------------------------|
| codes   | `[N, k_blocks, group * bits / 8]`        | u8                                                |
| scales  | `[N, k_blocks]`                          | floating point, may be negative                   |
| zeros   | `[N, ceil(k_blocks * bits / 8)]` or None | u8, packed per row; None means `2**(bits - 1)`    |
| zeros   | `[N, k_blocks]`                          | floating point: zero points between the codes     |

Bits are numbered from the low bit of the first byte on: code i occupies bits `bits * i` to `bits * i + bits - 1` of its
group, so that eight codes of 3 bits are three bytes with two codes cut by a border. Packed zero points of a row
likewise, padded to a whole byte. (The schema of the operator has 3 bits, `group * 3 / 8` bytes; no CPU kernel does.)

Source: ONNX Runtime, docs/ContribOperators.md, `com.microsoft.MatMulNBits`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.ops.registration import define_op

# Weights dequantised at a time, 2 MiB of fp32: of 2**16 ... 2**24 the fastest for 1 row of x, and as good as any for 64
# and 512. Smaller chunks pay per call; larger ones leave the cache, and the allocator returns them to the system each
# time, so that every chunk faults its pages in again.
CHUNK_WEIGHTS = 1 << 19

PACKED_BITS = (2, 3, 4, 8)


def quantized_linear_reference(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    in_features: int,
) -> Tensor:
    """Define `jettison::quantized_linear`: dequantise the whole weight in fp32, then one fp32 linear.

    Args:
        x: `[..., K]` f32, bf16 or f16.
        codes: `[N, k_blocks, group * bits / 8]` u8.
        scales: `[N, k_blocks]` floating point.
        zeros: `[N, ceil(k_blocks * bits / 8)]` u8, `[N, k_blocks]` floating point, or None for the middle of the codes.
        bias: `[N]` floating point, or None.
        bits: 2, 3, 4 or 8 bits per code.
        group: columns that share a scale.
        in_features: K, without the padding of the last group.

    Returns:
        `[..., N]` in the dtype of x, contiguous.
    """
    weight = dequantize_reference(codes, scales, zeros, bits, group, in_features)
    wide_bias = None if bias is None else bias.to(torch.float32)
    return F.linear(x.to(torch.float32), weight, wide_bias).to(x.dtype).contiguous()


def dequantize_reference(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, in_features: int
) -> Tensor:
    """Define the layout: shift, mask, `(code - zero) * scale`, drop the padding.

    Args:
        codes: `[N, k_blocks, group * bits / 8]` u8.
        scales: `[N, k_blocks]` floating point.
        zeros: `[N, ceil(k_blocks * bits / 8)]` u8, `[N, k_blocks]` floating point, or None.
        bits: 2, 3, 4 or 8 bits per code.
        group: columns that share a scale.
        in_features: K.

    Returns:
        `[N, K]` f32.
    """
    rows, k_blocks = scales.shape
    code = _codes_reference(codes, bits).reshape(rows, k_blocks, group).to(torch.float32)
    if zeros is None:
        zero = torch.full((rows, k_blocks), float(2 ** (bits - 1)), device=codes.device)
    elif zeros.is_floating_point():
        zero = zeros.to(torch.float32)
    else:
        zero = _codes_reference(zeros, bits)[:, :k_blocks].to(torch.float32)
    weight: Tensor = (code - zero.unsqueeze(-1)) * scales.to(torch.float32).unsqueeze(-1)
    return weight.reshape(rows, k_blocks * group)[:, :in_features]


def _codes_reference(packed: Tensor, bits: int) -> Tensor:
    """`[..., P]` u8 to `[..., P * 8 // bits]` u8, bit by bit."""
    bit = (packed.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8, device=packed.device)) & 1
    count = packed.shape[-1] * 8 // bits
    by_code = bit.flatten(-2)[..., : count * bits].unflatten(-1, (count, bits))
    code = by_code[..., 0]
    for place in range(1, bits):
        code = code | (by_code[..., place] << place)
    return code


def _quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    in_features: int,
) -> Tensor:
    """Compute `x @ w.T + bias` from the packed weight, at most `CHUNK_WEIGHTS` weights dequantised at a time.

    Operands and result as in `quantized_linear_reference`, whose result it equals within fp32 rounding (the chunks
    only split N, so the order of the sum over K is the matrix product's own).
    """
    check_packed(codes, scales, zeros, bits, group, in_features)
    check_linear(x, codes, bias, in_features)
    n = codes.shape[0]
    wide = x.reshape(-1, in_features).to(torch.float32)
    wide_bias = None if bias is None else bias.to(torch.float32)
    out = torch.empty(wide.shape[0], n, dtype=x.dtype, device=x.device)
    for rows in row_chunks(n, codes.shape[1] * group):
        chunk_zeros = None if zeros is None else zeros[rows]
        weight = dequantize_rows(codes[rows], scales[rows], chunk_zeros, bits, group, in_features)
        out[:, rows] = F.linear(wide, weight, None if wide_bias is None else wide_bias[rows])
    return out.view(*x.shape[:-1], n)


def _fake_quantized_linear(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    bits: int,
    group: int,
    in_features: int,
) -> Tensor:
    check_packed(codes, scales, zeros, bits, group, in_features)
    check_linear(x, codes, bias, in_features)
    return x.new_empty((*x.shape[:-1], codes.shape[0]))


quantized_linear = define_op(
    "quantized_linear(Tensor x, Tensor codes, Tensor scales, Tensor? zeros, Tensor? bias, "
    "int bits, int group, int in_features) -> Tensor",
    _quantized_linear,
    _fake_quantized_linear,
)


def dequantize_rows(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, in_features: int
) -> Tensor:
    """Dequantise every given row: bit for bit `dequantize_reference`, several times faster.

    Arguments as in `dequantize_reference`.

    Returns:
        `[N, K]` f32; a view with row stride `k_blocks * group` if K is not a multiple of the group.
    """
    rows, k_blocks = scales.shape
    weight = unpack_codes(codes, bits).to(torch.float32)
    if zeros is None:
        weight.sub_(2 ** (bits - 1))
    else:
        weight.sub_(unpack_zeros(zeros, bits, k_blocks).unsqueeze(-1))
    weight.mul_(scales.to(torch.float32).unsqueeze(-1))
    return weight.view(rows, k_blocks * group)[:, :in_features]


def unpack_codes(packed: Tensor, bits: int) -> Tensor:
    """Spread packed codes to one code per byte.

    Args:
        packed: `[..., P]` u8, first code in the low bits; P is a multiple of 3 for 3 bits.
        bits: 2, 3, 4 or 8.

    Returns:
        `[..., P * 8 / bits]` u8. For 8 bits it is `packed` itself, not a copy.
    """
    if bits == 8:
        return packed
    if bits == 3:
        return _unpack_3_bits(packed)
    # Copies of the byte are shifted so that code i falls in the low bits of byte i of a wider integer, which is then
    # read as bytes: whole-vector operations, where an interleaving store would run element by element. The shift is
    # 8 - bits per step because moving a code up by one byte also has to undo its own offset of `bits`.
    # Every processor torch runs on in practice is little-endian.
    wide_dtype, mask = (torch.int16, 0x0F0F) if bits == 4 else (torch.int32, 0x03030303)
    wide = packed.contiguous().to(wide_dtype)
    spread = wide << (8 - bits)
    spread |= wide
    for step in range(2, 8 // bits):
        spread |= wide << (step * (8 - bits))
    spread &= mask
    return spread.view(torch.uint8)


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes, one per byte, into bytes: the inverse of `unpack_codes`.

    Args:
        codes: `[..., C]` u8 below `2**bits`, C a multiple of `8 / bits`, of 8 for 3 bits.
        bits: 2, 3, 4 or 8.

    Returns:
        `[..., C * bits / 8]` u8. For 8 bits it is `codes` itself, not a copy.
    """
    if bits == 8:
        return codes
    if bits == 3:
        return _pack_3_bits(codes)
    wide = codes.contiguous().view(torch.int16 if bits == 4 else torch.int32)
    packed = wide >> (8 - bits)
    packed |= wide
    for step in range(2, 8 // bits):
        packed |= wide >> (step * (8 - bits))
    # Conversion to u8 keeps the low byte, which holds all the codes.
    return packed.to(torch.uint8)


# Eight codes of 3 bits, 24 bits, become 8 bytes by halving: the upper half of the codes of each part moves up until the
# part is twice as wide. One step for all, as for 2 and 4 bits, would let bits of neighbours into the masks.
_HALVINGS = ((20, 0x00000FFF_00000FFF), (10, 0x003F003F_003F003F), (5, 0x07070707_07070707))


def _unpack_3_bits(packed: Tensor) -> Tensor:
    triples = packed.unflatten(-1, (-1, 3))
    spread = triples[..., 2].to(torch.int64)
    for place in (1, 0):
        spread <<= 8
        spread |= triples[..., place]
    moved = torch.empty_like(spread)
    for shift, mask in _HALVINGS:
        torch.bitwise_left_shift(spread, shift, out=moved)
        spread |= moved
        spread &= mask
    return spread.unsqueeze(-1).view(torch.uint8).flatten(-2)


def _pack_3_bits(codes: Tensor) -> Tensor:
    packed = codes.contiguous().view(torch.int64).clone()
    moved = torch.empty_like(packed)
    masks = (*(mask for _, mask in _HALVINGS[1::-1]), 0xFFFFFF)
    for (shift, _), mask in zip(reversed(_HALVINGS), masks, strict=True):
        torch.bitwise_right_shift(packed, shift, out=moved)
        packed |= moved
        packed &= mask
    return packed.unsqueeze(-1).view(torch.uint8)[..., :3].flatten(-2)


def unpack_zeros(zeros: Tensor, bits: int, k_blocks: int) -> Tensor:
    """Zero points as numbers.

    Args:
        zeros: As in the table of this module.
        bits: Of the codes.
        k_blocks: Groups of a row.

    Returns:
        `[N, k_blocks]` f32.
    """
    if zeros.is_floating_point():
        return zeros.to(torch.float32)
    return unpack_rows(zeros, bits, k_blocks).to(torch.float32)


def unpack_rows(packed: Tensor, bits: int, count: int) -> Tensor:
    """Spread rows of packed codes that end with any byte.

    Args:
        packed: `[N, P]` u8, first code in the low bits.
        bits: Of the codes.
        count: Codes of a row.

    Returns:
        `[N, count]` u8.
    """
    padding = -packed.shape[1] % 3 if bits == 3 else 0
    return unpack_codes(F.pad(packed, (0, padding)) if padding else packed, bits)[:, :count]


def pack_zeros(zeros: Tensor, bits: int) -> Tensor:
    """Pack whole zero points: the inverse of `unpack_zeros`.

    Args:
        zeros: `[N, k_blocks]` of whole numbers below `2**bits`, any dtype.
        bits: Of the codes.

    Returns:
        `[N, ceil(k_blocks * bits / 8)]` u8: every row starts on a byte.
    """
    per_word = 8 if bits == 3 else 8 // bits
    padded = F.pad(zeros.to(torch.uint8), (0, -zeros.shape[1] % per_word))
    return pack_codes(padded, bits)[:, : -(-zeros.shape[1] * bits // 8)].contiguous()


def row_chunks(rows: int, row_weights: int, at_most: int | None = None) -> list[slice]:
    """Cut `rows` rows of `row_weights` weights into slices of at most so many weights, and at least one row.

    Args:
        rows: How many.
        row_weights: Of each.
        at_most: Default `CHUNK_WEIGHTS`.
    """
    step = max(1, (at_most or CHUNK_WEIGHTS) // max(1, row_weights))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def check_packed(codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, in_features: int) -> None:
    """Check a packed weight against the layout of this module, as an operator's own argument check.

    Raises:
        RuntimeError: through `torch._check`, as ATen operators do, so that it also works on symbolic shapes.
    """
    torch._check(bits in PACKED_BITS, lambda: f"bits must be one of {PACKED_BITS}, found {bits}")
    torch._check(
        group > 0 and group * bits % 8 == 0, lambda: f"a group must fill whole bytes, found {group} x {bits} bits"
    )
    k_blocks = -(-in_features // group)
    block_bytes, zero_bytes = group * bits // 8, -(-k_blocks * bits // 8)
    torch._check(
        codes.dtype == torch.uint8 and codes.dim() == 3 and tuple(codes.shape[1:]) == (k_blocks, block_bytes),
        lambda: f"codes must be u8[N, {k_blocks}, {block_bytes}], found {codes.dtype}{list(codes.shape)}",
    )
    rows = codes.shape[0]
    torch._check(
        scales.is_floating_point() and tuple(scales.shape) == (rows, k_blocks),
        lambda: f"scales must be floating point [{rows}, {k_blocks}], found {scales.dtype}{list(scales.shape)}",
    )
    if zeros is not None:
        is_packed = zeros.dtype == torch.uint8 and tuple(zeros.shape) == (rows, zero_bytes)
        torch._check(
            is_packed or (zeros.is_floating_point() and tuple(zeros.shape) == (rows, k_blocks)),
            lambda: (
                f"zeros must be u8[{rows}, {zero_bytes}] or floating point [{rows}, {k_blocks}], "
                f"found {zeros.dtype}{list(zeros.shape)}"
            ),
        )


def check_indices(indices: Tensor) -> None:
    """Check the indices of an embedding."""
    torch._check(
        indices.dtype in (torch.int32, torch.int64), lambda: f"indices must be int32 or int64, found {indices.dtype}"
    )


def check_linear(x: Tensor, codes: Tensor, bias: Tensor | None, in_features: int) -> None:
    """Check the operands of a linear that are not its weight, as `check_packed` does the weight."""
    torch._check(
        x.dtype in (torch.float32, torch.bfloat16, torch.float16),
        lambda: f"x must be float32, bfloat16 or float16, found {x.dtype}",
    )
    torch._check(
        x.dim() > 0 and x.shape[-1] == in_features,
        lambda: f"the last dimension of x must be {in_features}, found {list(x.shape)}",
    )
    if bias is not None:
        torch._check(
            bias.is_floating_point() and tuple(bias.shape) == (codes.shape[0],),
            lambda: f"bias must be floating point [{codes.shape[0]}], found {bias.dtype}{list(bias.shape)}",
        )
