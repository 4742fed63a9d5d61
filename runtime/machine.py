"""What this machine does in a second, measured once and kept in the user's cache.

A few seconds: memory, large products, products with one row as the kernels of `packed_linear.py` run them, direct reads
of the disk, and the memory of a process that holds no model. The file is a JSON object of `machine`, which says what
was measured on, and figures by name; it is advice, and what does not fit is measured again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import platform
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from jettison.ir import ops
from jettison.ir.errors import UnsupportedError
from jettison.ir.roofline import TYPICAL_CPU, TYPICAL_GPU, Rates
from jettison.runtime.artifact import library_versions
from jettison.runtime.bitmap_weight import BitmapWeight, pack_bitmap
from jettison.runtime.cache_folder import cache_folder
from jettison.runtime.dense_linear import run_dense_linear
from jettison.runtime.mounts import mount_of
from jettison.runtime.packed_linear import pack_weight
from jettison.runtime.transfer_memory import transfer_memory

# What is read must not fit the last cache of a processor.
MEMORY_BYTES = 256 << 20
# The file that direct reads are measured on, one read as long as a streamed one, and how many run at once: more are no
# faster where nothing else runs.
FILE_BYTES = 256 << 20
READ_BYTES = 4 << 20
DIRECT_THREADS = 2
# A weight of one row's products, and how many of them are used in turn.
WEIGHT_SHAPE, WEIGHTS = (8192, 2048), 4
# Weights as small as those of small layers, more than a cache holds, and rows of a prompt.
SMALL_WEIGHT, SMALL_WEIGHTS, MANY_ROWS = (1024, 1024), 64, 128
PRODUCT_SHAPE = (512, 2048, 2048)
DECODED_SHAPE = (1024, 1024)
SMALL_SHAPE = (256, 256)
REPEATS, ROUNDS = 9, 3
# Graphs and allocators take some memory that a process without a model has not taken yet.
SLACK_BYTES = 24 << 20
Linear = Callable[[torch.Tensor], torch.Tensor]
_IN_MEMORY = {"tmpfs", "ramfs", "devtmpfs", "hugetlbfs"}
_FORMAT = 5
_IDLE = """
import re
import jettison.api, jettison.runtime.tokenizer, jettison.runtime.torch_executor
from jettison.runtime.machine import run_small_kernels
run_small_kernels()
print(re.search(r"VmRSS:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


def machine_rates(folder: Path | None = None, *, remeasure: bool = False) -> Rates:
    """The rates of this machine, measured if the cache does not have them.

    Args:
        folder: On the file system whose reads count; default where temporary files are.
        remeasure: Measure all the same.

    Raises:
        UnsupportedError: The folder is in memory: reading from there says nothing about a disk.
        OSError: It cannot be written to and its reads were never measured.
    """
    folder = Path(tempfile.gettempdir()) if folder is None else folder
    place, kind = mount_of(folder)
    if kind in _IN_MEMORY:
        raise UnsupportedError(
            f"[machine] {folder}: found {kind}, a file system in memory; needed one on a disk, because streamed "
            "weights are there to leave memory free. Set TMPDIR to a folder on a disk, or put the artifact on one."
        )
    path = _cache_path()
    known = {} if remeasure else _read(path)
    figures: dict[str, Any] = known.get("figures", {})
    if not figures:
        figures = _measure()
    disks: dict[str, float] = dict(known.get("disks", {}))
    is_new = not known or place not in disks
    if place not in disks:
        disks[place] = disk_rate(folder)
    if is_new:
        _write(path, {"format": _FORMAT, "machine": _machine(), "figures": figures, "disks": disks})
    return Rates(
        figures["read"], figures["products"], figures["weights"], disks[place], 0.0, figures["call_seconds"],
        figures["process_bytes"], figures["decoding"], figures["starts"],
    )  # fmt: skip


def gpu_rates(cpu: Rates) -> tuple[Rates, bool]:
    """Rates of the GPU, and whether they were measured: without one they are usual figures.

    Args:
        cpu: Of the machine that it is in, whose disk counts.
    """
    if not torch.cuda.is_available():
        return Rates(**{**TYPICAL_GPU.as_dict(), "disk": cpu.disk}), False
    on_host = torch.empty(MEMORY_BYTES, dtype=torch.uint8, pin_memory=True)
    on_device = on_host.to("cuda").view(torch.float32)

    def waited(call: Callable[[], object]) -> Callable[[], object]:
        return lambda: (call(), torch.cuda.synchronize())

    products = {}
    m = n = k = 4096
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        a, b = (torch.ones(size, dtype=dtype, device="cuda") for size in ((m, k), (k, n)))
        products[str(dtype).removeprefix("torch.")] = (
            2 * m * n * k / seconds_of(waited(functools.partial(torch.matmul, a, b)))
        )
    return Rates(
        MEMORY_BYTES / seconds_of(waited(on_device.sum)), products, {}, cpu.disk,
        MEMORY_BYTES / seconds_of(waited(lambda: on_device.view(torch.uint8).copy_(on_host, non_blocking=True))),
        TYPICAL_GPU.call_seconds, TYPICAL_GPU.process_bytes,
    ), True  # fmt: skip


def seconds_of(call: Callable[[], object], repeats: int | None = None) -> float:
    """The median of several calls, after one that does not count."""
    call()
    times = []
    for _ in range(repeats or REPEATS):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return max(statistics.median(times), 1e-9)


def _measure() -> dict[str, Any]:
    with torch.inference_mode():
        return {
            "read": memory_rate(),
            "products": {name: product_rate(getattr(torch, name)) for name in ("float32", "bfloat16")},
            **_medians([weight_rates() for _ in range(ROUNDS)]),
            "call_seconds": call_seconds(),
            "process_bytes": process_bytes(),
        }


def _medians(rounds: Sequence[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Of the same figures measured some seconds apart: another guest of a machine may be busy for one of them."""
    return {
        kind: {form: statistics.median(each[kind][form] for each in rounds) for form in forms}
        for kind, forms in rounds[0].items()
    }


def memory_rate() -> float:
    """Bytes of memory read in a second by all threads."""
    values = torch.ones(MEMORY_BYTES // 4)
    return MEMORY_BYTES / seconds_of(values.sum)


def product_rate(dtype: torch.dtype) -> float:
    """Operations of a large product in a second."""
    rows, columns, outputs = PRODUCT_SHAPE
    x, weight = torch.ones(rows, columns, dtype=dtype), torch.ones(outputs, columns, dtype=dtype)
    return 2 * rows * columns * outputs / seconds_of(lambda: run_dense_linear(x, weight))


def weight_rates() -> dict[str, dict[str, float]]:
    """`weights`, `decoding` and `starts` of `Rates`."""
    weights, decoding, starts = {}, {}, {}
    rows, columns = WEIGHT_SHAPE
    for form, make in _FORMS.items():
        large = [made for made in (make(rows, columns) for _ in range(WEIGHTS)) if made is not None]
        if not large:
            continue  # no kernel here
        x = torch.ones(1, columns, dtype=torch.bfloat16 if form == "bfloat16" else torch.float32)
        weights[form] = WEIGHTS * rows * columns / seconds_of(_products(large, x))
        if form in ("float32", "bfloat16"):
            continue
        many = torch.ones(MANY_ROWS, columns, dtype=_multiplied_in(form))
        dense = functools.partial(_run_dense, torch.ones(rows, columns, dtype=many.dtype))
        spent = seconds_of(_products(large[:1], many), 3) - seconds_of(_products([dense], many), 3)
        decoding[form] = rows * columns / max(spent, rows * columns / weights[form])
        del large
        few = [made for made in (make(*SMALL_WEIGHT) for _ in range(SMALL_WEIGHTS)) if made is not None]
        each = seconds_of(_products(few, x[:, : SMALL_WEIGHT[1]].contiguous())) / SMALL_WEIGHTS
        starts[form] = max(0.0, each - SMALL_WEIGHT[0] * SMALL_WEIGHT[1] / weights[form])
    rows, columns = DECODED_SHAPE
    codes, scales = _codes(rows, columns, 3)
    x = torch.ones(1, columns)
    weights["decoded"] = (
        rows * columns / seconds_of(lambda: ops.quantized_linear(x, codes, scales, None, None, 3, 128, columns))
    )
    return {"weights": weights, "decoding": decoding, "starts": starts}


def _multiplied_in(form: str) -> torch.dtype:
    """What weights are decoded to for many rows."""
    return torch.float32 if form == "int8" else torch.bfloat16


def _dense(dtype: torch.dtype) -> Callable[[int, int], Linear]:
    return lambda rows, columns: functools.partial(_run_dense, torch.ones(rows, columns, dtype=dtype))


def _run_dense(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return run_dense_linear(x, weight)


def _integers(bits: int) -> Callable[[int, int], Linear | None]:
    def make(rows: int, columns: int) -> Linear | None:
        packed = pack_weight(*_codes(rows, columns, bits), None, bits, 128, columns, is_table=False)
        return None if packed is None else lambda x: packed.linear(x, None)

    return make


def _bitmap(rows: int, columns: int) -> Linear | None:
    packed = _pruned(rows, columns)
    return None if packed is None else lambda x: packed.linear(x, None)


def _codes(rows: int, columns: int, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(rows, columns // 128, 16 * bits, dtype=torch.uint8), torch.ones(rows, columns // 128)


def _pruned(rows: int, columns: int) -> BitmapWeight | None:
    """Every second weight, in 4 bits."""
    bitmap = torch.full((rows, columns // 8), 0x55, dtype=torch.uint8)
    starts = torch.arange(0, rows + 1, 64) * (columns // 4)
    values = torch.zeros(rows * columns // 4, dtype=torch.uint8)
    return pack_bitmap(bitmap, starts, values, torch.ones(rows, columns // 128, dtype=torch.bfloat16), 4, 128, columns)


# How a product with a weight of some shape is made, by the form of the weight; None without a kernel.
_FORMS: dict[str, Callable[[int, int], Linear | None]] = {
    "float32": _dense(torch.float32),
    "bfloat16": _dense(torch.bfloat16),
    "int4": _integers(4),
    "int8": _integers(8),
    "bitmap": _bitmap,
}


def _products(linears: Iterable[Linear], x: torch.Tensor) -> Callable[[], object]:
    """Products with several weights in turn."""
    return lambda: [linear(x) for linear in linears]


def call_seconds() -> float:
    """That a call on a few values takes, the mean of several kinds, between products as in a decode step."""
    rows, columns = WEIGHT_SHAPE
    weights, x = torch.ones(WEIGHTS, rows // 8, columns), torch.ones(1, columns)
    few, halves = torch.ones(1, 1, 64), torch.ones(1, 1, 64, dtype=torch.bfloat16)

    def small_ones() -> None:
        torch.add(few, few)
        torch.mul(few, few)
        torch.cat([few, few], -1)
        few.to(torch.bfloat16)
        torch.add(halves, halves)
        few.mean(-1, keepdim=True)

    times = []
    for weight in [*weights] * REPEATS:
        F.linear(x, weight)
        started = time.perf_counter()
        small_ones()
        small_ones()
        times.append(time.perf_counter() - started)
    return max(statistics.median(times), 1e-7) / 12


def process_bytes() -> int:
    """Resident memory of a process that has imported the runtime, has run its kernels and holds no model."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _IDLE], capture_output=True, text=True, check=True, env=environment, timeout=300
        )
        return int(done.stdout) * 1024 + SLACK_BYTES
    except (OSError, ValueError, subprocess.SubprocessError):
        return TYPICAL_CPU.process_bytes


def run_small_kernels() -> None:
    """One product of each kind for one row and for several: libraries read their code when they first run."""
    rows, columns = SMALL_SHAPE
    with torch.inference_mode():
        for form, make in _FORMS.items():
            linear, dtype = make(rows, columns), torch.float32 if form == "float32" else torch.bfloat16
            for count in (1, 64, 512):
                if linear is not None:
                    linear(torch.ones(count, columns, dtype=dtype))
            x = torch.ones(1, 4, 64, 64, dtype=dtype)
            F.scaled_dot_product_attention(x, x, x, is_causal=True)


# --------------------------------------------------------------------------------------------------------------- disk


def disk_rate(folder: Path) -> float:
    """Bytes of direct reads in a second, several at once; buffered ones where the file system has no direct ones.

    Raises:
        OSError: The folder cannot be written to.
    """
    with _scratch_file(folder) as path:
        offsets = range(0, FILE_BYTES, READ_BYTES)

        def read() -> None:
            descriptor = _open_direct(path)
            try:
                with ThreadPoolExecutor(DIRECT_THREADS) as readers:
                    list(
                        readers.map(
                            lambda first: _read_every(descriptor, offsets[first::DIRECT_THREADS]), range(DIRECT_THREADS)
                        )
                    )
            finally:
                os.close(descriptor)

        return FILE_BYTES / seconds_of(read, 2)


@contextlib.contextmanager
def _scratch_file(folder: Path) -> Iterator[Path]:
    """A file whose blocks are on disk and not in memory."""
    handle, name = tempfile.mkstemp(prefix="jettison-", suffix=".reads", dir=folder)
    try:
        block = secrets.token_bytes(READ_BYTES)  # file systems skip zeros
        for _ in range(FILE_BYTES // READ_BYTES):
            os.write(handle, block)
        os.fsync(handle)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        yield Path(name)
    finally:
        os.close(handle)
        os.unlink(name)


def _open_direct(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | getattr(os, "O_DIRECT", 0))
    except OSError:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        return descriptor


def _read_every(descriptor: int, offsets: range) -> None:
    with transfer_memory(READ_BYTES) as buffer:
        for offset in offsets:
            os.preadv(descriptor, [buffer], offset)


# -------------------------------------------------------------------------------------------------------------- cache


def _machine() -> dict[str, Any]:
    """What the figures belong to."""
    name = platform.processor()
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    versions = library_versions()
    kept = {key: versions.get(key) for key in ("jettison", "python", "torch")}
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "versions": kept}


def _cache_path() -> Path:
    slug = hashlib.sha256(json.dumps(_machine(), sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "machine" / f"{slug}.json"


def _read(path: Path) -> dict[str, Any]:
    """The document of the cache, or an empty one if it is not sound."""
    try:
        document = json.loads(path.read_text())
        figures = document["figures"]
        numbers = [figures["read"], figures["call_seconds"], figures["process_bytes"], *document["disks"].values()]
        numbers += [*(each for name in ("products", "weights", "decoding") for each in figures[name].values())]
        numbers += [1.0 + each for each in figures["starts"].values()]  # 0 is sound
        is_sound = document["format"] == _FORMAT and document["machine"] == _machine()
        is_sound &= all(isinstance(each, (int, float)) and 0 < each < 1e18 for each in numbers)
        return document if is_sound and {"float32", "bfloat16"} <= set(figures["products"]) else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _write(path: Path, document: dict[str, Any]) -> None:
    """Keep a document; without a cache to write to it is measured again the next time."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_text(json.dumps(document, indent=1))
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
