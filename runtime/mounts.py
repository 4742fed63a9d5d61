"""What file system a path is on, and what Linux can do with it."""

from __future__ import annotations

import contextlib
import mmap
import platform
import re
from pathlib import Path

# Since when the page cache keeps files of a file system in pieces larger than a page, which a disk reads at once.
_LARGE_FOLIOS = {"xfs": (5, 18), "ext4": (6, 16)}


def mount_of(path: Path) -> tuple[str, str]:
    """Where the file system of a path is mounted, and its kind; both empty where the system does not say."""
    resolved, found = str(path.resolve()), ("", "")
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, place, kind, *_ = line.split(" ")
            place = place.replace("\\040", " ")
            is_inside = resolved == place or resolved.startswith(place.rstrip("/") + "/")
            if is_inside and len(place) >= len(found[0]):
                found = place, kind
    return found


def has_large_folios(path: Path) -> bool:
    """Whether pages of a mapped file are read in huge pieces if one asks for them (`MADV_HUGEPAGE`)."""
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    since = _LARGE_FOLIOS.get(mount_of(path)[1])
    if since is None or release is None or not hasattr(mmap, "MADV_HUGEPAGE"):
        return False
    return (int(release[1]), int(release[2])) >= since
