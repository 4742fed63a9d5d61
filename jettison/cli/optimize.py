"""`jettison optimize`: rewrite a model with passes and write an artifact."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jettison.cli.console import Terminal, size_text
from jettison.cli.parser import count, divergence, seed, window_size
from jettison.cli.signals import import_torch
from jettison.ir.errors import OptionError

if TYPE_CHECKING:
    from jettison.report import Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("model", metavar="MODEL", help="Hugging Face model folder (config.json, safetensors)")
    parser.add_argument(
        "--passes", metavar="TEXT", default="",
        help="pipeline such as quantize-weights{bits=4,group=32}, in quotes; `jettison passes` lists what there is. A "
        "decoder without cache-kv gets cache-kv{policy=full}",
    )  # fmt: skip
    parser.add_argument(
        "--target", choices=("onnx", "torch", "triton"), default="onnx", help="what runs it (default: onnx)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32",
        help="what the graph computes in (default: float32, which onnx needs; GPUs want bfloat16)",
    )  # fmt: skip
    parser.add_argument(
        "--arch", metavar="LIST", default="",
        help="also compile the kernels of triton for these GPUs, such as sm_80,sm_90; needs no GPU",
    )  # fmt: skip
    parser.add_argument(
        "--tune", action="store_true", help="measure which tile sizes of the triton kernels are fastest on this GPU"
    )
    parser.add_argument(
        "--prefill", choices=("exact", "fast"), default="exact",
        help="fast runs prompts in 8-bit integers, from a second copy of the weights (default: exact)",
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="DIR", type=Path,
        help="folder to write; must not exist. What an interrupted run has calibrated waits in DIR.unfinished",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace an artifact that is at --out")
    parser.add_argument("--dry-run", action="store_true", help="run the passes and report, but write nothing")
    parser.add_argument("--strict", action="store_true", help="fail where a pass could not fire, instead of noting it")
    parser.add_argument(
        "--check", action="store_true", help="run the program after every pass on a few tokens and report the drift"
    )
    parser.add_argument(
        "--max-kl", type=divergence, metavar="NATS",
        help="stop with exit code 3 when a pass drifts further than this many nats per token; implies --check",
    )  # fmt: skip
    parser.add_argument(
        "--calibration",
        type=Path,
        metavar="FILE",
        help="text that passes are calibrated and checked on (default: written by the model)",
    )
    parser.add_argument(
        "--calibration-size",
        type=window_size,
        metavar="WxL",
        help="windows of that text, and tokens of each, to calibrate on (default: 64x512)",
    )
    parser.add_argument("--seed", type=seed, default=0, metavar="N", help="of everything random (default: 0)")
    parser.add_argument(
        "--context", type=count, metavar="N", help="most positions of a sequence (default: the model's)"
    )


def run(args: argparse.Namespace, terminal: Terminal) -> int:
    """Carry the subcommand out; returns the exit code."""
    if args.out is None and not args.dry_run:
        raise OptionError(
            "jettison optimize: nowhere to write the artifact. Add --out DIR, or --dry-run to see the report only."
        )
    if args.out is not None and not args.dry_run:
        from jettison.runtime.artifact import check_destination

        check_destination(args.out, overwrite=args.overwrite)
    import_torch()
    import jettison
    from jettison.api import parse_passes

    is_read = args.check or args.max_kl is not None or any(p.needs_calibration for p in parse_passes(args.passes))
    if args.calibration is not None and not is_read:
        raise OptionError(
            "jettison optimize: --calibration: no pass of this pipeline calibrates (rounding to nearest does not), so "
            "the text would not be read. Take method=gptq or awq, or add --check to measure the drift on it."
        )
    # What an interrupted run has finished; the same command goes on behind it.
    unfinished = None if args.out is None else args.out.absolute().with_name(f"{args.out.absolute().name}.unfinished")
    model = jettison.optimize(
        args.model, args.passes, target=args.target, dtype=args.dtype, prefill=args.prefill, strict=args.strict,
        check=args.check, max_kl=args.max_kl, calibration=args.calibration, context=args.context, seed=args.seed,
        archs=[arch.strip() for arch in args.arch.split(",") if arch.strip()],
        tune=args.tune,
        **({} if args.calibration_size is None else {"calibration_size": args.calibration_size}),
        resume=None if args.dry_run else unfinished,
    )  # fmt: skip
    if not args.dry_run:
        model.save_pretrained(args.out, overwrite=args.overwrite)
        if unfinished is not None:
            shutil.rmtree(unfinished, ignore_errors=True)
    artifact = None if args.dry_run else str(args.out)
    if terminal.is_json:
        terminal.document({**model.report.as_dict(), "artifact": artifact, "dry_run": args.dry_run})
    else:
        print_report(model.report, terminal)
        terminal.line(f"artifact   {artifact or 'none: this was a dry run'}")
    return 0


def print_report(report: Report, terminal: Terminal) -> None:
    """Write what each pass did, and what it saved."""
    terminal.line(f"model      {report.source} ({report.model})")
    terminal.line(f"pipeline   {report.pipeline or '(empty)'}")
    terminal.line(f"target     {report.target}")
    terminal.line()
    print_passes(report.as_dict(), terminal)
    ratio = report.source_bytes / report.weight_bytes if report.weight_bytes else 1.0
    terminal.line(
        f"weights    {size_text(report.source_bytes)} -> {size_text(report.weight_bytes)}, {ratio:.2f} times less"
    )
    if report.prefill == "fast":
        kl = "" if report.prefill_kl is None else f"; KL of its prompts {report.prefill_kl:.2e} nats per token"
        added = size_text(report.prefill_bytes)
        terminal.line(f"prefill    fast: an 8-bit copy of the weights beside them, {added}{kl}")
    terminal.line(f"states     {size_text(report.state_bytes)} for one sequence of {report.context:,} tokens")
    terminal.line(f"time       {report.seconds:.1f} s for capture and passes")


def print_passes(report: dict[str, Any], terminal: Terminal) -> None:
    """Write the passes of a report as a table, and below it every place where one did not fire."""
    columns = ["pass", "rewrites", "misses", "bytes before", "bytes after"]
    records = report["passes"]
    # The report of an artifact has no times: it holds nothing that differs from run to run.
    is_timed = any(record["seconds"] for record in records)
    is_checked = any(record["kl"] is not None for record in records)
    rows = [
        [
            record["name"], record["rewrites"], len(record["misses"]), record["bytes_before"], record["bytes_after"],
            *([round(record["seconds"], 2)] if is_timed else []),
            *((record["kl"], record["max_error"], record["top1_agreement"]) if is_checked else ()),
        ]
        for record in records
    ]  # fmt: skip
    if rows:
        columns += ["seconds"] if is_timed else []
        columns += ["KL (nats/token)", "max error", "top-1 agreement"] if is_checked else []
        terminal.table(columns, rows)
        terminal.line()
    misses = [(record["name"], miss["node"], miss["reason"]) for record in records for miss in record["misses"]]
    if misses:
        terminal.table(["did not fire", "at", "because"], misses)
        terminal.line()
    for record in records:
        for note in record.get("notes", ()):
            terminal.line(f"{record['name']}: {note}")
    if report["not_recognised"]:
        terminal.table(
            ["not recognised", "because"], [(miss["node"], miss["reason"]) for miss in report["not_recognised"]]
        )
        terminal.line()
