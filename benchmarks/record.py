"""What every benchmark result says beside its figures: versions, machine, command, load."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from jettison.runtime.artifact import library_versions

RESULTS = Path(__file__).resolve().parent / "results"


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def environment() -> dict[str, Any]:
    """Versions, machine, command and load, to be taken before measuring."""
    return {
        "command": shlex.join(
            ["python", os.path.relpath(sys.argv[0], RESULTS.parent.parent), *map(_shown, sys.argv[1:])]
        ),
        "versions": library_versions(),
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "load_average_before": [round(load, 2) for load in os.getloadavg()],
    }


def _shown(argument: str) -> str:
    """An argument without the folders that are this machine's own."""
    return Path(argument).name if os.path.isabs(argument) else argument


def write(name: str, figures: dict[str, Any], before: dict[str, Any]) -> Path:
    """Write `results/NAME.json`.

    Args:
        name: File name without suffix.
        figures: The measurement.
        before: What `environment` returned before it.
    """
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    load_after = [round(load, 2) for load in os.getloadavg()]
    path.write_text(
        json.dumps({"environment": {**before, "load_average_after": load_after}, **figures}, indent=2) + "\n"
    )
    return path
