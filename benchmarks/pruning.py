"""What zeros cost in KL, and what is saved by storing only the others, beside fewer bits for all weights.

    python benchmarks/pruning.py --text FILE --calibration FILE [--model FOLDER] [--windows N]

Linears of the layers alone; embedding and head stay as they are. Scored as `weights_quality.py` does, on the first
windows of a text that the model was not trained on. `bits` is what the linears take per weight, all parts counted, 16
where they are not packed. Writes benchmarks/results/pruning.json.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from record import environment, write
from weights_peers import DecoderScorer
from weights_quality import LINEARS, MODELS, Bench, weights_of

from jettison.api import parse_passes
from jettison.ir.program import Program

BITMAP = "quantize-weights{format=bitmap{of=int4,group=128}}"


def settings() -> dict[str, str]:
    """Pipelines by name."""
    methods = ("magnitude", "wanda", "sparsegpt")
    zeros = {f"{method} 50%": f"prune-weights{{method={method}}}" for method in methods}
    zeros |= {f"{method} 2:4": f"prune-weights{{method={method},pattern=2:4}}" for method in methods}
    zeros |= {f"sparsegpt {share}%": f"prune-weights{{method=sparsegpt,sparsity=0.{share}}}" for share in (30, 70)}
    stored = {
        f"{name} + bitmap int4": f"{pipeline},{BITMAP}"
        for name, pipeline in zeros.items()
        if name in ("magnitude 50%", "wanda 50%") or name.startswith("sparsegpt")
    }
    stored["sparsegpt 50% + bitmap int8"] = f"{zeros['sparsegpt 50%']},{BITMAP.replace('int4', 'int8')}"
    dense = {
        f"{method} {bits}": f"quantize-weights{{bits={bits},group=128,method={method},{LINEARS}}}"
        for bits in (4, 3, 2)
        for method in ("rtn", "gptq")
    }
    return zeros | stored | dense


def bits_of_linears(program: Program, names: list[str]) -> float:
    """Stored bits per weight."""
    stored = weights = 0
    for name in names:
        packed = program.packed.get(name)
        held = [name] if packed is None else list(packed.parts.values())
        stored += sum(program.constants[each].stored_bytes for each in held)
        shape = program.constants[name].shape if packed is None else packed.shape
        weights += shape[0] * shape[1]
    return 8 * stored / weights


def row(bench: Bench, pipeline: str) -> dict[str, Any]:
    """Compress a copy and score it."""
    program = bench.source.program.copy()
    program.calibration = bench.tokens
    names = [name for name in program.used_constants() if ".layers." in name and name.endswith("proj.weight")]
    started = time.perf_counter()
    for pass_ in parse_passes(pipeline):
        pass_.run(program)
    seconds = round(time.perf_counter() - started, 1)
    figures = {"pipeline": pipeline, "bits": round(bits_of_linears(program, names), 3), "seconds": seconds}
    return figures | bench.score(weights_of(program, bench.names))


def main() -> None:
    """Score and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, type=Path, help="a text the model was not trained on")
    parser.add_argument("--calibration", required=True, type=Path, help="a text to calibrate on")
    parser.add_argument("--model", type=Path, default=MODELS / "tiny-llama")
    parser.add_argument("--windows", type=int, default=8)
    arguments = parser.parse_args()
    before = environment()
    rows: dict[str, Any] = {}
    with torch.inference_mode():
        scorer = DecoderScorer(arguments.model, arguments.text.read_text(), arguments.windows)
        bench = Bench(arguments.model, arguments.calibration, scorer)
        rows["dense"] = {"pipeline": "", "bits": 16.0, "seconds": 0.0, **scorer({})}
        for name, pipeline in settings().items():
            rows[name] = row(bench, pipeline)
            print(name, {key: value for key, value in rows[name].items() if key != "pipeline"}, flush=True)
    figures = {"model": arguments.model.name, "windows": arguments.windows, "settings": rows}
    print(write("pruning", figures, before))


if __name__ == "__main__":
    main()
