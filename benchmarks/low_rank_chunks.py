"""How long a factored feed-forward layer takes by the tokens of a chunk, and what one turn of its loop costs in ONNX.

    python benchmarks/low_rank_chunks.py [--rounds 7]

`chunks`: the shapes of Llama-3.2-1B (a gated layer, 2048 tokens) and BERT-base (4096 tokens) with half of the weights,
random, on both targets and one thread; milliseconds of the processor, which do not count what other processes take on
a busy machine: medians of interleaved rounds, and the fastest of them. `turn`: a layer so small
that nothing but the loop takes time, one token on ONNX; microseconds. Writes benchmarks/results/low_rank_chunks.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from low_rank_memory import executor
from record import environment, write
from torch import Tensor, nn

from jettison.ir import token_chunks
from jettison.ir.capture import capture_module
from jettison.passes.fuse_low_rank import FuseLowRank
from jettison.passes.pipeline import apply, prepare

CHUNKS = (64, 128, 256, 512, 1024)


class Layer(nn.Module):
    """An embedding and a factored layer whose result is small."""

    def __init__(self, width: int, neurons: int, rank: int, *, gated: bool) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, width)
        self.up, self.down = (
            nn.Sequential(nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows))
            for columns, rows in ((width, neurons), (neurons, width))
        )
        self.gate = nn.Sequential(nn.Linear(width, rank, bias=False), nn.Linear(rank, neurons)) if gated else None

    def forward(self, input_ids: Tensor) -> Tensor:
        """Hidden states of tokens."""
        x = self.embed(input_ids)
        gelu = torch.nn.functional.gelu
        hidden = gelu(self.up(x)) if self.gate is None else torch.nn.functional.silu(self.gate(x)) * self.up(x)
        return self.down(hidden)


SHAPES = {
    "Llama-3.2-1B": ({"width": 2048, "neurons": 8192, "rank": 819, "gated": True}, 2048),
    "BERT-base": ({"width": 768, "neurons": 3072, "rank": 307, "gated": False}, 4096),
}  # fmt: skip


def call_of(layer: dict[str, Any], tokens: int, target: str, folder: Path, chunk: int | None) -> Callable[[], Any]:
    """The layer in chunks of so many tokens; None leaves it unfused."""
    torch.manual_seed(0)
    program = capture_module(Layer(**layer).eval(), context=4096, dtype=torch.float32, kind="encoder")
    prepare(program)
    if chunk is not None:
        token_chunks.FEWEST = token_chunks.MOST = chunk
        apply(program, [FuseLowRank()])
    runs = executor(program, target, folder)
    ids = torch.arange(tokens)[None] % 64

    def run() -> Any:
        if chunk is not None:
            token_chunks.FEWEST = token_chunks.MOST = chunk
        return runs.run("forward", {"input_ids": ids}, {})

    return run


def times(calls: dict[str, Callable[[], Any]], rounds: int, repeats: int = 1) -> dict[str, list[float]]:
    """Milliseconds of each call, in turns, without the first round."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            started = time.process_time()
            for _ in range(repeats):
                call()
            taken[name].append((time.process_time() - started) / repeats * 1e3)
    return {name: each[1:] for name, each in taken.items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    before = environment()
    torch.set_num_threads(1)
    figures: dict[str, Any] = {"threads": 1, "chunks": {}}
    with tempfile.TemporaryDirectory(prefix="jettison-bench-") as scratch:
        for shape, (layer, tokens) in SHAPES.items():
            for target in ("torch", "onnx"):
                calls = {
                    "unfused" if chunk is None else str(chunk): call_of(
                        layer, tokens, target, Path(scratch) / f"{shape}-{chunk}", chunk
                    )
                    for chunk in (None, *CHUNKS)
                }
                taken = times(calls, arguments.rounds)
                figures["chunks"].setdefault(shape, {})[target] = {
                    name: {"median": round(statistics.median(each), 1), "fastest": round(min(each), 1)}
                    for name, each in taken.items()
                }
                print(shape, target, figures["chunks"][shape][target], flush=True)
        small = {"width": 16, "neurons": 32, "rank": 4, "gated": False}
        calls = {
            name: call_of(small, 1, "onnx", Path(scratch) / f"turn-{name}", chunk)
            for name, chunk in (("unfused", None), ("fused", 512))
        }
        taken = times(calls, arguments.rounds * 3, repeats=1000)
        figures["turn"] = {name: round(min(each) * 1e3, 2) for name, each in taken.items()}
        print(figures["turn"])
    print(write("low_rank_chunks", figures, before))


if __name__ == "__main__":
    main()
