"""Memory that is free, or a copy of what is on disk, given back to the system."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import re
from collections.abc import Callable, Iterator
from pathlib import Path

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


def forget_library(name: str) -> None:
    """Let go of the pages of a library that has done its work; they are read again if it is called once more.

    Args:
        name: Found in the file name of the library. What was written to of it stays.
    """
    advise = _advise()
    if advise is None:
        return
    with contextlib.suppress(OSError):  # another system
        for start, stop in _clean_pages(name, Path("/proc/self/smaps").read_text()):
            advise(start, stop - start, mmap.MADV_DONTNEED)


def _clean_pages(name: str, areas: str) -> Iterator[tuple[int, int]]:
    """Where a mapped file lies that nothing was written to: after `MADV_DONTNEED` its pages are what they were."""
    for area in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", areas, flags=re.MULTILINE):
        heading = area.partition("\n")[0].split(maxsplit=5)
        is_clean = re.search(r"^Anonymous: +0 kB$", area, re.MULTILINE) is not None
        if len(heading) == 6 and name in Path(heading[5]).name and "w" not in heading[1] and is_clean:
            start, stop = (int(edge, 16) for edge in heading[0].split("-"))
            yield start, stop
