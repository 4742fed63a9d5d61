"""A bitmap of the weights that are not zero, and their values: for weights that `prune-weights` made sparse.

Parts (the layout of `jettison.ir.ops.bitmap_linear`): `bitmap` u8 `[N, 8 * k_blocks]`, `starts` i64 `[slabs + 1]`,
`values` u8, bf16, f16 or f32 `[V]`, and, but for `values=float`, `scales` bf16 `[N, ceil(K / group)]`.

A weight of share `s` of zeros takes `1 + b (1 - s) + 16 / group + 1 / K` bits, and with `int4` about 0.03 more, since
values of 64 columns begin at a byte: 3.16 bits with half of the weights in int4 and groups of 128. Nothing is saved
where `s < 1 / b`, so such weights are declined. Zeros by pruning and zeros that were there before are not told apart.

`int4`: `m` = the entry of largest magnitude with its sign, `s = m / -8`, `number = clip(round(w / s), -8, 7)`. `int8`:
`s = max |w| / 127`. Only kept weights are looked at, and scales are rounded to bf16 before the weights are rounded, so
that `|w - w'| <= |s| / 2`, except for `int4` beyond `-7.5 s`, as for symmetric integer groups: there `<= 1.04 |s|`. A
kept weight may round to zero, and stays kept. `float` keeps the values as they are, in the narrowest of bf16, f16 and
f32 that holds all of them.

Source: Endor (arXiv 2406.11674).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from jettison.ir.edit import Edit
from jettison.ir.errors import ArtifactError, OptionError, PassError
from jettison.ir.ops import bitmap_linear
from jettison.ir.ops.bitmap_linear import (
    BLOCK,
    SLAB,
    expand_rows,
    kept_of,
    pack_bits,
    pack_values,
    row_sizes,
    slab_chunks,
    unpack_bits,
    values_of_rows,
)
from jettison.ir.ops.quantized_linear import row_chunks
from jettison.passes.formats.base import SMALLEST_SCALE, Grid, RowReader, WeightFormat
from jettison.passes.options import option

GROUPS = (64, 128, 256)
_BITS = {"int4": 4, "int8": 8}
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
# By bits: what the largest weight of a group becomes, the smallest and the largest number, and the code of 0. Code 0
# itself is a weight that is not kept.
_TOP, _LOW, _HIGH, _MIDDLE = {4: -8, 8: 127}, {4: -8, 8: -127}, {4: 7, 8: 127}, {4: 9, 8: 128}


@dataclass(frozen=True)
class Bitmap(WeightFormat):
    """A weight format: a bit per weight, and the values of those that are not zero.

    Attributes:
        of: How values are stored: `int4`, `int8` or `float`.
        group: 64, 128 or 256 columns that share a scale.
        row_starts: `[N + 1] i64`, where in the values each row begins, once adapted to a weight.
        dtype: Of the values, likewise.

    Raises:
        OptionError: A field is outside its range.
    """

    id: ClassVar[str] = "bitmap"
    is_for_zeros: ClassVar[bool] = True
    of: Literal["int4", "int8", "float"] = option("int4", doc="how weights that are not zero are stored")
    group: Literal[64, 128, 256] = option(128, doc="columns that share a scale")
    row_starts: Tensor | None = field(default=None, init=False, repr=False, compare=False)
    dtype: torch.dtype = field(default=torch.uint8, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.of not in (*_BITS, "float"):
            raise OptionError(f"[bitmap] of={self.of!r}: needs one of int4, int8 or float. Set of to one of them.")
        if type(self.group) is not int or self.group not in GROUPS:
            choices = ", ".join(str(choice) for choice in GROUPS)
            raise OptionError(f"[bitmap] group={self.group!r}: needs one of {choices}. Set group to one of them.")

    @property
    def name(self) -> str:
        """The canonical text, for example `bitmap{of=int4,group=128}`."""
        return f"bitmap{{of={self.of},group={self.group}}}"

    @property
    def bits(self) -> int:
        """Of a value: 4, 8, or those of the dtype."""
        return _BITS.get(self.of, self.dtype.itemsize * 8)

    @property
    def has_table(self) -> bool:
        """See `WeightFormat`: tables are never pruned."""
        return False

    def part_specs(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `WeightFormat`; what is kept must be known, see `adapted`."""
        rows, columns = shape
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "bitmap": ((rows, -(-columns // BLOCK) * 8), torch.uint8),
            "starts": ((-(-rows // SLAB) + 1,), torch.int64),
            "values": ((int(self._known_starts[-1]),), self.dtype),
        }
        if self.of != "float":
            specs["scales"] = ((rows, -(-columns // self.group)), torch.bfloat16)
        return specs

    def adapted(self, rows: RowReader, shape: tuple[int, int], where: str) -> Bitmap:
        """See `WeightFormat`: counts what is kept, and finds the narrowest dtype of `float`."""
        sizes, fitting = [], list(_FLOATS) if self.of == "float" else []
        for chunk in row_chunks(*shape):
            weight = rows(chunk.start, chunk.stop)
            sizes.append(row_sizes(kept_of(weight), _BITS.get(self.of, 16)))
            fitting = [dtype for dtype in fitting if dtype is torch.float32 or _holds(dtype, weight)]
        known = replace(self)
        object.__setattr__(known, "row_starts", F.pad(torch.cat(sizes).cumsum(0), (1, 0)))
        object.__setattr__(known, "dtype", fitting[0] if fitting else torch.uint8)
        return known

    def declines(self, zeros: float) -> str | None:
        """See `WeightFormat`: a bit per weight must be less than what zeros would take."""
        bits = _BITS.get(self.of, 16)
        if zeros * bits > 1:
            return None
        return (
            f"{zeros:.1%} of the weight is zero, and a bit per weight saves bytes from {1 / bits:.1%} on: prune it "
            "first (prune-weights), or store it in another format"
        )

    def fit(self, groups: Tensor) -> Grid:
        """See `WeightFormat`; zeros make no difference to it."""
        low, high = groups.amin(-1), groups.amax(-1)
        largest = torch.where(high > -low, high, low) if self.of == "int4" else torch.maximum(high, -low)
        scales = largest / _TOP[self.bits]
        return Grid(scales.masked_fill_(scales.abs() < SMALLEST_SCALE, 1.0))

    def stored(self, grid: Grid) -> Grid:
        """See `WeightFormat`: scales in bf16."""
        return Grid(grid.scales.to(torch.bfloat16).to(torch.float32))

    def round(self, groups: Tensor, grid: Grid) -> Tensor:
        """See `WeightFormat`; code 0 for weights that are zero."""
        numbers = groups.div(grid.scales.unsqueeze(-1)).round_().clamp_(_LOW[self.bits], _HIGH[self.bits])
        return numbers.add_(_MIDDLE[self.bits]).masked_fill_(groups == 0, 0.0).to(torch.int16).to(torch.uint8)

    def values(self, codes: Tensor, grid: Grid) -> Tensor:
        """See `WeightFormat`: `number * scale`."""
        numbers = codes.to(torch.float32).sub_(_MIDDLE[self.bits]).masked_fill_(codes == 0, 0.0)
        return numbers.mul_(grid.scales.unsqueeze(-1))

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """See `WeightFormat`; `starts` is that of these rows alone, see `put`."""
        numbers = (codes.to(torch.int16) - _MIDDLE[self.bits]).to(torch.int8)
        parts = _packed(numbers.view(len(codes), -1, BLOCK), (codes != 0).view(len(codes), -1, BLOCK), self.bits)
        return {**parts, "scales": grid.scales.to(torch.bfloat16)}

    def unpack(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Grid]:
        """See `WeightFormat`."""
        if self.of == "float":
            raise PassError(f"[{self.name}] has no codes.")
        ones = torch.ones_like(parts["scales"], dtype=torch.float32)
        numbers = expand_rows(parts["bitmap"], parts["values"], ones, self.bits, self.group, shape[1])
        kept = unpack_bits(parts["bitmap"]).flatten(1)[:, : shape[1]]
        codes = (numbers + _MIDDLE[self.bits]).masked_fill_(~kept, 0.0).to(torch.int16).to(torch.uint8)
        codes = F.pad(codes, (0, -shape[1] % self.group))
        return codes.view(len(codes), -1, self.group), Grid(parts["scales"].to(torch.float32))

    @torch.no_grad()
    def encode_rows(self, weight: Tensor, where: str = "weight", first_row: int = 0) -> dict[str, Tensor]:
        """See `WeightFormat`; whole blocks are cut, also where a group ends behind the last of them."""
        self._check_matrix(weight, where)
        groups = self.split_groups(weight)
        self.check_values(groups, where, first_row)
        kept = kept_of(weight)
        blocks = kept.shape[1]
        if self.of == "float":
            assert self._known_starts is not None, "and with it the dtype"
            padded = F.pad(weight, (0, blocks * BLOCK - weight.shape[1]))
            return _packed(padded.to(self.dtype).view(kept.shape), kept, self.bits)
        grid = self.stored(self.fit(groups))
        codes = self.round(groups, grid).view(len(weight), -1)[:, : blocks * BLOCK]
        return self.pack(codes.reshape(len(weight), blocks, BLOCK), grid)

    def put(self, parts: dict[str, Tensor], chunk: dict[str, Tensor], rows: slice) -> None:
        """See `WeightFormat`; values go where `adapted` found that these rows begin."""
        first, last = int(self._known_starts[rows.start]), int(self._known_starts[rows.stop])
        parts["values"][first:last] = chunk["values"]
        slabs = torch.arange(0, len(parts["bitmap"]) + SLAB, SLAB).clamp_(max=len(parts["bitmap"]))
        parts["starts"].copy_(self._known_starts[slabs[: len(parts["starts"])]])
        for name in chunk.keys() - {"values", "starts"}:
            parts[name][rows] = chunk[name]

    def take(self, parts: dict[str, Tensor], rows: slice) -> dict[str, Tensor]:
        """See `WeightFormat`; rows are to be whole slabs."""
        starts = parts["starts"][rows.start // SLAB : -(-rows.stop // SLAB) + 1]
        own = {name: part[rows] for name, part in parts.items() if name not in ("values", "starts")}
        return {**own, "starts": starts - starts[0], "values": parts["values"][values_of_rows(parts["starts"], rows)]}

    @torch.no_grad()
    def decode(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """See `WeightFormat`; how much is kept is read off the parts."""
        known, values = replace(self), parts.get("values", torch.empty(0))
        object.__setattr__(known, "row_starts", torch.tensor([0, values.numel()]))
        if self.of == "float":
            object.__setattr__(known, "dtype", values.dtype if values.dtype in _FLOATS else torch.float32)
        known._check_parts(parts, shape)
        weight = torch.empty(shape)
        try:
            for rows in slab_chunks(*shape):
                own = known.take(parts, rows)
                scales = own.get("scales")
                weight[rows] = expand_rows(own["bitmap"], own["values"], scales, known.bits, self.group, shape[1])
        except RuntimeError as error:
            raise ArtifactError(
                f"[{self.name}] parts of a weight {list(shape)}: {error}. The packed weight is damaged: make it again."
            ) from error
        return weight

    def unsupported_on(self, target: str) -> str | None:
        """See `WeightFormat`."""
        if target != "onnx":
            return None
        return "no operator of ONNX puts values where a bitmap has bits, and an expanded weight would save nothing"

    def call_linear(
        self, edit: Edit, x: fx.Node, parts: dict[str, fx.Node], bias: fx.Node | None, shape: tuple[int, int]
    ) -> fx.Node:
        """See `WeightFormat`."""
        stored = [parts.get(name) for name in ("bitmap", "starts", "values", "scales")]
        bits = _BITS.get(self.of) or parts["values"].meta["val"].dtype.itemsize * 8
        return edit.call(bitmap_linear, x, *stored, bias, bits, self.group, shape[1])

    @property
    def _known_starts(self) -> Tensor:
        if self.row_starts is None:
            raise OptionError(
                f"[{self.name}] what is kept is not known yet: call `adapted` with the whole weight first."
            )
        return self.row_starts


def _packed(numbers: Tensor, kept: Tensor, bits: int) -> dict[str, Tensor]:
    """The parts of some rows without scales, from `[n, k_blocks, 64]`."""
    starts = F.pad(row_sizes(kept, bits).cumsum(0), (1, 0))
    slabs = [*range(0, len(kept), SLAB), len(kept)]
    return {"bitmap": pack_bits(kept), "starts": starts[slabs], "values": pack_values(numbers, kept, bits)}


def _holds(dtype: torch.dtype, weight: Tensor) -> bool:
    """Whether every value has this dtype without loss."""
    return weight.dtype == dtype or bool((weight.to(dtype).to(weight.dtype) == weight).all())
