"""Reads the weights of segments before they run, as far ahead as a ring of bytes allows, and drops them afterwards.

One thread reads, in the order in which segments run and over the end of a step into the next. Bytes count from before
they are read until after they are dropped, so that never more than the ring are in memory.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from jettison.runtime.mapped_weights import Piece

Chain = Sequence[Sequence[Piece]]
# Pieces that the disk is asked for before the first of them is waited for.
_REQUESTED = 4


@dataclass
class ReadStatistics:
    """What was read, since the start.

    Attributes:
        bytes_read: Of weights that were read ahead.
        read_seconds: During which the reading thread had something to read or to drop.
        waited_seconds: That the computing thread waited for it.
        most_bytes: That were in memory at once.
    """

    bytes_read: int = 0
    read_seconds: float = 0.0
    waited_seconds: float = 0.0
    most_bytes: int = 0

    @property
    def bytes_per_second(self) -> float:
        """While it was reading."""
        return self.bytes_read / self.read_seconds if self.read_seconds else 0.0


class ReadAhead:
    """Keeps the weights of the next segments in memory.

    Used by one thread at a time: `wait` for a segment, run it, `release` it. The thread that reads holds nothing that
    holds this object: it ends with it, and with the process.

    Args:
        ring_bytes: That may be in memory at once, at least as many as the largest segment has.

    Attributes:
        statistics: What was read so far.
    """

    def __init__(self, ring_bytes: int) -> None:
        self.statistics = ReadStatistics()
        self._ring = _Ring(ring_bytes, self.statistics)
        self._thread: threading.Thread | None = None
        self._stop = weakref.finalize(self, _Ring.stop, self._ring)

    def wait(self, chain: Chain, index: int) -> None:
        """Return when a segment is in memory.

        Args:
            chain: Pieces of every segment that a step runs, in order; the same object at every call.
            index: Which segment; one that does not follow the last one begins anew.

        Raises:
            ArtifactError: Something could not be read.
        """
        if self._thread is None and self._stop.alive:
            self._thread = threading.Thread(target=self._ring.read, name="jettison-read-ahead", daemon=True)
            self._thread.start()
        started = time.perf_counter()
        try:
            self._ring.wait(chain, index)
        finally:
            self.statistics.waited_seconds += time.perf_counter() - started

    def release(self) -> None:
        """The segment that was waited for has run."""
        self._ring.release()

    def restart(self) -> None:
        """A step was broken off: what was read is dropped, and the next one begins anew."""
        self._ring.restart((), 0)

    def close(self) -> None:
        """End the thread, and wait until it has."""
        self._stop()
        if self._thread is not None:
            self._thread.join()


class _Ring:
    """What the two threads share. Segments are numbered over all steps: number n is the n-th that runs."""

    def __init__(self, ring_bytes: int, statistics: ReadStatistics) -> None:
        self._changed = threading.Condition()
        self._ring_bytes, self._statistics = ring_bytes, statistics
        self._chain: Chain = ()
        self._first = self._needed = 0  # the first that ran, and the next that will
        self._asked = 0  # of it and those behind it, not all pieces were asked for
        self._place = 0  # the next of its pieces
        self._missing: dict[int, int] = {}  # pieces that were asked for and are not there
        self._held: dict[int, list[Piece]] = {}
        self._over: list[Piece] = []
        self._bytes = self._restarts = 0
        self._keeps_all = self._is_stopped = False
        self._error: BaseException | None = None

    def wait(self, chain: Chain, index: int) -> None:
        """See `ReadAhead.wait`."""
        with self._changed:
            if chain is not self._chain or index != self._needed % len(chain):
                self._begin(chain, index)
            while self._error is None and not self._is_stopped and not self._is_ready():
                self._changed.wait()
            if self._error is not None:
                error, self._error = self._error, None
                raise error

    def _is_ready(self) -> bool:
        is_asked = self._needed < self._asked or (self._keeps_all and self._asked == self._first + len(self._chain))
        return is_asked and not self._missing.get(self._needed)

    def release(self) -> None:
        """See `ReadAhead.release`."""
        with self._changed:
            if not self._keeps_all:
                self._over += self._held.pop(self._needed, [])
            self._missing.pop(self._needed, None)
            self._needed += 1
            self._changed.notify_all()

    def restart(self, chain: Chain, index: int) -> None:
        """Drop everything, and begin with a segment."""
        with self._changed:
            self._begin(chain, index)

    def _begin(self, chain: Chain, index: int) -> None:
        for pieces in self._held.values():
            self._over += pieces
        self._held.clear()
        self._missing.clear()
        self._chain, self._place = chain, 0
        self._first = self._needed = self._asked = index
        self._keeps_all = sum(piece.length for pieces in chain for piece in pieces) <= self._ring_bytes
        self._restarts += 1
        self._changed.notify_all()

    def stop(self) -> None:
        """End the thread that reads."""
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def read(self) -> None:
        """What the thread does until it is stopped."""
        asked: deque[tuple[int, int, Piece]] = deque()
        started = time.perf_counter()
        while True:
            with self._changed:
                self._statistics.read_seconds += time.perf_counter() - started
                while not (self._is_stopped or self._over or asked or self._next() is not None):
                    self._changed.wait()
                if self._is_stopped:
                    return
                started = time.perf_counter()
                over, self._over = self._over, []
            for piece in over:
                piece.drop()
            with self._changed:
                self._bytes -= sum(piece.length for piece in over)
                new = self._ask(_REQUESTED - len(asked))
                self._changed.notify_all()
            del over
            for _, _, piece in new:
                piece.request()
            asked.extend(new)
            if asked:
                self._read(*asked.popleft())

    def _next(self) -> Piece | None:
        """The next piece to ask for, if the ring has room for it."""
        # A segment is read again when it has run, not before: both times it is the same memory.
        end = (self._first if self._keeps_all else self._needed) + len(self._chain)
        while self._asked < end and self._place >= len(self._chain[self._asked % len(self._chain)]):
            self._asked, self._place = self._asked + 1, 0
            self._changed.notify_all()
        if self._asked >= end:
            return None
        piece = self._chain[self._asked % len(self._chain)][self._place]
        return piece if self._bytes + piece.length <= self._ring_bytes else None

    def _ask(self, count: int) -> list[tuple[int, int, Piece]]:
        """Reserve the bytes of the next pieces; returns them with their segments and the beginning they belong to."""
        new: list[tuple[int, int, Piece]] = []
        while len(new) < count and (piece := self._next()) is not None:
            new.append((self._restarts, self._asked, piece))
            self._missing[self._asked] = self._missing.get(self._asked, 0) + 1
            self._bytes += piece.length
            self._place += 1
        self._next()
        self._statistics.most_bytes = max(self._statistics.most_bytes, self._bytes)
        return new

    def _read(self, begun: int, number: int, piece: Piece) -> None:
        error: BaseException | None = None
        try:
            piece.read()
        except BaseException as raised:
            error = raised  # for the thread that waits
        with self._changed:
            if begun == self._restarts and error is None:
                self._statistics.bytes_read += piece.length
                self._missing[number] -= 1
                self._held.setdefault(number, []).append(piece)
            else:
                self._over.append(piece)
                if error is not None and begun == self._restarts:
                    self._begin((), 0)
                    self._error = error
            self._changed.notify_all()
