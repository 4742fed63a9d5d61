"""`jettison eval`: measure perplexity, and KL divergence from a reference."""

from __future__ import annotations

import argparse
from pathlib import Path

from jettison.cli.artifact import open_model
from jettison.cli.console import Terminal, size_text
from jettison.cli.parser import add_artifact, add_running, count, divergence, seed
from jettison.cli.signals import import_torch

BUDGET_MISSED = 3

# Operators that decode steps have and prompts have not.
_DECODE_ONLY = ("jettison.sparse_mlp", "jettison.quantized_sparse_mlp", "jettison.sparse_linear",
                "jettison.head_candidates")  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add_artifact(parser)
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="UTF-8 text (default: sampled from the artifact itself)"
    )
    parser.add_argument(
        "--reference", metavar="MODEL", help="model folder the artifact was made from; without it there is no KL"
    )
    parser.add_argument(
        "--context", type=count, metavar="N", help="tokens of a window (default: the model's, at most 1024)"
    )
    parser.add_argument(
        "--prefill", type=count, metavar="P", help="decode all but the first P tokens of a window, and score only those"
    )
    parser.add_argument(
        "--max-kl", type=divergence, metavar="NATS", help="exit with code 3 above this many nats per token"
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of sampled text (default: 0)")
    add_running(parser)


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Carry the subcommand out; returns the exit code."""
    import_torch()
    from jettison.evaluate import evaluate
    from jettison.ir.errors import OptionError
    from jettison.sample_text import load_text

    if args.max_kl is not None and args.reference is None:
        raise OptionError("jettison eval: --max-kl needs something to diverge from. Add --reference MODEL.")
    text = None if args.text is None else load_text(args.text)
    model = open_model(args, terminal, allow_spinning=False)
    result = evaluate(
        model, text=text, reference=args.reference, context=args.context, prefill=args.prefill, seed=args.seed
    ).as_dict()  # fmt: skip
    if terminal.is_json:
        terminal.document(result)
    else:
        source = f"text {args.text}" if args.text else f"text sampled from the model, seed {args.seed}"
        terminal.line(f"{args.artifact}: {result['tokens']:,} tokens scored, {source}")
        terminal.line()
        units = {
            "perplexity": "",
            "bits_per_byte": "",
            "kl": "nats/token",
            "top1_agreement": "",
            "certified_fraction": "",
        }
        rows = [(key, result[key], unit) for key, unit in units.items() if result[key] is not None]
        terminal.table(("measure", "value", ""), rows)
        terminal.line()
        terminal.line(f"weights    {size_text(result['weight_bytes'])}")
        terminal.line(f"states     {size_text(result['state_bytes'])} for one window")
        if args.prefill is None and any(operator in model.graph for operator in _DECODE_ONLY):
            terminal.note("prompts are computed densely: add --prefill P to score what decode steps leave out")
        if args.reference is None:
            terminal.note("kl and top1_agreement need --reference MODEL")
    if args.max_kl is None or result["kl"] <= args.max_kl:
        return 0
    terminal.complain(f"[eval] KL {result['kl']:.3e} nats per token exceeds --max-kl {args.max_kl:g}")
    return BUDGET_MISSED
