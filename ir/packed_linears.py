"""Linears of GPTQ, AWQ and compressed-tensors checkpoints, as modules that read our packed layout.

Codes, scales and zero points are those of the file, laid out as `jettison::quantized_linear` reads them; nothing is
rounded again, and no weight is decoded. All three tools mean `(code - zero) * scale`; scales become fp32, so the
product is not rounded to the 16 bits that their own kernels may compute in. For a weight `[N, K]` in G groups:

| tensor              | layout                                                                                  |
|---------------------|-----------------------------------------------------------------------------------------|
| GPTQ `qweight`      | i32 `[K * bits / 32, N]`: along K, first code in the low bits, 3-bit codes across words |
| GPTQ `qzeros`       | i32 `[G, N * bits / 32]`, likewise along N; less one in the first format                |
| GPTQ `g_idx`        | i32 `[K]`: the group of each column (`desc_act`)                                        |
| AWQ `qweight`       | i32 `[K, N / 8]`: nibble i of a word is column 0, 2, 4, 6, 1, 3, 5, 7 of its eight      |
| AWQ `qzeros`        | i32 `[G, N / 8]`, likewise                                                              |
| both, `scales`      | `[G, N]`                                                                                |
| `weight_packed`     | i32 `[N, ceil(K * bits / 32)]`: as GPTQ's, along K; code is q + 2**(bits - 1)           |
| `weight_zero_point` | i32 `[ceil(N * bits / 32), G]`, likewise along N; or i8 `[N, G]` in old files           |
| `weight_scale`      | `[N, G]`                                                                                |

A group that is a multiple of one of ours (32, 64 or 128 columns) becomes several that share a scale and a zero point.
Where groups are scattered over the columns, columns are sorted by group, and so is the input of the linear.

Source: AutoGPTQ and GPTQModel (`qlinear`), AutoAWQ (`WQLinear_GEMM`), compressed-tensors (`pack_quantized`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from jettison.ir.checkpoint import Checkpoint
from jettison.ir.constants import Packed, scratch_tensor
from jettison.ir.errors import CaptureError, UnsupportedError
from jettison.ir.ops import quantized_linear
from jettison.ir.ops.quantized_linear import pack_codes, pack_zeros, row_chunks, unpack_codes, unpack_rows
from jettison.ir.packing_config import Packing, Scheme

# Columns of a group that `quantized_linear` has kernels for, best first: larger ones hold fewer scales.
_GROUPS = (128, 64, 32)
# Where column c of eight lies in a word of AWQ's.
_AWQ_NIBBLES = (0, 4, 1, 5, 2, 6, 3, 7)
# What the first format of GPTQ subtracts from words of zero points, in turn; borrows cross the zero points in a word.
# For 3 bits these are not the words of ones that AutoGPTQ subtracts, but what GPTQModel writes and reads.
_ONES = {2: (0x55555555,), 3: (0x24924924, -0x6DB6DB6E, 0x49249249), 4: (0x11111111,), 8: (0x01010101,)}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)

_Codes = Callable[[slice], Tensor]


@dataclass(frozen=True)
class PackedWeight:
    """A weight `[N, K]` in the layout of `jettison::quantized_linear`.

    Attributes:
        shape: `(N, K)`.
        bits: Of a code.
        group: Columns that share a scale.
        codes: `[N, k_blocks, group * bits / 8]` u8.
        scales: `[N, k_blocks]` f32.
        zeros: `[N, ceil(k_blocks * bits / 8)]` u8, or None where all are in the middle of the codes.
        order: `[K]` i64, the column of the input that each column of the weight reads; None where it is its own.
    """

    shape: tuple[int, int]
    bits: int
    group: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    order: Tensor | None

    @property
    def format(self) -> str:
        """Canonical text of the weight format."""
        return f"int{self.bits}{{group={self.group},symmetric={'true' if self.zeros is None else 'false'}}}"


class PackedLinear(nn.Module):
    """`nn.Linear` with a packed weight. Its parts are buffers under `weight`, the names that packed constants have.

    Args:
        packed: The weight.
        bias: `[N]` or None.
    """

    def __init__(self, packed: PackedWeight, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = packed.shape
        self.bits, self.group = packed.bits, packed.group
        self.weight = nn.Module()
        for part in ("codes", "scales", "zeros"):
            self.weight.register_buffer(part, getattr(packed, part))
        self.register_buffer("input_order", packed.order)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        if self.input_order is not None:
            x = x.index_select(-1, self.input_order)
        parts: Any = self.weight
        return quantized_linear(
            x, parts.codes, parts.scales, parts.zeros, self.bias, self.bits, self.group, self.in_features
        )


def replace_packed_linears(
    module: nn.Module, checkpoint: Checkpoint, prefix: str
) -> tuple[dict[str, Packed], set[str]]:
    """Put a `PackedLinear` in the place of every linear that a checkpoint holds packed.

    Args:
        module: The model; weights may be on the meta device. Changed in place.
        checkpoint: With a `packing`.
        prefix: What names of the base model begin with where the checkpoint has a head, e.g. `model.`.

    Returns:
        The packed weights by the name of the dense weight in `module`, and the tensors of the checkpoint they are in.

    Raises:
        CaptureError: Tensors are missing, or do not fit the model or each other.
        UnsupportedError: A packed tensor belongs to no linear, or its groups have no kernel.
    """
    packing = checkpoint.packing
    assert packing is not None, "checked by the caller"
    stored = {name.removesuffix(packing.suffix): name for name in checkpoint.names if name.endswith(packing.suffix)}
    packed: dict[str, Packed] = {}
    used: set[str] = set()
    orders: dict[bytes, Tensor] = {}
    for path, linear in list(module.named_modules()):
        spellings = (path, path.removeprefix(prefix), prefix + path)
        stem = next((spelling for spelling in spellings if spelling in stored), None)
        if stem is None:
            continue
        if not isinstance(linear, nn.Linear):
            _refuse_place(checkpoint, stored[stem], f"the weight of a {type(linear).__name__}")
        tensors = _Tensors(checkpoint, packing, stem, (linear.out_features, linear.in_features))
        weight = _READERS[packing.method](tensors, orders)
        module.set_submodule(path, PackedLinear(weight, linear.bias))
        if linear.bias is None and f"{stem}.bias" in checkpoint and not checkpoint.tensor(f"{stem}.bias").any():
            tensors.used.add(f"{stem}.bias")  # old AutoGPTQ writes zeros where the model has no bias
        parts = {part: f"{path}.weight.{part}" for part, _ in module.get_submodule(f"{path}.weight").named_buffers()}
        packed[f"{path}.weight"] = Packed(weight.format, weight.shape, parts)
        used |= tensors.used
        del stored[stem]
    if stored:
        _refuse_place(checkpoint, next(iter(stored.values())), "a weight that is no linear of the model")
    return packed, used


class _Tensors:
    """The tensors of one packed linear, checked as they are taken."""

    def __init__(self, checkpoint: Checkpoint, packing: Packing, stem: str, shape: tuple[int, int]) -> None:
        self.checkpoint, self.packing, self.stem, self.shape = checkpoint, packing, stem, shape
        self.used: set[str] = set()

    def take(self, part: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...]) -> Tensor:
        """A tensor that must be there, of one of these dtypes and of this shape."""
        name = f"{self.stem}.{part}"
        wanted = f"{'|'.join(str(dtype).removeprefix('torch.') for dtype in dtypes)}{list(shape)}"
        if name not in self.checkpoint:
            self.refuse(f"no tensor {name!r}", f"{wanted} beside {self.stem + self.packing.suffix!r}")
        dtype, found = self.checkpoint.dtype(name), self.checkpoint.shape(name)
        if dtype not in dtypes or found != shape:
            text = f"{str(dtype).removeprefix('torch.')}{list(found)}"
            self.refuse(
                f"tensor {name!r} {text}", f"{wanted} for a weight {list(self.shape)} packed as {self.settings}"
            )
        self.used.add(name)
        return self.checkpoint.tensor(name)

    def has(self, part: str) -> bool:
        """Whether there is a tensor."""
        return f"{self.stem}.{part}" in self.checkpoint

    @property
    def settings(self) -> str:
        """What config.json says, for messages."""
        each = (f"{bits} bits, group_size {group}" for bits, group, _ in self.packing.schemes)
        return f"{self.packing.method}, {' or '.join(each)}"

    def refuse(self, found: str, needed: str) -> NoReturn:
        """Refuse a tensor."""
        codes = self.stem + self.packing.suffix
        raise CaptureError(
            f"[checkpoint] {self.checkpoint.file(codes)}: found {found}; needed {needed}. The weights and config.json "
            "belong to different models, or the folder is incomplete: download it again."
        )


def _refuse_place(checkpoint: Checkpoint, name: str, what: str) -> NoReturn:
    raise UnsupportedError(
        f"[checkpoint] {checkpoint.file(name)}: found packed tensor {name!r}, {what}; needed packed weights of plain "
        "linears only (routed experts, for one, are read as dense stacks). Use the unquantised checkpoint that this "
        "one was made from."
    )


# ------------------------------------------------------------------------------------------------- the three layouts


def _read_gptq(tensors: _Tensors, orders: dict[bytes, Tensor]) -> PackedWeight:
    (bits, group, _), (n, k) = tensors.packing.schemes[0], tensors.shape
    if k * bits % 32:
        tensors.refuse(f"rows of {k} codes of {bits} bits", "whole words of 32 bits")
    columns = k if group == -1 else group
    groups = -(-k // columns)
    words = tensors.take("qweight", (torch.int32,), (k * bits // 32, n))
    stored = tensors.take("qzeros", (torch.int32,), (groups, -(-n * bits // 32)))
    scales = tensors.take("scales", _FLOATS, (groups, n))
    is_less, by_word = tensors.packing.zeros_less_one, bits != 3 or tensors.packing.by_gptqmodel
    if is_less and by_word:
        ones = torch.tensor(_ONES[bits], dtype=torch.int32)
        stored = stored + ones.repeat(-(-stored.shape[1] // len(ones)))[: stored.shape[1]]
    zeros = _spread(stored, bits, n)
    if is_less and not by_word:
        zeros = (zeros + 1) & (2**bits - 1)
    order = _order(tensors, "g_idx", columns, groups, orders)
    return _assemble(
        tensors, lambda rows: _spread(words[:, rows].t(), bits, k), scales.t(), zeros.t(), bits, columns, order
    )


def _read_awq(tensors: _Tensors, orders: dict[bytes, Tensor]) -> PackedWeight:
    (bits, group, _), (n, k) = tensors.packing.schemes[0], tensors.shape
    if n % 8:
        tensors.refuse(f"{n} rows for {tensors.stem!r}", "a multiple of 8, because words hold eight of them")
    columns = k if group == -1 else group
    groups = -(-k // columns)
    words = tensors.take("qweight", (torch.int32,), (k, n // 8))
    zeros = _spread_awq(tensors.take("qzeros", (torch.int32,), (groups, n // 8)))
    scales = tensors.take("scales", _FLOATS, (groups, n))

    def codes(rows: slice) -> Tensor:
        return _spread_awq(words[:, rows.start // 8 : rows.stop // 8]).t()

    return _assemble(tensors, codes, scales.t(), zeros.t(), bits, columns, None)


def _read_compressed_tensors(tensors: _Tensors, orders: dict[bytes, Tensor]) -> PackedWeight:
    n, k = tensors.shape
    bits, group, has_zeros = _compressed_scheme(tensors)
    columns = k if group == -1 else group
    groups = -(-k // columns)
    words = tensors.take("weight_packed", (torch.int32,), (n, -(-k * bits // 32)))
    scales = tensors.take("weight_scale", _FLOATS, (n, groups))
    if tensors.has("weight_shape"):
        shape = tensors.take("weight_shape", (torch.int64, torch.int32), (2,)).tolist()
        if shape != [n, k]:
            tensors.refuse(f"'{tensors.stem}.weight_shape' {shape}", f"{[n, k]}, as config.json describes the model")
    middle = 2 ** (bits - 1)
    zeros = torch.full((n, groups), middle, dtype=torch.uint8)
    name = f"{tensors.stem}.weight_zero_point"
    if name in tensors.checkpoint and tensors.checkpoint.dtype(name) == torch.int8:
        zeros = (tensors.take("weight_zero_point", (torch.int8,), (n, groups)).to(torch.int16) + middle).to(torch.uint8)
    elif has_zeros or name in tensors.checkpoint:
        packed = tensors.take("weight_zero_point", (torch.int32,), (-(-n * bits // 32), groups))
        zeros = _spread(packed.t(), bits, n).t()
    order = _order(tensors, "weight_g_idx", columns, groups, orders)
    return _assemble(tensors, lambda rows: _spread(words[rows], bits, k), scales, zeros, bits, columns, order)


_READERS = {"gptq": _read_gptq, "awq": _read_awq, "compressed-tensors": _read_compressed_tensors}


def _compressed_scheme(tensors: _Tensors) -> Scheme:
    """Of the kinds in config.json, the one that a linear's tensors fit; else the first, to say what it would need."""
    k, checkpoint = tensors.shape[1], tensors.checkpoint
    parts = [part for part in ("weight_packed", "weight_scale") if tensors.has(part)]
    found = [checkpoint.shape(f"{tensors.stem}.{part}")[-1:] for part in parts]
    for scheme in tensors.packing.schemes:
        groups = 1 if scheme.group == -1 else -(-k // scheme.group)
        has_zeros = tensors.has("weight_zero_point") or not scheme.has_zeros
        if has_zeros and found == [(-(-k * scheme.bits // 32),), (groups,)]:
            return scheme
    return tensors.packing.schemes[0]


def _order(tensors: _Tensors, part: str, columns: int, groups: int, orders: dict[bytes, Tensor]) -> Tensor | None:
    """Columns sorted by group, where groups are scattered; one tensor for all linears with the same order.

    Returns:
        `[K]` i64, or None if every column is in its place.
    """
    k = tensors.shape[1]
    if not tensors.has(part):
        return None
    index = tensors.take(part, (torch.int32, torch.int64), (k,)).to(torch.int64)
    if part == "weight_g_idx" and bool((index == -1).all()):
        return None  # how compressed-tensors says that there is none
    wanted = torch.arange(k) // columns
    if index.equal(wanted):
        return None
    order = index.argsort(stable=True)
    if not index[order].equal(wanted):
        tensors.refuse(
            f"tensor '{tensors.stem}.{part}' with groups of other sizes than {columns} columns",
            f"{columns} columns for each of {groups} groups",
        )
    return orders.setdefault(order.numpy().tobytes(), order)


def _spread(words: Tensor, bits: int, count: int) -> Tensor:
    """`[r, w]` i32, codes from the low bits of the first word on, to `[r, count]` u8."""
    # Every processor torch runs on in practice is little-endian.
    return unpack_rows(words.contiguous().view(torch.uint8), bits, count)


def _spread_awq(words: Tensor) -> Tensor:
    """`[r, w]` i32 to `[r, 8 * w]` u8."""
    nibbles = unpack_codes(words.contiguous().view(torch.uint8), 4)
    return nibbles.unflatten(1, (-1, 8))[..., _AWQ_NIBBLES].flatten(1)


# ----------------------------------------------------------------------------------------------------- to our layout


def _assemble(
    tensors: _Tensors, codes: _Codes, scales: Tensor, zeros: Tensor, bits: int, columns: int, order: Tensor | None
) -> PackedWeight:
    """Pack a weight in our layout, some rows at a time.

    Args:
        tensors: Of the linear.
        codes: Returns rows `[n, K]` u8 of the codes; slices begin and end at multiples of 8, or at N.
        scales: `[N, G]`.
        zeros: `[N, G]` u8.
        bits: Of a code.
        columns: Of a group in the file.
        order: See `PackedWeight`.
    """
    n, k = tensors.shape
    group = _our_group(tensors, columns)
    k_blocks = -(-k // group)
    theirs = torch.arange(k_blocks) * group // columns
    packed_scales = scratch_tensor((n, k_blocks), torch.float32)
    packed_scales.copy_(scales[:, theirs])
    is_symmetric = bool((zeros == 2 ** (bits - 1)).all())
    packed_zeros = None if is_symmetric else pack_zeros(zeros[:, theirs], bits)
    packed = scratch_tensor((n, k_blocks, group * bits // 8), torch.uint8)
    for rows in _eights(n, k):
        chunk = codes(rows)
        if order is not None:
            chunk = chunk[:, order]
        if k % group:
            # Padding decodes to zero.
            padding = zeros[rows, -1:].expand(-1, -k % group)
            chunk = torch.cat([chunk, padding], 1)
        packed[rows] = pack_codes(chunk.reshape(-1, k_blocks, group), bits)
    return PackedWeight(tensors.shape, bits, group, packed, packed_scales, packed_zeros, order)


def _our_group(tensors: _Tensors, columns: int) -> int:
    k = tensors.shape[1]
    if columns >= k:
        return next((group for group in reversed(_GROUPS) if group >= k), _GROUPS[0])
    for group in _GROUPS:
        if columns % group == 0:
            return group
    codes = tensors.stem + tensors.packing.suffix
    raise UnsupportedError(
        f"[checkpoint] {tensors.checkpoint.file(codes)}: found groups of {columns} columns in {codes!r}; needed a "
        "multiple of 32, because kernels read groups of 32, 64 or 128. Use the unquantised checkpoint that this one "
        "was made from, or one in other groups."
    )


def _eights(rows: int, columns: int) -> Iterator[slice]:
    """Slices of rows that begin at multiples of 8."""
    for chunk in row_chunks(-(-rows // 8), 8 * columns):
        yield slice(8 * chunk.start, min(8 * chunk.stop, rows))
