"""What loading an artifact takes: seconds, anonymous memory and the first token, plain and prepared, warm and cold.

    python benchmarks/load_cost.py --artifact FOLDER

Each load runs in a process of its own; figures are medians of five. Cold: the pages of the artifact and of the prepared
file are dropped before (posix_fadvise). The prepared form goes to a temporary cache. Writes
benchmarks/results/load_cost.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from record import environment, write

_LOAD = """
import json, sys, time
import onnxruntime, torch, jettison
def anonymous():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
model = jettison.load(sys.argv[1])
before, start = anonymous(), time.perf_counter()
is_prepared = model.executor.is_prepared
loaded, seconds = anonymous(), time.perf_counter() - start
session = model.session(1, 64)
session.prefill([[5] * 16])
print(json.dumps({"is_prepared": is_prepared, "load_seconds": seconds, "load_to_first_token_seconds":
    time.perf_counter() - start, "process_anon_bytes": loaded, "added_anon_bytes": loaded - before}))
"""


def drop_pages(folder: Path) -> None:
    """Ask the kernel to forget the cached pages of every file below a folder."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def loads(artifact: Path, cache: Path, *, is_cold: bool, number: int = 5) -> dict[str, Any]:
    """Medians over loads."""
    answers = []
    for _ in range(number):
        if is_cold:
            drop_pages(artifact)
            drop_pages(cache)
        done = subprocess.run([sys.executable, "-c", _LOAD, artifact], capture_output=True, text=True, check=True)
        answers.append(json.loads(done.stdout))
    return {key: round(statistics.median(answer[key] for answer in answers), 3) for key in answers[0]}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--artifact", required=True)
    artifact = Path(parser.parse_args().artifact)
    before = environment()
    with tempfile.TemporaryDirectory(prefix="jettison-bench-") as folder:
        os.environ["JETTISON_CACHE"] = folder
        cache = Path(folder)
        figures: dict[str, Any] = {"weight_file_bytes": (artifact / "model.onnx.data").stat().st_size}
        figures["plain"] = loads(artifact, cache, is_cold=False)
        figures["plain, cold"] = loads(artifact, cache, is_cold=True)
        started = time.perf_counter()
        command = [sys.executable, "-m", "jettison", "prepare", str(artifact), "--json"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        peak = 0
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            peak = max(peak, *(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon")), 0)
            time.sleep(0.01)
        assert process.stdout is not None, "piped"
        document = json.loads(process.stdout.read())
        figures["prepare"] = {
            "seconds": round(time.perf_counter() - started, 2),
            "peak_anon_bytes": peak,
            "file_bytes": document["bytes"],
        }
        figures["prepared"] = loads(artifact, cache, is_cold=False)
        figures["prepared, cold"] = loads(artifact, cache, is_cold=True)
    print(json.dumps(figures, indent=2))
    print(write("load_cost", figures, before))


if __name__ == "__main__":
    main()
