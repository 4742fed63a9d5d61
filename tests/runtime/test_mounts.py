"""File systems, and what Linux does with the pages of each."""

from __future__ import annotations

import mmap
import platform
from pathlib import Path

import pytest

from jettison.runtime import mounts
from jettison.runtime.mounts import has_large_folios, mount_of


def test_file_systems_are_found_by_the_longest_mount(tmp_path: Path) -> None:
    if not Path("/proc/mounts").exists():
        pytest.skip("mounts are read from Linux's /proc")
    place, kind = mount_of(Path("/proc/self"))
    assert (place, kind) == ("/proc", "proc")
    assert mount_of(tmp_path)[1] not in ("", "proc")


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="Linux alone is asked for huge pages")
@pytest.mark.parametrize(
    ("kind", "release", "has"),
    [
        ("ext4", "6.16.0", True),
        ("ext4", "6.18.44-custom", True),
        ("ext4", "7.0", True),
        ("ext4", "6.15.9", False),
        ("xfs", "5.18.1", True),
        ("xfs", "5.4.0-generic", False),
        ("overlay", "6.18.0", False),
        ("", "6.18.0", False),
        ("ext4", "unknown", False),
    ],
)
def test_large_folios_came_with_releases(kind, release, has, monkeypatch):
    monkeypatch.setattr(mounts, "mount_of", lambda path: ("/", kind))
    monkeypatch.setattr(platform, "release", lambda: release)
    assert has_large_folios(Path("/anything")) == has
