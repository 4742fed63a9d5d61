"""Weights that lie in memory of the machine and pass through a ring on the GPU, copied while others are computed with.

Every weight has its place in the ring once and for all, so that kernels read the same addresses in each step and a step
can be recorded as a CUDA graph. A weight is copied there as soon as those that it overwrites have been read. Copies
have a stream of their own, and the two streams wait for each other by events: the CPU waits for nothing. What a step
leaves room for at its end is copied for the next one; the step ends when that has arrived, since a recorded step may
not depend on what happened outside of it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from jettison.ir.errors import OptionError

# Where tensors begin in the ring; what the allocator of PyTorch gives on a GPU, and kernels may rely on.
_ALIGNMENT = 512


class Copies(Protocol):
    """Copies to the device beside what is computed there. A mark is a moment, as either side has been told to do it."""

    def begin(self, target: Tensor, source: Tensor, after: Sequence[Any]) -> None:
        """Copy once some marks have been reached, and after the copies before."""

    def copied(self) -> Any:
        """A mark: the copies so far are done."""

    def computed(self) -> Any:
        """A mark: what was launched so far is done."""

    def wait(self, mark: Any) -> None:
        """Let what is launched from now on wait for a mark."""


class CudaCopies:
    """On a stream of their own; marks are events.

    Args:
        device: A GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def begin(self, target: Tensor, source: Tensor, after: Sequence[torch.cuda.Event]) -> None:
        """See `Copies`."""
        for mark in after:
            self._stream.wait_event(mark)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def copied(self) -> torch.cuda.Event:
        """See `Copies`."""
        return self._stream.record_event()

    def computed(self) -> torch.cuda.Event:
        """See `Copies`."""
        return torch.cuda.current_stream().record_event()

    def wait(self, mark: torch.cuda.Event) -> None:
        """See `Copies`."""
        torch.cuda.current_stream().wait_event(mark)


def pinned_memory(size: int) -> Tensor:
    """Memory of the machine that a GPU reads by itself: `[size]` u8.

    `pin_memory` would take the next power of two, up to twice the weights.

    Raises:
        OptionError: The system gives none.
    """
    memory = torch.empty(size, dtype=torch.uint8)
    cuda = torch.cuda.cudart()
    found = cuda.cudaHostRegister(memory.data_ptr(), size, 0)
    if int(found) != 0:
        raise OptionError(
            f"[placement] {size:,} bytes of memory cannot be pinned for the GPU (CUDA error {int(found)}). Raise the "
            "limit of locked memory (`ulimit -l unlimited`), or place less on the host."
        )
    # The storage lives as long as any view of it.
    weakref.finalize(memory.untyped_storage(), cuda.cudaHostUnregister, memory.data_ptr())
    return memory


class PlainCopies:
    """At once, where the device is the CPU."""

    def begin(self, target: Tensor, source: Tensor, after: Sequence[Any]) -> None:
        """See `Copies`."""
        target.copy_(source)

    def copied(self) -> None:
        """See `Copies`."""

    def computed(self) -> None:
        """See `Copies`."""

    def wait(self, mark: Any) -> None:
        """See `Copies`."""


@dataclass(frozen=True)
class Held:
    """What is in a ring.

    Attributes:
        arrived: Numbers of weights.
        read: Of those, which have been computed with since.
    """

    arrived: frozenset[int] = frozenset()
    read: frozenset[int] = frozenset()


