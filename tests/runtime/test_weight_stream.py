"""The ring and its readers: the right bytes in order, whatever is asked for, and faults that end in an error."""

from __future__ import annotations

import gc
import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from jettison.ir.errors import ArtifactError, OptionError
from jettison.runtime import segment_file
from jettison.runtime.segment_file import SegmentFile
from jettison.runtime.segment_file_writer import BLOCK, Part, Segment
from jettison.runtime.table_rows import TableRows
from jettison.runtime.weight_store import Slab
from jettison.runtime.weight_stream import READERS, WeightStream
from tests.runtime.started import Started

SIZES = [BLOCK * blocks - odd for blocks, odd in ((1, 0), (3, 100), (2, 1), (5, 4000), (1, 4095), (4, 64), (2, 0))]
ORDER = list(range(len(SIZES)))
LARGEST = 5 * BLOCK


@pytest.fixture
def store(tmp_path: Path) -> tuple[Path, list[Segment], list[bytes]]:
    source = random.Random(0)
    contents = [source.randbytes(size) for size in SIZES]
    path, offset, segments = tmp_path / "weights.stream", 0, []
    with path.open("wb") as file:
        for data in contents:
            segments.append(Segment(offset, len(data), hashlib.sha256(data).hexdigest()))
            file.write(data + bytes(-len(data) % BLOCK))
            offset += segments[-1].padded
    return path, segments, contents


@pytest.fixture(autouse=True)
def readers() -> Iterator[Started]:
    """No thread is left behind."""
    started = Started("weight-reader")
    yield started
    if started.alive():  # collecting takes a second where much is alive
        gc.collect()
    assert not started.alive()


def taken(stream: WeightStream, number: int) -> bytes:
    return bytes(stream.take(number).numpy())


def take_steps(stream: WeightStream, contents: list[bytes], steps: int = 1) -> None:
    for number in ORDER * steps:
        assert taken(stream, number) == contents[number]


def wait_until(condition: Callable[[], bool]) -> None:
    """No deadline of its own: whoever runs the tests has one."""
    while not condition():
        time.sleep(0.001)


@pytest.mark.parametrize("ring", [LARGEST, 2 * LARGEST, 7 * BLOCK, 40 * BLOCK, 1 << 20])
@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_steps_get_every_segment_in_order(store, ring: int, direct: bool) -> None:
    path, segments, contents = store
    stream = WeightStream(SegmentFile(path, segments, direct=direct), ORDER, ring)
    for _ in range(9):
        for number in ORDER:
            assert taken(stream, number) == contents[number]
        stream.release()
    found = stream.statistics
    assert found.restarts == 0
    assert found.bytes_taken == 9 * path.stat().st_size
    # What was read in advance fits the ring.
    assert found.bytes_taken <= found.bytes_read <= found.bytes_taken + ring
    stream.close()


def test_what_is_held_is_given_again_and_does_not_change(store) -> None:
    path, segments, contents = store
    stream = WeightStream(SegmentFile(path, segments), ORDER, LARGEST + 3 * BLOCK)
    for number in ORDER:
        first = stream.take(number)
        assert stream.take(number).data_ptr() == first.data_ptr()
        time.sleep(0.01)  # readers go on where there is room
        assert bytes(first.numpy()) == contents[number]
        assert first.data_ptr() % BLOCK == 0
    stream.close()


def test_reading_goes_on_across_the_end_of_a_step(store) -> None:
    path, segments, _ = store
    stream = WeightStream(SegmentFile(path, segments), ORDER, 2 * path.stat().st_size)
    for number in ORDER:
        stream.take(number)
    stream.release()
    # Nobody has asked for the next step, and it is there: two rounds fit the ring.
    wait_until(lambda: stream.statistics.bytes_read >= 2 * path.stat().st_size)
    waited = stream.statistics.seconds_waiting
    stream.take(0)
    assert stream.statistics.seconds_waiting - waited < 0.001 or stream._reading._stretches[0].is_ready
    assert stream.statistics.restarts == 0
    stream.close()


def test_any_order_gives_the_right_bytes(store) -> None:
    """Other entries, two sessions in turn, steps that were given up."""
    path, segments, contents = store
    stream = WeightStream(SegmentFile(path, segments), ORDER[:5], LARGEST + 2 * BLOCK)
    source = random.Random(1)
    for _ in range(300):
        number = source.choice(ORDER)  # 5 and 6 are in no step
        assert taken(stream, number) == contents[number]
        if source.random() < 0.3:
            stream.release()
    restarts = stream.statistics.restarts
    assert restarts > 100
    for number in [*range(5)] * 2:
        assert taken(stream, number) == contents[number]
    assert stream.statistics.restarts <= restarts + 1
    stream.close()


