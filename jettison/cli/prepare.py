"""`jettison prepare`: pack the weights of an artifact for this machine once; loads then map them."""

from __future__ import annotations

import argparse

from jettison.cli.console import Terminal, size_text
from jettison.cli.parser import add_artifact
from jettison.ir.errors import OptionError
from jettison.ir.progress import track


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_artifact(parser)
    parser.add_argument("--remove", action="store_true", help="delete the packed weights of this artifact instead")


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Carry the subcommand out; returns the exit code."""
    from jettison.runtime import prepared
    from jettison.runtime.artifact import Artifact, check_requirements

    artifact = Artifact.open(args.artifact, verify=True)
    if artifact.manifest["target"] != "onnx":
        raise OptionError(
            f"[prepare] {args.artifact}: its target is {artifact.manifest['target']}: needed onnx, whose weights are "
            "packed when they are loaded. Use it as it is."
        )
    check_requirements(artifact.manifest)
    folder = prepared.prepared_folder(artifact)
    if args.remove:
        was_there = prepared.remove_prepared(artifact)
        document = {"artifact": str(args.artifact), "folder": str(folder), "bytes": 0, "removed": was_there}
        text = f"removed {folder}" if was_there else f"{args.artifact} was not prepared"
    else:
        graphs = [graph["file"] for graph in artifact.manifest["graphs"]]
        with track("pack weights", len(graphs)) as advance:
            folder = prepared.prepare(artifact, graphs, advance)
        size = sum(path.stat().st_size for path in folder.iterdir())
        document = {"artifact": str(args.artifact), "folder": str(folder), "bytes": size, "removed": False}
        text = f"{folder}: {size_text(size)}; every load of {args.artifact} on this machine uses it"
    if terminal.is_json:
        terminal.document(document)
    else:
        terminal.line(text)
    return 0
