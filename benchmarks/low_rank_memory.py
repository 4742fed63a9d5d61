"""What `fuse-low-rank` does to factored models: activations that are alive at once, and time.

    python benchmarks/low_rank_memory.py [--layers 12] [--decoder-layers 2] [--rounds 7] [--threads 1]

`encoder` has the shape of BERT-base, every linear of its layers as two with half of the weights, and reads 8 rows of
512 tokens. `decoder` has that of Llama-3.2-1B with fewer layers and a small vocabulary, likewise; it reads a prompt of
512 tokens and then writes token by token; `long` is the same model with a prompt of 2048. Weights are random. Both
graphs of a model compute from the same factors.

`activation_bytes` is the most that is alive at once in a first forward. On `torch` it is added up from what PyTorch's
allocator reports (torch.profiler). On `onnx` it is RssAnon of the process over what it was after a forward of one short
row, sampled every millisecond: ONNX Runtime's arena grows in steps, so these figures are coarse. Each is taken in a
process of its own. Times are medians of interleaved rounds in one process: `milliseconds` of the clock, and
`cpu_milliseconds` of the processor, which do not count what other processes take on a busy machine; `cpu_ratio` is
unfused over fused. `products` are the matrix products of the layers alone, on `torch`: what neither graph can do
without; `products_gflop` is how many operations they have. Writes benchmarks/results/low_rank_memory.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import environment, write
from torch import Tensor, nn

from jettison.codegen.onnx.emit import emit_program, weight_bytes
from jettison.ir.compare import usual_inputs
from jettison.ir.program import Program
from jettison.passes.cache_kv import CacheKV
from jettison.passes.fuse_low_rank import FuseLowRank
from jettison.passes.pipeline import apply, prepare
from jettison.runtime.dense_linear import run_dense_linear
from jettison.runtime.executor import Executor, allocate_states
from jettison.runtime.onnx_executor import OnnxExecutor, OnnxGraph
from jettison.runtime.torch_executor import TorchExecutor
from jettison.source import open_source

WAYS = ("unfused", "fused")
TARGETS = ("torch", "onnx")
SHAPES = {"encoder": (8, 512), "decoder": (1, 512), "long": (1, 2048)}
RATIO = 0.5


def model(name: str, layers: int) -> nn.Module:
    """The module with random weights, its linears factored."""
    from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    made: Any
    if name == "encoder":
        made = BertModel(BertConfig(num_hidden_layers=layers), add_pooling_layer=False)
    else:
        sizes: dict[str, Any] = {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32}
        made = LlamaForCausalLM(
            LlamaConfig(
                **sizes,
                num_key_value_heads=8,
                head_dim=64,
                num_hidden_layers=layers,
                vocab_size=4096,
                max_position_embeddings=8192,
                tie_word_embeddings=True,
            )
        )
    for parent in list(made.modules()):
        for child, linear in list(parent.named_children()):
            if isinstance(linear, nn.Linear) and child != "lm_head":
                setattr(parent, child, factored(linear))
    return made.eval()


def factored(linear: nn.Linear) -> nn.Module:
    """Two linears of the share `RATIO` of the weights."""
    rank = int(RATIO * linear.out_features * linear.in_features / (linear.out_features + linear.in_features)) // 8 * 8
    pair = nn.Sequential(
        nn.Linear(linear.in_features, rank, bias=False),
        nn.Linear(rank, linear.out_features, bias=linear.bias is not None),
    )
    for each in pair:
        nn.init.normal_(each.weight, std=each.in_features**-0.5)
    return pair


def program(name: str, layers: int, way: str) -> Program:
    """The program, with a cache if it is a decoder."""
    made = open_source(model(name, layers)).program
    prepare(made)
    apply(made, [FuseLowRank()] if way == "fused" else [])
    apply(made, [CacheKV()] if name != "encoder" else [])
    return made


def executor(made: Program, target: str, folder: Path) -> Executor:
    """What runs it."""
    if target == "torch":
        return TorchExecutor(made)
    folder.mkdir()
    graphs = [
        OnnxGraph(
            each.path, each.entries, tuple(name for name in each.inputs if name not in each.states),
            tuple(name for name in each.outputs if name not in {new for _, new in each.states.values()}), each.states,
        )
        for each in emit_program(made, folder)
    ]  # fmt: skip
    return OnnxExecutor(graphs, made.info, made.states, weight_bytes(made), threads=torch.get_num_threads())


def forward(runs: Executor, rows: int, steps: int, entry: str = "prefill", past: int = 0) -> Callable[[], Any]:
    """A call of an entry: of the only one of an encoder, or behind `past` tokens in the cache."""
    ids = torch.arange(rows * steps).reshape(rows, steps) % 997
    entry = entry if entry in runs.entries else "forward"
    inputs: dict[str, Tensor] = {**usual_inputs(ids)}
    if past:
        inputs["position_ids"] = torch.arange(past, past + steps)[None].repeat(rows, 1)
        inputs["attention_mask"] = torch.ones(rows, past + steps, dtype=torch.int64)
    inputs = {name: inputs[name] for name in runs.entries[entry].inputs if name in inputs}
    inputs |= (
        {"logits_positions": torch.full((rows, 1), -1)} if "logits_positions" in runs.entries[entry].inputs else {}
    )
    states = allocate_states(runs.states, rows, 4096)
    return lambda: runs.run(entry, inputs, states)


def products(module: nn.Module, tokens: int) -> tuple[Callable[[], Any], float]:
    """A call of the matrix products of the layers, on numbers of no meaning, and how many GFLOP they are."""
    linears = [
        each for name, each in module.named_modules() if isinstance(each, nn.Linear) and not name.endswith("lm_head")
    ]
    inputs = {each.in_features: torch.randn(tokens, each.in_features) for each in linears}
    gflop = sum(2e-9 * tokens * each.in_features * each.out_features for each in linears)

    def call() -> None:
        for each in linears:
            run_dense_linear(inputs[each.in_features], each.weight)

    return torch.no_grad()(call), gflop


def allocated_bytes(call: Callable[[], Any]) -> int:
    """The most that PyTorch's allocator has handed out at once since the call began."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def resident_bytes(call: Callable[[], Any]) -> int:
    """The most by which RssAnon grows during the call."""
    before = most = anonymous_bytes()
    is_over = threading.Event()

    def watch() -> None:
        nonlocal most
        while not is_over.wait(0.001):
            most = max(most, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    is_over.set()
    watcher.join()
    return max(most, anonymous_bytes()) - before


def measure_memory(name: str, layers: int, target: str, way: str) -> dict[str, Any]:
    """Of one way, in this process."""
    with tempfile.TemporaryDirectory(prefix="jettison-bench-") as folder:
        runs = executor(program(name, layers, way), target, Path(folder) / way)
        forward(runs, 1, 8)()
        call = forward(runs, *SHAPES[name])
        most = allocated_bytes(call) if target == "torch" else resident_bytes(call)
    return {"activation_bytes": most}


def measure_time(name: str, layers: int, target: str, rounds: int) -> dict[str, Any]:
    """Of both ways, in this process."""
    with tempfile.TemporaryDirectory(prefix="jettison-bench-") as folder:
        calls: dict[str, dict[str, Callable[[], Any]]] = {}
        for way in WAYS:
            runs = executor(program(name, layers, way), target, Path(folder) / way)
            calls.setdefault("forward" if name == "encoder" else "prompt", {})[way] = forward(runs, *SHAPES[name])
            if name == "decoder":
                calls.setdefault("step", {})[way] = forward(runs, 1, 1, "decode", past=512)
        figures: dict[str, Any] = {}
        if target == "torch":
            (what,) = [what for what in calls if what != "step"]
            rows, steps = SHAPES[name]
            calls[what]["products"], gflop = products(model(name, layers), rows * steps)
            figures["products_gflop"] = round(gflop, 2)
        for what, ways in calls.items():
            taken: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
            repeats, times = (1, 1) if what != "step" else (10, 8)
            for turn in range(times * rounds + 1):
                # Each is first in every second round.
                for way in ways if turn % 2 else reversed(ways):
                    started = time.perf_counter(), time.process_time()
                    for _ in range(repeats):
                        ways[way]()
                    ended = time.perf_counter(), time.process_time()
                    wall, cpu = (1e3 * (end - start) / repeats for start, end in zip(started, ended, strict=True))
                    taken[way].append((wall, cpu))
            figures[what] = {
                f"{way}_{clock}": round(statistics.median(each[index] for each in taken[way][1:]), 3)
                for index, clock in enumerate(("milliseconds", "cpu_milliseconds"))
                for way in ways
            }
            ratios = [u[1] / f[1] for u, f in zip(taken["unfused"][1:], taken["fused"][1:], strict=True)]
            figures[what]["cpu_ratio"] = round(statistics.median(ratios), 3)
    return figures


def in_a_process(*arguments: object, threads: int, rounds: int = 1) -> dict[str, Any]:
    """One measurement in a process of its own."""
    given = ["--threads", str(threads), "--rounds", str(rounds)]
    command = [sys.executable, __file__, *given, "--measure", *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    print(*arguments, done.stdout.strip().splitlines()[-1], flush=True)
    return json.loads(done.stdout.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    """Measure each way on each target, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--decoder-layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--measure", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        name, layers, target, what = arguments.measure
        torch.set_num_threads(arguments.threads)
        timed = what == "time"
        run = measure_time(name, int(layers), target, arguments.rounds) if timed else None
        print(json.dumps(run or measure_memory(name, int(layers), target, what)))
        return
    before = environment()
    figures: dict[str, Any] = {"ratio": RATIO, "threads": arguments.threads}
    for name, layers in zip(SHAPES, (arguments.layers, *[arguments.decoder_layers] * 2), strict=True):
        figures[name] = {"layers": layers, "rows": SHAPES[name][0], "tokens": SHAPES[name][1]}
        for target in TARGETS:
            threads = arguments.threads
            alive = {way: in_a_process(name, layers, target, way, threads=threads) for way in WAYS}
            memory = {way: each["activation_bytes"] for way, each in alive.items()}
            timed = in_a_process(name, layers, target, "time", threads=threads, rounds=arguments.rounds)
            figures[name][target] = {
                **{f"{way}_activation_bytes": most for way, most in memory.items()},
                "share": round(memory["fused"] / memory["unfused"], 3),
                **timed,
            }
    print(write("low_rank_memory", figures, before))


if __name__ == "__main__":
    main()
