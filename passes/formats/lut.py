"""Palettes: a matrix, or each of its rows, that takes few distinct values is stored exactly, as codes into a table.

Parts (the layout of `jettison.ir.ops.lut_linear`): `codes` u8 `[N, k_blocks, bits]`, eight to a group, and `lut` f32
`[T, 2^bits]`, rising, its last value repeated; T is 1, or N with `per_row`. Bytes: `N * ceil(K / 8) * bits + 4 * T *
2^bits`.

Checkpoints that were clustered during training (eDKM, Core ML palettes) have such matrices, and so have those that a
tool wrote back after rounding with one scale per matrix or per row. Nothing is rounded here: a weight that takes more
values is refused. (-0 becomes 0.)

Source: arXiv 2309.00964 (eDKM) for the layout.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from jettison.ir.edit import Edit
from jettison.ir.errors import OptionError, UnsupportedError
from jettison.ir.ops import lut_embedding, lut_linear
from jettison.ir.ops.quantized_linear import pack_codes, row_chunks, unpack_codes
from jettison.passes.formats.base import Grid, RowReader, WeightFormat, pad_with_last
from jettison.passes.options import option

BITS: tuple[Literal[2, 4, 8], ...] = (2, 4, 8)
MOST_VALUES = 2 ** max(BITS)


def palette(rows: RowReader, shape: tuple[int, int]) -> Tensor | None:
    """The distinct values of a weight, if they are few.

    Stops at the first rows that show more than 256: on a weight that has no palette it reads next to nothing.

    Args:
        rows: Returns rows `[start, stop)` of the weight, any floating-point dtype.
        shape: `(N, K)`.

    Returns:
        `[C]` f32, rising, C at most 256; None if there are more, or one is not finite.
    """
    found = torch.empty(0)
    # The first row alone, since most weights have no palette.
    chunks = [slice(0, 1), *(rows_ for rows_ in row_chunks(*shape))]
    for chunk in chunks:
        values = rows(chunk.start, chunk.stop).to(torch.float32).reshape(-1)
        if len(found):
            near = torch.searchsorted(found, values, out_int32=True).clamp_(max=len(found) - 1)
            values = values[found.index_select(0, near) != values]
        if len(values):
            # A zero of either sign is one value.
            found = torch.cat([found, values + 0.0]).unique()
        if len(found) > MOST_VALUES or not bool(torch.isfinite(found).all()):
            return None
    return found


@dataclass(frozen=True)
class Lut(WeightFormat):
    """A weight format: codes into a table of exact values.

    Attributes:
        bits: 2, 4 or 8 bits per code; None for the fewest that do.
        per_row: a table for every row; None for what takes fewer bytes.
        group: columns whose codes fill whole bytes.
        table: what `adapted` found: `[1, 2^bits]` f32.

    Raises:
        OptionError: a field is outside its range.
    """

    id: ClassVar[str] = "lut"
    is_exact: ClassVar[bool] = True
    bits: Literal[2, 4, 8] | None = option(None, doc="bits per weight; none: the fewest that hold every value")
    per_row: bool | None = option(None, doc="a table for every row; none: whatever takes fewer bytes")
    group: int = field(default=8, init=False, repr=False)
    table: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.bits is not None and (type(self.bits) is not int or self.bits not in BITS):
            raise OptionError(f"[lut] bits={self.bits!r}: needs one of 2, 4, 8 or none. Set bits to one of them.")
        if self.per_row is not None and not isinstance(self.per_row, bool):
            raise OptionError(f"[lut] per_row={self.per_row!r}: needs true, false or none. Set one of them.")

    @property
    def name(self) -> str:
        """The canonical text, for example `lut{bits=4,per_row=false}`; what is not known yet is left out."""
        known = [] if self.bits is None else [f"bits={self.bits}"]
        known += [] if self.per_row is None else [f"per_row={str(self.per_row).lower()}"]
        return f"lut{{{','.join(known)}}}" if known else "lut"

    @property
    def shared_parts(self) -> tuple[str, ...]:
        """See `WeightFormat`."""
        return () if self.per_row else ("lut",)

    def part_specs(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `WeightFormat`; bits and tables must be known, see `adapted`."""
        rows, columns = shape
        bits = self._known_bits
        return {
            "codes": ((rows, -(-columns // self.group), bits), torch.uint8),
            "lut": ((rows if self.per_row else 1, 2**bits), torch.float32),
        }

    def adapted(self, rows: RowReader, shape: tuple[int, int], where: str) -> Lut:
        """See `WeightFormat`: finds the palette, and the layout that takes the fewest bytes."""
        choices: list[Lut] = []
        if not self.per_row:
            values = palette(rows, shape)
            if values is not None:
                choices += self._choices(len(values), per_row=False, table=values[None])
        if self.per_row is None or self.per_row:
            by_row = self._choices(_most_values_of_a_row(rows, shape), per_row=True, table=None)
            # Rows of up to 256 columns always have few values, which does not make tables of them worth while.
            dense_bytes = shape[0] * shape[1] * rows(0, 1).element_size()
            choices += [each for each in by_row if self.per_row or each.bytes(shape) < dense_bytes]
        if not choices:
            self._refuse(rows, shape, where)
        return min(choices, key=lambda choice: choice.bytes(shape))

    def _choices(self, count: int, *, per_row: bool, table: Tensor | None) -> list[Lut]:
        """The layout for so many values, if there is one."""
        fitting = [bits for bits in BITS if count <= 2**bits and self.bits in (None, bits)]
        chosen = [replace(self, bits=bits, per_row=per_row) for bits in fitting[:1]]
        for each in chosen:
            if table is not None:
                padding = 2**each._known_bits - table.shape[1]
                object.__setattr__(each, "table", torch.cat([table, table[:, -1:].expand(-1, padding)], 1))
        return chosen

    def _refuse(self, rows: RowReader, shape: tuple[int, int], where: str) -> None:
        for chunk in row_chunks(*shape):
            self.check_values(self.split_groups(rows(chunk.start, chunk.stop)), where, chunk.start)
        values, most = palette(rows, shape), _most_values_of_a_row(rows, shape)
        found = f"more than {MOST_VALUES}" if values is None else str(len(values))
        in_row = f"more than {MOST_VALUES}" if most > MOST_VALUES else str(most)
        limit = MOST_VALUES if self.bits is None else 2**self.bits
        scope = {None: "in all or in each row", True: "in each row", False: "in all"}[self.per_row]
        raise UnsupportedError(
            f"[{self.name}] {where}: found {found} distinct values, up to {in_row} in a row, needs at most {limit} "
            f"{scope}, because this format stores a weight exactly. Choose a format that rounds (int, nf4), or leave "
            "this weight out of the pass (skip='...')."
        )

    def fit(self, groups: Tensor) -> Grid:
        """See `WeightFormat`: the values of each row, or those that `adapted` found in the whole weight."""
        scales = torch.ones(groups.shape[:2])
        if self.per_row:
            return Grid(scales, tables=_row_tables(groups.flatten(1), 2**self._known_bits))
        if self.table is None:
            raise OptionError(f"[{self.name}] has no table yet: call `adapted` with the whole weight first.")
        return Grid(scales, tables=self.table)

    def round(self, groups: Tensor, grid: Grid) -> Tensor:
        """See `WeightFormat`; a value that is in the table keeps it exactly."""
        flat = groups.flatten(1)
        tables = _tables(grid).expand(len(flat), -1).contiguous()
        above = torch.searchsorted(tables, flat.contiguous()).clamp_(1, tables.shape[1] - 1)
        is_below = flat - tables.gather(1, above - 1) < tables.gather(1, above) - flat
        return above.sub_(is_below.to(torch.int64)).to(torch.uint8).view(groups.shape)

    def values(self, codes: Tensor, grid: Grid) -> Tensor:
        """See `WeightFormat`."""
        tables = _tables(grid).expand(len(codes), -1)
        return tables.gather(1, codes.flatten(1).to(torch.int64)).view(codes.shape)

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """See `WeightFormat`."""
        return {"codes": pack_codes(codes, self._known_bits), "lut": _tables(grid)}

    def unpack(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Grid]:
        """See `WeightFormat`."""
        codes = unpack_codes(parts["codes"], self._known_bits)
        return codes, Grid(torch.ones(codes.shape[:2]), tables=parts["lut"])

    def decode(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
        """See `WeightFormat`; bits and tables are read off the parts if they are not known."""
        if (self.bits is None or self.per_row is None) and "lut" in parts and parts["lut"].dim() == 2:
            found: Literal[2, 4, 8] = next((bits for bits in BITS if 2**bits >= parts["lut"].shape[1]), 8)
            return Lut(self.bits or found, parts["lut"].shape[0] > 1).decode(parts, shape)
        return super().decode(parts, shape)

    def split_groups(self, weight: Tensor) -> Tensor:
        """See `WeightFormat`; padded with the last column, so that padding is no further value."""
        return super().split_groups(pad_with_last(weight, self.group))

    def call_linear(
        self, edit: Edit, x: fx.Node, parts: dict[str, fx.Node], bias: fx.Node | None, shape: tuple[int, int]
    ) -> fx.Node:
        """See `WeightFormat`."""
        layout = self._known_bits, self.group, shape[1]
        return edit.call(lut_linear, x, parts["codes"], parts["lut"], None, None, bias, *layout)

    def call_embedding(
        self, edit: Edit, indices: fx.Node, parts: dict[str, fx.Node], shape: tuple[int, int]
    ) -> fx.Node:
        """See `WeightFormat`."""
        layout = self._known_bits, self.group, shape[1]
        return edit.call(lut_embedding, indices, parts["codes"], parts["lut"], None, None, *layout)

    @property
    def _known_bits(self) -> int:
        if self.bits is None:
            raise OptionError(f"[{self.name}] bits are not known yet: call `adapted` with the whole weight first.")
        return self.bits


def _tables(grid: Grid) -> Tensor:
    assert grid.tables is not None, "a grid of another format"
    return grid.tables


def _row_tables(weight: Tensor, size: int) -> Tensor:
    """The distinct values of each row, rising, the last one repeated: `[n, K]` to `[n, size]` f32."""
    ordered = weight.sort(1).values
    rank = (ordered[:, 1:] != ordered[:, :-1]).cumsum(1)
    tables = ordered[:, -1:].repeat(1, size)
    tables[:, 0] = ordered[:, 0]
    return tables.scatter_(1, rank.clamp_(max=size - 1), ordered[:, 1:])


def _most_values_of_a_row(rows: RowReader, shape: tuple[int, int]) -> int:
    """Most distinct values that a row takes; a number above 256 once one takes more."""
    most = 0
    for chunk in (slice(0, 1), *row_chunks(*shape)):
        ordered = rows(chunk.start, chunk.stop).to(torch.float32).sort(1).values
        most = max(most, 1 + int((ordered[:, 1:] != ordered[:, :-1]).sum(1).max()) if shape[1] > 1 else 1)
        if most > MOST_VALUES:
            break
    return most
