"""From a file to the ring on a device: read ahead into pinned memory, and copied on as the pieces come.

Threads read, a stream of the GPU copies, another one computes. The CPU alone knows when a piece has been read, so the
thread that launches waits for it where a weight is needed; reading goes on meanwhile. None of this can be recorded as a
CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from jettison.ir.errors import BugError
from jettison.ir.placement import READ_AHEAD_BYTES
from jettison.runtime.device_copies import Copies
from jettison.runtime.segment_file import SegmentFile
from jettison.runtime.weight_stream import StreamStatistics, WeightStream


class DiskCopies:
    """Segments of a file that go to a device.

    Args:
        file: The store.
        copies: What copies them on.
    """

    def __init__(self, file: SegmentFile, copies: Copies) -> None:
        self._file, self._copies = file, copies
        self._stream: WeightStream | None = None
        self._last: Any = None

    @property
    def statistics(self) -> StreamStatistics:
        """Of reading; waiting is that of the thread that launches."""
        return StreamStatistics() if self._stream is None else self._stream.statistics

    def open(self, order: Sequence[int]) -> None:
        """Begin to read.

        Args:
            order: Numbers of the segments that steps read, in their order.

        Raises:
            ArtifactError: The system refuses memory or threads.
            OptionError: It cannot be pinned.
        """
        sizes = [segment.padded for segment in self._file.segments]
        size = min(max(2 * max(sizes), READ_AHEAD_BYTES), sum(sizes))
        self._stream = WeightStream(self._file, order, size, self._copies.pin)

    def copy(self, segments: Sequence[int], target: Tensor, after: Sequence[Any]) -> None:
        """Copy some segments, one behind the other; waits until the last of them is on its way.

        Args:
            segments: Their numbers.
            target: Where to: `[n]` u8 on the device, as many bytes as they have.
            after: Marks that have to be reached before.

        Raises:
            ArtifactError: One cannot be read, or is not what was written.
        """
        if self._stream is None:
            raise BugError("[stream] a weight was copied from disk before its file was opened")
        start = 0
        for number in segments:
            if self._last is not None:
                self._copies.settle(self._last)  # the stretch that it read is given back now
            piece = self._stream.take(number)
            self._copies.begin(target[start : start + len(piece)], piece, after)
            self._last, after = self._copies.copied(), ()
            start += len(piece)
