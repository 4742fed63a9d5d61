"""Memory that is given back to the system."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from jettison.ir.allocator import forget_library
from jettison.runtime.bitmap_weight import bitmap_kernels

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are counted by /proc")


def _file_pages(name: str) -> int:
    """Bytes of the pages of a mapped library that are in memory and as they are in its file."""
    areas = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE)
    own = [area for area in areas if name in area.partition("\n")[0]]
    counts = {key: [int(each) for each in re.findall(rf"^{key}: +(\d+) kB", "".join(own), re.MULTILINE)]
              for key in ("Rss", "Anonymous")}  # fmt: skip
    return 1024 * (sum(counts["Rss"]) - sum(counts["Anonymous"]))


def test_a_library_that_has_done_its_work_takes_no_memory_and_still_works() -> None:
    from llvmlite import binding

    for number in range(2):
        binding.initialize_native_target()
        binding.parse_assembly(f"define void @nothing{number}() {{ ret void }}").verify()
        before = _file_pages("llvmlite")
        assert before > 1 << 20, "parsing touches LLVM"
        forget_library("llvmlite")
        assert _file_pages("llvmlite") < before / 4


def test_compiled_kernels_leave_no_compiler_behind() -> None:
    assert bitmap_kernels("int8", 64).multiply
    assert _file_pages("llvmlite") < 4 << 20
