"""`jettison place`: write an artifact again for less memory: what does not fit is streamed from disk."""

from __future__ import annotations

import argparse
from pathlib import Path

from jettison.cli.console import Terminal
from jettison.cli.optimize import print_report
from jettison.cli.parser import add_artifact
from jettison.cli.plan import add_workload, size_of
from jettison.cli.signals import import_torch
from jettison.ir.errors import OptionError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_artifact(parser)
    parser.add_argument("--out", metavar="DIR", type=Path, required=True, help="folder to write; must not exist")
    parser.add_argument("--overwrite", action="store_true", help="replace an artifact that is at --out")
    add_workload(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Carry the subcommand out; returns the exit code."""
    from jettison.runtime.artifact import check_destination

    check_destination(args.out, overwrite=args.overwrite)
    import_torch()
    from jettison.placing import place

    host, disk = (
        size_of(getattr(args, name.replace("-", "_")), f"jettison place: --{name}") for name in ("host-memory", "disk")
    )
    if host is None:
        raise OptionError("jettison place: no limit of memory. Say it: --host-memory 2GiB, for example.")
    model = place(args.artifact, host, disk=disk, context=args.context, prompt=args.prompt, batch=args.batch)
    model.save_pretrained(args.out, overwrite=args.overwrite)
    if terminal.is_json:
        terminal.document({**model.report.as_dict(), "artifact": str(args.out)})
    else:
        print_report(model.report, terminal)
        terminal.line(f"artifact   {args.out}")
    return 0
