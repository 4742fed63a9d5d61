"""How fast bitmap weights are expanded and multiplied on the CPU, in every form of the kernel that this processor runs.

    python benchmarks/bitmap_linear.py [--threads N ...] [--sparsity S ...]

Per shape `N x K` with random zeros: billions of weights per second of `BitmapWeight.linear`, zeros counted, and the
bytes per second of the stored form that this is, to be compared with a disk; the best of the rounds for 1, 4 and 512
rows of x. `expand` is the kernel into a buffer of 4 MiB that is used again and again, `compiling` the time and the
memory that LLVM and the first kernel take. Beside it PyTorch's int4 kernel and fp32 product of the same shape, and
`masked_scatter`, the nearest that PyTorch has. Writes benchmarks/results/bitmap_linear.json.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from record import environment, write
from torch import Tensor

from jettison.codegen.cpu.compiled import host_features
from jettison.ir.ops.bitmap_linear import unpack_bits
from jettison.passes.formats import Bitmap, IntGroups
from jettison.runtime import bitmap_weight
from jettison.runtime.bitmap_weight import BitmapWeight, bitmap_kernels, pack_bitmap
from jettison.runtime.packed_linear import BLOCK_WEIGHTS, pack_weight

SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192))
ROUNDS, GROUP = 15, 128
FORMS = {
    "vbmi2": frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vbmi2", "bmi2"}),
    "bmi2": frozenset({"avx2", "fma", "bmi2"}),
    "portable": frozenset[str](),
}


def best_seconds(run: Callable[[], object]) -> float:
    """The fastest of the rounds: what disturbs a round makes it slower."""
    run()
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def speed(run: Callable[[], object], weights: int, nbytes: int) -> dict[str, float]:
    """Of one call that reads so many weights."""
    seconds = best_seconds(run)
    return {
        "ms": round(1e3 * seconds, 3),
        "gweights_per_s": round(weights / seconds / 1e9, 2),
        "gbytes_per_s": round(nbytes / seconds / 1e9, 2),
    }


def compiling() -> dict[str, Any]:
    """What the first kernel costs: LLVM itself, and the kernel; before anything else was compiled."""

    def memory(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))

    before = {name: memory(name) for name in ("VmRSS", "RssAnon")}
    started = time.perf_counter()
    bitmap_kernels("int4", GROUP)
    seconds = time.perf_counter() - started
    grown = {name: memory(name) - held for name, held in before.items()}
    return {"seconds": round(seconds, 2), "resident_bytes": grown["VmRSS"], "anonymous_bytes": grown["RssAnon"]}


def sparse(rows: int, columns: int, sparsity: float) -> Tensor:
    """Random values and zeros, in bf16 as of a checkpoint."""
    generator = torch.Generator().manual_seed(0)
    kept = torch.rand(rows, columns, generator=generator) >= sparsity
    return (torch.randn(rows, columns, generator=generator).to(torch.bfloat16) * kept).float()


def expanding(weight: BitmapWeight) -> Callable[[], None]:
    """Expand the whole weight, a buffer at a time."""
    columns = -(-weight.columns // 64) * 64
    at_once = BLOCK_WEIGHTS // columns // 64 * 64
    dense = torch.empty(at_once, columns, dtype=bitmap_kernels("int4", GROUP).dense)

    def run() -> None:
        for start in range(0, weight.rows, at_once):
            weight._expand(dense, start, min(start + at_once, weight.rows))

    return run


def shape_rows(rows: int, columns: int, sparsity: float) -> dict[str, Any]:
    """All measurements of one shape."""
    dense, weights = sparse(rows, columns, sparsity), rows * columns
    found: dict[str, Any] = {}
    for of, bits in (("int4", 4), ("int8", 8), ("float", 16)):
        parts = Bitmap(of, GROUP).encode(dense)
        for form, needed in FORMS.items():
            if not needed <= host_features() or (form == "bmi2" and of == "float"):
                continue
            with mock.patch.object(bitmap_weight, "bitmap_kernels", partial(bitmap_kernels, form=form)):
                weight = pack_bitmap(
                    parts["bitmap"], parts["starts"], parts["values"], parts.get("scales"), bits, GROUP, columns
                )
            assert weight is not None
            row: dict[str, Any] = {"bits_per_weight": round(8 * weight.nbytes / weights, 3)}
            for tokens in (1, 4, 512):
                x = torch.randn(tokens, columns)
                row[f"{tokens} rows"] = speed(lambda w=weight, x=x: w.linear(x, None), weights, weight.nbytes)
            row["expand"] = speed(expanding(weight), weights, weight.nbytes)
            found[f"{of} {form}"] = row
    x = torch.randn(1, columns)
    stored = IntGroups(4, GROUP).encode(dense)
    packed = pack_weight(stored["codes"], stored["scales"], stored.get("zeros"), 4, GROUP, columns, is_table=False)
    if packed is not None:
        found["dense int4, PyTorch"] = {"1 rows": speed(lambda: packed.linear(x, None), weights, packed.nbytes)}
    found["dense fp32, PyTorch"] = {"1 rows": speed(lambda: F.linear(x, dense), weights, dense.nbytes)}
    parts = Bitmap("float", GROUP).encode(dense)
    nbytes = sum(part.nbytes for part in parts.values())

    def scattered() -> Tensor:
        kept = unpack_bits(parts["bitmap"]).flatten(1)
        return torch.zeros(kept.shape, dtype=parts["values"].dtype).masked_scatter_(kept, parts["values"])

    found["float, masked_scatter"] = {"expand": speed(scattered, weights, nbytes)}
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2])
    parser.add_argument("--sparsity", nargs="*", type=float, default=[0.5, 0.7])
    arguments = parser.parse_args()
    before = environment()
    figures: dict[str, Any] = {"compiling": compiling()}
    with torch.inference_mode():
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for sparsity in arguments.sparsity:
                for rows, columns in SHAPES:
                    name = f"{threads} threads, {sparsity:.0%} zeros, {rows} x {columns}"
                    figures[name] = shape_rows(rows, columns, sparsity)
                    print(name, {key: each.get("1 rows") for key, each in figures[name].items()}, flush=True)
    print(write("bitmap_linear", figures, before))


if __name__ == "__main__":
    main()
