"""The ring that streamed segments pass through: order, bytes, errors, and the end of its thread."""

from __future__ import annotations

import gc
import random
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from jettison.ir.errors import ArtifactError
from jettison.runtime.read_ahead import ReadAhead
from tests.runtime.started import Started


@dataclass(eq=False)
class FakePiece:
    """Bytes that say whether they are there."""

    length: int
    disk: Disk
    is_there: bool = False

    def request(self) -> None:
        self.disk.took(self.length)

    def read(self) -> None:
        self.disk.wait()
        self.is_there = True

    def drop(self) -> None:
        self.is_there = False
        self.disk.took(-self.length)


@dataclass
class Disk:
    """Counts what pieces take, and is as slow as it is told."""

    slowest: float = 0.0
    error: BaseException | None = None
    gate: threading.Event | None = None
    bytes: int = 0
    most: int = 0
    reads: int = 0
    random: random.Random = field(default_factory=lambda: random.Random(0))

    def took(self, count: int) -> None:
        self.bytes += count
        self.most = max(self.most, self.bytes)

    def wait(self) -> None:
        self.reads += 1
        if self.gate is not None:
            self.gate.wait()
        if self.slowest:
            time.sleep(self.random.random() * self.slowest)
        if self.error is not None:
            error, self.error = self.error, None
            raise error


def chain_of(disk: Disk, *sizes: tuple[int, ...]) -> list[list[FakePiece]]:
    return [[FakePiece(size, disk) for size in segment] for segment in sizes]


def run(reader: ReadAhead, chain: Any, steps: int, first: int = 0) -> None:
    for _ in range(steps):
        for index in range(first, len(chain)):
            reader.wait(chain, index)
            assert all(piece.is_there for piece in chain[index])
            reader.release()


@pytest.fixture
def threads() -> Iterator[Started]:
    """No thread is left behind."""
    started = Started("jettison-read-ahead")
    yield started
    deadline = time.monotonic() + 60
    while started.alive():
        gc.collect()
        assert time.monotonic() < deadline
        time.sleep(0.01)


SIZES = ((10, 10, 5), (), (10, 10), (3,), (10, 10, 10), ())


@pytest.mark.parametrize("ring", [30, 31, 47, 60, 77])
@pytest.mark.parametrize("slowest", [0.0, 0.003])
def test_every_segment_is_there_when_it_runs_and_the_ring_is_kept(ring, slowest, threads):
    disk = Disk(slowest)
    chain, reader = chain_of(disk, *SIZES), ReadAhead(ring)
    run(reader, chain, 25)
    assert disk.most <= ring
    assert reader.statistics.most_bytes <= ring
    reader.close()
    total = sum(map(sum, SIZES))
    # What comes after the last step was read ahead, as far as the ring goes.
    assert 25 * total <= reader.statistics.bytes_read <= 25 * total + ring


@pytest.mark.parametrize("ring", [78, 1000])
def test_what_fits_is_read_once(ring, threads):
    disk = Disk()
    chain, reader = chain_of(disk, *SIZES), ReadAhead(ring)
    run(reader, chain, 10)
    assert reader.statistics.bytes_read == disk.bytes == sum(map(sum, SIZES))
    reader.close()


def test_it_reads_ahead_into_the_next_step(threads):
    disk = Disk()
    chain, reader = chain_of(disk, (10,), (10,), (10,)), ReadAhead(20)
    run(reader, chain, 1)
    deadline = time.monotonic() + 60
    while not (chain[0][0].is_there and chain[1][0].is_there):
        assert time.monotonic() < deadline, "nobody asked for them"
        time.sleep(0.001)
    assert not chain[2][0].is_there
    reader.close()


def test_another_chain_and_a_step_that_was_broken_off_begin_anew(threads):
    disk = Disk(0.001)
    first, second = chain_of(disk, *SIZES), chain_of(disk, (20, 10), (25,))
    reader = ReadAhead(40)
    for _ in range(5):
        run(reader, first, 2)
        run(reader, second, 2)
        reader.wait(first, 0)
        reader.release()
        reader.wait(first, 1)
        reader.restart()
        run(reader, second, 1)
    assert disk.most <= 40
    reader.close()


def test_an_error_is_the_waiting_threads_and_the_next_step_works(threads):
    disk = Disk()
    chain, reader = chain_of(disk, *SIZES), ReadAhead(40)
    run(reader, chain, 1)
    disk.error = ArtifactError("the disk failed")
    with pytest.raises(ArtifactError, match="the disk failed"):
        run(reader, chain, 3)
    reader.restart()
    run(reader, chain, 3)
    assert disk.most <= 40
    reader.close()


def test_a_slow_disk_can_be_interrupted(threads):
    disk = Disk(gate=threading.Event())
    chain, reader = chain_of(disk, *SIZES), ReadAhead(40)
    main = threading.main_thread().ident
    assert main is not None
    timer = threading.Timer(0.1, lambda: signal.pthread_kill(main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        reader.wait(chain, 0)
    timer.join()
    disk.gate.set()
    reader.restart()
    run(reader, chain, 2)
    reader.close()


def test_its_thread_ends_with_it(threads):
    reader = ReadAhead(40)
    run(reader, chain_of(Disk(), *SIZES), 1)
    assert threads.alive()
    del reader  # and the fixture waits for the thread


def test_a_closed_one_waits_for_nothing():
    reader = ReadAhead(40)
    reader.close()
    reader.wait(chain_of(Disk(), (10,)), 0)
    reader.close()
