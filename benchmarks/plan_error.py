"""Predicted against measured decode steps and prompts of resident models on the torch target.

    python benchmarks/plan_error.py [--layers 4] [--prompt 128] [--new 32] [--rounds 3]

Random models in two shapes (a small one, and Llama-3.2-1B with fewer layers) are optimised in bf16, in fp32, and with
4- and 8-bit weights; `jettison plan` predicts each with the machine's rates, measured at the start of this run, and
then it is run. Measured figures are medians over the rounds, which go through all models in turn. `error` is predicted
over measured, less one; `worst_error` is the largest of decode steps, without its sign.
Writes benchmarks/results/plan_error.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from random_models import make_llama
from record import environment, write

import jettison
from jettison.ir.roofline import Rates
from jettison.planner import Wanted, open_program, plan
from jettison.runtime.machine import machine_rates
from jettison.runtime.session import Session

SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "1B": {},
}  # fmt: skip
FORMS = {
    "bf16": ("", "bfloat16"),
    "fp32": ("", "float32"),
    "int4 in bf16": ("quantize-weights{bits=4,group=128}", "bfloat16"),
    "int8 in fp32": ("quantize-weights{bits=8,group=128}", "float32"),
}


@dataclass
class Contender:
    """A model, what was predicted of it, and the times of its rounds in milliseconds."""

    name: str
    session: Session
    predicted: dict[str, Any]
    prefill: list[float]
    decode: list[float]


def open_contender(
    name: str, folder: Path, form: tuple[str, str], rates: Rates, sizes: argparse.Namespace
) -> Contender:
    """Predict and open a model."""
    passes, dtype = form
    context = sizes.prompt + sizes.new
    program, target = open_program(folder, passes, "torch", dtype)
    # Halfway through what is generated: a step reads the slots that are filled.
    wanted = Wanted(context=sizes.prompt + sizes.new // 2, prompt=sizes.prompt)
    predicted = plan(program, target, wanted, rates)
    model = jettison.optimize(folder, passes, target="torch", dtype=dtype)
    return Contender(name, Session(model.executor, 1, context), predicted, [], [])


def run_round(each: Contender, sizes: argparse.Namespace) -> None:
    """Time a prompt and the steps behind it."""
    session = Session(each.session.executor, 1, sizes.prompt + sizes.new)
    started = time.perf_counter()
    session.prefill([[index % 1000 for index in range(sizes.prompt)]])
    filled = time.perf_counter()
    each.prefill.append(1e3 * (filled - started))
    times = []
    for step in range(sizes.new):
        started = time.perf_counter()
        session.decode([step])
        times.append(1e3 * (time.perf_counter() - started))
    each.decode.append(statistics.median(times))


def figures_of(each: Contender) -> dict[str, Any]:
    """Predicted, measured and the error of both phases."""
    found: dict[str, Any] = {"bound_by": each.predicted["bound_by"]}
    for phase, times in zip(each.predicted["phases"], (each.prefill, each.decode), strict=True):
        measured = statistics.median(times)
        found[phase["phase"]] = {
            "predicted_ms": round(phase["ms"], 3),
            "measured_ms": round(measured, 3),
            "error": round(phase["ms"] / measured - 1, 3),
            "weight_bytes": phase["weight_bytes_pinned"],
            "predicted_ms_by_kind": {kind: round(ms, 3) for kind, ms in phase["ms_by_kind"].items()},
        }
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    sizes = parser.parse_args()
    before = environment()
    rates = machine_rates(remeasure=True)
    contenders = []
    with tempfile.TemporaryDirectory(prefix="jettison-bench-") as scratch:
        for shape in sizes.shapes:
            folder = Path(scratch) / shape
            make_llama(folder, sizes.layers, **SHAPES[shape])
            contenders += [
                open_contender(f"{shape}, {name}", folder, form, rates, sizes) for name, form in FORMS.items()
            ]
        for _ in range(sizes.rounds + 1):
            for each in contenders:
                run_round(each, sizes)
    for each in contenders:  # the first round warms up
        del each.prefill[0], each.decode[0]
    found = {each.name: figures_of(each) for each in contenders}
    worst = max(abs(figures["decode"]["error"]) for figures in found.values())
    settings = {"threads": torch.get_num_threads(), "layers": sizes.layers, "prompt": sizes.prompt, "new": sizes.new}
    print(write("plan_error", {**settings, "rates": rates.as_dict(), "worst_error": worst, "models": found}, before))


if __name__ == "__main__":
    main()
