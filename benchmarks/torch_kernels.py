"""Products with quantised weights in PyTorch on a CPU: the kernels that the torch target uses, and those it does not.

    python benchmarks/torch_kernels.py [--threads N]

Per shape `N x K` and number of rows of x, milliseconds of the best run; weights are taken in turn from enough copies
that no cache holds them. `kernel` and `blocks` are the two ways of `runtime/packed_linear.py` for few and for many
rows, `operator` is `jettison::quantized_linear` as a graph defines it, `fp32` a product with the decoded weight.
Writes benchmarks/results/torch_kernels.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from record import environment, write
from torch import Tensor

from jettison.ir import ops
from jettison.runtime import packed_linear
from jettison.runtime.packed_linear import pack_weight

aten = torch.ops.aten
GROUP = 128
SHAPES = ((2048, 2048), (8192, 2048), (2048, 8192), (128256, 2048))
ROWS = (1, 4, 16, 128, 512)
# Rows of x times weights beyond which a shape is left out: seconds per run.
MOST_PRODUCTS = 1 << 34
CACHE_BYTES = 64 << 20
SECONDS = 0.25


def best_ms(call: Callable[[], object]) -> float:
    """Best of the runs that fit `SECONDS`, at least two, after one to warm up."""
    call()
    best, stop, runs = float("inf"), time.perf_counter() + SECONDS, 0
    while runs < 2 or time.perf_counter() < stop:
        start = time.perf_counter()
        call()
        best, runs = min(best, time.perf_counter() - start), runs + 1
    return round(1e3 * best, 3)


def parts(rows: int, columns: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Random codes, scales and zero points: speed does not depend on their values."""
    blocks = columns // GROUP
    codes = torch.randint(256, (rows, blocks, GROUP * bits // 8), dtype=torch.uint8)
    zeros = torch.randint(256, (rows, blocks * bits // 8), dtype=torch.uint8)
    return codes, torch.rand(rows, blocks), zeros


def in_turn(weights: list[Any], call: Callable[[Any], object]) -> Callable[[], object]:
    """A call that reads the next weight each time."""
    cycle = itertools.cycle(weights)
    return lambda: call(next(cycle))


def measure_shape(rows: int, columns: int) -> dict[str, Any]:
    """Milliseconds by rows of x and way."""
    given, packed = {}, {}
    for bits in (4, 8):
        copies = 1 + CACHE_BYTES // (rows * columns * bits // 8)
        given[bits] = [parts(rows, columns, bits) for _ in range(copies)]
        packed[bits] = [pack_weight(*each, bits, GROUP, columns, is_table=False) for each in given[bits]]
    dense = torch.randn(rows, columns)
    figures: dict[str, Any] = {}
    for steps in ROWS:
        if steps * rows * columns > MOST_PRODUCTS:
            continue
        x = torch.randn(steps, columns)
        found = {"fp32": best_ms(lambda x=x: F.linear(x, dense))}
        for bits in (4, 8):
            few = (lambda w, x=x: _int4(w, x)) if bits == 4 else (lambda w, x=x: w._sum_bags(x))
            found[f"int{bits} kernel"] = best_ms(in_turn(packed[bits], few)) if bits == 4 or steps <= 16 else None
            found[f"int{bits} blocks"] = best_ms(in_turn(packed[bits], lambda w, x=x: w._multiply_decoded(x)))
            operator = best_ms(
                in_turn(given[bits], lambda w, x=x, b=bits: ops.quantized_linear(x, *w, None, b, GROUP, columns))
            )
            found[f"int{bits} operator"] = operator
        figures[str(steps)] = found
        print(f"{rows} x {columns}, {steps} rows: {found}", flush=True)
    return figures


def _int4(weight: packed_linear.Int4Weight, x: Tensor) -> Tensor:
    operands = weight._codes, weight.group, weight._scales_offsets
    return aten._weight_int4pack_mm_for_cpu(x.to(torch.bfloat16), *operands).to(torch.float32)


def not_taken(rows: int, columns: int) -> dict[str, float | None]:
    """Milliseconds of the alternatives for one row of x."""
    codes, scales, zeros = parts(rows, columns, 4)
    weight = pack_weight(codes, scales, zeros, 4, GROUP, columns, is_table=False)
    assert isinstance(weight, packed_linear.Int4Weight)
    x, found = torch.randn(1, columns), {}
    for dtype in (torch.float32, torch.float16):
        wide, pairs = x.to(dtype), weight._scales_offsets.to(dtype)
        found[f"int4 kernel on {str(dtype).removeprefix('torch.')}"] = best_ms(
            lambda x=wide, pairs=pairs: aten._weight_int4pack_mm_for_cpu(x, weight._codes, GROUP, pairs)
        )
    per_row = aten._dyn_quant_pack_4bit_weight(
        codes.view(rows, -1), torch.rand(rows, columns // 32).bfloat16(), None, 32, columns, rows
    )
    found["_dyn_quant_matmul_4bit, groups of 32"] = best_ms(
        lambda: aten._dyn_quant_matmul_4bit(x, per_row, 32, columns, rows)
    )
    int8, row_scales = torch.randint(-128, 127, (rows, columns), dtype=torch.int8), torch.rand(rows)
    for dtype in (torch.float32, torch.bfloat16):
        found[f"_weight_int8pack_mm on {str(dtype).removeprefix('torch.')}, one scale per row"] = best_ms(
            partial(aten._weight_int8pack_mm, x.to(dtype), int8, row_scales.to(dtype))
        )
    found["embedding_bag_4bit, fp32, one thread only"] = best_ms(_bags_of_4_bits(rows, columns, x))
    found["torch.compile of the decoded product"] = _compiled(codes, scales, x)
    print(found)
    return found


def _bags_of_4_bits(rows: int, columns: int, x: Tensor) -> Callable[[], object]:
    width, bag = 512, GROUP
    table = torch.randint(256, (rows // width * columns, width // 2 + 4), dtype=torch.uint8)
    table[:, -4:] = torch.tensor([1.0, -8.0], dtype=torch.float16).view(torch.uint8)
    indices = torch.arange(len(table), dtype=torch.int32)
    offsets = torch.arange(0, len(table), bag, dtype=torch.int32)
    weights = x.flatten().repeat(rows // width)
    bags = torch.ops.quantized.embedding_bag_4bit_rowwise_offsets
    return lambda: bags(table, indices, offsets, per_sample_weights=weights)


def _compiled(codes: Tensor, scales: Tensor, x: Tensor) -> float | None:
    """None without a C++ compiler."""

    def product(codes: Tensor, scales: Tensor, x: Tensor) -> Tensor:
        halves = x.view(codes.shape[1], 2, -1)
        low, high = (codes & 15).to(torch.float32), (codes >> 4).to(torch.float32)
        return ((low * halves[:, 0] + high * halves[:, 1]) * scales[:, :, None]).sum((1, 2))

    try:
        return best_ms(partial(torch.compile(product, dynamic=False), codes, scales, x))
    except Exception as error:  # whatever the compiler's absence raises
        print(f"torch.compile: {error!r}"[:200])
        return None


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    before = environment()
    with torch.inference_mode():
        shapes = {f"{rows}x{columns}": measure_shape(rows, columns) for rows, columns in SHAPES}
        alternatives = not_taken(8192, 2048)
    figures = {
        "threads": arguments.threads, "group": GROUP, "unit": "ms", "shapes": shapes,
        "not taken, 8192x2048, 1 row": alternatives,
    }  # fmt: skip
    print(json.dumps(alternatives, indent=2))
    print(write("torch_kernels", figures, before))


if __name__ == "__main__":
    main()
