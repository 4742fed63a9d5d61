"""`jettison prepare`: do once what depends on this machine: pack weights for its CPU, or tune kernels for its GPU."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from jettison.cli.console import Terminal, size_text
from jettison.cli.parser import add_artifact
from jettison.ir.errors import OptionError
from jettison.ir.progress import track

if TYPE_CHECKING:
    from jettison.runtime.artifact import Artifact


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_artifact(parser)
    parser.add_argument("--remove", action="store_true", help="delete the packed weights of this artifact instead")


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Carry the subcommand out; returns the exit code."""
    from jettison.runtime.artifact import Artifact, check_requirements

    artifact = Artifact.open(args.artifact, verify=True)
    target = artifact.manifest["target"]
    if target == "torch" or (target == "triton" and args.remove):
        raise OptionError(
            f"[prepare] {args.artifact}: its target is {target}, and nothing of it is packed: needed onnx, whose "
            "weights are packed when they are loaded. Use it as it is."
        )
    check_requirements(artifact.manifest)
    document, text = _tuned(args) if target == "triton" else _packed(args, artifact)
    if terminal.is_json:
        terminal.document(document)
    else:
        terminal.line(text)
    return 0


def _packed(args: argparse.Namespace, artifact: Artifact) -> tuple[dict[str, Any], str]:
    from jettison.runtime import prepared
    from jettison.segment_files import packed_segments

    folder = prepared.prepared_folder(artifact)
    document = {"artifact": str(args.artifact), "folder": str(folder), "bytes": 0, "removed": False}
    if args.remove:
        was_there = prepared.remove_prepared(artifact)
        text = f"removed {folder}" if was_there else f"{args.artifact} was not prepared"
        return {**document, "removed": was_there}, text
    graphs = [graph["file"] for graph in artifact.manifest["graphs"]]
    if "chains" in artifact.manifest:
        graphs = packed_segments(artifact)
        if not graphs:
            raise OptionError(
                f"[prepare] {args.artifact}: its weights are read from disk as they are stored, and nothing of it is "
                "packed. Use it as it is."
            )
    with track("pack weights", len(graphs)) as advance:
        folder = prepared.prepare(artifact, graphs, advance)
    size = sum(path.stat().st_size for path in folder.iterdir())
    text = f"{folder}: {size_text(size)}; every load of {args.artifact} on this machine uses it"
    return {**document, "bytes": size}, text


def _tuned(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    import jettison
    from jettison.runtime.triton_executor import TritonExecutor
    from jettison.runtime.tunings import keep, measure, stopwatch

    watch = stopwatch()
    executor = jettison.load(args.artifact).executor
    assert isinstance(executor, TritonExecutor), "what runs this target"
    with track("tune kernels", 1) as advance:
        tuned = measure(executor, watch)
        advance(1)
    path, count = keep(tuned), len(tuned["kernels"])
    document = {"artifact": str(args.artifact), "file": str(path), "kernels": tuned["kernels"]}
    return document, f"{path}: {count} kernels; every load on this machine uses it"
