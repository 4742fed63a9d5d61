"""`jettison diff`: show how two artifacts differ, or what the passes changed in one."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.cli.console import Terminal, size_text
from jettison.cli.graph_text import slot_counts, state_bytes

if TYPE_CHECKING:
    from jettison.runtime.artifact import Artifact

_STYLES = {"+": "green", "-": "red", "@": "cyan"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("before", metavar="A", type=Path, help="artifact; alone, its graph before and after the passes")
    parser.add_argument("after", metavar="B", type=Path, nargs="?", help="artifact to compare it with")
    parser.add_argument("--summary", action="store_true", help="counts and bytes only, not the graph diff itself")


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Carry the subcommand out; returns the exit code."""
    from jettison.ir.diff import diff_summary, diff_text
    from jettison.runtime.artifact import Artifact

    first = Artifact.open(args.before)
    if args.after is None:
        before, after = _side(first, "before"), _side(first, "after")
        texts = _graph(first, "before"), _graph(first, "after")
    else:
        second = Artifact.open(args.after)
        before, after = _side(first, "after"), _side(second, "after")
        texts = _graph(first, "after"), _graph(second, "after")
    summary = diff_summary(*texts)
    text = "" if args.summary else diff_text(*texts)
    if terminal.is_json:
        terminal.document(
            {"before": before, "after": after, "summary": summary, "diff": None if args.summary else text}
        )
        return 0
    print_sides(before, after, terminal)
    print_summary(summary, terminal)
    if text:
        terminal.line()
    for line in text.splitlines():
        terminal.line(line, style=_STYLES.get(line[:1]))
    return 0


def print_sides(before: dict[str, Any], after: dict[str, Any], terminal: Terminal) -> None:
    """Write what is compared: name, pipeline, bytes."""
    for mark, side in (("-", before), ("+", after)):
        states = "" if side["state_bytes"] is None else f", states {size_text(side['state_bytes'])}"
        terminal.line(f"{mark} {side['name']}  {side['pipeline'] or '(no passes)'}", style=_STYLES[mark])
        terminal.line(f"  weights {size_text(side['weight_bytes'])}{states}")


def print_summary(summary: dict[str, Any], terminal: Terminal) -> None:
    """Write how many operators of which kind came and went."""
    terminal.line()
    terminal.line(f"operators  {summary['nodes_before']:,} -> {summary['nodes_after']:,}")
    added, removed = summary["added"], summary["removed"]
    names = sorted({*added, *removed}, key=lambda name: (-max(added.get(name, 0), removed.get(name, 0)), name))
    if names:
        terminal.line()
        terminal.table(("operator", "added", "removed"), [(n, added.get(n, 0), removed.get(n, 0)) for n in names])


def _graph(artifact: Artifact, side: str) -> str:
    return artifact.path(f"graph/{side}.txt").read_text()


def _side(artifact: Artifact, side: str) -> dict[str, Any]:
    manifest = artifact.manifest
    if side == "before":
        # As captured: the weights as the model stores them, no cache yet.
        source_bytes = artifact.read_json("report.json")["source_bytes"]
        name = f"{manifest['source']['name']} before the passes"
        return {"name": name, "pipeline": None, "weight_bytes": source_bytes, "state_bytes": None}
    return {
        "name": str(artifact.folder),
        "pipeline": manifest["pipeline"],
        "weight_bytes": manifest["weight_bytes"],
        "state_bytes": state_bytes(manifest["states"], slot_counts(manifest, manifest["model"]["context"])),
    }
