"""Weights that do not fit: streamed from disk on the torch target, beside accelerate's disk offload and AirLLM.

    python benchmarks/offload.py [--model HF_FOLDER] [--only bf16 int4 bitmap] [--accelerate PYTHON] [--airllm PYTHON]
        [--rounds 5] [--new 8]

Without --model, a random model of the shape of Llama-3.2-1B is made (2.47 GB in bf16). Each contender runs in a process
of its own and decodes in turn; the page cache of its files is dropped before every token, outside of what is timed.
Peers have no limit, and each runs in a virtual environment of its own (`pip install accelerate transformers torch`,
and `airllm>=3`). jettison has those of `PIPELINES`, in megabytes of resident memory, all of the process counted; what
is pinned is what `place-weights` chose for them, with the rates of this machine (`jettison plan`), and what was
predicted stands beside what was measured.

`seconds_per_token` are medians over the rounds of medians over the tokens. `read_gb_per_s` is what the stream reached
while it read, `direct_gb_per_s` what two threads reach that only read what a step reads of the same file past the
page cache, several times, in the same round, by turns before and after (fio's sequential read), `bandwidth_share` their
ratio, and `small_page_gb_per_s` the same into pages of 4 KiB instead of huge ones. `prediction_error` is predicted over
measured less one, with the rates measured before the run; `prediction_error_at_direct_rate` with `direct_gb_per_s` for
the disk. `overlap` is the time in which reading and computing went on at once, over the shorter of the two.
`reached_byte_ratios` is, of two that stream, how much faster one is over how much less it reads: the median over the
rounds, between which the rate of a disk changes. `rss_peak_bytes` and `anon_peak_bytes` are sampled every 10 ms over
loading and all steps. `same_tokens` says that greedy tokens are those of the artifact with all weights in memory.
Writes benchmarks/results/offload.json.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cpu_decode import Contender
from random_models import make_llama
from record import environment, write

import jettison
from jettison.artifact_files import STREAM_FILE, STREAM_TABLE_FILE
from jettison.ir.cost import Workload
from jettison.ir.roofline import Rates
from jettison.planner import Wanted, open_program, plan
from jettison.runtime.machine import DIRECT_THREADS, machine_rates
from jettison.runtime.transfer_memory import transfer_memory
from jettison.runtime.weight_store import SEGMENT_BYTES, table_from_dict
from jettison.runtime.weight_stream import READERS

TOKENIZER = Path(__file__).resolve().parent.parent / "examples" / "models" / "tiny-llama"
# Of each stretch that direct reads are measured on.
DIRECT_PASSES = 3
INT4 = "quantize-weights{bits=4,group=128}"
# Passes, and limits in megabytes.
PIPELINES: dict[str, tuple[str, tuple[int, ...]]] = {
    "bf16": ("", (1200, 700)),
    "int4": (INT4, (500,)),
    "bitmap": (
        "prune-weights{method=magnitude},quantize-weights{format=bitmap{of=int4,group=128},skip='embed'}," + INT4,
        (500,),
    ),
}


class Sampler(Contender):
    """A contender whose resident memory is sampled from the start of its process."""

    def __init__(self, name: str, python: str, script: str, model: str, threads: int) -> None:
        self.peaks = {"VmRSS": 0, "RssAnon": 0}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self.process: Any = None
        self._thread.start()
        super().__init__(name, python, script, model, threads)

    def _sample(self) -> None:
        while not self._stop.wait(0.01):
            if self.process is None:
                continue
            try:
                lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
            except OSError:
                return
            for line in lines:
                key = line.split(":")[0]
                if key in self.peaks:
                    self.peaks[key] = max(self.peaks[key], int(line.split()[1]) * 1024)

    def close(self) -> None:
        """End the process and the sampling."""
        super().close()
        self._stop.set()
        self._thread.join()


def step_bytes(artifact: Path) -> int:
    """Bytes from the beginning of a store that a step reads."""
    table = table_from_dict(json.loads((artifact / STREAM_TABLE_FILE).read_text()), artifact / STREAM_FILE)
    return max(table.segments[number].offset + table.segments[number].padded for number in table.order)


def small_pages(size: int) -> mmap.mmap:
    """Memory in pages of 4 KiB, as readers have it that do not ask for huge ones."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return memory


