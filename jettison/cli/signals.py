"""Ctrl-C and the other signals that end a program: they unwind its stack, which removes temporary folders."""

from __future__ import annotations

import contextlib
import importlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class Signals:
    """Makes the signals that end a program unwind its stack, which removes temporary folders.

    Attributes:
        is_interrupted: Ctrl-C was pressed.
    """

    def __init__(self) -> None:
        self.is_interrupted = False

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """SIGINT, SIGTERM and SIGHUP raise inside this block, unless somebody else handles or ignores them."""
        defaults: dict[int, Any] = {signal.SIGINT: signal.default_int_handler}
        defaults |= {getattr(signal, name): signal.SIG_DFL for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)}
        caught = [number for number, default in defaults.items() if _is_main() and signal.getsignal(number) is default]
        for number in caught:
            signal.signal(number, self._raise)
        try:
            yield
        finally:
            for number in caught:
                signal.signal(number, defaults[number])

    def _raise(self, number: int, frame: object) -> None:
        if number == signal.SIGINT:
            self.is_interrupted = True
            raise KeyboardInterrupt
        raise SystemExit(128 + number)


def import_torch() -> None:
    """Import torch, and let Ctrl-C wait for that: an exception while its extensions start aborts the process."""
    with _held():
        importlib.import_module("torch")


@contextlib.contextmanager
def _held() -> Iterator[None]:
    """Ctrl-C inside this block takes effect behind it."""
    previous = signal.getsignal(signal.SIGINT)
    if not _is_main() or not callable(previous):
        yield
        return
    pending: list[tuple[int, Any]] = []
    signal.signal(signal.SIGINT, lambda number, frame: pending.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
    if pending:
        previous(*pending[0])


def _is_main() -> bool:
    """Python lets no other thread set handlers."""
    return threading.current_thread() is threading.main_thread()