def test_a_ring_that_holds_no_segment_is_refused(store) -> None:
    path, segments, _ = store
    with pytest.raises(OptionError, match=rf"ring_bytes={LARGEST - 1:,}: needed at least {LARGEST:,}.*{2 * LARGEST:,}"):
        WeightStream(SegmentFile(path, segments), ORDER, LARGEST - 1)


def test_a_system_without_memory_or_threads(store, monkeypatch: pytest.MonkeyPatch) -> None:
    path, segments, _ = store
    with pytest.raises(ArtifactError, match=r"the system gives no memory or threads .*Cannot allocate"):
        WeightStream(SegmentFile(path, segments), ORDER, 1 << 60)
    started = []

    def start(thread: threading.Thread) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(ArtifactError, match="can't start new thread"):
        WeightStream(SegmentFile(path, segments), ORDER, LARGEST)


def test_threads_end_when_the_stream_is_closed_or_forgotten(store, readers: Started) -> None:
    path, segments, _ = store
    stream = WeightStream(SegmentFile(path, segments), ORDER, LARGEST)
    stream.take(0)
    assert len(readers.alive()) == READERS
    stream.close()
    assert not readers.alive()
    with pytest.raises(ArtifactError, match="is closed"):
        stream.take(1)
    stream.close()
    forgotten = WeightStream(SegmentFile(path, segments), ORDER, LARGEST)
    forgotten.take(0)
    del forgotten
    gc.collect()
    assert not readers.alive()


# --- faults ---------------------------------------------------------------------------------------------------------


def damage(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def test_a_flipped_byte_is_found_at_the_first_read(store) -> None:
    path, segments, contents = store
    damage(path, segments[3].offset + 77)
    stream = WeightStream(SegmentFile(path, segments), ORDER, LARGEST)
    for number in (0, 1, 2):
        assert taken(stream, number) == contents[number]
    for _ in range(2):  # it stays usable, and does not believe the segment the second time
        with pytest.raises(ArtifactError, match=r"segment 3: found SHA-256 .*; needed .*damaged"):
            stream.take(3)
        assert taken(stream, 4) == contents[4]
    stream.close()


def test_padding_is_no_content(store) -> None:
    path, segments, contents = store
    damage(path, segments[1].offset + segments[1].bytes)
    stream = WeightStream(SegmentFile(path, segments), ORDER, LARGEST)
    assert taken(stream, 1) == contents[1]
    stream.close()


def test_a_file_that_is_cut_off_is_refused(store) -> None:
    path, segments, _ = store
    os.truncate(path, segments[-1].offset)
    with pytest.raises(ArtifactError, match=r"found 6\d,\d{3} bytes; needed 7\d,\d{3}"):
        SegmentFile(path, segments)


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "buffered"])
def test_a_file_that_is_cut_off_while_it_is_read(store, direct: bool) -> None:
    path, segments, contents = store
    file = SegmentFile(path, segments, direct=direct)
    os.truncate(path, segments[4].offset)
    stream = WeightStream(file, ORDER, LARGEST)
    with pytest.raises(ArtifactError, match=r"was changed while weights were streamed|ends at byte"):
        take_steps(stream, contents)
    stream.close()
    with pytest.raises(ArtifactError, match="ends at byte"):
        file.read_blocks(segments[4].offset, memoryview(bytearray(BLOCK)))


def test_a_file_that_is_changed_in_place_is_found_at_the_next_step(store) -> None:
    path, segments, contents = store
    stream = WeightStream(SegmentFile(path, segments), ORDER, LARGEST)
    for number in ORDER:
        assert taken(stream, number) == contents[number]
    os.utime(path, ns=(1, 1))
    damage(path, 5)
    with pytest.raises(ArtifactError, match=r"was changed.*Load the artifact again"):
        take_steps(stream, contents, 2)
    stream.close()


def test_a_file_that_is_replaced_goes_on_as_it_was(store, tmp_path: Path) -> None:
    """The descriptor still names the old file: overwriting an artifact does not mix two sets of weights."""
    path, segments, contents = store
    stream = WeightStream(SegmentFile(path, segments), ORDER, LARGEST)
    stream.take(0)
    (tmp_path / "other").write_bytes(bytes(path.stat().st_size))
    os.replace(tmp_path / "other", path)
    for number in [*ORDER, *ORDER]:
        assert taken(stream, number) == contents[number]
    stream.close()


def test_a_read_error_reaches_who_computes_and_passes(store, monkeypatch: pytest.MonkeyPatch) -> None:
    path, segments, contents = store
    file, real, is_broken = SegmentFile(path, segments), os.preadv, threading.Event()

    def preadv(descriptor: int, buffers: list[memoryview], offset: int) -> int:
        if is_broken.is_set() and offset >= segments[4].offset:
            raise OSError(5, "Input/output error")
        return real(descriptor, buffers, offset)

    monkeypatch.setattr(segment_file.os, "preadv", preadv)
    is_broken.set()
    stream = WeightStream(file, ORDER, LARGEST)
    for _ in range(2):
        with pytest.raises(ArtifactError, match=rf"byte {segments[4].offset:,} \(Input/output error\)"):
            take_steps(stream, contents)
    is_broken.clear()
    for number in ORDER:
        assert taken(stream, number) == contents[number]
    stream.close()


