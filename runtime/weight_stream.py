"""Reads weights ahead of who computes with them, through a ring of buffers of a fixed size.

Threads read the segments of a step one after the other, and after the last one the first again: the next token
needs it, and where a prompt and a step have the same order nothing is read in vain. A segment takes a stretch of the
ring when its read begins and gives it back when the next one is asked for, so what is held never exceeds the ring.
Segments come back in order; whoever asks for another one than the next starts the stream anew there, which is slower
and correct.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from jettison.ir.errors import ArtifactError, OptionError
from jettison.runtime.segment_file import SegmentFile
from jettison.runtime.transfer_memory import transfer_memory

# Threads that read at once, 4 MiB each. One reaches the rate of the disk while nothing else runs; beside a computation
# that keeps every processor busy, a read that is over waits for its thread, and others must be under way.
READERS = 4


@dataclass
class StreamStatistics:
    """What a stream did since it was opened.

    Attributes:
        bytes_read: Read from the file, padding and what was read ahead included.
        bytes_taken: Of segments that were computed with.
        seconds_reading: While at least one read was under way.
        seconds_waiting: While a computation waited for a segment.
        seconds_running: While entries ran, waiting included.
        restarts: How often another segment than the next one was asked for.
    """

    bytes_read: int = 0
    bytes_taken: int = 0
    seconds_reading: float = 0.0
    seconds_waiting: float = 0.0
    seconds_running: float = 0.0
    restarts: int = 0

    @property
    def read_gb_per_s(self) -> float:
        """Gigabytes per second while reading."""
        return self.bytes_read / max(self.seconds_reading, 1e-9) / 1e9

    @property
    def overlap(self) -> float:
        """How much of what can be done at once was: reading while computing, over the shorter of the two."""
        computing = self.seconds_running - self.seconds_waiting
        most = min(self.seconds_reading, computing)
        return min(1.0, max(0.0, self.seconds_reading - self.seconds_waiting) / max(most, 1e-9))

    def since(self, before: StreamStatistics) -> StreamStatistics:
        """What was done since an earlier copy."""
        names = (field.name for field in fields(self))
        return StreamStatistics(**{name: getattr(self, name) - getattr(before, name) for name in names})


@dataclass
class _Stretch:
    """A segment in the ring, or on its way there."""

    segment: int
    start: int
    is_first: bool
    is_ready: bool = False
    error: BaseException | None = None


class WeightStream:
    """Segments of a store, in the order of a step; used by one thread at a time.

    Closed by `close`, when nobody refers to it any more, and when the interpreter ends: no thread outlives it.

    Args:
        file: The store.
        order: Numbers of its segments in the order in which a step reads them.
        ring_bytes: Of the ring; page aligned memory of the process.
        pin: Called with the ring, `[n]` u8, before anything is read into it.

    Raises:
        OptionError: The ring is smaller than a segment, or what `pin` raises.
        ArtifactError: The system refuses its memory or threads.
    """

    def __init__(
        self,
        file: SegmentFile,
        order: Sequence[int],
        ring_bytes: int,
        pin: Callable[[Tensor], None] = lambda _: None,
    ) -> None:
        # Tables whose rows are looked up need no ring.
        largest = max((file.segments[number].padded for number in order), default=0)
        if ring_bytes < largest:
            raise OptionError(
                f"[placement] ring_bytes={ring_bytes:,}: needed at least {largest:,}, one segment of {file.shown}, and "
                f"{2 * largest:,} to read one while another is computed with. Give the ring more, and pin less."
            )
        try:
            self._reading = _Reading(file, tuple(order), ring_bytes // mmap.PAGESIZE * mmap.PAGESIZE, pin)
        except (OSError, RuntimeError) as error:
            raise ArtifactError(
                f"[placement] ring_bytes={ring_bytes:,}: the system gives no memory or threads for it ({error}). "
                "Give the ring less, or raise the limit of the process (`ulimit -d`, `ulimit -u`)."
            ) from error
        self._close = weakref.finalize(self, self._reading.close)

    @property
    def step_bytes(self) -> int:
        """Bytes that a step reads."""
        return self._reading.step_bytes

    @property
    def statistics(self) -> StreamStatistics:
        """A copy of the counters."""
        return self._reading.counted()

    def take(self, segment: int) -> Tensor:
        """The bytes of a segment, valid until `release` or until another one is taken.

        Args:
            segment: Its number.

        Returns:
            `[n]` u8, a view of the ring; not to be written to.

        Raises:
            ArtifactError: It could not be read. The next call tries again.
        """
        return self._reading.take(segment)

    def release(self) -> None:
        """Give back what was taken."""
        self._reading.release()

    @contextmanager
    def running(self) -> Iterator[None]:
        """An entry runs: its time is counted, and at its end what it took is given back."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self._reading.end_run(time.perf_counter() - started)

    def close(self) -> None:
        """End the threads and give the ring back; what was taken is not to be used any more."""
        self._close()


