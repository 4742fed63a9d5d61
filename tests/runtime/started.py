"""Threads that a test started: a process that ran other tests may still have theirs."""

from __future__ import annotations

import threading


class Started:
    """Threads that were started since.

    Args:
        prefix: How their names begin.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        # The objects: a number is given to another thread as soon as the first one has ended.
        self._before = threading.enumerate()

    def alive(self) -> list[threading.Thread]:
        """Those that have not ended."""
        return [
            each for each in threading.enumerate() if each.name.startswith(self._prefix) and each not in self._before
        ]