def test_short_reads_are_continued(store, monkeypatch: pytest.MonkeyPatch) -> None:
    path, segments, contents = store
    real = os.preadv
    monkeypatch.setattr(segment_file.os, "preadv", lambda file, into, at: real(file, [into[0][:BLOCK]], at))
    stream = WeightStream(SegmentFile(path, segments), ORDER, LARGEST)
    for number in ORDER:
        assert taken(stream, number) == contents[number]
    stream.close()


def test_a_file_system_without_direct_reads(store, monkeypatch: pytest.MonkeyPatch) -> None:
    path, segments, contents = store
    real = os.open

    def refuse(name: object, flags: int, *mode: int) -> int:
        if flags & os.O_DIRECT:
            raise OSError(22, "Invalid argument")
        return real(name, flags, *mode)

    monkeypatch.setattr(segment_file.os, "open", refuse)
    file = SegmentFile(path, segments)
    assert not file.is_direct
    stream = WeightStream(file, ORDER, LARGEST)
    assert taken(stream, 0) == contents[0]
    stream.close()


def test_what_is_no_file_is_refused(store, tmp_path: Path) -> None:
    _, segments, _ = store
    with pytest.raises(ArtifactError, match=r"cannot be opened \(No such file"):
        SegmentFile(tmp_path / "none", segments)
    with pytest.raises(ArtifactError, match=r"found .* bytes; needed|cannot be opened"):
        SegmentFile(tmp_path, segments)  # a folder


_WAITING = """
import os, sys, threading, time
from jettison.runtime import segment_file
from jettison.runtime.segment_file import SegmentFile
from jettison.runtime.segment_file_writer import Segment
from jettison.runtime.weight_stream import WeightStream
import hashlib
path = sys.argv[1]
data = open(path, "rb").read()[:4096]
segments = [Segment(0, 4096, hashlib.sha256(data).hexdigest())]
file = SegmentFile(__import__("pathlib").Path(path), segments)
real, gate = os.preadv, threading.Event()
def slow(*arguments):
    gate.wait()
    return real(*arguments)
segment_file.os.preadv = slow
stream = WeightStream(file, [0], 4096)
print("waiting", flush=True)
try:
    stream.take(0)
except KeyboardInterrupt:
    print("interrupted", flush=True)
gate.set()
assert bytes(stream.take(0).numpy()) == data
print("usable", flush=True)
"""


def test_ctrl_c_while_waiting(store) -> None:
    """The wait ends at once, the stream can be used, and the interpreter ends with its threads."""
    command = [sys.executable, "-c", _WAITING, str(store[0])]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "waiting\n"
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == "interrupted\nusable\n"
        assert process.wait() == 0


def test_the_child_of_a_fork_is_told(store) -> None:
    path, segments, _ = store
    stream = WeightStream(SegmentFile(path, segments), ORDER, LARGEST)
    child = os.fork()
    if not child:
        try:
            stream.take(0)
        except ArtifactError as error:
            os._exit(0 if "another process" in str(error) else 1)
        os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    stream.close()


# --- single rows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 50), (torch.float32, 4096), (torch.uint8, 7)])
def test_single_rows_of_a_table(tmp_path: Path, dtype: torch.dtype, width: int) -> None:
    values = torch.randint(0, 100, (40, width)).to(dtype)
    path, offset, segments, slabs = tmp_path / "table", 0, [], []
    with path.open("wb") as file:
        for start, stop in ((0, 17), (17, 40)):
            data = bytes(64) + values[start:stop].contiguous().view(torch.uint8).numpy().tobytes()
            part = Part(dtype, (stop - start, width), 64)
            slabs.append(Slab(len(segments), start, {"rows": stop - start}, {"values": part}))
            segments.append(Segment(offset, len(data), hashlib.sha256(data).hexdigest()))
            file.write(data + bytes(-len(data) % BLOCK))
            offset += segments[-1].padded
    rows = TableRows(SegmentFile(path, segments), slabs)
    wanted = [39, 0, 16, 17, 5, 5]
    assert torch.equal(rows.read(wanted)["values"], values[wanted])
    damage(path, segments[1].offset + 100)
    damaged = TableRows(SegmentFile(path, segments), slabs)
    assert torch.equal(damaged.read([3])["values"], values[[3]])
    with pytest.raises(ArtifactError, match="segment 1"):
        damaged.read([20])
