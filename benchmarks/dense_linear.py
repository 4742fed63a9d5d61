"""Products with dense fp32 weights by each library that PyTorch brings: MKL (`aten::linear`) and oneDNN.

    python benchmarks/dense_linear.py [--threads 2] [--rounds 15]

For each shape the median microseconds of interleaved calls, the rate in GFLOP/s, and what the first call of a shape
costs beyond the second. `taken` is which of them `run_dense_linear` takes. Weights and inputs are random. Writes
benchmarks/results/dense_linear.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from record import environment, write
from torch import Tensor

from jettison.runtime.dense_linear import FEWEST_PRODUCTS, has_onednn

# Rows of x; columns and rows of the weight: of tiny models, of BERT-base, of Llama-3.2-1B and of its factors.
SHAPES = [
    (1, 288, 768), (16, 288, 768), (64, 288, 768), (1, 768, 3072), (64, 768, 3072), (512, 768, 3072), (1, 2048, 512),
    (1, 2048, 8192), (4, 2048, 8192), (16, 2048, 8192), (64, 2048, 8192), (512, 2048, 8192), (512, 8192, 2048),
    (512, 819, 8192), (512, 2048, 819),
]  # fmt: skip


def seconds(call: Callable[[], Any]) -> float:
    """Of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def measure(rows: int, columns: int, width: int, rounds: int) -> dict[str, Any]:
    """Of one shape."""
    x, weight = torch.randn(rows, columns), torch.randn(width, columns)

    def by_onednn() -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
        return product

    calls: dict[str, Callable[[], Tensor]] = {"mkl": lambda: F.linear(x, weight), "onednn": by_onednn}
    first = {name: seconds(call) - seconds(call) for name, call in calls.items()}
    repeats = max(1, int(2e-3 / seconds(calls["mkl"])))
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in calls if turn % 2 else reversed(calls):
            call = calls[name]
            taken[name].append(sum(seconds(call) for _ in range(repeats)) / repeats)
    gflop = 2e-9 * rows * columns * width
    medians = {name: statistics.median(each) for name, each in taken.items()}
    return {
        "shape": [rows, columns, width],
        **{f"{name}_microseconds": round(1e6 * median, 1) for name, median in medians.items()},
        **{f"{name}_gflops": round(gflop / median, 1) for name, median in medians.items()},
        "onednn_first_call_milliseconds": round(1e3 * first["onednn"], 2),
        "ratio": round(medians["mkl"] / medians["onednn"], 2),
        "taken": "onednn" if rows * columns * width >= FEWEST_PRODUCTS and has_onednn() else "mkl",
    }


def main() -> None:
    """Measure each shape, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    before = environment()
    torch.set_num_threads(arguments.threads)
    with torch.inference_mode():
        shapes = [measure(*shape, arguments.rounds) for shape in SHAPES]
    for shape in shapes:
        print(shape)
    print(write("dense_linear", {"threads": arguments.threads, "shapes": shapes}, before))


if __name__ == "__main__":
    main()
