"""Writes segments: what is read at once from a file of streamed weights, and whose bytes are hashed together."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, TypeVar

import torch
from torch import Tensor

from jettison.ir.errors import ArtifactError

Table = TypeVar("Table")
# Reads past the page cache begin and end at multiples of it.
BLOCK = 4096


@dataclass(frozen=True)
class Segment:
    """What is read at once: where it begins in the file, its bytes without padding, and their SHA-256."""

    offset: int
    bytes: int
    sha256: str

    @property
    def padded(self) -> int:
        """Bytes with padding to whole blocks, as they are read."""
        return -(-self.bytes // BLOCK) * BLOCK


@dataclass(frozen=True)
class Part:
    """A tensor in a segment, or in what several of them hold; `offset` counts from the start of it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def of(self, data: Tensor) -> Tensor:
        """The tensor, given the bytes it is in: a view."""
        return data[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)

    def as_dict(self) -> dict[str, Any]:
        """What `part_from_dict` reads, as JSON-ready values."""
        return {"dtype": str(self.dtype).removeprefix("torch."), "shape": list(self.shape), "offset": self.offset}


def part_from_dict(value: Any, size: int) -> Part:
    """Read a part of something of `size` bytes; trusts nothing in it.

    Raises:
        ValueError: It does not lie in there.
    """
    dtype = getattr(torch, value["dtype"])
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"the dtype {value['dtype']}")
    part = Part(dtype, tuple(int(length) for length in value["shape"]), int(value["offset"]))
    end = part.offset + part.nbytes
    if min(part.offset, *part.shape) < 0 or end > size:
        raise ValueError(f"a part that ends at byte {end} of {size}")
    return part


def segments_from_dict(document: Any) -> tuple[Segment, ...]:
    """Read what a file holds; trusts nothing in it.

    Raises:
        ValueError: They do not follow each other.
    """
    segments = tuple(Segment(int(each["offset"]), int(each["bytes"]), str(each["sha256"])) for each in document)
    ends = [0, *(segment.offset + segment.padded for segment in segments)]
    if any(s.offset != end or s.bytes < 1 for s, end in zip(segments, ends, strict=False)):
        raise ValueError("segments that do not lie one behind the other")
    return segments


class SegmentFileWriter:
    """Appends to a file; `close` ends a segment.

    Args:
        file: Where to write; empty.
        on_bytes: Called with the number of bytes after each write.

    Attributes:
        segments: Those that have ended.
        used: Bytes of the one that has not.
    """

    def __init__(self, file: IO[bytes], on_bytes: Callable[[int], object] | None) -> None:
        self.segments: list[Segment] = []
        self.used = 0
        self._file, self._on_bytes = file, on_bytes
        self._offset, self._sha = 0, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        """Append to the segment."""
        self._file.write(data)
        self._sha.update(data)
        self.used += len(data)
        if self._on_bytes is not None:
            self._on_bytes(len(data))

    def fill(self, data: memoryview, most: int) -> None:
        """Append as `write`, and end the segment whenever it has `most` bytes; it has no more."""
        while data:
            taken = min(len(data), most - self.used)
            self.write(data[:taken])
            data = data[taken:]
            if self.used == most:
                self.close()

    def close(self) -> None:
        """End the segment, if anything is in it; the next one begins at a block."""
        if not self.used:
            return
        segment = Segment(self._offset, self.used, self._sha.hexdigest())
        self._file.write(bytes(segment.padded - segment.bytes))
        self.segments.append(segment)
        self._offset += segment.padded
        self.used, self._sha = 0, hashlib.sha256()


def bytes_of(tensor: Tensor) -> memoryview:
    """The bytes of a tensor, row after row; of the tensor itself where it is contiguous."""
    return memoryview(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy())


def written_to_temporary_file(needed: int, write: Callable[[IO[bytes]], tuple[Table, int]]) -> tuple[Table, int]:
    """Write to a file without a name, which goes with its descriptor.

    Args:
        needed: Bytes that it takes about; a disk that has no room for them is an error before the work.
        write: Writes, and returns what it says of the file, and the bytes of it.

    Returns:
        What `write` said, and the descriptor.

    Raises:
        ArtifactError: The temporary folder has no room.
    """
    folder = tempfile.gettempdir()
    with tempfile.TemporaryFile(prefix="jettison-", suffix=".stream", buffering=0) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, max(1, needed))
            with os.fdopen(os.dup(file.fileno()), "wb") as writing:
                table, size = write(writing)
            os.ftruncate(file.fileno(), size)
        except OSError as error:
            raise ArtifactError(
                f"[stream] {folder}: {needed:,} bytes of streamed weights cannot be written: {error.strerror}. Free "
                "some space there, set TMPDIR to a folder on another disk, or save the model and load it."
            ) from error
        return table, os.dup(file.fileno())
