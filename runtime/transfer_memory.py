"""Memory that a disk writes to in few pieces.

A direct read hands the disk one piece for each page that does not follow the last one, and a disk takes some hundred
pieces at once, so with pages of 4 KiB a read of 4 MiB becomes several. Huge pages make it two or three: on the measured
machine that doubles the rate (`direct_gb_per_s` and `small_page_gb_per_s` in benchmarks/results/offload.json).
"""

from __future__ import annotations

import contextlib
import mmap


def transfer_memory(size: int) -> mmap.mmap:
    """Private memory of the process, in huge pages where the system has them.

    Args:
        size: Bytes, at least one page.

    Raises:
        OSError: The system has none left.
    """
    memory = mmap.mmap(-1, max(size, mmap.PAGESIZE), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE)
    return memory
