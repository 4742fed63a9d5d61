"""Copies to a device beside what is computed there, and the memory that they are made from."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from jettison.ir.errors import OptionError


class Copies(Protocol):
    """Copies to the device beside what is computed there. A mark is a moment, as either side has been told to do it."""

    def pin(self, memory: Tensor) -> None:
        """Make some memory of the machine, `[n]` u8, fit to be copied from, as long as its storage lives."""

    def begin(self, target: Tensor, source: Tensor, after: Sequence[Any]) -> None:
        """Copy once some marks have been reached, and after the copies before."""

    def copied(self) -> Any:
        """A mark: the copies so far are done."""

    def computed(self) -> Any:
        """A mark: what was launched so far is done."""

    def wait(self, mark: Any) -> None:
        """Let what is launched from now on wait for a mark."""

    def settle(self, mark: Any) -> None:
        """Wait for a mark, on the CPU."""


class CudaCopies:
    """On a stream of their own; marks are events.

    Args:
        device: A GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def pin(self, memory: Tensor) -> None:
        """See `Copies`. Allocating it pinned would take the next power of two, up to twice the weights.

        Raises:
            OptionError: The system does not allow it.
        """
        cuda = torch.cuda.cudart()
        found = cuda.cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)
        if int(found) != 0:
            raise OptionError(
                f"[placement] {memory.nbytes:,} bytes cannot be pinned for the GPU (CUDA error {int(found)}). "
                "Raise the limit of locked memory (`ulimit -l unlimited`), or place less on the host."
            )
        # The storage lives as long as any view of it.
        weakref.finalize(memory.untyped_storage(), cuda.cudaHostUnregister, memory.data_ptr())

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

    def settle(self, mark: torch.cuda.Event) -> None:
        """See `Copies`."""
        mark.synchronize()


class PlainCopies:
    """At once, where the device is the CPU."""

    def pin(self, memory: Tensor) -> None:
        """See `Copies`."""

    def begin(self, target: Tensor, source: Tensor, after: Sequence[Any]) -> None:
        """See `Copies`."""
        target.copy_(source)

    def copied(self) -> None:
        """See `Copies`."""

    def computed(self) -> None:
        """See `Copies`."""

    def wait(self, mark: Any) -> None:
        """See `Copies`."""

    def settle(self, mark: Any) -> None:
        """See `Copies`."""
