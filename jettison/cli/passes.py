"""`jettison passes`: list every pass, cache policy, weight format, rounding method and predictor with its options."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from jettison.cli.console import Terminal
from jettison.cli.signals import import_torch


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("name", metavar="NAME", nargs="?", help="show all that is documented about this one")


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Carry the subcommand out; returns the exit code."""
    import_torch()
    from jettison.passes import USER_PASSES
    from jettison.passes.factorizers import FACTORIZERS
    from jettison.passes.formats import FORMATS
    from jettison.passes.methods import METHODS
    from jettison.passes.policies import POLICIES
    from jettison.passes.predictors import PREDICTORS
    from jettison.passes.pruners import PRUNERS

    kinds: dict[str, list[dict[str, Any]]] = {
        "passes": [_describe(cls) for cls in USER_PASSES],
        "policies": [_describe(cls) for cls in POLICIES.values()],
        "formats": [_describe(cls) for cls in FORMATS.values()],
        "methods": [_describe(cls) for cls in METHODS.values()],
        "predictors": [_describe(cls) for cls in PREDICTORS.values()],
        "factorizers": [_describe(cls) for cls in FACTORIZERS.values()],
        "pruners": [_describe(cls) for cls in PRUNERS.values()],
    }
    if args.name is not None:
        from jettison.passes.options import lookup

        named = {entry["name"]: entry for entries in kinds.values() for entry in entries}
        found = lookup(args.name, named, "pass, policy, format, method, predictor, factorizer or pruner", "")
        kinds = {kind: [entry for entry in entries if entry is found] for kind, entries in kinds.items()}
    if terminal.is_json:
        terminal.document(kinds)
        return 0
    if args.name is not None:
        _print_document(next(entry for entries in kinds.values() for entry in entries), terminal)
        return 0
    titles = (
        "Passes", "\nPolicies of cache-kv", "\nFormats of quantize-weights", "\nMethods of quantize-weights",
        "\nMethods of predict-mlp-sparsity", "\nMethods of factorize-linear", "\nMethods of prune-weights",
    )  # fmt: skip
    for title, entries in zip(titles, kinds.values(), strict=True):
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
    name = getattr(cls, "id", None) or cls.name  # type: ignore[attr-defined]
    return {"name": name, "summary": summary, "options": options, "doc": text}


def _print_document(entry: dict[str, Any], terminal: Terminal) -> None:
    terminal.line(entry["name"], style="bold cyan")
    terminal.line(entry["doc"].strip())
    terminal.line()
    _print_options(entry, terminal)


def _print_options(entry: dict[str, Any], terminal: Terminal) -> None:
    if entry["options"]:
        rows = [(f"  {o['name']}", o["type"], o["default"], o["doc"]) for o in entry["options"]]
        terminal.table(("  option", "type", "default", "meaning"), rows)
