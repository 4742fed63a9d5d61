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
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.kernels.gather_down import GatherDown
from jettison.codegen.triton.kernels.gather_packed_down import GatherPackedDown
from jettison.codegen.triton.kernels.gather_up import GatherUp
from jettison.codegen.triton.kernels.gemm import Gemm
from jettison.codegen.triton.kernels.gemv import Gemv
from jettison.codegen.triton.kernels.joint_attention import JointAttention, Ranges
from jettison.codegen.triton.kernels.low_rank_attention import LowRankAttention, Masks
from jettison.codegen.triton.kernels.low_rank_mlp import LowRankMlp
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
# Feed-forward layers with half of their weights: dimensions, neurons, rank, and whether there is a gate.
FACTORED = {"BERT-base": (768, 3072, 307, False), "1.2 B": (2048, 8192, 819, True)}
# Attentions: heads, key heads, channels, ranks, rotated channels, and whether later tokens are hidden.
LOW_RANK_ATTENTIONS = {
    "BERT-base": (12, 12, 64, (192, 192, 192), 0, False),
    "1.2 B": (32, 8, 64, (512, 204, 204), 64, True),
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


class SparseLayer:
    """A gated feed-forward layer of Llama-3.1-8B, of which one token names a share of the neurons.

    Launches take copies of the weights and lists of slabs in turn, so that little of what one reads is still in the L2
    cache.
    """

    width, neurons, group = 4096, 14336, 128

    def __init__(self, form: WeightForm, share: float) -> None:
        self.form, self.groups = form, self.neurons // self.group
        self.kept = round(share * self.groups)
        sizes = (self.width, self.neurons, self.kept, self.group, BF16)
        self.first = GatherUp(form, *sizes, "silu", is_gated=True)
        self.second: GatherDown | GatherPackedDown = GatherDown(*sizes)
        if form.bits:
            self.second = GatherPackedDown(form, *sizes)
        self.ups, self.downs = [self._up()], [self._down()]
        self.bytes_of_all = sum(each.nbytes for each in (*self.ups[0], *self.downs[0]))
        for _ in range(max(2, -(-ROTATED_BYTES // self.bytes_of_all)) - 1):
            self.ups.append([each.clone() for each in self.ups[0]])
            self.downs.append([each.clone() for each in self.downs[0]])
        self.indices = [
            torch.randperm(self.groups, device="cuda")[None, : self.kept].contiguous() for _ in range(LAUNCHES)
        ]
        self.x, self.out = (torch.randn(1, self.width, device="cuda").to(BF16) for _ in range(2))
        self.hidden = torch.randn(1, self.kept * self.group, device="cuda").to(BF16)

    def _up(self) -> list[Tensor]:
        """Gate and up: one below the other where they are quantised."""
        if self.form.bits:
            return random_words(self.form, 2 * self.neurons, self.width)
        return [each for _ in range(2) for each in random_words(self.form, self.neurons, self.width)]

    def _down(self) -> list[Tensor]:
        """`[E, F]`, or `[F, E]` where it is dense."""
        if self.form.bits:
            return random_words(self.form, self.width, self.neurons)
        return random_words(self.form, self.neurons, self.width)

    def launch_up(self, tuning: Tuning) -> list[Callable[[], object]]:
        """Launches of the first kernel."""
        launcher, copies = Launcher(self.first, tuning), len(self.ups)
        return [
            lambda up=self.ups[index % copies], named=named: launcher(self.x, named, *up, self.hidden, sizes={"M": 1})
            for index, named in enumerate(self.indices)
        ]

    def launch_down(self, tuning: Tuning) -> list[Callable[[], object]]:
        """Launches of the second kernel."""
        launcher, copies, scratch = Launcher(self.second, tuning), len(self.downs), []
        if isinstance(self.second, GatherDown):
            parts = torch.empty(1, tuning["SPLITS"], self.width, device="cuda")
            scratch = [parts, torch.zeros(self.second.blocks(tuning), dtype=torch.int32, device="cuda")]
        return [
            lambda down=self.downs[index % copies], named=named: launcher(
                self.hidden, named, *down, *scratch, self.out, sizes={"M": 1}
            )
            for index, named in enumerate(self.indices)
        ]

    def launch_all_neurons(self) -> list[Callable[[], object]]:
        """The same weights, quantised, as linears on one row."""
        gated = Gemv(self.form, self.width, self.neurons, BF16, epilogue=Epilogue(activation="silu", is_gated=True))
        down = Gemv(self.form, self.neurons, self.width, BF16)
        hidden = torch.empty(1, self.neurons, device="cuda", dtype=BF16)

        def launch_gated(tuning: Tuning) -> list[Callable[[], object]]:
            launcher = Launcher(gated, tuning)
            return [lambda own=own: launcher(self.x, *own, hidden, sizes={}) for own in self.ups]

        def launch_down(tuning: Tuning) -> list[Callable[[], object]]:
            launcher = Launcher(down, tuning)
            return [lambda own=own: launcher(hidden, *own, self.out, sizes={}) for own in self.downs]

        return one_after_the_other(fastest(gated, launch_gated)[1], fastest(down, launch_down)[1])


def one_after_the_other(
    first: list[Callable[[], object]], second: list[Callable[[], object]]
) -> list[Callable[[], object]]:
    """Pairs of launches."""
    return [lambda one=one, other=other: (one(), other()) for one, other in zip(first, second, strict=True)]


def cublas_layer() -> list[Callable[[], object]]:
    """The layer in bf16 with all its neurons."""
    shapes = [(SparseLayer.neurons, SparseLayer.width)] * 2 + [(SparseLayer.width, SparseLayer.neurons)]
    layers = [[torch.randn(*shape, device="cuda").to(BF16) / 64 for shape in shapes] for _ in range(2)]
    x = torch.randn(1, SparseLayer.width, device="cuda").to(BF16)
    return [
        lambda own=own: F.linear(F.silu(F.linear(x, own[0])) * F.linear(x, own[1]), own[2]) for own in layers
    ]  # fmt: skip


def sparse(form: WeightForm, share: float, rounds: int, copy: float) -> dict[str, Any]:
    """A sparse layer of ours beside all of it: with cuBLAS in bf16, and with our linears in 4 bits."""
    layer, int4 = SparseLayer(form, share), SparseLayer(WeightForm(HALF, 4, 128, True), share)
    first, ups = fastest(layer.first, layer.launch_up)
    second, downs = fastest(layer.second, layer.launch_down)
    contenders = {
        "ours": one_after_the_other(ups, downs), "up": ups, "down": downs, "cublas": cublas_layer(),
        "int4": int4.launch_all_neurons(),
    }  # fmt: skip
    times = interleaved({name: graph_of(calls) for name, calls in contenders.items()}, rounds)
    read = layer.bytes_of_all * layer.kept // layer.groups
    floor = read / (copy * 1e3)
    return {
        "kernels": [layer.first.name, layer.second.name], "tunings": [str(first), str(second)], "kept": share,
        "bytes": read, "microseconds": times["ours"], "up_microseconds": times["up"],
        "down_microseconds": times["down"], "floor_microseconds": floor,
        "share_of_copy_bandwidth": floor / times["ours"], "cublas_bf16_microseconds": times["cublas"],
        "over_cublas": times["cublas"] / times["ours"], "int4_gemv_microseconds": times["int4"],
        "over_int4_gemv": times["int4"] / times["ours"],
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


def roofline(
    kernel: Kernel, tuning: Tuning, moved: int, operations: int, best: float, peers: dict[str, float]
) -> dict[str, Any]:
    """Figures of a kernel that is bound by products or by memory."""
    return {
        "kernel": kernel.name, "tuning": str(tuning), "bytes": moved, "operations": operations, "microseconds": best,
        "tera_operations_per_s": operations / best / 1e6, "gb_per_s": moved / best / 1e3,
        **{f"{name}_microseconds": time for name, time in peers.items()},
        **{f"over_{name}": time / best for name, time in peers.items()},
    }  # fmt: skip


def low_rank_mlp(name: str, tokens: int, rounds: int) -> dict[str, Any]:
    """A factored feed-forward layer of a prompt from rank space to rank space, beside its products one by one."""
    _, neurons, rank, is_gated = FACTORED[name]
    activation = "silu" if is_gated else "gelu"
    kernel = LowRankMlp(rank, rank * is_gated, neurons, rank, BF16, activation)
    read = [torch.randn(tokens, rank, device="cuda").to(BF16) for _ in range(1 + is_gated)]
    rows = [torch.randn(neurons, rank, device="cuda").to(BF16) / rank**0.5 for _ in read]
    columns = torch.randn(rank, neurons, device="cuda").to(BF16) / neurons**0.5
    out = torch.empty(tokens, rank, device="cuda", dtype=BF16)
    given = [each for pair in zip(read, rows, strict=True) for each in pair]

    def launches(tuning: Tuning) -> list[Callable[[], object]]:
        launcher = Launcher(kernel, tuning)
        return [lambda: launcher(*given, columns, out, sizes={"M": tokens})]

    def one_by_one() -> Tensor:
        made = [F.linear(x, weight) for x, weight in zip(read, rows, strict=True)]
        hidden = F.silu(made[0]) * made[1] if is_gated else F.gelu(made[0])
        return F.linear(hidden, columns)

    tuning, own = fastest(kernel, launches)
    times = interleaved({"ours": graph_of(own), "cublas": graph_of([one_by_one])}, rounds)
    moved = sum(each.nbytes for each in (*given, columns, out))
    # What one program makes again of what another has made is no part of it.
    operations = 2 * tokens * neurons * rank * (len(read) + 1)
    figures = roofline(kernel, tuning, moved, operations, times["ours"], {"cublas": times["cublas"]})
    return {"layer": name, "tokens": tokens, "spared_bytes": 2 * len(read) * tokens * neurons * 2, **figures}


def low_rank_attention(name: str, batch: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Attention from rank space, beside the products of its heads, their rotation and PyTorch's attention."""
    heads, kv_heads, dim, ranks, rotated, causal = LOW_RANK_ATTENTIONS[name]
    scale, masks = dim**-0.5, Masks(causal)
    kernel = LowRankAttention(
        heads, kv_heads, dim, dim, ranks, (False,) * 3, rotated, False, scale, 0.0, False, masks, BF16
    )
    counts = (heads, kv_heads, kv_heads)
    read = [torch.randn(batch, tokens, rank, device="cuda").to(BF16) for rank in ranks]
    rows = [
        torch.randn(count * dim, rank, device="cuda").to(BF16) / rank**0.5
        for count, rank in zip(counts, ranks, strict=True)
    ]
    angles = [torch.randn(1, tokens, rotated // 2, device="cuda") for _ in range(2)] if rotated else []
    out = torch.empty(batch, tokens, heads, dim, device="cuda", dtype=BF16)

    def launches(tuning: Tuning) -> list[Callable[[], object]]:
        launcher, sizes = Launcher(kernel, tuning), {"B": batch, "S": tokens, "T": tokens, "ANGLES": 0}
        return [lambda: launcher(*read, *rows, *angles, out, sizes=sizes)]

    def one_by_one() -> Tensor:
        made = [F.linear(x, weight) for x, weight in zip(read, rows, strict=True)]
        query, key, value = (each.unflatten(-1, (-1, dim)).transpose(1, 2) for each in made)
        if angles:
            query, key = (ops.rotary_embedding(each, *angles, False) for each in (query, key))
        return F.scaled_dot_product_attention(
            query, key, value, is_causal=causal, scale=scale, enable_gqa=heads != kv_heads
        )

    tuning, own = fastest(kernel, launches)
    times = interleaved({"ours": graph_of(own), "sdpa": graph_of([one_by_one])}, rounds)
    moved = sum(each.nbytes for each in (*read, *rows, *angles, out))
    made = 2 * batch * tokens * dim * sum(count * rank for count, rank in zip(counts, ranks, strict=True))
    operations = made + 4 * batch * tokens * tokens * heads * dim // (1 + causal)
    figures = roofline(kernel, tuning, moved, operations, times["ours"], {"sdpa": times["sdpa"]})
    return {
        "layer": name,
        "batch": batch,
        "tokens": tokens,
        "spared_bytes": 2 * batch * tokens * dim * sum(counts),
        **figures,
    }


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
    figures: dict[str, Any] = {"device": device, "copy_gb_per_s": copy, "linear": [], "sparse": [], "attention": []}
    for columns, rows in SHAPES.values():
        for form in [WeightForm(BF16), *forms] if rows == 14336 else [WeightForm(HALF, 4, 128, True)]:
            for count in (1, 8, 512):
                figures["linear"].append(linear(form, columns, rows, count, rounds, copy))
                print(figures["linear"][-1], flush=True)
    for form in (WeightForm(BF16), WeightForm(HALF, 8, 128, True), WeightForm(HALF, 4, 128, True)):
        for share in (0.1, 0.2, 0.4):
            figures["sparse"].append(sparse(form, share, rounds, copy))
            print(figures["sparse"][-1], flush=True)
    for tokens in (1024, 8192, 32768):
        figures["attention"].append(attention(tokens, rounds, copy))
        print(figures["attention"][-1], flush=True)
        for bits in (8, 4, 2):
            figures["attention"].append(joint(bits, tokens, rounds, copy))
            print(figures["attention"][-1], flush=True)
    figures |= {"low_rank_mlp": [], "low_rank_attention": []}
    for name in FACTORED:
        for tokens in (64, 512, 4096, 16384):
            figures["low_rank_mlp"].append(low_rank_mlp(name, tokens, rounds))
            print(figures["low_rank_mlp"][-1], flush=True)
    for name in LOW_RANK_ATTENTIONS:
        for batch, tokens in ((1, 512), (8, 512), (1, 4096)):
            figures["low_rank_attention"].append(low_rank_attention(name, batch, tokens, rounds))
            print(figures["low_rank_attention"][-1], flush=True)
    print(write(file_name(), figures, before))


if __name__ == "__main__":
    main()
