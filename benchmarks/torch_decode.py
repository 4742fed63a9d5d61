"""Prefill and decode of the torch target beside the ONNX target on a CPU, in interleaved rounds.

    python benchmarks/torch_decode.py [--model HF_FOLDER] [--pair NAME ONNX_FOLDER TORCH_FOLDER ...]

Each artifact runs in a process of its own and is asked in turn, as in `cpu_decode.py`; figures are medians over the
rounds. Without --pair, artifacts are made in a temporary folder, with 4 and with 8 bits; without --model, of a random
model of the shape of Llama-3.2-1B. `times_onnx` is the torch target's decode step over the ONNX target's.
Writes benchmarks/results/torch_decode.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from cpu_decode import Contender, rounds
from random_models import make_llama
from record import environment, write

TARGETS = ("onnx", "torch")


def make_pairs(model: str | None, scratch: Path) -> dict[str, list[str]]:
    """ONNX and torch artifact of each format."""
    folder = Path(model) if model else scratch / "model"
    if not model:
        make_llama(folder, 16)
    pairs: dict[str, list[str]] = {}
    for bits in (4, 8):
        for target in TARGETS:
            out = str(scratch / f"{target}{bits}")
            passes = f"quantize-weights{{bits={bits},group=128}}"
            command = ["optimize", str(folder), "--passes", passes, "--target", target, "--out", out]
            subprocess.run([sys.executable, "-m", "jettison", *command], check=True, stdout=subprocess.DEVNULL)
            pairs.setdefault(f"int{bits} group 128", []).append(out)
    return pairs


def measure(folders: list[str], settings: list[tuple[int, int]], new: int, number: int) -> dict[str, Any]:
    """Figures of one pair, by batch and prompt."""
    contenders = [
        Contender(target, sys.executable, "run_jettison.py", folder, 0)
        for target, folder in zip(TARGETS, folders, strict=True)
    ]
    found: dict[str, Any] = {
        each.name: {**each.about, "load_seconds": each.load_seconds, **each.memory()} for each in contenders
    }
    for batch, prompt in settings:
        figures = rounds(contenders, batch, prompt, new, number)
        figures["times_onnx"] = round(figures["torch"]["decode_ms"] / figures["onnx"]["decode_ms"], 2)
        found[f"batch {batch}, prompt {prompt}"] = figures
    for each in contenders:
        each.close()
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--pair", nargs=3, action="append", metavar=("NAME", "ONNX", "TORCH"))
    parser.add_argument("--prompts", type=int, nargs="+", default=[128])
    parser.add_argument("--batches", type=int, nargs="+", default=[4])
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    settings = [(1, prompt) for prompt in arguments.prompts] + [(batch, 128) for batch in arguments.batches]
    before = environment()
    with tempfile.TemporaryDirectory(prefix="jettison-bench-") as folder:
        given = {name: folders for name, *folders in arguments.pair or ()}
        pairs = given or make_pairs(arguments.model, Path(folder))
        figures = {name: measure(folders, settings, arguments.new, arguments.rounds) for name, folders in pairs.items()}
    print(write("torch_decode", {"threads": torch.get_num_threads(), "new_tokens": arguments.new, **figures}, before))


if __name__ == "__main__":
    main()
