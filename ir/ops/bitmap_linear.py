"""`jettison::bitmap_linear`: a linear layer that reads a weight with many zeros as a bitmap and what is not zero.

The K columns of a row are cut into `k_blocks = ceil(K / 64)` blocks, one 64-bit word of the bitmap each: bit j of byte
b is column `8 b + j`, set where a weight is kept; bits behind column K are clear. Values lie in the order of the rows
and columns, and those of a block begin at a whole byte.

| bits | values                                         | weight                              |
|------|------------------------------------------------|-------------------------------------|
| 4    | u8 `[V]`, two to a byte, the first in low bits | two's complement number times scale |
| 8    | u8 `[V]`, one to a byte                        | two's complement number times scale |
| 16   | bf16 or f16 `[V]`                              | the value                           |
| 32   | f32 `[V]`                                      | the value                           |

| operand | shape                  | dtype                                                                       |
|---------|------------------------|-----------------------------------------------------------------------------|
| bitmap  | `[N, 8 * k_blocks]`    | u8                                                                          |
| starts  | `[ceil(N / 64) + 1]`   | i64: where in `values` each slab of 64 rows begins, and where the last ends |
| values  | `[V]`                  | see above                                                                   |
| scales  | `[N, ceil(K / group)]` | floating point with 4 and 8 bits, and group a multiple of 64; else None     |

A slab of rows is self-contained: its part of every operand is contiguous. Inside, rows follow each other without an
index, since a reader counts the bits of those before.

Source: Endor (arXiv 2406.11674) for the idea; the layout is chosen for vector units that expand 64 bytes by a mask.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.ops.quantized_linear import CHUNK_WEIGHTS, check_linear
from jettison.ir.ops.registration import define_op

BITMAP_BITS = (4, 8, 16, 32)
BLOCK, SLAB = 64, 64
_FLOATS = {16: (torch.bfloat16, torch.float16), 32: (torch.float32,)}


def bitmap_linear_reference(
    x: Tensor, bitmap: Tensor, starts: Tensor, values: Tensor, scales: Tensor | None, bias: Tensor | None, bits: int,
    group: int, in_features: int,
) -> Tensor:  # fmt: skip
    """Define `jettison::bitmap_linear`: expand the whole weight in fp32, then one fp32 linear.

    Args:
        x: `[..., K]` f32, bf16 or f16.
        bitmap: `[N, 8 * k_blocks]` u8.
        starts: `[ceil(N / 64) + 1]` i64.
        values: `[V]` u8, or floating point of 16 or 32 bits.
        scales: `[N, ceil(K / group)]` floating point with 4 and 8 bits, else None.
        bias: `[N]` floating point, or None.
        bits: Of a value: 4, 8, 16 or 32.
        group: Columns that share a scale, a multiple of 64.
        in_features: K.

    Returns:
        `[..., N]` in the dtype of x, contiguous.
    """
    weight = expand_reference(bitmap, values, scales, bits, group, in_features)
    wide_bias = None if bias is None else bias.to(torch.float32)
    return F.linear(x.to(torch.float32), weight, wide_bias).to(x.dtype).contiguous()


def expand_reference(
    bitmap: Tensor, values: Tensor, scales: Tensor | None, bits: int, group: int, in_features: int
) -> Tensor:
    """Define the layout, block by block: `[N, K]` f32; arguments as in `bitmap_linear_reference`."""
    rows, columns = len(bitmap), bitmap.shape[1] * 8
    weight, position = torch.zeros(rows, columns), 0
    for row in range(rows):
        for first in range(0, columns, BLOCK):
            kept = [c for c in range(first, first + BLOCK) if int(bitmap[row, c // 8]) >> c % 8 & 1]
            for rank, column in enumerate(kept):
                value = values[position + (rank // 2 if bits == 4 else rank)]
                if scales is not None:
                    code = int(value) >> rank % 2 * 4 & 15 if bits == 4 else int(value)
                    number = code - (1 << bits) * (code >> (bits - 1))
                    value = number * scales[row, column // group].to(torch.float32)
                weight[row, column] = value
            position += -(-len(kept) // 2) if bits == 4 else len(kept)
    return weight[:, :in_features]


def _bitmap_linear(
    x: Tensor, bitmap: Tensor, starts: Tensor, values: Tensor, scales: Tensor | None, bias: Tensor | None, bits: int,
    group: int, in_features: int,
) -> Tensor:  # fmt: skip
    """Compute `x @ w.T + bias`, some slabs of rows expanded at a time."""
    check_bitmap(bitmap, starts, values, scales, bits, group, in_features)
    check_linear(x, bitmap, bias, in_features)
    wide = x.reshape(-1, in_features).to(torch.float32)
    wide_bias = None if bias is None else bias.to(torch.float32)
    out = torch.empty(wide.shape[0], len(bitmap), dtype=x.dtype, device=x.device)
    for rows in slab_chunks(len(bitmap), in_features):
        own = values[values_of_rows(starts, rows)]
        weight = expand_rows(bitmap[rows], own, None if scales is None else scales[rows], bits, group, in_features)
        out[:, rows] = F.linear(wide, weight, None if wide_bias is None else wide_bias[rows])
    return out.view(*x.shape[:-1], len(bitmap))


def _fake_bitmap_linear(
    x: Tensor, bitmap: Tensor, starts: Tensor, values: Tensor, scales: Tensor | None, bias: Tensor | None, bits: int,
    group: int, in_features: int,
) -> Tensor:  # fmt: skip
    check_bitmap(bitmap, starts, values, scales, bits, group, in_features)
    check_linear(x, bitmap, bias, in_features)
    return x.new_empty((*x.shape[:-1], bitmap.shape[0]))


bitmap_linear = define_op(
    "bitmap_linear(Tensor x, Tensor bitmap, Tensor starts, Tensor values, Tensor? scales, Tensor? bias, "
    "int bits, int group, int in_features) -> Tensor",
    _bitmap_linear,
    _fake_bitmap_linear,
)


def slab_chunks(rows: int, row_weights: int) -> list[slice]:
    """Cut rows into slices of whole slabs, of about `CHUNK_WEIGHTS` weights each."""
    step = max(1, CHUNK_WEIGHTS // max(1, row_weights * SLAB)) * SLAB
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def values_of_rows(starts: Tensor, rows: slice) -> slice:
    """Where the values of some rows lie; `rows` begins with a slab and ends with one or with the last row."""
    return slice(int(starts[rows.start // SLAB]), int(starts[-(-rows.stop // SLAB)]))


def kept_of(weight: Tensor) -> Tensor:
    """Which weights are kept: `[n, K]` any floating point to `[n, k_blocks, 64]` bool, padded with False."""
    kept = weight != 0
    padding = -kept.shape[1] % BLOCK
    return (F.pad(kept, (0, padding)) if padding else kept).view(len(kept), -1, BLOCK)


def row_sizes(kept: Tensor, bits: int) -> Tensor:
    """How many elements of `values` each row takes: `[n, k_blocks, 64]` bool to `[n]` i64."""
    counts = kept.sum(-1)
    return ((counts + 1) // 2 if bits == 4 else counts).sum(-1)


def pack_bits(kept: Tensor) -> Tensor:
    """`[n, k_blocks, 64]` bool to `[n, 8 * k_blocks]` u8."""
    places = torch.tensor([1 << bit for bit in range(8)], dtype=torch.uint8)
    return (kept.view(len(kept), -1, 8).to(torch.uint8) * places).sum(-1, dtype=torch.uint8)


def unpack_bits(bitmap: Tensor) -> Tensor:
    """The inverse of `pack_bits`."""
    places = torch.arange(8, dtype=torch.uint8, device=bitmap.device)
    return ((bitmap.unsqueeze(-1) >> places) & 1).to(torch.bool).view(len(bitmap), -1, BLOCK)


def pack_values(numbers: Tensor, kept: Tensor, bits: int) -> Tensor:
    """Values of whole rows one behind the other.

    Args:
        numbers: `[n, k_blocks, 64]`: i8 with 4 and 8 bits, else in the dtype that is stored; any where not kept.
        kept: `[n, k_blocks, 64]` bool.
        bits: 4, 8, 16 or 32.

    Returns:
        `[V]`.
    """
    found = numbers[kept]
    if bits != 4:
        return found.view(torch.uint8) if bits == 8 else found
    nibbles = torch.zeros(2 * int(row_sizes(kept, 4).sum()), dtype=torch.uint8)
    nibbles[_nibble_places(kept)] = found.view(torch.uint8) & 15
    return nibbles[::2] | nibbles[1::2] << 4


def _nibble_places(kept: Tensor) -> Tensor:
    """Index of the nibble of each kept weight, in order."""
    counts = kept.sum(-1).flatten()
    padding = (counts % 2).cumsum(0) - counts % 2  # nibbles that blocks before left empty
    return torch.arange(int(counts.sum()), device=kept.device) + padding.repeat_interleave(counts)


def expand_rows(
    bitmap: Tensor, values: Tensor, scales: Tensor | None, bits: int, group: int, in_features: int
) -> Tensor:
    """Expand whole rows: bit for bit `expand_reference`, thousands of times faster.

    Args:
        bitmap: `[n, 8 * k_blocks]` u8.
        values: Of these rows alone.
        scales: `[n, ceil(K / group)]` floating point, or None.
        bits: 4, 8, 16 or 32.
        group: Columns that share a scale.
        in_features: K.

    Returns:
        `[n, K]` f32, a view with row stride `64 * k_blocks` if K is not a multiple of 64.

    Raises:
        RuntimeError: There are more or fewer values than the bitmap counts.
    """
    kept = unpack_bits(bitmap)
    size = int(row_sizes(kept, bits).sum())
    torch._check(size == len(values), lambda: f"the bitmap counts {size} values, found {len(values)}")
    if bits == 4:
        nibbles = torch.stack([values & 15, values >> 4], -1).flatten()[_nibble_places(kept)]
        found = ((nibbles ^ 8).view(torch.int8) - 8).to(torch.float32)
    else:
        found = (values.view(torch.int8) if bits == 8 else values).to(torch.float32)
    weight = torch.zeros(kept.shape, dtype=torch.float32, device=bitmap.device)
    weight[kept] = found
    if scales is not None:
        weight *= scales.to(torch.float32).repeat_interleave(group // BLOCK, 1)[:, : kept.shape[1], None]
    return weight.view(len(bitmap), -1)[:, :in_features]


def check_bitmap(
    bitmap: Tensor, starts: Tensor, values: Tensor, scales: Tensor | None, bits: int, group: int, in_features: int
) -> None:
    """Check shapes and dtypes of a weight against the layout of this module, as an operator's own argument check.

    Raises:
        RuntimeError: through `torch._check`, as ATen operators do, so that it also works on symbolic shapes.
    """
    torch._check(bits in BITMAP_BITS, lambda: f"bits must be one of {BITMAP_BITS}, found {bits}")
    width = -(-in_features // BLOCK) * 8
    torch._check(
        bitmap.dtype == torch.uint8 and bitmap.dim() == 2 and bitmap.shape[1] == width,
        lambda: f"bitmap must be u8[N, {width}], found {bitmap.dtype}{list(bitmap.shape)}",
    )
    rows = bitmap.shape[0]
    slabs = -(-rows // SLAB)
    torch._check(
        starts.dtype == torch.int64 and tuple(starts.shape) == (slabs + 1,),
        lambda: f"starts must be i64[{slabs + 1}], found {starts.dtype}{list(starts.shape)}",
    )
    dtypes = _FLOATS.get(bits, (torch.uint8,))
    torch._check(
        values.dim() == 1 and values.dtype in dtypes,
        lambda: f"values must be a vector of {dtypes}, found {values.dtype}{list(values.shape)}",
    )
    torch._check(
        (scales is None) == (bits > 8), lambda: f"scales belong to 4 and 8 bits, found {scales} with {bits} bits"
    )
    if scales is not None:
        torch._check(group > 0 and group % BLOCK == 0, lambda: f"a group must be whole blocks of 64, found {group}")
        groups = -(-in_features // group)
        torch._check(
            scales.is_floating_point() and tuple(scales.shape) == (rows, groups),
            lambda: f"scales must be floating point [{rows}, {groups}], found {scales.dtype}{list(scales.shape)}",
        )
