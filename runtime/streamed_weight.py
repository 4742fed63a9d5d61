"""Weights that pass through the ring: what linears and embeddings of the torch target read in the place of a tensor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import torch
from torch import Tensor

from jettison.ir import ops
from jettison.ir.errors import ArtifactError, BugError
from jettison.ir.packed_parts import PackedParts
from jettison.ir.program import Program
from jettison.runtime.dense_weight import DenseWeight
from jettison.runtime.packed_linear import StoredWeight
from jettison.runtime.segment_file import SegmentFile
from jettison.runtime.segment_file_writer import Part
from jettison.runtime.streamed_reads import StreamedRead, streamed_reads
from jettison.runtime.table_rows import TableRows
from jettison.runtime.weight_store import KINDS, Slab, StoreTable, temporary_store
from jettison.runtime.weight_stream import WeightStream


@dataclass(frozen=True)
class WeightStore:
    """A store on this machine.

    Attributes:
        table: What is where.
        source: Its path, or the descriptor of a temporary file, which whoever opens it takes over.
    """

    table: StoreTable
    source: Path | int


class StreamedWeight:
    """A weight `[N, K]` that is read slab by slab whenever a linear wants it; see `PackedWeight`.

    Args:
        stream: Where its slabs come from.
        slabs: All rows.
        kind: Of the slabs, a key of `KINDS`.
        table: Where an embedding finds single rows; None if none looks any up.

    Attributes:
        nbytes: Bytes in the store that linears read.
    """

    def __init__(self, stream: WeightStream, slabs: tuple[Slab, ...], kind: str, table: StreamedTable | None) -> None:
        self._stream, self._table = stream, table
        self.rows = sum(slab.rows for slab in slabs)
        self._slabs = []
        for slab in slabs:
            weight = KINDS[kind].of_form(slab.form)
            if isinstance(weight, DenseWeight):
                weight.whole_rows = self.rows
            self._slabs.append(_OpenSlab(slab, weight))
        self.nbytes = sum(part.nbytes for slab in slabs for part in slab.parts.values())
        if table is not None and not slabs:
            self.nbytes = table.nbytes

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `PackedWeight`: the numbers of the weight in memory, since no kernel adds up across rows of it."""
        out = None
        for slab in self._slabs:
            weight = slab.open(self._stream.take(slab.segment))
            rows = slice(slab.start, slab.start + weight.rows)
            part = weight.linear(x, None if bias is None else bias[rows])
            if len(self._slabs) == 1:
                return part
            if out is None:
                out = part.new_empty(*x.shape[:-1], self.rows)
            out[..., rows] = part
        assert out is not None, "a linear reads it, so it has slabs"
        return out

    def lookup(self, indices: Tensor) -> Tensor:
        """See `PackedWeight`; in the dtype of the graph."""
        assert self._table is not None, "stored without rows to look up"
        return self._table.lookup(indices)

    def linear_of_rows(self, x: Tensor, slabs: Tensor, rows: int) -> Tensor:
        """Is not asked for: weights of which slabs are chosen are not streamed."""
        self._refuse()

    def linear_of_columns(self, x: Tensor, slabs: Tensor, columns: int) -> Tensor:
        """Is not asked for, like `linear_of_rows`."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise BugError("[stream] a weight of which slabs are chosen was streamed")


class _OpenSlab:
    """A slab, and its weight without tensors."""

    def __init__(self, slab: Slab, weight: StoredWeight) -> None:
        self.segment, self.start = slab.segment, slab.start
        self._parts, self._weight = slab.parts, weight

    def open(self, segment: Tensor) -> StoredWeight:
        """The weight of these rows over the bytes of their segment."""
        return self._weight.with_parts({name: part.of(segment) for name, part in self._parts.items()})


class StreamedTable:
    """Rows of a table on disk, looked up; see `PackedWeight.lookup`.

    Args:
        rows: Where they are.
        dtype: What the graph sees.
        packed: How they are packed; None for floating-point rows.
        nbytes: Bytes of the table.
    """

    def __init__(self, rows: TableRows, dtype: torch.dtype, packed: PackedParts | None, nbytes: int) -> None:
        self._rows, self._dtype, self._packed, self.nbytes = rows, dtype, packed, nbytes

    def lookup(self, indices: Tensor) -> Tensor:
        """`[...]` i64 to `[..., K]`.

        Raises:
            IndexError: An index is not in `[0, N)`.
        """
        flat = indices.reshape(-1)
        if bool(((flat < 0) | (flat >= self._rows.rows)).any()):
            raise IndexError(f"index out of range: the table has {self._rows.rows} rows")
        distinct, places = flat.unique(return_inverse=True)
        found = self._rows.read(distinct.tolist())
        if self._packed is None:
            rows = found["values"].to(self._dtype)[places]
        else:
            packed, zeros = self._packed, found.get("zeros")
            rows = ops.quantized_embedding(
                places, found["codes"], found["scales"], zeros, packed.bits, packed.group, packed.columns
            )
        return rows.view(*indices.shape, -1)


def open_streamed(program: Program, store: WeightStore | None) -> tuple[dict[str, StreamedWeight], WeightStream | None]:
    """The streamed weights of a program, by the name of the constant that stands for each, and their stream.

    Args:
        program: With a placement, or without.
        store: Where they are; None to write them to a temporary file first.

    Raises:
        ArtifactError: The store cannot be read, or belongs to another program.
        UnsupportedError: A constant is on disk that cannot be streamed.
        OptionError: The ring is smaller than a segment.
    """
    reads = streamed_reads(program)
    if not reads:
        return {}, None
    assert program.placement is not None, "or nothing is on disk"
    if store is None:
        store = WeightStore(*temporary_store(program))
    table = store.table
    file = SegmentFile(store.source, table.segments)
    _check(program, reads, table, file.shown)
    stream = WeightStream(file, table.order, program.placement.ring_bytes)
    weights = {}
    for read in reads:
        stored, rows = table.reads[read.name], None
        if read.is_table:
            packed = None if read.packed is None else read.packed.parts[0]
            nbytes = sum(part.nbytes for slab in stored.table for part in slab.parts.values())
            rows = StreamedTable(TableRows(file, stored.table), program.constants[read.name].dtype, packed, nbytes)
        weights[read.name] = StreamedWeight(stream, stored.slabs, stored.kind, rows)
    return weights, stream


def _check(program: Program, reads: list[StreamedRead], table: StoreTable, shown: str) -> None:
    """Refuse a store whose weights are not those of the program."""
    for read in reads:
        stored = table.reads.get(read.name)
        slabs = () if stored is None else stored.slabs + stored.table
        rows = program.constants[read.name].shape[0] if read.packed is None else sum(read.packed.rows)
        kinds = (bool(stored and stored.slabs), bool(stored and stored.table))
        if (
            any(not _fits(program, read, slab) for slab in slabs)
            or kinds != (read.is_multiplied, read.is_table)
            or any(
                part and part[-1].start + part[-1].rows != rows
                for part in (stored and (stored.slabs, stored.table)) or ()
            )
        ):
            raise ArtifactError(
                f"[{shown}] does not hold {read.name} as the program reads it. The artifact is damaged: copy it again, "
                "or write it again with `jettison optimize`."
            )


def _fits(program: Program, read: StreamedRead, slab: Slab) -> bool:
    if read.bitmap is not None:
        return all(slab.form.get(key) == getattr(read.bitmap, key) for key in ("columns", "bits", "group"))
    if read.packed is None:
        constant = program.constants[read.name]
        wanted = {"rows": slab.rows, "columns": constant.shape[1], "dtype": str(constant.stored_dtype)[6:]}
        return slab.form == wanted
    first = read.packed.parts[0]
    if "codes" in slab.parts and "scales" in slab.parts:
        return _is_rows(program, read, slab.parts)
    return all(slab.form.get(key, value) == value for key, value in (
        ("columns", first.columns), ("group", first.group), ("bits", first.bits),
    ))  # fmt: skip


def _is_rows(program: Program, read: StreamedRead, parts: dict[str, Part]) -> bool:
    """Whether these are rows of a packed table as the program defines it."""
    assert read.packed is not None, "of a packed table"
    first = read.packed.parts[0]
    for name in ("codes", "scales", "zeros"):
        constant = getattr(first, name)
        if (constant is None) != (name not in parts):
            return False
        if constant is not None:
            wanted = program.constants[constant]
            if (parts[name].dtype, parts[name].shape[1:]) != (wanted.dtype, wanted.shape[1:]):
                return False
    return True
