"""Memory that a disk writes to: private, as large as asked for, and of huge pages where there are any."""

from __future__ import annotations

import mmap
import re
from pathlib import Path

import pytest
import torch

from jettison.runtime.transfer_memory import transfer_memory

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def area_of(address: int) -> str:
    """What the system says of the memory around an address."""
    for area in re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE):
        if area and address in range(*(int(end, 16) for end in area.split(" ", 1)[0].split("-"))):
            return area
    raise AssertionError("not mapped")


@pytest.mark.skipif(not HUGE_PAGES.exists(), reason="this system has no huge pages")
def test_it_is_private_and_asks_for_huge_pages() -> None:
    memory = transfer_memory(5 << 20)
    assert len(memory) == 5 << 20
    area = area_of(torch.frombuffer(memory, dtype=torch.uint8).data_ptr())
    assert area.splitlines()[0].split()[1] == "rw-p", "it counts as memory of this process"
    (flags,) = re.findall(r"^VmFlags: (.*)$", area, flags=re.MULTILINE)
    assert "hg" in flags.split()


def test_a_system_without_them_gives_usual_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 12345)  # what a kernel without them answers: EINVAL
    memory = transfer_memory(10)
    memory[:10] = bytes(range(10))
    assert memory[9] == 9
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE")
    assert len(transfer_memory(1 << 16)) == 1 << 16
