"""Weights of linears in the layouts that PyTorch's CPU kernels read, so that a decode step reads codes, not fp32.

| bits | kernel for few rows                               | arithmetic                                       |
|------|---------------------------------------------------|--------------------------------------------------|
| 4    | `aten::_weight_int4pack_mm_for_cpu`               | x, scales and result bf16, sums fp32             |
| 8    | `quantized::embedding_bag_byte_rowwise_offsets`   | fp32 throughout                                  |
| 2    | `quantized::embedding_bag_2bit_rowwise_offsets`   | fp32 throughout, on one thread                   |

No kernel reads 3 bits.

For many rows either decodes a block of the weight at a time and multiplies: the kernels decode per row, or per four.

Measured on two Zen 4 cores, weights per second and core for one row of x (benchmarks/results/torch_kernels.json): int4
20 G, int8 20 G. What was not taken, in the same file: the int4 kernel with fp32 or fp16 operands (scalar code, 0.7 G),
`torch.compile` of `(code * x).sum()` in five layouts (12 G at most, and it needs a C++ compiler at run time),
`_dyn_quant_matmul_4bit` (KleidiAI; scalar on x86, 0.7 G), `_weight_int8pack_mm` and `onednn::qlinear_pointwise` (one
scale per row: our groups do not fit), decoding all and one fp32 product (2 G).
"""

from __future__ import annotations

import copy
import functools
import math
import platform
import sys
import threading
from collections.abc import Mapping
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.ops.quantized_linear import pack_codes, unpack_codes, unpack_zeros

aten = torch.ops.aten

# From this many rows of x on, decoding blocks and multiplying them is faster; the kernels' time grows with the rows.
INT4_MANY_ROWS = {torch.bfloat16: 64, torch.float32: 256}  # by the dtype of the product
BAG_MANY_ROWS = 16
# Weights decoded at a time for many rows: 4 MiB, as two halves in bf16 or one in fp32. Of 2**17 ... 2**22 the fastest.
BLOCK_WEIGHTS = 1 << 21
INT4_GROUPS = (32, 64, 128, 256)
# Rows of the weight that the int4 kernel interleaves: a block is `[K, 32]` bytes, row j in the low and row j + 32 in
# the high bits of byte j with AVX-512, and half of that with AVX2.
_WIDEST_INTERLEAVE = 64
# Rows that every layout can give by themselves.
SLAB_ROWS = _WIDEST_INTERLEAVE
# Rows of the weight in a strip of the int8 layout; of 256 ... 8192 the fastest, and few weights have fewer rows.
_STRIP = 512
# Bytes of the sums per group that the int8 kernel makes before they are scaled.
_SUMS_BYTES = 4 << 20


