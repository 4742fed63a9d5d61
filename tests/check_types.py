"""Type-check the package as it is installed: checkers do not follow a mapping of folders to package names.

Builds a tree of links in which `jettison/ir` and the others lie where their names say, and runs mypy on it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("ir", "passes", "codegen", "runtime")


def main() -> int:
    """Run mypy; its exit code is ours."""
    with tempfile.TemporaryDirectory(prefix="jettison-types-") as folder:
        package = Path(folder) / "jettison"
        package.mkdir()
        for child in (ROOT / "jettison").iterdir():
            (package / child.name).symlink_to(child)
        for name in PACKAGES:
            (package / name).symlink_to(ROOT / name)
        # No cache: the links lie elsewhere each time, which confuses it.
        command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), "-p", "jettison"]
        return subprocess.run([*command, "--cache-dir", os.devnull], cwd=folder, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
