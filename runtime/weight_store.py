"""The file that weights are streamed from: slabs of rows in the layout of their kernels, in the order they are read.

A *slab* is some rows of a weight, about 4 MiB; a *segment* is one slab, or several small ones that follow each other.
Segments begin at multiples of 4096 bytes, as reads past the page cache need it, and the tensors in them at multiples of
64. What an embedding looks up of a packed table lies behind the segments of a step, row by row as the program defines
them: the layout of the kernel has a row in many places.

The layout of 4-bit weights is that of the processor which wrote the file: another one refuses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from jettison.ir.errors import ArtifactError, UnsupportedError
from jettison.ir.packed_parts import BitmapParts, JointWeight
from jettison.ir.program import Program
from jettison.runtime.bitmap_weight import BitmapWeight, pack_bitmap
from jettison.runtime.dense_weight import DenseWeight
from jettison.runtime.packed_linear import BagWeight, Int4Weight, StoredWeight, int4_interleave, pack_weight
from jettison.runtime.segment_file_writer import (
    BLOCK,
    Part,
    Segment,
    SegmentFileWriter,
    bytes_of,
    part_from_dict,
    segments_from_dict,
    written_to_temporary_file,
)
from jettison.runtime.streamed_reads import StreamedRead, read_order, streamed_reads

ALIGNMENT = 64
# Of a segment, at most where rows allow it: reads of 4 MiB by two threads are as fast as any (see `weight_stream.py`).
SEGMENT_BYTES = 4 << 20
# A ring of so many segments reads ahead while one is computed with and the next is waited for.
SEGMENTS_OF_RING = 6
KINDS: dict[str, type[StoredWeight]] = {"dense": DenseWeight, "int4": Int4Weight, "bag": BagWeight,
                                       "bitmap": BitmapWeight}  # fmt: skip


@dataclass(frozen=True)
class Slab:
    """Some rows of a weight.

    Attributes:
        segment: Number of the segment it is in.
        start: First row.
        form: Of the weight that these rows are.
        parts: Its tensors.
    """

    segment: int
    start: int
    form: dict[str, Any]
    parts: dict[str, Part]

    @property
    def rows(self) -> int:
        """How many rows."""
        return int(self.form["rows"])


@dataclass(frozen=True)
class StoredRead:
    """A weight of the store.

    Attributes:
        kind: Of its slabs, a key of `KINDS`.
        slabs: All of its rows, for linears; none if no linear reads it.
        table: All of its rows, for embeddings; none if no embedding reads it. Those of a dense weight are its slabs.
    """

    kind: str
    slabs: tuple[Slab, ...]
    table: tuple[Slab, ...]


@dataclass(frozen=True)
class StoreTable:
    """What is where in a store.

    Attributes:
        segments: In the order of the file.
        order: Numbers of the segments in the order in which a step reads them.
        reads: Weights by the name of `StreamedRead`.
        int4_interleave: Rows that the int4 kernel interleaves on the processor that wrote it; 0 without such weights.
    """

    segments: tuple[Segment, ...]
    order: tuple[int, ...]
    reads: dict[str, StoredRead]
    int4_interleave: int

    @property
    def step_bytes(self) -> int:
        """Bytes that a step reads."""
        return sum(self.segments[number].padded for number in self.order)

    @property
    def file_bytes(self) -> int:
        """Bytes of the file."""
        return max((segment.offset + segment.padded for segment in self.segments), default=0)


def segment_bytes(ring_bytes: int) -> int:
    """How large segments are made for a ring."""
    return min(SEGMENT_BYTES, max(BLOCK, ring_bytes // SEGMENTS_OF_RING))


def write_store(program: Program, file: IO[bytes], on_bytes: Callable[[int], object] | None = None) -> StoreTable:
    """Write the weights of a program that are placed on disk, a slab at a time.

    Args:
        program: With a `placement`.
        file: Where to write; empty.
        on_bytes: Called with the number of bytes after each write.

    Returns:
        What is where.

    Raises:
        UnsupportedError: A constant is on disk that cannot be streamed.
        OSError: The file cannot be written.
    """
    reads = streamed_reads(program)
    assert program.placement is not None, "or nothing is on disk"
    most = segment_bytes(program.placement.ring_bytes)
    writer = _Writer(file, most, on_bytes)
    order = read_order(program, reads)
    found, is_step = {}, True
    for read in reads:
        if is_step and read.name not in order:
            writer.close()  # what a step does not read lies apart
            is_step = False
        kind, slabs = "dense", []
        if read.packed is None or read.is_multiplied:
            kind, rows, total = _kernel_rows(program, read)
            slabs = [writer.add(start, weight) for start, weight in _cut(rows, total, most)]
        # The rows of a dense table are its slabs; those of a packed one come behind.
        table = slabs if read.is_table and read.packed is None else []
        found[read.name] = StoredRead(kind, tuple(slabs) if read.is_multiplied else (), tuple(table))
    writer.close()
    for read in reads:
        if read.is_table and read.packed is not None:
            table = writer.add_rows(program, read.packed, most)
            found[read.name] = dataclasses.replace(found[read.name], table=tuple(table))
    writer.close()
    by_slab = [slab.segment for name in order for slab in found[name].slabs]
    steps = tuple(number for index, number in enumerate(by_slab) if not index or number != by_slab[index - 1])
    interleave = int4_interleave() if any(read.kind == "int4" for read in found.values()) else 0
    return StoreTable(tuple(writer.segments), steps, found, interleave)


_Rows = Callable[[int, int], StoredWeight]


def _kernel_rows(program: Program, read: StreamedRead) -> tuple[str, _Rows, int]:
    """The kind of a weight's slabs, a function that makes one of some rows, and how many rows there are."""
    if read.bitmap is not None:
        return _bitmap_rows(program, read.bitmap)
    if read.packed is None:
        constant = program.constants[read.name]
        return "dense", lambda start, stop: DenseWeight(constant.stored_rows(start, stop)), constant.shape[0]
    joint, whole = read.packed, sum(read.packed.rows)
    first = joint.parts[0]

    def rows(start: int, stop: int) -> StoredWeight:
        codes, scales = (_joint_rows(program, joint, part, start, stop) for part in ("codes", "scales"))
        zeros = None if first.zeros is None else _joint_rows(program, joint, "zeros", start, stop)
        with torch.no_grad():
            weight = pack_weight(
                codes, scales, zeros, first.bits, first.group, first.columns, is_table=False,
                whole_rows=joint.whole_rows or whole,
            )  # fmt: skip
        if weight is None:
            raise UnsupportedError(
                f"[placement] {first.codes} is on disk, and PyTorch has no kernel for {first.bits} bits in groups of "
                f"{first.group} on this processor: it would be decoded as a whole at every step. Leave it in memory."
            )
        return weight

    sample = rows(0, min(whole, 64))
    return next(name for name, kind in KINDS.items() if isinstance(sample, kind)), rows, whole


