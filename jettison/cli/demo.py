"""`jettison demo`: quantise the bundled model and compare it with the original, offline."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.cli.console import Terminal, size_text
from jettison.cli.diff import print_summary
from jettison.cli.parser import seed
from jettison.cli.signals import import_torch
from jettison.ir.errors import ArtifactError
from jettison.ir.progress import track

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jettison.evaluate import EagerReference
    from jettison.optimized_model import OptimizedModel

# The unquantised model runs through the same runtime, so that the table shows what the passes change and nothing else.
ORIGINAL = "cache-kv{policy=full}"
OPTIMIZED = "quantize-weights{bits=4,group=32},cache-kv{policy=full}"
_STATE_TOKENS = 1024
_WINDOWS, _MOST_WINDOWS, _WINDOW_TOKENS = 4, 16, 256
_PROMPT_TOKENS, _NEW_TOKENS, _ROUNDS = 64, 48, 3
_PROMPT = "The old captain looked out over the sea, and"
_PARAGRAPH_TOKENS = 80


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help=f"measure on the first {_MOST_WINDOWS * _WINDOW_TOKENS:,} tokens of it (default: sampled from the model)",
    )
    parser.add_argument("--target", choices=("onnx", "torch"), default="onnx", help="what runs it (default: onnx)")
    parser.add_argument("--prompt", default=_PROMPT, metavar="TEXT", help="what both models continue")
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of the texts (default: 0)")


def bundled_model() -> Path:
    """The folder of the model that comes with the repository.

    Raises:
        ArtifactError: jettison was installed without its repository.
    """
    folder = Path(__file__).resolve().parents[2] / "examples" / "models" / "tiny-llama"
    if not (folder / "config.json").is_file():
        raise ArtifactError(
            f"[demo] {folder}: no such folder, needed the bundled model, which an installed package does not carry. "
            "Clone the repository and run `jettison demo` from there, or run `jettison optimize` on a model of yours."
        )
    return folder


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Carry the subcommand out; returns the exit code."""
    folder = bundled_model()
    import_torch()
    import jettison
    from jettison.evaluate import EagerReference
    from jettison.ir.diff import diff_summary
    from jettison.runtime.tokenizer import load_tokenizer
    from jettison.sample_text import load_windows, sample_text

    windows = None
    if args.text is not None:
        windows = load_windows(args.text, load_tokenizer(folder), _WINDOW_TOKENS)[:_MOST_WINDOWS]
    # Spinning threads would slow the reference, which runs in turn with the models.
    settings: dict[str, Any] = {"target": args.target, "seed": args.seed, "allow_spinning": False}
    original = jettison.optimize(folder, ORIGINAL, **settings)
    optimized = jettison.optimize(folder, OPTIMIZED, **settings)
    summary = diff_summary(optimized.graph_before, optimized.graph)
    if not terminal.is_json:
        terminal.line(f"model      {optimized.report.source} ({optimized.report.model})")
        terminal.line(f"pipeline   {optimized.report.pipeline}")
        terminal.line(f"target     {args.target}")
        print_summary(summary, terminal)
        terminal.line()
    if windows is None:  # both are measured on what the original writes
        windows = sample_text(original, windows=_WINDOWS, length=_WINDOW_TOKENS, seed=args.seed).windows
    reference = EagerReference(folder)
    columns = {"original": _measure(original, windows, reference, args)}
    columns["optimized"] = _measure(optimized, windows, reference, args)
    document = {
        "pipeline": optimized.report.pipeline,
        "target": args.target,
        "diff": summary,
        "source_bytes": optimized.report.source_bytes,
        "prompt": args.prompt,
        **columns,
    }
    if terminal.is_json:
        terminal.document(document)
    else:
        _print(document, terminal)
    return 0


def _measure(
    model: OptimizedModel, windows: Sequence[Sequence[int]], reference: EagerReference, args: argparse.Namespace
) -> dict[str, Any]:
    from jettison.bench import bench
    from jettison.evaluate import evaluate

    quality = evaluate(model, windows=windows, reference=reference)
    speed = bench(model, prompt_tokens=_PROMPT_TOKENS, new_tokens=_NEW_TOKENS, batch=1, rounds=_ROUNDS)
    session = model.session(1, _STATE_TOKENS)
    with track("generate", 1) as advance:
        text = model.generate(args.prompt, max_new_tokens=_PARAGRAPH_TOKENS, do_sample=True, top_p=0.9, seed=args.seed)
        advance(1)
    return {
        "weight_bytes": quality.weight_bytes,
        "state_bytes": session.state_bytes,
        "decode_tokens_per_s": speed["decode_tokens_per_s"],
        "perplexity": quality.perplexity,
        "kl": quality.kl,
        "top1_agreement": quality.top1_agreement,
        "tokens": quality.tokens,
        "text": text,
    }


def _print(document: dict[str, Any], terminal: Terminal) -> None:
    original, optimized = document["original"], document["optimized"]
    labels = {
        "weight_bytes": "weight bytes",
        "state_bytes": f"state bytes at {_STATE_TOKENS} tokens",
        "decode_tokens_per_s": "decode tokens/s",
        "perplexity": "perplexity",
        "kl": "KL (nats/token)",
        "top1_agreement": "top-1 agreement",
    }
    terminal.table(
        ("", "original", "optimised"), [(label, original[key], optimized[key]) for key, label in labels.items()]
    )
    terminal.line()
    terminal.line(
        f"Quality on {original['tokens']:,} tokens against the eager model in fp32. The checkpoint stores its weights "
        f"in {size_text(document['source_bytes'])}; unquantised, this runtime computes with them in fp32."
    )
    for name, column in (("original", original), ("optimised", optimized)):
        terminal.line()
        terminal.line(f"The {name} model writes:", style="bold")
        terminal.line(document["prompt"] + column["text"])
