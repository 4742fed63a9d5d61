"""Single rows of a table in a weight store: the blocks around each of them, read past the page cache, once per row.

A step looks one row up, a prompt as many as it has different tokens; the ring would have to pass the whole table by for
them. The first row of a segment reads all of it, to check its hash.
"""

from __future__ import annotations

import bisect
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from jettison.runtime.segment_file import SegmentFile
from jettison.runtime.segment_file_writer import BLOCK, Part
from jettison.runtime.weight_store import Slab

_BUFFER_BYTES = 256 << 10


class TableRows:
    """Reads rows of a table.

    Args:
        file: The store.
        slabs: All rows of the table; the first axis of each part is that of the rows.
    """

    def __init__(self, file: SegmentFile, slabs: Sequence[Slab]) -> None:
        self._file, self._slabs = file, slabs
        self._starts = [slab.start for slab in slabs]
        self.rows = slabs[-1].start + slabs[-1].rows
        widest = max(part.nbytes // slab.rows for slab in slabs for part in slab.parts.values())
        size = max(_BUFFER_BYTES, -(-widest // BLOCK) * BLOCK + 2 * BLOCK)
        self._buffer = memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))

    def read(self, rows: Sequence[int]) -> dict[str, Tensor]:
        """The parts of some rows, `[n, ...]` each.

        Args:
            rows: Which, in any order; each in the table.

        Raises:
            ArtifactError: They cannot be read.
        """
        first = self._slabs[0].parts
        found = {name: torch.empty(len(rows), *part.shape[1:], dtype=part.dtype) for name, part in first.items()}
        for place, row in enumerate(rows):
            slab = self._slabs[bisect.bisect_right(self._starts, row) - 1]
            self._file.check(slab.segment, self._buffer)
            for name, part in slab.parts.items():
                found[name][place] = self._row(slab, part, row - slab.start)
        return found

    def _row(self, slab: Slab, part: Part, row: int) -> Tensor:
        """A view of the buffer, valid until the next one."""
        row_bytes = part.nbytes // slab.rows
        start = self._file.segments[slab.segment].offset + part.offset + row * row_bytes
        aligned = start // BLOCK * BLOCK
        size = -(-(start + row_bytes - aligned) // BLOCK) * BLOCK
        self._file.read_blocks(aligned, self._buffer[:size])
        own = self._buffer[start - aligned : start - aligned + row_bytes]
        # A row may begin anywhere: its bytes are copied to where a tensor of its type can.
        return torch.frombuffer(bytearray(own), dtype=part.dtype).view(part.shape[1:])
