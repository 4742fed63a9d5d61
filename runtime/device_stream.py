"""Weights that lie in memory of the machine, or on its disk, and pass through a ring on the GPU as they are needed.

Every weight has its place in the ring once and for all, so that kernels read the same addresses in each step and a step
can be recorded as a CUDA graph. A weight is copied there as soon as those that it overwrites have been read. Copies
have a stream of their own, and the two streams wait for each other by events: the CPU waits for nothing. What a step
leaves room for at its end is copied for the next one; the step ends when that has arrived, since a recorded step may
not depend on what happened outside of it. Weights from disk are the exception: see `disk_copies.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.runtime.device_copies import Copies, CudaCopies, PlainCopies
from jettison.runtime.device_store import Image, image_of
from jettison.runtime.disk_copies import DiskCopies
from jettison.runtime.segment_file import SegmentFile


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
        file: What weights on disk are read from.

    Attributes:
        disk: What reads it, or None.
        bytes_copied: To the device, since it was opened; recorded steps that are replayed not included.
        step_bytes: Of all weights: what each step copies, but for those that stay where they all fit.
    """

    def __init__(
        self,
        device: torch.device,
        ring_bytes: int,
        copies: Copies | None = None,
        file: SegmentFile | None = None,
    ) -> None:
        self.device, self.bytes_copied, self.step_bytes = device, 0, 0
        self._limit = ring_bytes
        self._copies: Copies = copies or (CudaCopies(device) if device.type == "cuda" else PlainCopies())
        self.disk = None if file is None else DiskCopies(file, self._copies)
        self._images: list[Image] = []
        # Of those on the host.
        self._memory: dict[int, Tensor] = {}
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
        image = image_of(tensors)
        number = self.add_stored(image)
        memory = torch.empty(image.nbytes, dtype=torch.uint8)
        self._copies.pin(memory)
        for part, tensor in zip(image.parts, tensors, strict=True):
            part.of(memory).copy_(tensor)
        self._memory[number] = memory
        return number

    def add_stored(self, image: Image) -> int:
        """Take a weight that is in the file; before the first step.

        Args:
            image: Which.

        Returns:
            Its number.

        Raises:
            OptionError: The ring is smaller.
        """
        size = image.nbytes
        if size > self._limit:
            raise OptionError(
                f"[placement] ring_bytes={self._limit:,}: needed at least {size:,}, one weight, and {2 * size:,} to "
                "copy one while another is computed with. Give the ring more, and pin less."
            )
        self._images.append(image)
        self.step_bytes += size
        return len(self._images) - 1

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around everything that a step launches."""
        if not self._images:
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
        place = self._place(number)
        return [part.of(place) for part in self._images[number].parts]

    def release(self, number: int) -> None:
        """Everything that reads a weight has been launched: others may take its place."""
        self._read[number] = self._copies.computed()
        following = number
        for _ in self._images:
            following = (following + 1) % len(self._images)
            if following in self._arrivals:
                continue
            # What is read from disk is waited for where it is needed: the GPU has launches before that to do.
            if following not in self._memory or any(other not in self._read for other in self._overwritten(following)):
                break
            self._copy(following)

    def _lay_out(self) -> None:
        """Places one behind the other, from the front again where the end is too near."""
        start = 0
        for image in self._images:
            start = 0 if start + image.nbytes > self._limit else start
            self._starts.append(start)
            start += image.nbytes
        self._ring = torch.empty(self.nbytes, dtype=torch.uint8, device=self.device)
        if self.disk is not None:
            # What nothing is written over is read once.
            every = range(len(self._images))
            again = [
                number for number in every if number not in self._memory and len(self._neighbours(number, every)) > 1
            ]
            self.disk.open([segment for number in again for segment in self._images[number].segments])

    def _place(self, number: int) -> Tensor:
        assert self._ring is not None, "laid out"
        return self._ring[self._starts[number] :][: self._images[number].nbytes]

    def _neighbours(self, number: int, among: Iterable[int]) -> list[int]:
        """Weights that share a part of the ring with one, itself included."""
        start, stop = self._starts[number], self._starts[number] + self._images[number].nbytes
        return [
            other
            for other in among
            if self._starts[other] < stop and start < self._starts[other] + self._images[other].nbytes
        ]

    def _overwritten(self, number: int) -> list[int]:
        """Weights in the ring that are where another one goes."""
        return self._neighbours(number, self._arrivals)

    def _copy(self, number: int) -> None:
        # The first copies of a step wait for its beginning: so a recording knows that they belong to it.
        after = [self._start]
        for other in self._overwritten(number):
            after.append(self._read.pop(other, None) or self._copies.computed())
            del self._arrivals[other]
        image, self._has_copied = self._images[number], True
        if number in self._memory:
            self._copies.begin(self._place(number), self._memory[number], after)
        else:
            assert self.disk is not None, "or it would not have been added"
            self.disk.copy(image.segments, self._place(number), after)
        self._arrivals[number] = self._copies.copied()
        self.bytes_copied += image.nbytes
