"""The user's cache: `$JETTISON_CACHE`, else `$XDG_CACHE_HOME/jettison`, else `~/.cache/jettison`."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where what was made for this machine is kept."""
    given = os.environ.get("JETTISON_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jettison"
