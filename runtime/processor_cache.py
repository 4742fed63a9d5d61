"""How large the cache of this processor is."""

from __future__ import annotations

import functools
from pathlib import Path

from jettison.ir.token_chunks import USUAL_CACHE_BYTES

_FOLDER = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@functools.cache
def cache_bytes(folder: Path = _FOLDER) -> int:
    """Of the largest cache that holds data; a usual size where the system does not say.

    Args:
        folder: Where Linux describes the caches of a core.
    """
    sizes = [0]
    for cache in folder.glob("index*"):
        try:
            kind, size = ((cache / name).read_text().strip() for name in ("type", "size"))
            if kind != "Instruction":
                sizes.append(int(size.rstrip("KMG")) * _UNITS.get(size[-1:], 1))
        except (OSError, ValueError):
            continue
    return max(sizes) or USUAL_CACHE_BYTES
