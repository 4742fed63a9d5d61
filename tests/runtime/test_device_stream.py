"""The ring on a device: nothing is overwritten while it is read, or read before it is there, in any interleaving."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jettison.ir.errors import ArtifactError, OptionError
from jettison.runtime import disk_copies
from jettison.runtime.device_store import image_of
from jettison.runtime.device_stream import DeviceStream, Held
from jettison.runtime.segment_file import SegmentFile
from jettison.runtime.segment_file_writer import BLOCK, SegmentFileWriter, bytes_of

SIZES = (512, 2048, 1024, 512, 1536, 512)
# Of the file, so that some weights have two.
SEGMENT = 1024
CPU = torch.device("cpu")


class TwoQueues:
    """Copies and computations as two queues, run later in an order drawn at random that respects what waits for what.

    A mark is a queue and how much of it has to be done.
    """

    def __init__(self) -> None:
        self.queues: dict[str, list[tuple[str, Any]]] = {"copy": [], "compute": []}
        self._done = dict.fromkeys(self.queues, 0)
        self._drawn = random.Random(0)
        self.pinned: set[int] = set()

    def pin(self, memory: Tensor) -> None:
        self.pinned.add(memory.untyped_storage().data_ptr())

    def begin(self, target: Tensor, source: Tensor, after: Sequence[Any]) -> None:
        assert source.untyped_storage().data_ptr() in self.pinned, "a GPU would not copy it by itself"
        self.queues["copy"] += [("wait", mark) for mark in after]
        # Half of it, and the rest: a copy is no single moment.
        half = len(source) // 2
        self.queues["copy"] += [("copy", (target[:half], source[:half])), ("copy", (target[half:], source[half:]))]

    def copied(self) -> tuple[str, int]:
        return "copy", len(self.queues["copy"])

    def computed(self) -> tuple[str, int]:
        return "compute", len(self.queues["compute"])

    def wait(self, mark: tuple[str, int]) -> None:
        self.queues["compute"].append(("wait", mark))

    def settle(self, mark: tuple[str, int]) -> None:
        self._run_until(lambda: self._done[mark[0]] >= mark[1])

    def read(self, view: Tensor, expected: Tensor) -> None:
        self.queues["compute"].append(("read", (view, expected)))

    def run(self, seed: int) -> None:
        self._drawn = random.Random(seed)
        self._run_until(lambda: all(self._done[name] == len(queue) for name, queue in self.queues.items()))

    def _run_until(self, is_enough: Callable[[], bool]) -> None:
        favourite = self._drawn.choice(["copy", "compute", None])
        while not is_enough():
            ready = [name for name in self.queues if self._is_ready(name)]
            assert ready, "both wait for each other"
            name = favourite if favourite in ready and self._drawn.random() < 0.95 else self._drawn.choice(ready)
            kind, value = self.queues[name][self._done[name]]
            if kind == "copy":
                value[0].copy_(value[1])
            elif kind == "read":
                assert torch.equal(*value)
            self._done[name] += 1

    def _is_ready(self, name: str) -> bool:
        if self._done[name] == len(self.queues[name]):
            return False
        kind, value = self.queues[name][self._done[name]]
        return kind != "wait" or self._done[value[0]] >= value[1]


def streamed(
    ring: int, copies: TwoQueues | None = None, on_disk: Collection[int] = ()
) -> tuple[DeviceStream, list[Tensor]]:
    weights = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in SIZES]
    images, file = {}, None
    if on_disk:
        with tempfile.NamedTemporaryFile(suffix=".stream") as written:
            writer = SegmentFileWriter(written, None)  # type: ignore[arg-type]
            for number in sorted(on_disk):
                first = len(writer.segments)
                writer.fill(bytes_of(weights[number]), SEGMENT)
                writer.close()
                images[number] = replace(
                    image_of([weights[number]]), segments=tuple(range(first, len(writer.segments)))
                )
            written.flush()
            file = SegmentFile(Path(written.name), writer.segments)
    stream = DeviceStream(CPU, ring, copies, file)
    for number, weight in enumerate(weights):
        assert (stream.add_stored(images[number]) if number in images else stream.add([weight])) == number
    return stream, weights


def run_step(stream: DeviceStream, copies: TwoQueues, weights: list[Tensor], order: Sequence[int]) -> None:
    with stream.step():
        for number in order:
            (view,) = stream.take(number)
            copies.read(view, weights[number])
            stream.release(number)


@pytest.mark.parametrize("ring", [2048, 2560, 3072, 4096, 5632, 1 << 20])
@pytest.mark.parametrize("on_disk", [(), (1, 2, 5), range(6)], ids=["host", "host and disk", "disk"])
@pytest.mark.parametrize("seed", range(8))
def test_every_interleaving_reads_what_it_asked_for(
    ring: int, on_disk: Collection[int], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two segments of the file at most are in pinned memory.
    monkeypatch.setattr(disk_copies, "READ_AHEAD_BYTES", 2 * BLOCK)
    copies = TwoQueues()
    stream, weights = streamed(ring, copies, on_disk)
    drawn = random.Random(seed)
    orders = [range(len(SIZES)), range(len(SIZES)), [5], [3, 1, 1, 4], [], range(len(SIZES)), range(2), range(6)]
    for number, order in enumerate(orders):
        run_step(stream, copies, weights, order)
        if drawn.random() < 0.5:
            copies.run(100 * seed + number)
        # As the step itself waits for its copies, the queues may as well run on.
    copies.run(seed)


def test_a_step_copies_each_weight_once_and_what_fits_stays() -> None:
    copies = TwoQueues()
    stream, weights = streamed(1 << 20, copies)
    assert stream.nbytes == stream.step_bytes == sum(SIZES)
    for _ in range(3):
        run_step(stream, copies, weights, range(6))
    assert stream.bytes_copied == sum(SIZES)
    stream, weights = streamed(2560, copies := TwoQueues())
    assert stream.nbytes == 2560
    run_step(stream, copies, weights, range(6))
    before, steps = stream.bytes_copied, 5
    for _ in range(steps):
        run_step(stream, copies, weights, range(6))
    assert stream.bytes_copied - before <= steps * sum(SIZES)


@pytest.mark.parametrize("ring", [2048, 3072, 5632, 1 << 20])
def test_what_stays_on_the_device_is_read_once_and_the_rest_without_a_new_start(ring: int) -> None:
    copies = TwoQueues()
    stream, weights = streamed(ring, copies, range(6))
    assert stream.disk is not None
    run_step(stream, copies, weights, range(6))
    copied, before = stream.bytes_copied, stream.disk.statistics
    for _ in range(3):
        run_step(stream, copies, weights, range(6))
    now = stream.disk.statistics.since(before)
    assert now.restarts == 0
    # In the largest ring but one, the last weight lies where the first one does, and nothing else.
    again = {5632: [0, 5], 1 << 20: []}.get(ring, range(6))
    assert stream.bytes_copied - copied == 3 * sum(SIZES[number] for number in again)
    assert now.bytes_taken == 3 * BLOCK * sum(-(-SIZES[number] // SEGMENT) for number in again)
    copies.run(0)


def test_a_file_that_is_changed_is_an_error_and_the_next_step_runs() -> None:
    copies = TwoQueues()
    stream, weights = streamed(2560, copies, range(6))
    assert stream.disk is not None
    run_step(stream, copies, weights, range(6))
    checked = stream.disk._file.check_unchanged
    stream.disk._file.check_unchanged = refuse  # type: ignore[method-assign]
    with pytest.raises(ArtifactError, match="changed"):
        run_step(stream, copies, weights, 3 * list(range(6)))
    stream.disk._file.check_unchanged = checked  # type: ignore[method-assign]
    run_step(stream, copies, weights, range(6))
    copies.run(0)


def refuse() -> None:
    raise ArtifactError("[stream] changed")


def test_copies_run_ahead_of_what_is_computed() -> None:
    copies = TwoQueues()
    stream, _ = streamed(4096, copies)
    with stream.step():
        stream.take(0)
        before = stream.bytes_copied
        stream.release(0)
        # The next two fit beside the first one, and the fourth in its place.
        assert stream.bytes_copied - before == sum(SIZES[1:4])


def test_an_aborted_step_leaves_nothing_behind() -> None:
    copies = TwoQueues()
    stream, weights = streamed(2560, copies)
    run_step(stream, copies, weights, range(3))
    with pytest.raises(IndexError):
        run_step(stream, copies, weights, [0, 1, 99])
    run_step(stream, copies, weights, range(6))
    copies.run(0)


def test_what_is_held_can_be_set_to_what_a_recording_left() -> None:
    copies = TwoQueues()
    stream, weights = streamed(2560, copies)
    run_step(stream, copies, weights, range(6))
    first = stream.held
    run_step(stream, copies, weights, range(6))
    assert stream.held == first != Held()
    stream.held = Held()
    run_step(stream, copies, weights, range(6))
    assert stream.held == first
    copies.run(1)


def test_parts_keep_their_types_and_shapes() -> None:
    stream = DeviceStream(CPU, 1 << 14)
    parts = [torch.randn(3, 5), torch.randint(0, 9, (7,)), torch.randn(2, 2).to(torch.bfloat16)]
    number = stream.add(parts)
    with stream.step():
        taken = stream.take(number)
        assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(taken, parts, strict=True))
        assert all((each.data_ptr() - taken[0].data_ptr()) % 512 == 0 for each in taken)
        stream.release(number)


def test_a_ring_that_is_too_small() -> None:
    stream = DeviceStream(CPU, 1000)
    with pytest.raises(
        OptionError, match=r"ring_bytes=1,000: needed at least 4,096, one weight, and 8,192 to copy one"
    ):
        stream.add([torch.zeros(1024)])
