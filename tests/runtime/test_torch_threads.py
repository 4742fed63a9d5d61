"""Threads of torch, and those that stand in for them, sharing rows of a compiled function."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from jettison.codegen.cpu.compiled import compile_source
from jettison.codegen.cpu.row_shares import row_shares
from jettison.runtime import torch_threads
from jettison.runtime.torch_threads import run_shared

# Counts a row and says which thread took it. Whoever takes row 0 naps, a millisecond each time, until row 1 is taken.
WORK = """
declare i64 @pthread_self()
declare i32 @usleep(i32)
define void @work(ptr %counts, i64 %first, i64 %last, ptr %threads, i64 %naps) {
  %self = call i64 @pthread_self()
  %second = getelementptr i64, ptr %counts, i64 1
  br label %begin
begin:
  %row = phi i64 [ %first, %0 ], [ %next, %end ]
  %is_left = icmp ult i64 %row, %last
  br i1 %is_left, label %mark, label %done
mark:
  %count = getelementptr i64, ptr %counts, i64 %row
  %before = atomicrmw add ptr %count, i64 1 monotonic
  %thread = getelementptr i64, ptr %threads, i64 %row
  store i64 %self, ptr %thread
  br label %look
look:
  %taken_naps = phi i64 [ 0, %mark ], [ %more, %nap ]
  %is_first = icmp eq i64 %row, 0
  %other = load atomic i64, ptr %second monotonic, align 8
  %is_alone = icmp eq i64 %other, 0
  %may_nap = icmp ult i64 %taken_naps, %naps
  %waits = and i1 %is_first, %is_alone
  %naps_on = and i1 %waits, %may_nap
  br i1 %naps_on, label %nap, label %end
nap:
  %ignored = call i32 @usleep(i32 1000)
  %more = add i64 %taken_naps, 1
  br label %look
end:
  %next = add i64 %row, 1
  br label %begin
done:
  ret void
}
"""


@pytest.fixture(scope="module")
def work() -> Any:
    return compile_source(WORK + row_shares("work", ["ptr", "i64", "i64", "ptr", "i64"], 1))("work_shared", 1)


@pytest.fixture(params=["of torch", "of ours"])
def whose(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "of ours":
        monkeypatch.setattr(torch_threads, "_parallel", lambda: None)
    return str(request.param)


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def ran(work: Any, rows: range, at_once: int, threads: int, naps: int = 0) -> tuple[list[int], list[int]]:
    """How often each row was taken, and by which threads."""
    counts, takers = torch.zeros(2, 64, dtype=torch.int64)
    run_shared(work, [rows.start, rows.stop, at_once, counts.data_ptr(), 7, 7, takers.data_ptr(), naps], threads)
    return counts.tolist(), [taker for taker in dict.fromkeys(takers.tolist()) if taker]


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("at_once", [1, 3, 100])
@pytest.mark.parametrize("rows", [range(0), range(1), range(10), range(5, 33), range(64)], ids=str)
def test_every_row_is_done_once(rows: range, at_once: int, threads: int, whose: str, work: Any) -> None:
    counts, takers = ran(work, rows, at_once, threads)
    assert counts == [int(row in rows) for row in range(64)]
    assert len(takers) <= threads


def test_two_threads_share_the_rows_and_the_caller_is_one_of_them(whose: str, work: Any, three_threads: None) -> None:
    _, takers = ran(work, range(64), 1, 2, naps=60_000)
    assert len(takers) == 2
    assert threading.get_ident() in takers
    assert ran(work, range(64), 1, 1)[1] == [threading.get_ident()]


@pytest.mark.skipif(torch_threads._parallel() is None, reason="torch has no OpenMP of this kind here")
def test_torch_has_the_threads_already(work: Any, three_threads: None) -> None:
    torch.randn(1 << 20).sin()
    before = len(os.listdir("/proc/self/task"))
    ran(work, range(64), 1, 3)
    assert len(os.listdir("/proc/self/task")) <= before  # one that another test left may end


def test_linux_has_threads_of_torch() -> None:
    """Or kernels wait for processors, and no result shows it."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    assert (torch_threads._parallel() is not None) == (library.exists() and torch.backends.openmp.is_available())
