"""Compiled code in the threads of torch.

Threads of our own would wait for a processor: those of torch keep theirs busy for a while after each of its operators,
in case there is another one, and between two of them a step calls a kernel of ours.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch


@functools.cache
def _parallel() -> Callable[[Any, int, int, int], None] | None:
    """`GOMP_parallel` of the OpenMP that torch is linked with: a function, its argument, threads, and flags."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    try:
        parallel = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):  # another system, or torch without OpenMP
        return None
    parallel.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint)
    parallel.restype = None
    return parallel


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, thread_name_prefix="jettison-kernel")


def run_shared(function: Any, job: Sequence[int], threads: int) -> None:
    """Call a function in several threads at once, and return when all calls have.

    Args:
        function: From `compile_source`, over a job: see `jettison.codegen.cpu.row_shares`.
        job: Its words.
        threads: How many, at least one. The calling thread is one of them.
    """
    words = (ctypes.c_int64 * len(job))(*job)
    address = ctypes.addressof(words)
    parallel = _parallel() if threads > 1 else None
    if parallel is not None:
        parallel(function, address, threads, 0)
        return
    others = [_pool(threads - 1).submit(function, address) for _ in range(threads - 1)]
    try:
        function(address)
    finally:
        wait(others)  # they read `words`
