"""`jettison bench`: measure speed and memory."""

from __future__ import annotations

import argparse

from jettison.cli.artifact import open_model
from jettison.cli.console import Terminal
from jettison.cli.parser import add_artifact, add_running, count
from jettison.cli.signals import import_torch

_PROMPT_TOKENS, _NEW_TOKENS, _BATCH, _ROUNDS = 512, 64, 1, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_artifact(parser)
    for flag, default, text in (
        ("--prompt-tokens", _PROMPT_TOKENS, "tokens of the prompt"),
        ("--new-tokens", _NEW_TOKENS, "tokens to generate"),
        ("--batch", _BATCH, "rows"),
        ("--rounds", _ROUNDS, "repetitions; medians are reported"),
    ):
        parser.add_argument(flag, type=count, default=default, metavar="N", help=f"{text} (default: {default})")
    add_running(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Carry the subcommand out; returns the exit code."""
    import_torch()
    from jettison.bench import bench

    result = bench(
        open_model(args, terminal), prompt_tokens=args.prompt_tokens, new_tokens=args.new_tokens, batch=args.batch,
        rounds=args.rounds,
    )  # fmt: skip
    if terminal.is_json:
        terminal.document(result)
        return 0
    terminal.line(
        f"{args.artifact}: {args.prompt_tokens} prompt tokens, {args.new_tokens} new tokens, batch {args.batch}, "
        f"median of {args.rounds} rounds"
    )
    terminal.line()
    terminal.table(("measure", "value"), [(key, value) for key, value in result.items()])
    return 0
