"""Text of kernels, and the functions that it defines."""

from __future__ import annotations

import hashlib
import linecache
from collections.abc import Iterable
from types import CodeType
from typing import Any

HEADER = "import triton\nimport triton.language as tl\n"


def indented(lines: Iterable[str], depth: int = 1) -> str:
    """Lines of a block, one per line; empty ones are left out."""
    return "\n".join("    " * depth + line for line in lines if line)


def comment(text: str, width: int = 116) -> list[str]:
    """A comment of as many lines as it takes."""
    lines, line = [], "#"
    for word in text.split():
        if len(line) + 1 + len(word) > width and line != "#":
            lines.append(line)
            line = "#"
        line += " " + word
    return [*lines, line]


def source_hash(text: str) -> str:
    """SHA-256 of a source."""
    return hashlib.sha256(text.encode()).hexdigest()


def define(text: str, name: str) -> Any:
    """The kernel that a source defines.

    Triton reads the text of a function through `inspect`, which finds what is not in a file in the cache of lines.

    Args:
        text: A whole module.
        name: Of the kernel.
    """
    file_name = f"<jettison kernel {name} {source_hash(text)[:12]}>"
    linecache.cache[file_name] = (len(text), None, text.splitlines(keepends=True), file_name)
    code: CodeType = compile(text, file_name, "exec")
    scope: dict[str, Any] = {"__name__": f"jettison_kernel_{name}"}
    exec(code, scope)
    return scope[name]
