"""Progress of long steps, reported to whoever listens; silent by default.

Libraries call `track`; the command line installs a listener that draws a bar. Nothing here prints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol


class Listener(Protocol):
    """Draws progress."""

    def start(self, description: str, total: float) -> Callable[[float], None]:
        """Begin a step of `total` units; returns a function that advances it."""

    def stop(self, advance: Callable[[float], None]) -> None:
        """End the step that `start` returned `advance` for."""


_listener: ContextVar[Listener | None] = ContextVar("jettison_progress", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Send progress to `listener` inside this block."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def track(description: str, total: float) -> Iterator[Callable[[float], None]]:
    """A step of `total` units (bytes, layers, tokens); yields a function that advances it.

    Args:
        description: Shown to the user, e.g. `"quantize-weights"`.
        total: Units of the whole step.
    """
    listener = _listener.get()
    if listener is None:
        yield lambda amount: None
        return
    advance = listener.start(description, total)
    try:
        yield advance
    finally:
        listener.stop(advance)
