"""The ring on a device: nothing is overwritten while it is read, or read before it is there, in any interleaving."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.runtime.device_stream import DeviceStream, Held

SIZES = (512, 2048, 1024, 512, 1536, 512)
CPU = torch.device("cpu")


class TwoQueues:
    """Copies and computations as two queues, run later in an order drawn at random that respects what waits for what.

    A mark is a queue and how much of it has to be done.
    """

    def __init__(self) -> None:
        self.queues: dict[str, list[tuple[str, Any]]] = {"copy": [], "compute": []}

    def begin(self, target: Tensor, source: Tensor, after: Sequence[Any]) -> None:
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

    def read(self, view: Tensor, expected: Tensor) -> None:
        self.queues["compute"].append(("read", (view, expected)))

    def run(self, seed: int) -> None:
        drawn, done = random.Random(seed), dict.fromkeys(self.queues, 0)
        favourite = drawn.choice(["copy", "compute", None])
        while any(done[name] < len(queue) for name, queue in self.queues.items()):
            ready = [name for name in self.queues if self._is_ready(name, done)]
            assert ready, "both wait for each other"
            name = favourite if favourite in ready and drawn.random() < 0.95 else drawn.choice(ready)
            kind, value = self.queues[name][done[name]]
            if kind == "copy":
                value[0].copy_(value[1])
            elif kind == "read":
                assert torch.equal(*value)
            done[name] += 1
        self.queues = {name: [] for name in self.queues}

    def _is_ready(self, name: str, done: dict[str, int]) -> bool:
        if done[name] == len(self.queues[name]):
            return False
        kind, value = self.queues[name][done[name]]
        return kind != "wait" or done[value[0]] >= value[1]


def streamed(ring: int, copies: TwoQueues | None = None) -> tuple[DeviceStream, list[Tensor]]:
    stream = DeviceStream(CPU, ring, copies)
    weights = [torch.randint(0, 255, (size,), dtype=torch.uint8) for size in SIZES]
    for number, weight in enumerate(weights):
        assert stream.add([weight]) == number
    return stream, weights


def run_step(stream: DeviceStream, copies: TwoQueues, weights: list[Tensor], order: Sequence[int]) -> None:
    with stream.step():
        for number in order:
            (view,) = stream.take(number)
            copies.read(view, weights[number])
            stream.release(number)


@pytest.mark.parametrize("ring", [2048, 2560, 3072, 4096, 5632, 1 << 20])
@pytest.mark.parametrize("seed", range(8))
def test_every_interleaving_reads_what_it_asked_for(ring: int, seed: int) -> None:
    copies = TwoQueues()
    stream, weights = streamed(ring, copies)
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
