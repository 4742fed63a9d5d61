"""What was captured in this process, for tests of what comes after it."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jettison.source import ModelSource

remembers_modules = False
_known: dict[Any, ModelSource] = {}


def remembered(open_source: Callable[..., ModelSource]) -> Callable[..., ModelSource]:
    """`open_source` that captures a folder again only if its files have changed."""

    @functools.wraps(open_source)
    def opened(model: Any, **settings: Any) -> ModelSource:
        files = []
        if isinstance(model, (str, Path)):
            files = [(path, path.stat()) for path in sorted(Path(model).rglob("*")) if path.is_file()]
        if not files and not remembers_modules:
            return open_source(model, **settings)
        seen = tuple((path, status.st_ino, status.st_mtime_ns, status.st_size) for path, status in files)
        key = (model, seen, *sorted(settings.items()))
        if key not in _known:
            _known[key] = open_source(model, **settings)
        known = _known[key]
        # Passes change the program, and options what belongs to it.
        return dataclasses.replace(known, program=known.program.copy(), config=dict(known.config))

    return opened


def forget_modules() -> None:
    """Captures of modules are of use to one file; folders are shared by many."""
    for key in [key for key in _known if not isinstance(key[0], (str, Path))]:
        del _known[key]
