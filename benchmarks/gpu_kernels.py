"""Kernels on a GPU beside what PyTorch has: bytes over the bandwidth of a copy, and the time of the peer.

    PYTHONPATH=. python benchmarks/gpu_kernels.py [--rounds N]

Run by `make gpu`. Weights are held so often that the copies in rotation are larger than the L2 cache; times are those
of CUDA graphs of launches, medians of interleaved rounds. Every tuning of a kernel is tried first, the fastest is kept.
Writes benchmarks/results/gpu-DEVICE.json.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from record import environment, write
from torch import Tensor

from jettison.codegen.triton.kernels.base import Kernel, Tuning
from jettison.codegen.triton.kernels.decode_attention import DecodeAttention
from jettison.codegen.triton.kernels.gemm import Gemm
from jettison.codegen.triton.kernels.gemv import Gemv
from jettison.codegen.triton.kernels.joint_attention import JointAttention, Ranges
from jettison.codegen.triton.kernels.weight_form import WeightForm
from jettison.codegen.triton.launch import Launcher
from jettison.ir import ops

BF16, HALF = torch.bfloat16, torch.float16
# Of Llama-3.1-8B: K and N.
SHAPES = {
    "qkv": (4096, 6144),
    "o": (4096, 4096),
    "up": (4096, 14336),
    "gate and up": (4096, 28672),
    "down": (14336, 4096),
}
ROTATED_BYTES = 256 << 20
LAUNCHES = 20


def file_name() -> str:
    """Of the results of this GPU."""
    return "gpu-" + re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")


def graph_of(calls: list[Callable[[], object]]) -> Callable[[], float]:
    """Capture some launches; the result runs them and returns the microseconds of one."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(LAUNCHES):
            calls[index % len(calls)]()

    def run() -> float:
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        return 1e3 * start.elapsed_time(stop) / LAUNCHES

    return run


