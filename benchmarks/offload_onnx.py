"""ONNX Runtime with less memory than the weights take: seconds per token, bytes read, memory, beside no limit.

    python benchmarks/offload_onnx.py --limit 900

A random model in the shape of Llama-3.2-1B, in 4 bits (`--bits 32` for fp32), `--layers` of it, placed within a limit
of resident memory by `place-weights`, with the memory that `jettison plan` measures for a process. Every run is in a
process of its own: a prompt of 16 tokens, then `--tokens` steps. What streams is dropped from the page cache by the
runtime itself, so every byte that is not held is read from the disk; `disk_bytes_per_token` is what the kernel counted.
Pages of the folder are dropped (posix_fadvise) before the prompt only: between steps that would drop what has been
asked for and is not there yet. Beside it the artifact without a limit, which holds all weights in memory, and what the
disk gives to direct reads of the same files, one after another. Writes
benchmarks/results/offload_onnx.json.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from random_models import make_llama
from record import environment, write

import jettison
from jettison.api import parse_passes
from jettison.passes.base import Pass
from jettison.passes.place_weights import PlaceWeights
from jettison.runtime.machine import machine_rates

MB = 1_000_000

_RUN = """
import json, os, statistics, sys, threading, time
from pathlib import Path
import onnxruntime, torch, jettison
folders, threads, tokens = [Path(each) for each in sys.argv[1].split(":")], int(sys.argv[2]), int(sys.argv[3])
def memory():
    lines = dict(line.split(":") for line in open("/proc/self/status") if line.startswith("Rss"))
    return [int(lines[key].split()[0]) * 1024 for key in ("RssAnon", "RssFile")]
def drop():
    for folder in folders:
        for path in folder.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
def read_bytes():
    return next(int(line.split()[1]) for line in open("/proc/self/io") if line.startswith("read_bytes"))
model = jettison.load(folders[0], threads=threads)
before, samples, is_over = memory(), [], threading.Event()
def sample():
    while not is_over.wait(0.01):
        samples.append(memory())
sampler = threading.Thread(target=sample)
sampler.start()
started = time.perf_counter()
executor = model.executor
opened, loading = time.perf_counter() - started, len(samples)
session = model.session(1, 16 + tokens + 2)
drop()
started = time.perf_counter()
session.prefill([[5] * 16])
prompt = time.perf_counter() - started
session.decode([3])
read = getattr(executor, "statistics", None)
at_first = (read.bytes_read, read.waited_seconds, read.read_seconds) if read else (0, 0, 0)
seconds, disk = [], read_bytes()
for token in range(tokens):
    started = time.perf_counter()
    session.decode([token])
    seconds.append(time.perf_counter() - started)
disk = read_bytes() - disk
ahead, waited, reading = [now - then for now, then in zip(
    (read.bytes_read, read.waited_seconds, read.read_seconds), at_first)] if read else (0, 0, 0)
is_over.set()
sampler.join()
peak = lambda part, column: max((each[column] for each in part), default=0) - before[column]
print(json.dumps({
    "open_seconds": opened, "prompt_seconds": prompt, "seconds_per_token": statistics.median(seconds),
    "slowest_token_seconds": max(seconds), "disk_bytes_per_token": disk / tokens,
    "read_ahead_bytes_per_token": ahead / tokens, "waited_seconds_per_token": waited / tokens,
    "read_ahead_gb_per_second": ahead / reading / 1e9 if reading else None,
    "ring_bytes": read.most_bytes if read else 0,
    "added_anon_bytes_opening": peak(samples[:loading], 0), "added_file_bytes_opening": peak(samples[:loading], 1),
    "added_anon_bytes": peak(samples[loading:], 0), "added_file_bytes": peak(samples[loading:], 1),
    "rss_peak_bytes_opening": max(sum(each) for each in samples[:loading]),
    "rss_peak_bytes": max(sum(each) for each in samples[loading:]),
}))
"""


def direct_gb_per_second(folder: Path) -> float:
    """Of reads of 8 MiB, one after another, that go past the page cache."""
    buffer, count, started = mmap.mmap(-1, 8 << 20), 0, time.perf_counter()
    for path in sorted(folder.glob("*.data")):
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        offset = 0
        while (got := os.preadv(file, [buffer], offset)) > 0:
            offset += got
            if got % 4096:
                break
        count += offset
        os.close(file)
    return count / (time.perf_counter() - started) / 1e9


def measure(folder: Path, cache: Path, threads: int, tokens: int) -> dict[str, Any]:
    """One run in a process of its own."""
    command = [sys.executable, "-c", _RUN, f"{folder}:{cache}", str(threads), str(tokens)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    figures = json.loads(done.stdout)
    return {key: value if value is None else round(value, 4) for key, value in figures.items()}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--bits", type=int, choices=[4, 32], default=4)
    parser.add_argument("--limit", type=int, default=900, help="megabytes of resident memory")
    parser.add_argument("--tokens", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--folder", type=Path, help="where to work: on the disk that is to be measured")
    args = parser.parse_args()
    before = environment()
    with tempfile.TemporaryDirectory(prefix="jettison-bench-", dir=args.folder) as name:
        root, figures = Path(name), {key: value for key, value in vars(args).items() if key != "folder"}
        os.environ["JETTISON_CACHE"] = str(root / "cache")
        make_llama(root / "model", args.layers)
        passes = parse_passes("quantize-weights{bits=4,group=32}" if args.bits == 4 else "")
        place = PlaceWeights(
            host=args.limit * MB, context=args.tokens + 32, prompt=16, reserve=machine_rates(root).process_bytes
        )
        limits: dict[str, list[Pass]] = {"no limit": [], "limit": [place]}
        for label, last in limits.items():
            made = jettison.optimize(root / "model", [*passes, *last])
            made.save_pretrained(root / label)
            figures["weight_bytes"] = made.report.weight_bytes
            figures["notes"] = made.report.passes[-1].notes
        chains = json.loads((root / "limit" / "jettison.json").read_text()).get("chains", [])
        figures["segments"] = sum(len(chain["segments"]) for chain in chains)
        started = time.perf_counter()
        jettison.load(root / "limit").executor  # noqa: B018  (packs the weights)
        figures["first_open_seconds"] = round(time.perf_counter() - started, 2)
        packed = [path.parent for path in (root / "cache").rglob("prepared.json")]
        figures["direct_read_gb_per_second"] = round(direct_gb_per_second((packed or [root / "limit"])[0]), 3)
        # In turns, so that whatever else runs on the machine slows both.
        rounds = [{label: measure(root / label, root / "cache", args.threads, args.tokens) for label in limits}
                  for _ in range(args.rounds)]  # fmt: skip
        for label in limits:
            runs = [each[label] for each in rounds]
            figures[label] = {
                key: None if runs[0][key] is None else statistics.median(run[key] for run in runs) for key in runs[0]
            }
            figures[label]["all_seconds_per_token"] = [run["seconds_per_token"] for run in runs]
    print(json.dumps(figures, indent=2))
    print(write("offload_onnx", figures, before))


if __name__ == "__main__":
    main()
