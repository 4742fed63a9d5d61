"""Memory that is free, given back to the system."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable


@functools.cache
def _trim() -> Callable[[int], object] | None:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):  # another C library, or another system
        return None


def give_back() -> None:
    """Have the C library return free pages; large tensors that come and go leave it twice what is alive."""
    trim = _trim()
    if trim is not None:
        trim(0)
