"""`jettison plan`: predict bytes, time and memory of a model on this machine, and what to stream if it does not fit."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from jettison.cli.console import Terminal, size_text
from jettison.cli.parser import count
from jettison.cli.signals import import_torch
from jettison.ir.errors import OptionError

_SIZE = "such as 2GiB, 700MB or 1.5GB"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "model", metavar="MODEL|DIR", help="Hugging Face model folder, or an artifact for torch or triton"
    )
    parser.add_argument(
        "--passes", metavar="TEXT", default="", help="pipeline that the model would go through; see `optimize`"
    )
    parser.add_argument(
        "--target", choices=("onnx", "torch", "triton"), help="what would run it (default: torch, or the artifact's)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="what the graph would compute in (default: float32)",
    )  # fmt: skip
    parser.add_argument(
        "--device-memory", metavar="SIZE",
        help=f"memory where products are computed, {_SIZE}: of the GPU for triton, else main memory",
    )  # fmt: skip
    add_workload(parser)
    parser.add_argument(
        "--objective", choices=("latency", "throughput"), default="latency",
        help="throughput also plans a block of batches; blocks are predicted, not executed yet",
    )  # fmt: skip
    parser.add_argument(
        "--calibration", type=Path, metavar="FILE", help="text for passes that are calibrated; see `optimize`"
    )
    parser.add_argument("--remeasure", action="store_true", help="measure the machine again, which takes some seconds")


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Options that say which memory there is, and for what."""
    parser.add_argument(
        "--host-memory", metavar="SIZE", help="main memory, all that the process takes included (default: no limit)"
    )
    parser.add_argument("--disk", metavar="SIZE", help="room for streamed weights on disk (default: no limit)")
    parser.add_argument("--batch", type=count, default=1, metavar="N", help="sequences at once (default: 1)")
    parser.add_argument(
        "--context", type=count, metavar="N", help="tokens of a sequence in the end (default: the model's context)"
    )
    parser.add_argument("--prompt", type=count, default=512, metavar="N", help="tokens of its prompt (default: 512)")


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Carry the subcommand out; returns the exit code."""
    import_torch()
    from jettison.planner import Wanted, folder_of, open_program, plan

    device, host, disk = (
        size_of(getattr(args, name.replace("-", "_")), f"jettison plan: --{name}")
        for name in ("device-memory", "host-memory", "disk")
    )
    wanted = Wanted(device, host, disk, args.context, args.prompt, args.batch, args.objective)
    program, target = open_program(args.model, args.passes, args.target, args.dtype, args.calibration)
    try:
        document = plan(program, target, wanted, folder=folder_of(args.model), remeasure=args.remeasure)
    except OptionError as error:
        if terminal.is_json:
            nothing = dict.fromkeys(("bound_by", "predicted_ms_per_token", "placement"))
            terminal.document({"model": args.model, "fits": False, **nothing, "problem": str(error)})
        raise
    if terminal.is_json:
        terminal.document({"model": args.model, **document})
    else:
        _print(args.model, document, terminal)
    return 0


def size_of(text: str | None, flag: str) -> int | None:
    """Bytes of a size; `flag` is how messages begin."""
    from jettison.passes.options import parse_bytes

    if text is None:
        return None
    try:
        found = parse_bytes(text)
    except OptionError as error:
        raise OptionError(f"{flag}: {error}") from error
    if not found:
        raise OptionError(f"{flag} {text}: needs bytes above 0, {_SIZE}.")
    return found


def _print(model: str, document: dict[str, Any], terminal: Terminal) -> None:
    rates = document["rates"]
    origin = "measured" if rates["is_measured"] else "usual figures, no GPU was found"
    terminal.line(f"model      {model}")
    terminal.line(f"pipeline   {document['pipeline'] or '(empty)'}")
    terminal.line(
        f"target     {document['target']}, batch {document['batch']}, context {document['context']:,}, prompt "
        f"{document['prompt']:,}"
    )
    copies = f", copies {rates['copy'] / 1e9:.1f} GB/s" if rates["copy"] else ""
    terminal.line(
        f"machine    memory {rates['read'] / 1e9:.1f} GB/s, disk {rates['disk'] / 1e9:.2f} GB/s{copies} ({origin})"
    )
    terminal.line()
    _print_phases(document["phases"], terminal)
    _print_memory(document, terminal)
    for note in document["notes"]:
        terminal.line(f"note       {note}")
    if document.get("throughput"):
        terminal.line(f"throughput {document['throughput']['text']}")
    if document["placement"]["pass"]:
        terminal.line(f"pass       {document['placement']['pass']}")


def _print_phases(tables: list[dict[str, Any]], terminal: Terminal) -> None:
    columns = (
        "phase", "tokens", "weights pinned", "weights streamed", "states read", "states written", "operations", "ms",
        "ms per token", "bound by",
    )  # fmt: skip
    keys = (
        "phase", "tokens", "weight_bytes_pinned", "weight_bytes_streamed", "state_bytes_read", "state_bytes_written",
        "operations", "ms", "ms_per_token", "bound_by",
    )  # fmt: skip
    terminal.table(columns, [[table[key] for key in keys] for table in tables])
    terminal.line()
    kinds = dict.fromkeys(kind for table in tables for kind in table["ms_by_kind"])
    terminal.table(
        ("ms of computing", *kinds),
        [(table["phase"], *(table["ms_by_kind"].get(kind) for kind in kinds)) for table in tables],
    )
    terminal.line()


def _print_memory(document: dict[str, Any], terminal: Terminal) -> None:
    memory, placement = document["memory"], document["placement"]
    terminal.table(("memory at its peak", "bytes"), [(kind, size) for kind, size in memory.items() if size is not None])
    terminal.line()
    for tier in ("pinned", "host", "disk"):
        held = placement[tier]
        if held["tensors"]:
            terminal.line(f"{tier:10} {held['tensors']:,} tensors, {size_text(held['bytes'])}")