def direct_gb_per_s(path: Path, size: int, threads: int, memory: Callable[[int], mmap.mmap] = transfer_memory) -> float:
    """What threads reach that read a file in pieces of a segment past the page cache, and do nothing else."""
    count, lock, places = DIRECT_PASSES * (size // SEGMENT_BYTES), threading.Lock(), iter(range(1 << 40))
    file = os.open(path, os.O_RDONLY | os.O_DIRECT)

    def read() -> None:
        buffer = memoryview(memory(SEGMENT_BYTES))
        while True:
            with lock:
                place = next(places)
            if place >= count:
                return
            os.preadv(file, [buffer], place % (size // SEGMENT_BYTES) * SEGMENT_BYTES)

    started = time.perf_counter()
    readers = [threading.Thread(target=read) for _ in range(threads)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    os.close(file)
    return count * SEGMENT_BYTES / (time.perf_counter() - started) / 1e9


def make_artifacts(
    model: Path, names: list[str], scratch: Path, work: Workload, rates: Rates
) -> tuple[dict[str, Path], dict[str, dict[str, Any]]]:
    """An artifact with all weights in memory, and one for each limit, of every pipeline; and the plan of each."""
    made: dict[str, Path] = {}
    planned: dict[str, dict[str, Any]] = {}
    for pipeline in names:
        text, limits = PIPELINES[pipeline]
        started = time.perf_counter()
        optimized = jettison.optimize(model, text, target="torch", dtype="bfloat16")
        made[pipeline] = optimized.save_pretrained(scratch / pipeline)
        del optimized
        print(pipeline, f"{time.perf_counter() - started:.1f} s", flush=True)
        for limit in limits:
            name = f"{pipeline} {limit} MB"
            placed = jettison.place(
                made[pipeline],
                limit * 1_000_000,
                context=work.context,
                prompt=work.prompt,
                reserve=rates.process_bytes,
            )
            made[name] = placed.save_pretrained(scratch / name.replace(" ", "-"))
            planned[name] = predicted(made[name], work, rates)
            print(name, planned[name], flush=True)
    return made, planned


def predicted(artifact: Path, work: Workload, rates: Rates) -> dict[str, Any]:
    """What `jettison plan` says of an artifact."""
    program, target = open_program(artifact, "", None, "bfloat16")
    found = plan(program, target, Wanted(context=work.context, prompt=work.prompt), rates)
    return {
        "predicted_ms_per_token": round(found["predicted_ms_per_token"], 1),
        "bound_by": found["bound_by"],
        "pinned_bytes": found["placement"]["pinned"]["bytes"],
        "ring_bytes": found["placement"]["ring_bytes"],
    }


def measure(
    contenders: list[Sampler],
    streamed: dict[str, Path],
    planned: dict[str, dict[str, Any]],
    prompt: int,
    new: int,
    rounds: int,
) -> dict[str, Any]:
    """Medians by contender; the first round warms up."""
    sizes = {name: step_bytes(artifact) for name, artifact in streamed.items()}
    answers: dict[str, list[dict[str, Any]]] = {each.name: [] for each in contenders}
    direct: dict[str, list[float]] = {name: [] for name in streamed}
    small: dict[str, list[float]] = {name: [] for name in streamed}
    for number in range(1 + rounds):
        for each in contenders:
            # Whoever reads first warms what caches the disk beneath this machine.
            for is_direct in (True, False) if number % 2 else (False, True):
                if not is_direct:
                    answers[each.name].append(each.ask(1, prompt, new))
                elif each.name in streamed:
                    store = streamed[each.name] / STREAM_FILE
                    direct[each.name].append(direct_gb_per_s(store, sizes[each.name], DIRECT_THREADS))
                    small[each.name].append(direct_gb_per_s(store, sizes[each.name], DIRECT_THREADS, small_pages))
            print(number, each.name, statistics.median(answers[each.name][-1]["step_seconds"]), flush=True)
    figures: dict[str, Any] = {}
    for each in contenders:
        counted = answers[each.name][1:]
        seconds = [statistics.median(answer["step_seconds"]) for answer in counted]
        figures[each.name] = {
            **each.about,
            "seconds_per_token": round(statistics.median(seconds), 4),
            "seconds_per_token_range": [round(min(seconds), 4), round(max(seconds), 4)],
            "round_seconds_per_token": [round(each, 4) for each in seconds],
            "prefill_seconds": round(statistics.median(answer["prefill_seconds"] for answer in counted), 3),
            "load_seconds": each.load_seconds,
            "rss_peak_bytes": each.peaks["VmRSS"],
            "anon_peak_bytes": each.peaks["RssAnon"],
        }
        if each.name in streamed:
            error = planned[each.name]["predicted_ms_per_token"] / 1e3 / statistics.median(seconds) - 1
            figures[each.name] |= {**planned[each.name], "prediction_error": round(error, 3)}
            stream = {
                key: round(statistics.median(answer[key] for answer in counted), 4)
                for key in ("read_gb_per_s", "overlap", "read_bytes_per_step", "waiting_seconds_per_step")
            }
            plain = statistics.median(direct[each.name][1:])
            resident = answers[each.name.rpartition(" ")[0].rpartition(" ")[0]]
            figures[each.name] |= {
                **stream,
                "direct_gb_per_s": round(plain, 3),
                "small_page_gb_per_s": round(statistics.median(small[each.name][1:]), 3),
                "bandwidth_share": round(stream["read_gb_per_s"] / plain, 3),
                "step_gb_per_s": round(stream["read_bytes_per_step"] / statistics.median(seconds) / 1e9, 3),
                "same_tokens": all(answer["tokens"] == resident[0]["tokens"] for answer in answers[each.name]),
            }
    return figures


def reached_byte_ratios(figures: dict[str, Any]) -> dict[str, float]:
    """Of each two that stream, one with fewer bytes: how much faster it is over how much less it reads, by rounds."""
    streamed = [name for name in figures if "read_bytes_per_step" in figures[name]]
    found = {}
    for more in streamed:
        for less in streamed[streamed.index(more) + 1 :]:
            if more.split()[0] == less.split()[0]:
                continue  # other limits, not other bytes
            rounds = zip(*(figures[name]["round_seconds_per_token"] for name in (more, less)), strict=True)
            faster = statistics.median(long / short for long, short in rounds)
            fewer = figures[more]["read_bytes_per_step"] / figures[less]["read_bytes_per_step"]
            found[f"{more} to {less}"] = round(faster / fewer, 3)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--layers", type=int, default=16, help="of the random model")
    parser.add_argument("--only", nargs="+", choices=PIPELINES, default=list(PIPELINES))
    parser.add_argument("--accelerate", metavar="PYTHON")
    parser.add_argument("--airllm", metavar="PYTHON")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prompt", type=int, default=32)
    parser.add_argument("--new", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    before = environment()
    with tempfile.TemporaryDirectory(prefix="jettison-bench-") as folder:
        scratch = Path(folder)
        model = arguments.model or scratch / "model"
        if arguments.model is None:
            make_llama(model, arguments.layers)
            for name in ("tokenizer.json", "tokenizer_config.json"):  # AirLLM opens no folder without
                shutil.copy(TOKENIZER / name, model)
        threads = arguments.threads
        torch.set_num_threads(threads)
        rates = machine_rates(scratch, remeasure=True)
        work = Workload(1, arguments.prompt + arguments.new + 8, arguments.prompt)
        artifacts, planned = make_artifacts(model, arguments.only, scratch, work, rates)
        contenders = [
            Sampler(name, sys.executable, "run_streamed.py", str(path), threads) for name, path in artifacts.items()
        ]
        for name, python in (("accelerate", arguments.accelerate), ("airllm", arguments.airllm)):
            if python:
                contenders.append(Sampler(name, python, f"run_{name}.py", str(model), threads))
        streamed = {name: artifacts[name] for name in planned}
        figures = measure(contenders, streamed, planned, arguments.prompt, arguments.new, arguments.rounds)
        for name in streamed:
            disk = replace(rates, disk=figures[name]["direct_gb_per_s"] * 1e9)
            again = predicted(artifacts[name], work, disk)["predicted_ms_per_token"] / 1e3
            error = again / figures[name]["seconds_per_token"] - 1
            figures[name]["prediction_error_at_direct_rate"] = round(error, 3)
        for each in contenders:
            each.close()
    settings = {"threads": threads, "prompt": arguments.prompt, "new_tokens": arguments.new}
    ratios = {"reached_byte_ratios": reached_byte_ratios(figures)}
    print(write("offload", {**settings, "readers": READERS, "rates": rates.as_dict(), **figures, **ratios}, before))


if __name__ == "__main__":
    main()
