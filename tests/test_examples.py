"""Every example runs as a user would run it, all in one process: importing torch takes longer than most of them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parent.parent / "examples").glob("*.py"))
RUN = """
import runpy, sys
for path in sys.argv[1:]:
    sys.argv = [path]
    runpy.run_path(path, run_name="__main__")
    print("done:", path)
"""


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_is_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) < 80, "an example stays under 80 lines"


def test_examples_run() -> None:
    command = [sys.executable, "-c", RUN, *map(str, EXAMPLES)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    shown = done.stdout
    for path in EXAMPLES:
        printed, _, shown = shown.partition(f"done: {path}\n")
        assert printed.strip(), path.name
