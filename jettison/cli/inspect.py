"""`jettison inspect`: list what an artifact holds: entries, states, kernels, files, bytes."""

from __future__ import annotations

import argparse
from collections import Counter
from typing import TYPE_CHECKING, Any

from jettison.cli.console import Terminal, size_text
from jettison.cli.graph_text import read_graph, slot_counts, state_bytes
from jettison.cli.parser import add_artifact

if TYPE_CHECKING:
    from jettison.runtime.artifact import Artifact

_CLASSES = (
    ("weights", (".data", ".safetensors")),
    ("graphs", (".onnx",)),
    ("program", ("program.json",)),
    ("graph text", (".txt",)),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_artifact(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Carry the subcommand out; returns the exit code."""
    from jettison.runtime.artifact import Artifact

    document = _document(Artifact.open(args.artifact))
    if terminal.is_json:
        terminal.document(document)
        return 0
    model = document["model"]
    terminal.line(f"model      {document['source']['name']} ({model['name']}, {model['kind']})")
    terminal.line(f"pipeline   {document['pipeline'] or '(empty)'}")
    terminal.line(f"target     {document['target']}")
    terminal.line(f"context    {model['context']:,} tokens, vocabulary {model['vocab_size']:,}")
    terminal.line(f"weights    {size_text(document['weight_bytes'])}")
    terminal.line(f"on disk    {size_text(document['file_bytes'])} with tables, padding and headers")
    terminal.line(f"states     {size_text(document['state_bytes'])} for one sequence of {model['context']:,} tokens")
    terminal.line()
    columns = ("entry", "operators", "inputs", "outputs")
    rows = [(e["name"], e["operators"], " ".join(e["inputs"]), " ".join(e["outputs"])) for e in document["entries"]]
    terminal.table(columns, rows)
    terminal.line()
    if document["states"]:
        terminal.table(
            ("state", "dtype", "shape"),
            [(s["name"], s["dtype"], "[" + ", ".join(map(str, s["shape"])) + "]") for s in document["states"]],
        )
        terminal.line()
    if document["kernels"]:
        facts = ("name", "arch", "registers", "shared_bytes", "spill_bytes")
        terminal.table(facts, [[kernel[fact] for fact in facts] for kernel in document["kernels"]])
        terminal.line()
    terminal.table(("file", "bytes", "sha256"), [(f["name"], f["bytes"], f["sha256"]) for f in document["files"]])
    terminal.line()
    terminal.table(("class", "bytes"), list(document["bytes_by_class"].items()))
    return 0


def _document(artifact: Artifact) -> dict[str, Any]:
    manifest = artifact.manifest
    files = [{"name": name, **record} for name, record in sorted(manifest["files"].items())]
    by_class: Counter[str] = Counter()
    for file in files:
        by_class[_class_of(file["name"])] += file["bytes"]
    return {
        "artifact": str(artifact.folder),
        "format_version": manifest["format_version"],
        "target": manifest["target"],
        "pipeline": manifest["pipeline"],
        "source": manifest["source"],
        "model": manifest["model"],
        "libraries": manifest["libraries"],
        "requires": manifest["requires"],
        "seed": manifest["seed"],
        "entries": _entries(artifact),
        "states": manifest["states"],
        # Native kernels come with the Triton target; the others are run by a library.
        "kernels": manifest.get("kernels", []),
        "files": files,
        "bytes_by_class": dict(by_class),
        "weight_bytes": manifest["weight_bytes"],
        "file_bytes": by_class["weights"],
        "state_bytes": state_bytes(manifest["states"], slot_counts(manifest, manifest["model"]["context"])),
    }


def _entries(artifact: Artifact) -> list[dict[str, Any]]:
    """Entries with their operators as the canonical text counts them, and the names at their surface."""
    counts = read_graph(artifact.path("graph/after.txt").read_text(), artifact.manifest["target"]).entries
    files = {entry: graph for graph in artifact.manifest.get("graphs", []) for entry in graph["entries"]}
    for chain in artifact.manifest.get("chains", []):
        first, *_, last = [segment["file"] for segment in chain["segments"]] * 2
        files |= {
            entry: {**chain, "file": first if first == last else f"{first} to {last}"} for entry in chain["entries"]
        }
    return [
        {
            "name": name,
            "operators": operators.total(),
            "file": files[name]["file"] if name in files else "program.json",
            "inputs": files[name]["inputs"] if name in files else [],
            "outputs": files[name]["outputs"] if name in files else [],
        }
        for name, operators in counts.items()
    ]


def _class_of(name: str) -> str:
    for label, suffixes in _CLASSES:
        if name.endswith(suffixes):
            return label
    return "configuration and tokenizer"