def interleaved(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Median microseconds of each."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for round_ in range(rounds + 2):
        for name, run in contenders.items():
            elapsed = run()
            if round_ >= 2:
                times[name].append(elapsed)
    return {name: statistics.median(each) for name, each in times.items()}


def copy_gb_per_s(rounds: int) -> float:
    """Of a copy within the device, bytes read and written."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    run = graph_of([lambda: target.copy_(source)])
    return 2 * source.nbytes / (1e-6 * interleaved({"copy": run}, rounds)["copy"]) / 1e9


def fastest(kernel: Kernel, launches: Callable[[Tuning], list[Callable[[], object]]]) -> tuple[Tuning, list[Any]]:
    """The best tuning of a kernel, and its launches."""
    times = {}
    for tuning in kernel.tunings():
        run = graph_of(launches(tuning))
        times[tuning] = min(run() for _ in range(5))
    best = min(times, key=lambda tuning: times[tuning])
    return best, launches(best)


def random_words(form: WeightForm, rows: int, columns: int) -> list[Tensor]:
    """A weight in the layout of the kernels; speed does not depend on its values."""
    if not form.bits:
        return [torch.randn(rows, columns, device="cuda").to(form.dtype) / 64]
    words = form.row_words(columns)
    found = [torch.randint(-(2**31), 2**31, (rows, words), dtype=torch.int64, device="cuda").to(torch.int32)]
    if form.bits == 3:
        found.append(torch.randint(-(2**15), 2**15, (rows, words), device="cuda").to(torch.int16))
    groups = columns // form.group
    return [*found, *(torch.rand(rows, groups, device="cuda").to(form.dtype) / 64 for _ in range(1 + form.has_offsets))]


def linear(form: WeightForm, columns: int, rows: int, count: int, rounds: int, copy: float) -> dict[str, Any]:
    """A linear layer of ours beside the one of cuBLAS in bf16."""
    weights = [random_words(form, rows, columns)]
    read = sum(each.nbytes for each in weights[0]) + 2 * count * (columns + rows)
    copies = max(2, -(-ROTATED_BYTES // read))
    weights += [[each.clone() for each in weights[0]] for _ in range(copies - 1)]
    dense = [
        torch.randn(rows, columns, device="cuda").to(BF16) / 64
        for _ in range(max(2, ROTATED_BYTES // (2 * rows * columns)))
    ]
    x = torch.randn(count, columns, device="cuda").to(BF16)
    out = torch.empty(count, rows, device="cuda", dtype=BF16)
    kernel: Kernel = Gemv(form, columns, rows, BF16) if count == 1 else Gemm(form, columns, rows, BF16, count <= 16)

    def launches(tuning: Tuning) -> list[Callable[[], object]]:
        launcher = Launcher(kernel, tuning)
        return [lambda own=own: launcher(x, *own, out, sizes={"M": count}) for own in weights]

    tuning, own = fastest(kernel, launches)
    peer = [lambda weight=weight: F.linear(x, weight) for weight in dense]
    times = interleaved({"ours": graph_of(own), "cublas": graph_of(peer)}, rounds)
    floor = read / (copy * 1e3)
    return {
        "kernel": kernel.name, "tuning": str(tuning), "rows": count, "bytes": read, "microseconds": times["ours"],
        "floor_microseconds": floor, "share_of_copy_bandwidth": floor / times["ours"],
        "cublas_bf16_microseconds": times["cublas"], "over_cublas": times["cublas"] / times["ours"],
    }  # fmt: skip


def attention(tokens: int, rounds: int, copy: float) -> dict[str, Any]:
    """Decode attention over a bf16 cache beside PyTorch's."""
    heads, kv_heads, dim = 32, 8, 128
    kernel = DecodeAttention(heads, kv_heads, dim, dim**-0.5, 0, 0.0, BF16, BF16)
    query = torch.randn(1, heads, 1, dim, device="cuda").to(BF16)
    caches = [[torch.randn(1, kv_heads, tokens, dim, device="cuda").to(BF16) for _ in range(2)] for _ in range(3)]
    slots = torch.tensor([[tokens - 1]], device="cuda")
    counters = torch.zeros(kv_heads, dtype=torch.int32, device="cuda")
    out = torch.empty(1, 1, heads * dim, device="cuda", dtype=BF16)

    def launches(tuning: Tuning) -> list[Callable[[], object]]:
        launcher, splits = Launcher(kernel, tuning), tuning["SPLITS"]
        parts = torch.empty(kv_heads, splits, heads // kv_heads, dim, device="cuda")
        stats = torch.empty(kv_heads, splits, heads // kv_heads, 2, device="cuda")
        sizes = {"B": 1, "C": tokens}
        return [
            lambda own=own: launcher(query, *own, slots, parts, stats, counters, out, sizes=sizes) for own in caches
        ]

    tuning, own = fastest(kernel, launches)
    peer = [lambda own=own: F.scaled_dot_product_attention(query, *own, enable_gqa=True) for own in caches]
    grouped = query.view(1, kv_heads, heads // kv_heads, dim)
    packed = [lambda own=own: F.scaled_dot_product_attention(grouped, *own) for own in caches]
    times = interleaved({"ours": graph_of(own), "sdpa": graph_of(peer), "sdpa grouped": graph_of(packed)}, rounds)
    return beside_sdpa(kernel, tuning, tokens, sum(each.nbytes for each in caches[0]), times, copy)


def beside_sdpa(
    kernel: Kernel, tuning: Tuning, tokens: int, read: int, times: dict[str, float], copy: float
) -> dict[str, Any]:
    """Figures of an attention that reads so many bytes."""
    floor, best = read / (copy * 1e3), min(times["sdpa"], times["sdpa grouped"])
    return {
        "kernel": kernel.name, "tuning": str(tuning), "tokens": tokens, "bytes": read, "microseconds": times["ours"],
        "floor_microseconds": floor, "share_of_copy_bandwidth": floor / times["ours"],
        "sdpa_bf16_microseconds": best, "over_sdpa": best / times["ours"],
    }  # fmt: skip


def joint(bits: int, tokens: int, rounds: int, copy: float) -> dict[str, Any]:
    """Decode attention over a compressed cache (4 bits as KIVI has them, 8 bits per token) beside PyTorch's in bf16."""
    heads, kv_heads, dim, newest = 32, 8, 128, 128
    # Of a slot: tokens, and groups along tokens and channels, of keys and of values.
    granule, groups = (1, ((1, 1), (1, 1))) if bits == 8 else (32, ((1, dim), (32, dim // 32)))
    slots = tokens // granule
    kernel = JointAttention(
        heads, kv_heads, dim, dim**-0.5, granule, *(Ranges(bits, *each) for each in groups), BF16, BF16
    )
    wide = torch.randn(1, kv_heads, slots, granule, dim)
    stored = [part.cuda() for each in groups for part in ops.quantize_slots(wide, bits, *each)]
    caches = [[part.clone() for part in stored] for _ in range(3)]
    query = torch.randn(1, heads, 1, dim, device="cuda").to(BF16)
    key, value = (torch.randn(1, kv_heads, newest, dim, device="cuda").to(BF16) for _ in range(2))
    count, places = torch.tensor([tokens], device="cuda"), torch.tensor([[newest - 1]], device="cuda")
    counters = torch.zeros(kv_heads, dtype=torch.int32, device="cuda")
    out = torch.empty(1, 1, heads * dim, device="cuda", dtype=BF16)

    def launches(tuning: Tuning) -> list[Callable[[], object]]:
        launcher, splits = Launcher(kernel, tuning), tuning["SPLITS"]
        parts = torch.empty(kv_heads, splits, heads // kv_heads, dim, device="cuda")
        stats = torch.empty(kv_heads, splits, heads // kv_heads, 2, device="cuda")
        sizes = {"B": 1, "SLOTS": slots, "C": newest}
        return [
            lambda own=own: launcher(query, *own, count, key, value, places, parts, stats, counters, out, sizes=sizes)
            for own in caches
        ]

    tuning, own = fastest(kernel, launches)
    full = [[torch.randn(1, kv_heads, tokens, dim, device="cuda").to(BF16) for _ in range(2)] for _ in range(3)]
    grouped = query.view(1, kv_heads, heads // kv_heads, dim)
    peers = {
        "sdpa": [lambda own=own: F.scaled_dot_product_attention(query, *own, enable_gqa=True) for own in full],
        "sdpa grouped": [lambda own=own: F.scaled_dot_product_attention(grouped, *own) for own in full],
    }
    times = interleaved({"ours": graph_of(own)} | {name: graph_of(each) for name, each in peers.items()}, rounds)
    return beside_sdpa(kernel, tuning, tokens, sum(part.nbytes for part in stored), times, copy)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no GPU on this machine: nothing was measured")
    before, rounds = environment(), arguments.rounds
    device = torch.cuda.get_device_name()
    copy = copy_gb_per_s(rounds)
    forms = [WeightForm(HALF, bits, 128, has_offsets) for bits in (8, 4, 3, 2) for has_offsets in (True, False)]
    figures: dict[str, Any] = {"device": device, "copy_gb_per_s": copy, "linear": [], "attention": []}
    for columns, rows in SHAPES.values():
        for form in [WeightForm(BF16), *forms] if rows == 14336 else [WeightForm(HALF, 4, 128, True)]:
            for count in (1, 8, 512):
                figures["linear"].append(linear(form, columns, rows, count, rounds, copy))
                print(figures["linear"][-1], flush=True)
    for tokens in (1024, 8192, 32768):
        figures["attention"].append(attention(tokens, rounds, copy))
        print(figures["attention"][-1], flush=True)
        for bits in (8, 4, 2):
            figures["attention"].append(joint(bits, tokens, rounds, copy))
            print(figures["attention"][-1], flush=True)
    print(write(file_name(), figures, before))


if __name__ == "__main__":
    main()