class PackedWeight(Protocol):
    """A weight `[N, K]` that only its kernels read.

    Attributes:
        nbytes: Bytes held.
    """

    nbytes: int

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x @ w.T + bias`: `[..., K]` to `[..., N]` in the dtype of x."""

    def lookup(self, indices: Tensor) -> Tensor:
        """Rows of the weight, exactly as the packed constants define them: `[...]` i64 to `[..., K]` f32.

        Raises:
            IndexError: An index is not in `[0, N)`, as the operator raises it.
        """

    def linear_of_rows(self, x: Tensor, slabs: Tensor, rows: int) -> Tensor:
        """`x @ w.T` for some of the rows of w: slabs of `rows` rows, a multiple of `SLAB_ROWS` that divides N.

        Args:
            x: `[M, K]`.
            slabs: `[n] i64`, their numbers.
            rows: Of a slab.

        Returns:
            `[M, n * rows]`.
        """

    def linear_of_columns(self, x: Tensor, slabs: Tensor, columns: int) -> Tensor:
        """`x @ w.T` over some of the columns of w: slabs of `columns` columns, whole groups that divide K.

        Args:
            x: `[M, n * columns]`.
            slabs: `[n] i64`, their numbers.
            columns: Of a slab.

        Returns:
            `[M, N]`.
        """


class StoredWeight(Protocol):
    """A weight that can be cut into slabs of rows and kept in a file as its kernel reads it.

    Attributes:
        rows: N.
        nbytes: Bytes held.
    """

    rows: int
    nbytes: int

    @property
    def granule(self) -> int:
        """Rows at whose multiples it is cut."""

    @property
    def form(self) -> dict[str, int | str]:
        """What with the parts makes the weight again, as JSON values."""

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `PackedWeight`."""

    @classmethod
    def of_form(cls, form: Mapping[str, Any]) -> StoredWeight:
        """A weight of this form without its parts, to call `layout` and `with_parts` of."""

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each part of a weight of this form."""

    def parts(self) -> dict[str, Tensor]:
        """The tensors that its kernel reads."""

    def with_parts(self, parts: Mapping[str, Tensor]) -> StoredWeight:
        """The same form over other tensors, which are not copied; without rows to look up."""

    def rows_between(self, start: int, stop: int) -> StoredWeight:
        """Rows `[start, stop)` as a weight of their own.

        Args:
            start: A multiple of `granule`.
            stop: Another one, or N.
        """


def pack_weight(
    codes: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, group: int, in_features: int, *, is_table: bool,
    is_cut: bool = False, whole_rows: int | None = None,
) -> Int4Weight | BagWeight | None:  # fmt: skip
    """Copy a weight into the layout of its kernel, a few rows at a time.

    Args:
        codes: As in `jettison::quantized_linear`, like the next five.
        scales: Per group.
        zeros: Per group, or None.
        bits: Per code.
        group: Columns that share a scale.
        in_features: K.
        is_table: Whether an embedding looks rows up too.
        is_cut: Whether `linear_of_rows` is called.
        whole_rows: N of the weight of which this is a slab; None if it is the whole.

    Returns:
        The weight, or None if no kernel of this build of PyTorch on this processor reads it.
    """
    if scales.dtype != torch.float32:
        return None
    if bits == 4 and group in INT4_GROUPS and _has_int4_kernel():
        return Int4Weight(codes, scales, zeros, group, in_features, is_table=is_table)
    # The layout of bags has zero points among the codes.
    if bits in (2, 8) and _has_bag_kernel() and (zeros is None or not zeros.is_floating_point()):
        strip = SLAB_ROWS if is_cut else _STRIP
        return BagWeight(codes, scales, zeros, bits, group, in_features, strip, whole_rows)
    return None


@functools.cache
def _has_int4_kernel() -> bool:
    # Vector code only for x86, and not in builds by Microsoft's compiler; elsewhere a loop over single weights.
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and sys.platform != "win32"


@functools.cache
def _has_bag_kernel() -> bool:
    is_x86 = platform.machine().lower() in ("x86_64", "amd64")
    return is_x86 and "fbgemm" in torch.backends.quantized.supported_engines


@functools.cache
def _product_dtype() -> torch.dtype:
    """What decoded int4 weights are multiplied in: bf16 where the processor has instructions for it."""
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


@functools.cache
def int4_interleave() -> int:
    """Rows that the int4 kernel interleaves on this processor."""
    second_column = torch.tensor([[0, 1]] * _WIDEST_INTERLEAVE, dtype=torch.int32)
    packed = aten._convert_weight_to_int4pack_for_cpu(second_column, 2).flatten()
    return 2 * int(packed.nonzero()[0])


_SCRATCH = threading.local()


def _scratch(dtype: torch.dtype, *shape: int) -> Tensor:
    """Memory of this thread to decode into, valid until the next call; holds what was there.

    The allocator would return blocks of this size to the system and fault their pages in again for each, which costs as
    much as decoding.
    """
    elements = math.prod(shape)
    held = getattr(_SCRATCH, "held", None)
    if held is None or held.nbytes < elements * dtype.itemsize:
        held = _SCRATCH.held = torch.empty(elements * dtype.itemsize, dtype=torch.uint8)
    return held[: elements * dtype.itemsize].view(dtype).view(shape)


def _checked_rows(indices: Tensor, rows: int) -> Tensor:
    """Indices in one dimension; the layouts have padding, which would answer for rows that are not there."""
    flat = indices.reshape(-1)
    if bool(((flat < 0) | (flat >= rows)).any()):
        raise IndexError(f"index out of range: the table has {rows} rows")
    return flat


class Int4Weight:
    """A 4-bit weight as `aten::_weight_int4pack_mm_for_cpu` reads it: `w = (code - 8) * scale + offset`.

    The kernel takes x, scales and offsets in bf16 and rounds its fp32 sums to bf16 (with other dtypes it is thirty
    times slower). Each rounding is by up to 2**-8; together they move a result by 3e-3 of its typical size. Rounding x
    to 8-bit integers, as the ONNX target does, moves it by 6e-3.

    Args:
        codes: `[N, k_blocks, group / 2]` u8.
        scales: `[N, k_blocks]` f32.
        zeros: `[N, ceil(k_blocks / 2)]` u8, `[N, k_blocks]` floating point, or None.
        group: 32, 64, 128 or 256.
        in_features: K.
        is_table: Whether `lookup` is called; then scales and zero points are kept as they are, too.
    """

    def __init__(
        self, codes: Tensor, scales: Tensor, zeros: Tensor | None, group: int, in_features: int, *, is_table: bool
    ) -> None:
        rows, blocks = scales.shape
        self.rows, self.columns, self.group = rows, in_features, group
        padded_rows = -(-rows // _WIDEST_INTERLEAVE) * _WIDEST_INTERLEAVE
        self._padding = blocks * group - in_features
        self._codes = torch.empty(padded_rows, blocks * group // 2, dtype=torch.uint8)
        self._scales_offsets = torch.zeros(blocks, padded_rows, 2, dtype=torch.bfloat16)
        step = max(1, (1 << 22) // (blocks * group) // _WIDEST_INTERLEAVE) * _WIDEST_INTERLEAVE
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            part = unpack_codes(codes[start:stop], 4).reshape(stop - start, -1)
            part = F.pad(part, (0, 0, 0, -len(part) % _WIDEST_INTERLEAVE)).to(torch.int32)
            self._codes[start : start + len(part)] = aten._convert_weight_to_int4pack_for_cpu(part, 2)
        self._scales_offsets[:, :rows, 0] = scales.T
        if zeros is not None:
            # (code - zero) * scale = (code - 8) * scale + (8 - zero) * scale; the second scale is the rounded one, so
            # that a code equal to its zero point stays next to nothing.
            middle = 8.0 - unpack_zeros(zeros, 4, blocks).T
            self._scales_offsets[:, :rows, 1] = middle * self._scales_offsets[:, :rows, 0].to(torch.float32)
        # Copies: what is given may be mapped from a file, which then can go.
        self._table = (scales.clone(), None if zeros is None else zeros.clone()) if is_table else None
        held = [self._codes, self._scales_offsets, *(self._table or ())]
        self.nbytes = sum(part.numel() * part.element_size() for part in held if part is not None)

    @classmethod
    def of_form(cls, form: Mapping[str, Any]) -> Int4Weight:
        """See `StoredWeight`."""
        made = cls.__new__(cls)
        made.rows, made.columns, made.group = form["rows"], form["columns"], form["group"]
        made._padding = -made.columns % made.group
        made._table = None
        return made

    @property
    def granule(self) -> int:
        """See `StoredWeight`."""
        return SLAB_ROWS

    @property
    def form(self) -> dict[str, int | str]:
        """See `StoredWeight`."""
        return {"rows": self.rows, "columns": self.columns, "group": self.group}

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """See `StoredWeight`."""
        rows, columns = -(-self.rows // SLAB_ROWS) * SLAB_ROWS, self.columns + self._padding
        return {
            "codes": (torch.uint8, (rows, columns // 2)),
            "scales_offsets": (torch.bfloat16, (columns // self.group, rows, 2)),
        }

    def parts(self) -> dict[str, Tensor]:
        """See `StoredWeight`."""
        return {"codes": self._codes, "scales_offsets": self._scales_offsets}

    def with_parts(self, parts: Mapping[str, Tensor]) -> Int4Weight:
        """See `StoredWeight`."""
        made = copy.copy(self)
        made._codes, made._scales_offsets, made._table = parts["codes"], parts["scales_offsets"], None
        made.nbytes = made._codes.nbytes + made._scales_offsets.nbytes
        return made

    def rows_between(self, start: int, stop: int) -> Int4Weight:
        """See `StoredWeight`."""
        made = copy.copy(self)
        made.rows = min(stop, self.rows) - start
        rows = slice(start, -(-stop // SLAB_ROWS) * SLAB_ROWS)  # with the padding behind the last ones
        return made.with_parts(
            {"codes": self._codes[rows], "scales_offsets": self._scales_offsets[:, rows].contiguous()}
        )

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `PackedWeight`; the rounding of the class applies to any number of rows."""
        flat = x.reshape(-1, self.columns)
        if self._padding:
            flat = F.pad(flat, (0, self._padding))
        if len(flat) >= INT4_MANY_ROWS[_product_dtype()]:
            out = self._multiply_decoded(flat)
        else:
            out = self._multiply(flat, self._codes, self._scales_offsets)
        if out.shape[1] != self.rows:
            out = out[:, : self.rows].contiguous()
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], self.rows).to(x.dtype)

    def lookup(self, indices: Tensor) -> Tensor:
        """See `PackedWeight`."""
        assert self._table is not None, "packed without is_table"
        scales, zeros = self._table
        flat, half = _checked_rows(indices, self.rows), int4_interleave() // 2
        lane = flat % (2 * half)
        blocks = self._codes.view(-1, 2 * self._codes.shape[1], half)
        found = blocks[flat // (2 * half), :, lane % half]
        codes = (found >> (lane // half * 4).to(torch.uint8)[:, None]) & 15
        zero: Tensor | float = 8.0
        if zeros is not None:
            zero = unpack_zeros(zeros[flat], 4, scales.shape[1])[:, :, None]
        values = (codes.unflatten(1, (-1, self.group)) - zero) * scales[flat][:, :, None]
        return values.flatten(1)[:, : self.columns].reshape(*indices.shape, self.columns)

    def linear_of_rows(self, x: Tensor, slabs: Tensor, rows: int) -> Tensor:
        """See `PackedWeight`."""
        codes = self._codes[: self.rows].view(-1, rows * self._codes.shape[1]).index_select(0, slabs)
        scales = self._scales_offsets[:, : self.rows].unflatten(1, (-1, rows)).index_select(1, slabs).flatten(1, 2)
        x = F.pad(x, (0, self._padding)) if self._padding else x
        return self._multiply(x, codes.view(-1, self._codes.shape[1]), scales)

    def linear_of_columns(self, x: Tensor, slabs: Tensor, columns: int) -> Tensor:
        """See `PackedWeight`."""
        padded, half = len(self._codes), int4_interleave() // 2
        # A block of interleaved rows is `[K, half]` bytes: a slab of its columns is contiguous.
        blocks = self._codes.view(padded // (2 * half), -1, columns * half)[:, : self.columns // columns]
        scales = self._scales_offsets[: self.columns // self.group].unflatten(0, (-1, columns // self.group))
        taken = blocks.index_select(1, slabs).view(padded, -1)
        return self._multiply(x, taken, scales.index_select(0, slabs).flatten(0, 1))[:, : self.rows]

    def _multiply(self, x: Tensor, codes: Tensor, scales_offsets: Tensor) -> Tensor:
        product = aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), codes, self.group, scales_offsets)
        return product.to(x.dtype)

    def _multiply_decoded(self, x: Tensor) -> Tensor:
        """`[M, K]` to `[M, N]` with padding, decoding `BLOCK_WEIGHTS` at a time."""
        half = int4_interleave() // 2
        columns = self._codes.shape[1] * 2
        blocks = self._codes.view(-1, columns, half)
        pairs = self._scales_offsets.view(-1, 1, len(blocks), 2, half, 2)
        x = x.to(_product_dtype())
        out = x.new_empty(len(x), len(blocks), 2, half, dtype=torch.float32)
        at_once = max(1, BLOCK_WEIGHTS // (2 * half * columns))
        for first in range(0, len(blocks), at_once):
            part = slice(first, min(first + at_once, len(blocks)))
            shape = columns, part.stop - first, half
            wide, codes = _scratch(torch.int16, 2, *shape)
            wide.copy_(blocks[part].transpose(0, 1))
            for index, take in enumerate((torch.bitwise_and, torch.bitwise_right_shift)):
                take(wide, (15, 4)[index], out=codes)
                # 0x4300 is 128.0 in bf16, whose last bit is worth 1: or-ing a code into it adds the code.
                weight = codes.bitwise_or_(0x4300).view(torch.bfloat16).sub_(136)
                grouped = weight.view(-1, self.group, *shape[1:])
                scale, offset = pairs[:, :, part, index].unbind(-1)
                torch.addcmul(offset.contiguous(), grouped, scale.contiguous(), out=grouped)
                product = x @ weight.view(columns, -1).to(x.dtype)
                out[:, part, index] = product.view(len(x), -1, half)
        return out.view(len(x), -1)


@functools.lru_cache(maxsize=16)
def _bags(blocks: int, steps: int, bag: int) -> tuple[Tensor, Tensor]:
    """Rows of the table in each bag, and where bags begin: each block once for every row of x."""
    rows = torch.arange(blocks * bag, dtype=torch.int32).view(blocks, 1, bag).expand(-1, steps, -1)
    return rows.reshape(-1), torch.arange(0, blocks * steps * bag, bag, dtype=torch.int32)


_BAG_KERNELS = {
    8: torch.ops.quantized.embedding_bag_byte_rowwise_offsets,
    2: torch.ops.quantized.embedding_bag_2bit_rowwise_offsets,
}


class BagWeight:
    """An 8- or 2-bit weight as a table whose rows are added up: `out[n] = sum over k of x[k] * codes[k, n]`.

    Rows of the weight are cut into strips of 512; a row of the table is one column of a strip, and a bag is a group of
    columns. The kernel takes the middle of the codes off each by itself. Zero points are one more row of each bag,
    weighted with minus the sum of its x, so that a bag is `sum of x * (code - zero)` and only its scale is left to
    apply.

    Args:
        codes: `[N, k_blocks, group * bits / 8]` u8.
        scales: `[N, k_blocks]` f32.
        zeros: `[N, ceil(k_blocks * bits / 8)]` u8, or None.
        bits: 8 or 2.
        group: Columns that share a scale.
        in_features: K.
        strip: Rows of a strip, at most; `linear_of_rows` takes slabs of whole strips.
        whole_rows: N of the weight of which this is a slab: strips as wide as those of the whole add up as those do.
    """

    def __init__(
        self,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        bits: int,
        group: int,
        in_features: int,
        strip: int = _STRIP,
        whole_rows: int | None = None,
    ) -> None:
        rows, blocks = scales.shape
        self.rows, self.columns, self.bits, self.group = rows, in_features, bits, group
        self._padding = blocks * group - in_features
        self._has_zeros = zeros is not None
        width = min(strip, -(-(whole_rows or rows) // 4) * 4)
        strips, bag = -(-rows // width), group + self._has_zeros
        self._width = width
        # A row of the table ends with the scale and the bias that the kernel applies to it: 1 and minus the middle.
        dtype = torch.float32 if bits == 8 else torch.float16
        tail = torch.tensor([1.0, -(2.0 ** (bits - 1))], dtype=dtype).view(torch.uint8)
        self._codes_bytes = width * bits // 8
        self._table = torch.zeros(strips, blocks, bag, self._codes_bytes + len(tail), dtype=torch.uint8)
        self._table[..., self._codes_bytes :] = tail
        self._scales = torch.zeros(strips, blocks, 1, width)
        for number in range(strips):
            part = slice(number * width, min((number + 1) * width, rows))
            filled = slice(0, part.stop - part.start)
            column = torch.zeros(blocks, bag, width, dtype=torch.uint8)
            column[:, :group, filled] = unpack_codes(codes[part], bits).permute(1, 2, 0)
            if zeros is not None:
                column[:, group, filled] = unpack_zeros(zeros[part], bits, blocks).T.to(torch.uint8)
            self._table[number, :, :, : self._codes_bytes] = pack_codes(column, bits)
            self._scales[number, :, 0, filled] = scales[part].T
        self.nbytes = self._table.nbytes + self._scales.nbytes

    @classmethod
    def of_form(cls, form: Mapping[str, Any]) -> BagWeight:
        """See `StoredWeight`."""
        made = cls.__new__(cls)
        made.rows, made.columns, made.bits, made.group = (form[key] for key in ("rows", "columns", "bits", "group"))
        made._padding = -made.columns % made.group
        made._has_zeros = bool(form["has_zeros"])
        made._width = form["width"]
        made._codes_bytes = made._width * made.bits // 8
        return made

    @property
    def granule(self) -> int:
        """See `StoredWeight`: the rows of a strip."""
        return self._width

    @property
    def form(self) -> dict[str, int | str]:
        """See `StoredWeight`."""
        return {
            "rows": self.rows, "columns": self.columns, "bits": self.bits, "group": self.group,
            "has_zeros": int(self._has_zeros), "width": self._width,
        }  # fmt: skip

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """See `StoredWeight`."""
        strips, blocks = -(-self.rows // self._width), (self.columns + self._padding) // self.group
        row_bytes = self._codes_bytes + (8 if self.bits == 8 else 4)
        return {
            "table": (torch.uint8, (strips, blocks, self.group + self._has_zeros, row_bytes)),
            "scales": (torch.float32, (strips, blocks, 1, self._width)),
        }

    def parts(self) -> dict[str, Tensor]:
        """See `StoredWeight`."""
        return {"table": self._table, "scales": self._scales}

    def with_parts(self, parts: Mapping[str, Tensor]) -> BagWeight:
        """See `StoredWeight`."""
        made = copy.copy(self)
        made._table, made._scales = parts["table"], parts["scales"]
        made.nbytes = made._table.nbytes + made._scales.nbytes
        return made

    def rows_between(self, start: int, stop: int) -> BagWeight:
        """See `StoredWeight`."""
        strips = slice(start // self._width, -(-stop // self._width))
        made = copy.copy(self)
        made.rows = min(stop, self.rows) - start
        return made.with_parts({"table": self._table[strips], "scales": self._scales[strips]})

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `PackedWeight`; fp32 up to the order of the sum."""
        flat = x.reshape(-1, self.columns).to(torch.float32)
        if self._padding:
            flat = F.pad(flat, (0, self._padding))
        out = (
            self._multiply_decoded(flat)
            if len(flat) >= BAG_MANY_ROWS
            else self._sum_bags(flat, self._table, self._scales)
        )
        if out.shape[1] != self.rows:
            out = out[:, : self.rows].contiguous()
        if bias is not None:
            out += bias
        return out.view(*x.shape[:-1], self.rows).to(x.dtype)

    def lookup(self, indices: Tensor) -> Tensor:
        """See `PackedWeight`."""
        flat = _checked_rows(indices, self.rows)
        width = self._scales.shape[-1]
        strip, lane = flat // width, flat % width
        per_byte = 8 // self.bits
        found = (
            self._table[strip, :, :, lane // per_byte] >> (lane % per_byte * self.bits).to(torch.uint8)[:, None, None]
        )
        codes = (found & (2**self.bits - 1)).to(torch.float32)
        zero = codes[:, :, self.group :] if self._has_zeros else 2.0 ** (self.bits - 1)
        values = (codes[:, :, : self.group] - zero) * self._scales[strip, :, :, lane]
        return values.flatten(1)[:, : self.columns].reshape(*indices.shape, self.columns)

    def linear_of_rows(self, x: Tensor, slabs: Tensor, rows: int) -> Tensor:
        """See `PackedWeight`."""
        per_slab = rows // self._scales.shape[-1]
        strips = (slabs[:, None] * per_slab + torch.arange(per_slab)).flatten()
        table, scales = self._table.index_select(0, strips), self._scales.index_select(0, strips)
        padded = F.pad(x, (0, self._padding)) if self._padding else x
        return self._sum_bags(padded.to(torch.float32), table, scales).to(x.dtype)

    def linear_of_columns(self, x: Tensor, slabs: Tensor, columns: int) -> Tensor:
        """See `PackedWeight`."""
        per_slab = columns // self.group
        blocks = (slabs[:, None] * per_slab + torch.arange(per_slab)).flatten()
        table, scales = self._table.index_select(1, blocks), self._scales.index_select(1, blocks)
        return self._sum_bags(x.to(torch.float32), table, scales)[:, : self.rows].to(x.dtype)

    def _sum_bags(self, x: Tensor, table: Tensor, all_scales: Tensor) -> Tensor:
        """`[M, K]` to `[M, N]` with padding."""
        strips, blocks, bag, row_bytes = table.shape
        width, steps = all_scales.shape[-1], len(x)
        grouped = x.view(steps, blocks, self.group)
        if self._has_zeros:
            grouped = torch.cat([grouped, -grouped.sum(-1, keepdim=True)], -1)
        grouped = grouped.transpose(0, 1)
        at_once = max(1, _SUMS_BYTES // (4 * blocks * steps * width))
        done = []
        for first in range(0, strips, at_once):
            scales = all_scales[first : first + at_once]
            sums = _BAG_KERNELS[self.bits](
                table[first : first + at_once].view(-1, row_bytes),
                *_bags(len(scales) * blocks, steps, bag),
                per_sample_weights=grouped.expand(len(scales), -1, -1, -1).reshape(-1),
            )
            done.append(sums.view(-1, blocks, steps, width).mul_(scales).sum(1))
        out = done[0] if len(done) == 1 else torch.cat(done)
        return out.transpose(0, 1).reshape(steps, -1)

    def _multiply_decoded(self, x: Tensor) -> Tensor:
        """`[M, K]` to `[M, N]` with padding, decoding some groups of a strip at a time."""
        strips, blocks, _, _ = self._table.shape
        width = self._scales.shape[-1]
        out = x.new_zeros(len(x), strips, width)
        at_once = max(1, BLOCK_WEIGHTS // 2 // (width * self.group))
        for strip in range(strips):
            for first in range(0, blocks, at_once):
                codes = unpack_codes(self._table[strip, first : first + at_once, :, : self._codes_bytes], self.bits)
                weight = _scratch(torch.float32, len(codes), self.group, width).copy_(codes[:, : self.group])
                weight -= codes[:, self.group :].to(torch.float32) if self._has_zeros else 2.0 ** (self.bits - 1)
                weight *= self._scales[strip, first : first + at_once]
                columns = slice(first * self.group, (first + len(codes)) * self.group)
                out[:, strip].addmm_(x[:, columns], weight.flatten(0, 1))
        return out.view(len(x), -1)
