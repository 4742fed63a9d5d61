"""Models several times as large as the memory they are given, streamed from disk on the torch target.

    python benchmarks/offload_large.py [--only 8B 3B] [--new 8]

Random models in the shapes of Llama-3.1-8B (4 bits, 1.5 GB) and Llama-3.2-3B (bf16, 1 GB) are optimised, and placed
within the limit by `jettison.place`. The artifact with all weights in memory and the placed one each run in a process
of their own, one after the other; `same_tokens` says that their greedy tokens are the same. `rss_peak_bytes` is sampled
every 10 ms over loading, a prompt and all steps; the page cache is dropped before each of them. Twenty gigabytes of
disk and 24 of memory are needed to make the larger one. Writes benchmarks/results/offload_large.json.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from offload import Sampler
from random_models import make_llama
from record import environment, write

import jettison

# Layers, sizes, passes, and the limit in megabytes.
SHAPES: dict[str, tuple[int, dict[str, Any], str, int]] = {
    "3B": (
        28, {"hidden_size": 3072, "num_attention_heads": 24, "head_dim": 128}, "", 1000,
    ),
    "8B": (
        32,
        {"hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128, "tie_word_embeddings": False},
        "quantize-weights{bits=4,group=128}", 1500,
    ),
}  # fmt: skip


def run_one(name: str, artifact: Path, sizes: argparse.Namespace) -> dict[str, Any]:
    """Greedy tokens and figures of an artifact, in a process that ends with it."""
    each = Sampler(name, sys.executable, "run_streamed.py", str(artifact), sizes.threads)
    answer = each.ask(1, sizes.prompt, sizes.new)
    each.close()
    return {
        "weight_bytes": each.about["weight_bytes"],
        "load_seconds": each.load_seconds,
        "prefill_seconds": round(answer["prefill_seconds"], 2),
        "seconds_per_token": round(statistics.median(answer["step_seconds"]), 3),
        **{key: answer[key] for key in ("read_gb_per_s", "overlap", "read_bytes_per_step") if key in answer},
        "rss_peak_bytes": each.peaks["VmRSS"],
        "anon_peak_bytes": each.peaks["RssAnon"],
        "tokens": answer["tokens"],
    }


def measure(name: str, scratch: Path, sizes: argparse.Namespace) -> dict[str, Any]:
    """One shape, its files gone afterwards."""
    layers, shape, passes, limit = SHAPES[name]
    model, whole, placed = (scratch / f"{name}-{part}" for part in ("model", "whole", "placed"))
    make_llama(model, layers, **shape)
    started = time.perf_counter()
    jettison.optimize(model, passes, target="torch", dtype="bfloat16").save_pretrained(whole)
    optimised = time.perf_counter()
    shutil.rmtree(model)
    jettison.place(whole, limit * 1_000_000, context=sizes.context, prompt=sizes.prompt).save_pretrained(placed)
    figures: dict[str, Any] = {
        "limit_bytes": limit * 1_000_000,
        "optimize_seconds": round(optimised - started, 1),
        "place_seconds": round(time.perf_counter() - optimised, 1),
        "whole": run_one(name, whole, sizes),
    }
    shutil.rmtree(whole)
    figures["placed"] = run_one(f"{name} placed", placed, sizes)
    shutil.rmtree(placed)
    figures["same_tokens"] = figures["whole"].pop("tokens") == figures["placed"].pop("tokens")
    print(name, figures, flush=True)
    return figures


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--context", type=int, default=512)
    sizes = parser.parse_args()
    before = environment()
    torch.set_num_threads(sizes.threads)
    with tempfile.TemporaryDirectory(prefix="jettison-bench-") as folder:
        figures = {name: measure(name, Path(folder), sizes) for name in sizes.only}
    settings = {"threads": sizes.threads, "prompt": sizes.prompt, "new_tokens": sizes.new, "context": sizes.context}
    print(write("offload_large", {**settings, "shapes": figures}, before))


if __name__ == "__main__":
    main()
