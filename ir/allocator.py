"""Memory that is free, or a copy of what is on disk, given back to the system."""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

from torch import Tensor

# `MADV_PAGEOUT` of Linux 5.4, which Python names from 3.13 on: pages go, and come back when they are touched. Unlike
# `MADV_DONTNEED` it is safe for any memory: what is not mapped from a file is not lost.
_PAGEOUT = getattr(mmap, "MADV_PAGEOUT", 21)


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


@functools.cache
def _advise() -> Callable[[int, int, int], int] | None:
    try:
        advise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):  # another system
        return None
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return advise


def forget_pages(tensor: Tensor) -> None:
    """Let the system drop the pages of a tensor that is mapped from a file; they are read again if they are touched.

    Memory that is no mapped file keeps its contents.

    Args:
        tensor: Contiguous, on the CPU.
    """
    advise, page = _advise(), mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    stop = (tensor.data_ptr() + tensor.nbytes) // page * page
    if advise is not None and stop > start:
        advise(start, stop - start, _PAGEOUT)