def _bitmap_rows(program: Program, parts: BitmapParts) -> tuple[str, _Rows, int]:
    """The same of a bitmap and values, of which each slab is a piece as it is."""
    names = {"bitmap": parts.bitmap, "starts": parts.starts, "values": parts.values, "scales": parts.scales}
    held = {part: None if name is None else program.constants[name].value() for part, name in names.items()}
    weight = pack_bitmap(**held, bits=parts.bits, group=parts.group, in_features=parts.columns)
    if weight is None:
        raise UnsupportedError(
            f"[placement] {parts.bitmap} is on disk, and no kernel for bitmaps was compiled on this processor: it "
            "would be expanded as a whole at every step. Leave it in memory."
        )
    return "bitmap", weight.rows_between, weight.rows


def _joint_rows(program: Program, joint: JointWeight, part: str, start: int, stop: int) -> Tensor:
    """Rows of a part of weights that are read as one, row after row."""
    pieces, offset = [], 0
    for parts, rows in zip(joint.parts, joint.rows, strict=True):
        low, high = max(start - offset, 0), min(stop - offset, rows)
        if low < high:
            pieces.append(program.constants[getattr(parts, part)].rows(low, high))
        offset += rows
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _cut(rows: _Rows, total: int, most: int) -> Iterator[tuple[int, StoredWeight]]:
    """Slabs of about `most` bytes, of nearly the same number of rows."""
    sample = rows(0, min(total, 512))
    granule = sample.granule
    granule_bytes = max(1, sum(part.nbytes for part in sample.parts().values()) * granule // sample.rows)
    granules = -(-total // granule)
    count = -(-granules // max(1, most // granule_bytes))
    for number in range(count):
        start, stop = (granules * edge // count * granule for edge in (number, number + 1))
        yield start, rows(start, min(stop, total))


class _Writer(SegmentFileWriter):
    """Appends slabs; small ones share a segment."""

    def __init__(self, file: IO[bytes], most: int, on_bytes: Callable[[int], object] | None) -> None:
        super().__init__(file, on_bytes)
        self._most = most

    def add(self, start: int, weight: StoredWeight) -> Slab:
        """Append some rows of a weight."""
        return self._append(start, weight.form, weight.parts())

    def add_rows(self, program: Program, joint: JointWeight, most: int) -> list[Slab]:
        """Append the rows of a packed table as the program defines them."""
        total = sum(joint.rows)
        names = [part for part in ("codes", "scales", "zeros") if getattr(joint.parts[0], part) is not None]
        row_bytes = sum(_joint_rows(program, joint, part, 0, 1).nbytes for part in names)
        step = max(1, most // row_bytes)
        slabs = []
        for start in range(0, total, step):
            stop = min(start + step, total)
            parts = {part: _joint_rows(program, joint, part, start, stop) for part in names}
            slabs.append(self._append(start, {"rows": stop - start}, parts))
        return slabs

    def _append(self, start: int, form: dict[str, Any], tensors: Mapping[str, Tensor]) -> Slab:
        size = sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors.values())
        if self.used and self.used + size > self._most:
            self.close()
        parts = {}
        for name, tensor in tensors.items():
            self.write(bytes(-self.used % ALIGNMENT))
            parts[name] = Part(tensor.dtype, tuple(tensor.shape), self.used)
            self.write(bytes_of(tensor))
        return Slab(len(self.segments), start, form, parts)


def temporary_store(program: Program) -> tuple[StoreTable, int]:
    """Write the store of a program that was not saved to a file without a name, which goes with its descriptor.

    Args:
        program: With a `placement`.

    Returns:
        What is where, and the descriptor.

    Raises:
        UnsupportedError: As `write_store`.
        ArtifactError: The temporary folder has no room.
    """
    needed = sum(program.constants[name].stored_bytes for read in streamed_reads(program) for name in read.constants)

    def write(file: IO[bytes]) -> tuple[StoreTable, int]:
        table = write_store(program, file)
        return table, table.file_bytes

    return written_to_temporary_file(needed, write)


def table_as_dict(table: StoreTable) -> dict[str, Any]:
    """What `table_from_dict` reads, as JSON-ready values."""
    plain = dataclasses.asdict(table)
    for name, read in table.reads.items():
        for kind in ("slabs", "table"):
            for slab, own in zip(plain["reads"][name][kind], getattr(read, kind), strict=True):
                slab["parts"] = {part: held.as_dict() for part, held in own.parts.items()}
    return {"format": "jettison stream", "version": 1, **plain}


def table_from_dict(document: Any, path: Path) -> StoreTable:
    """Read what a store says of itself; trusts nothing in it.

    Args:
        document: Of JSON.
        path: Of the file, for messages.

    Raises:
        ArtifactError: It is damaged, or written for another processor or by a newer version.
    """
    try:
        if document["format"] != "jettison stream" or document["version"] != 1:
            raise ArtifactError(
                f"[{path}] found version {document['version']!r} of {document['format']!r}; needed version 1 of "
                "'jettison stream'. Upgrade with `pip install -U jettison`."
            )
        segments = segments_from_dict(document["segments"])
        reads = {name: _read_from_dict(each, segments) for name, each in document["reads"].items()}
        order = tuple(int(number) for number in document["order"])
        table = StoreTable(segments, order, reads, int(document["int4_interleave"]))
        if not all(0 <= number < len(segments) for number in order):
            raise ValueError("an order of other segments")
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ArtifactError(
            f"[{path}] found {type(error).__name__}: {str(error)[:200]}; needed the table of a weight store. The "
            "artifact is damaged: copy it again, or write it again with `jettison optimize`."
        ) from error
    if table.int4_interleave and table.int4_interleave != int4_interleave():
        raise ArtifactError(
            f"[{path}] holds 4-bit weights for processors whose kernel interleaves {table.int4_interleave} rows; this "
            f"one interleaves {int4_interleave()}. Run `jettison optimize` on this machine."
        )
    return table


def _read_from_dict(value: Any, segments: Sequence[Segment]) -> StoredRead:
    slabs = [_slab_from_dict(each, segments) for each in value["slabs"]]
    for slab in slabs:
        wanted = KINDS[value["kind"]].of_form(slab.form).layout()
        if wanted != {name: (part.dtype, part.shape) for name, part in slab.parts.items()}:
            raise ValueError(f"the parts {slab.parts} where {wanted} are needed")
    table = [_slab_from_dict(each, segments) for each in value["table"]]
    for rows in (slabs, table):
        ends = [0, *(slab.start + slab.rows for slab in rows)]
        if any(slab.start != end or slab.rows < 1 for slab, end in zip(rows, ends, strict=False)):
            raise ValueError("rows that do not follow each other")
    if any(part.shape[0] != slab.rows for slab in table for part in slab.parts.values()):
        raise ValueError("a table with another number of rows")
    return StoredRead(value["kind"], tuple(slabs), tuple(table))


def _slab_from_dict(value: Any, segments: Sequence[Segment]) -> Slab:
    size = segments[value["segment"]].bytes
    parts = {name: part_from_dict(part, size) for name, part in value["parts"].items()}
    return Slab(int(value["segment"]), int(value["start"]), dict(value["form"]), parts)