class _Reading:
    """What the threads share; they keep it alive, and not the `WeightStream`."""

    def __init__(
        self, file: SegmentFile, order: tuple[int, ...], ring_bytes: int, pin: Callable[[Tensor], None]
    ) -> None:
        self._file, self._order, self._ring_bytes = file, order, ring_bytes
        # Private, so that it counts as memory of this process; a child of a fork must not share what a disk writes to.
        ring = transfer_memory(ring_bytes)
        if hasattr(mmap, "MADV_DONTFORK"):
            ring.madvise(mmap.MADV_DONTFORK)
        self._memory = memoryview(ring)
        self._bytes = torch.frombuffer(ring, dtype=torch.uint8)
        pin(self._bytes)
        self._changed = threading.Condition()
        self._stretches: deque[_Stretch] = deque()
        # Where in the order the next read is; a segment outside of it is read alone. None: nothing more is read.
        self._next: int | None = 0 if order else None
        self._alone: int | None = None
        self._head = self._under_way = 0
        self._is_held = self._is_closed = False
        self._counters, self._read_since = StreamStatistics(), 0.0
        self._process = os.getpid()
        self._threads = [
            threading.Thread(target=self._run, name=f"weight-reader-{number}", daemon=True) for number in range(READERS)
        ]
        try:
            for thread in self._threads:
                thread.start()
        except RuntimeError:  # those that did start end
            self._is_closed = True
            raise

    # --- the thread that computes

    def take(self, segment: int) -> Tensor:
        if self._is_closed or os.getpid() != self._process:
            raise ArtifactError(
                f"[{self._file.shown}] its stream is closed, or was opened by another process. Load the model again, "
                "in the process that runs it."
            )
        with self._changed:
            if self._is_held and self._stretches[0].segment == segment:
                return self._view(self._stretches[0])
            self._release()
            if self._expected() != segment:
                self._restart(segment)
            started = time.perf_counter()
            while not self._stretches or not self._stretches[0].is_ready:
                self._changed.wait()
            self._counters.seconds_waiting += time.perf_counter() - started
            first = self._stretches[0]
            if first.error is not None:
                self._stop()
                self._stretches.clear()
                raise first.error
            self._is_held = True
            self._counters.bytes_taken += self._file.segments[segment].padded
            return self._view(first)

    @property
    def step_bytes(self) -> int:
        return sum(self._file.segments[number].padded for number in self._order)

    def release(self) -> None:
        with self._changed:
            self._release()

    def end_run(self, seconds: float) -> None:
        with self._changed:
            self._release()
            self._counters.seconds_running += seconds

    def counted(self) -> StreamStatistics:
        with self._changed:
            now = replace(self._counters)
            if self._under_way:
                now.seconds_reading += time.perf_counter() - self._read_since
            return now

    def close(self) -> None:
        if os.getpid() != self._process:
            return  # the child of a fork has none of the threads, and a lock that one of them may have held
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        # The collector may run in one of the threads, which then holds what the others wait for: all end by themselves.
        if threading.current_thread() not in self._threads:
            for thread in self._threads:
                thread.join()
            self._stretches.clear()

    def _view(self, stretch: _Stretch) -> Tensor:
        return self._bytes[stretch.start : stretch.start + self._file.segments[stretch.segment].bytes]

    def _release(self) -> None:
        if self._is_held:
            self._is_held = False
            self._stretches.popleft()
            self._changed.notify_all()

    def _expected(self) -> int | None:
        """The segment that comes next by itself."""
        if self._stretches:
            return self._stretches[0].segment
        return self._alone if self._next is None else self._order[self._next]

    def _stop(self) -> None:
        """Begin no further read, and wait for those under way: they write to the ring."""
        self._next = self._alone = None
        while self._under_way:
            self._changed.wait()

    def _restart(self, segment: int) -> None:
        self._stop()
        self._stretches.clear()
        self._head = 0
        if segment in self._order:
            self._next = self._order.index(segment)
        else:
            self._alone = segment
        self._counters.restarts += 1
        self._changed.notify_all()

    # --- the threads that read

    def _run(self) -> None:
        while (stretch := self._begin()) is not None:
            error: BaseException | None = None
            try:
                if stretch.is_first:
                    self._file.check_unchanged()
                size = self._file.segments[stretch.segment].padded
                self._file.read(stretch.segment, self._memory[stretch.start : stretch.start + size])
            except BaseException as caught:
                error = caught  # for the thread that waits
            with self._changed:
                self._end(stretch, error)

    def _begin(self) -> _Stretch | None:
        """The next segment to read, when there is room for it; None when the stream is closed."""
        with self._changed:
            while not self._is_closed:
                stretch = self._reserved()
                if stretch is not None:
                    if not self._under_way:
                        self._read_since = time.perf_counter()
                    self._under_way += 1
                    return stretch
                self._changed.wait()
        return None

    def _reserved(self) -> _Stretch | None:
        segment = self._alone if self._next is None else self._order[self._next]
        if segment is None:
            return None
        size = self._file.segments[segment].padded
        start = self._room(size)
        if start is None:
            return None
        stretch = _Stretch(segment, start, is_first=self._alone is not None or self._next == 0 or not self._stretches)
        if self._next is None:
            self._alone = None
        else:
            self._next = (self._next + 1) % len(self._order)
        self._head = start + size
        self._stretches.append(stretch)
        return stretch

    def _room(self, size: int) -> int | None:
        """Where so many bytes are free behind the last stretch; they have to lie in one piece."""
        if not self._stretches:
            return 0 if size <= self._ring_bytes else None
        tail = self._stretches[0].start
        if self._head > tail:
            if self._head + size <= self._ring_bytes:
                return self._head
            return 0 if size <= tail else None
        return self._head if self._head + size <= tail else None

    def _end(self, stretch: _Stretch, error: BaseException | None) -> None:
        stretch.error, stretch.is_ready = error, True
        self._under_way -= 1
        self._counters.bytes_read += self._file.segments[stretch.segment].padded
        if not self._under_way:
            self._counters.seconds_reading += time.perf_counter() - self._read_since
        self._changed.notify_all()
