"""`jettison passes`: list every pass and KV-cache policy with its options."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from jettison.cli.console import Terminal
from jettison.cli.signals import import_torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="show all that is documented about this pass or policy")


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Carry the subcommand out; returns the exit code."""
    import_torch()
    from jettison.passes import USER_PASSES
    from jettison.passes.policies import POLICIES

    passes = [_describe(cls) for cls in USER_PASSES]
    policies = [_describe(cls) for cls in POLICIES.values()]
    if args.name is not None:
        from jettison.passes.options import lookup

        found = lookup(args.name, {entry["name"]: entry for entry in (*passes, *policies)}, "pass or policy", "")
        passes, policies = ([entry for entry in entries if entry is found] for entries in (passes, policies))
    if terminal.is_json:
        terminal.document({"passes": passes, "policies": policies})
        return 0
    if args.name is not None:
        _print_document((*passes, *policies)[0], terminal)
        return 0
    for title, entries in (("Passes", passes), ("\nPolicies of cache-kv", policies)):
        terminal.line(title, style="bold")
        for entry in entries:
            terminal.line()
            terminal.line(entry["name"], style="bold cyan")
            terminal.line(f"  {entry['summary']}")
            _print_options(entry, terminal)
    return 0


def _describe(cls: type) -> dict[str, Any]:
    from jettison.passes.options import describe

    text = sys.modules[cls.__module__].__doc__ or ""
    summary = text.partition("\n\n")[0].replace("\n", " ").strip()
    columns = ("name", "type", "default", "doc")
    options = [dict(zip(columns, row, strict=True)) for row in describe(cls)]
    return {"name": cls.name, "summary": summary, "options": options, "doc": text}  # type: ignore[attr-defined]


def _print_document(entry: dict[str, Any], terminal: Terminal) -> None:
    terminal.line(entry["name"], style="bold cyan")
    terminal.line(entry["doc"].strip())
    terminal.line()
    _print_options(entry, terminal)


def _print_options(entry: dict[str, Any], terminal: Terminal) -> None:
    if entry["options"]:
        rows = [(f"  {o['name']}", o["type"], o["default"], o["doc"]) for o in entry["options"]]
        terminal.table(("  option", "type", "default", "meaning"), rows)