class DeviceStream:
    """Weights in the order in which steps read them.

    Args:
        device: Where they are computed with.
        ring_bytes: Most that the ring takes; it is no larger than all of them.
        copies: What copies; default a stream on a GPU.

    Attributes:
        bytes_copied: To the device, since it was opened; recorded steps that are replayed not included.
        step_bytes: Of all weights: what each step copies, but for those that stay where they all fit.
    """

    def __init__(self, device: torch.device, ring_bytes: int, copies: Copies | None = None) -> None:
        self.device, self.bytes_copied, self.step_bytes = device, 0, 0
        self._limit = ring_bytes
        self._is_gpu = device.type == "cuda"
        self._copies: Copies = copies or (CudaCopies(device) if self._is_gpu else PlainCopies())
        self._sources: list[Tensor] = []
        self._layouts: list[list[tuple[int, torch.dtype, torch.Size]]] = []
        self._starts: list[int] = []
        self._ring: Tensor | None = None
        # Numbers of what is in the ring or on its way, with the mark of its arrival; and of what has been read since.
        self._arrivals: dict[int, Any] = {}
        self._read: dict[int, Any] = {}
        self._is_in_step = self._has_copied = False

    @property
    def nbytes(self) -> int:
        """Bytes of the ring."""
        return min(self._limit, self.step_bytes)

    def add(self, tensors: Sequence[Tensor]) -> int:
        """Take a weight into the host's memory, pinned where there is a GPU; before the first step.

        Args:
            tensors: Its parts, on the CPU; they may go.

        Returns:
            Its number.

        Raises:
            OptionError: The ring is smaller.
        """
        layout, size = [], 0
        for tensor in tensors:
            layout.append((size, tensor.dtype, tensor.shape))
            size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
        if size > self._limit:
            raise OptionError(
                f"[placement] ring_bytes={self._limit:,}: needed at least {size:,}, one weight, and {2 * size:,} to "
                "copy one while another is computed with. Give the ring more, and pin less."
            )
        source = pinned_memory(size) if self._is_gpu else torch.empty(size, dtype=torch.uint8)
        for (start, _, _), tensor in zip(layout, tensors, strict=True):
            source[start : start + tensor.nbytes] = tensor.contiguous().view(-1).view(torch.uint8)
        self._sources.append(source)
        self._layouts.append(layout)
        self.step_bytes += size
        return len(self._sources) - 1

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around everything that a step launches."""
        if not self._sources:
            yield
            return
        if self._ring is None:
            self._lay_out()
        start = self._copies.computed()
        if self._is_in_step:  # the last one was aborted somewhere
            self._copies.wait(self._copies.copied())
            self.held = Held()
        self._is_in_step, self._has_copied, self._start = True, False, start
        # All that was copied has arrived, and all that was launched is behind this mark.
        self._arrivals = dict.fromkeys(self._arrivals)
        self._read = dict.fromkeys(self._read, start)
        yield
        if self._has_copied:
            self._copies.wait(self._copies.copied())
        self._is_in_step = False

    @property
    def held(self) -> Held:
        """What is in the ring between two steps. To be set behind a step that was replayed, to what its recording left.

        A recording belongs to what was held when it was made.
        """
        return Held(frozenset(self._arrivals), frozenset(self._read))

    @held.setter
    def held(self, held: Held) -> None:
        self._arrivals, self._read = dict.fromkeys(held.arrived), dict.fromkeys(held.read)

    def take(self, number: int) -> list[Tensor]:
        """The parts of a weight on the device; what is launched from now on waits until they are there.

        Args:
            number: What `add` returned.

        Returns:
            Views of the ring, valid until `release`.
        """
        assert self._ring is not None, "taken within a step"
        if number not in self._arrivals:
            self._copy(number)
        mark = self._arrivals[number]
        if mark is not None:
            self._copies.wait(mark)
        self._read.pop(number, None)
        start = self._starts[number]
        return [
            self._ring[start + offset : start + offset + dtype.itemsize * shape.numel()].view(dtype).view(shape)
            for offset, dtype, shape in self._layouts[number]
        ]

    def release(self, number: int) -> None:
        """Everything that reads a weight has been launched: others may take its place."""
        self._read[number] = self._copies.computed()
        following = number
        for _ in self._sources:
            following = (following + 1) % len(self._sources)
            if following in self._arrivals:
                continue
            if any(other not in self._read for other in self._overwritten(following)):
                break
            self._copy(following)

    def _lay_out(self) -> None:
        """Places one behind the other, from the front again where the end is too near."""
        start = 0
        for source in self._sources:
            start = 0 if start + len(source) > self._limit else start
            self._starts.append(start)
            start += len(source)
        self._ring = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)

    def _overwritten(self, number: int) -> list[int]:
        """Weights in the ring that are where another one goes."""
        start, stop = self._starts[number], self._starts[number] + len(self._sources[number])
        return [
            other
            for other in self._arrivals
            if self._starts[other] < stop and start < self._starts[other] + len(self._sources[other])
        ]

    def _copy(self, number: int) -> None:
        assert self._ring is not None, "laid out"
        # The first copies of a step wait for its beginning: so a recording knows that they belong to it.
        after = [self._start]
        for other in self._overwritten(number):
            after.append(self._read.pop(other, None) or self._copies.computed())
            del self._arrivals[other]
        source = self._sources[number]
        self._has_copied = True
        self._copies.begin(self._ring[self._starts[number] :][: len(source)], source, after)
        self._arrivals[number] = self._copies.copied()
        self.bytes_copied += len(source)
