"""`jettison verify`: check the hash of every file of an artifact."""

from __future__ import annotations

import argparse
from typing import Any

from jettison.cli.console import Terminal, size_text
from jettison.cli.parser import add_artifact
from jettison.ir.errors import ArtifactError
from jettison.ir.progress import track


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_artifact(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Carry the subcommand out; returns the exit code."""
    from jettison.runtime.artifact import Artifact

    document: dict[str, Any] = {
        "artifact": str(args.artifact),
        "ok": False,
        "files": None,
        "bytes": None,
        "problems": [],
    }
    try:
        artifact = Artifact.open(args.artifact)
    except ArtifactError as error:
        # What is wrong with the manifest, with a size or with a small file shows when the folder is opened.
        if terminal.is_json:
            problem = {"kind": "unreadable", "name": None, "found": str(error), "needed": "an artifact"}
            terminal.document({**document, "problems": [problem]})
        raise
    sizes = [record["bytes"] for record in artifact.manifest["files"].values()]
    done = 0
    with track("verify", sum(sizes)) as advance:

        def progress(name: str, now: int, total: int) -> None:
            nonlocal done
            advance(now - done)
            done = now

        problems = artifact.verify(progress)
    damage = [problem for problem in problems if not problem.is_note]
    document.update(ok=not damage, files=len(sizes), bytes=sum(sizes))
    document["problems"] = [
        {"kind": p.kind, "name": p.name, "found": p.found, "needed": p.needed} for p in problems
    ]  # fmt: skip
    if terminal.is_json:
        terminal.document(document)
    else:
        for note in (problem for problem in problems if problem.is_note):
            terminal.line(f"note: {note}")
    if damage:
        listed = "\n".join(f"  {problem}" for problem in damage)
        raise ArtifactError(
            f"[verify] {args.artifact}: {len(damage)} of {len(sizes) + 1} files are damaged:\n{listed}\nCopy the "
            "artifact again, or write it again with `jettison optimize`."
        )
    if not terminal.is_json:
        terminal.line(f"{args.artifact}: sound, {len(sizes)} files, {size_text(sum(sizes))}", style="green")
    return 0
