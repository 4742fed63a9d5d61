"""What `jettison optimize` costs on the shape of Llama-3.2-1B: seconds, and peak anonymous memory against the folder.

    python benchmarks/compile_cost.py [--layers 4 8 16] [--passes TEXT]

The largest number of layers is that of the model; the smaller ones show how the time grows. The weights are random bf16
(the cost does not depend on their values), in a temporary folder. The command runs in a process of its own; RssAnon is
sampled every 20 ms. Writes benchmarks/results/compile_cost.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from random_models import make_llama
from record import environment, write

ROOT = Path(__file__).resolve().parent.parent


def status_bytes(pid: int, key: str) -> int:
    """A line of /proc/PID/status in bytes; 0 once the process is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def run(model: Path, out: Path, passes: str, *options: str) -> dict[str, object]:
    """Optimise in a process of its own and watch it."""
    command = [sys.executable, "-m", "jettison", "optimize", str(model), "--passes", passes, "--out", str(out),
               "--json", *options]  # fmt: skip
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    peak_anon = peak_rss = 0
    while process.poll() is None:
        peak_anon = max(peak_anon, status_bytes(process.pid, "RssAnon"))
        peak_rss = max(peak_rss, status_bytes(process.pid, "VmHWM"))
        time.sleep(0.02)
    seconds = time.perf_counter() - started
    assert process.stdout is not None
    printed = json.loads(process.stdout.read())
    if process.returncode != 0:
        raise SystemExit(f"optimize failed with exit code {process.returncode}")
    report_seconds = printed["seconds"]
    of_passes = sum(record["seconds"] for record in printed["passes"])
    return {
        "seconds": round(seconds, 1),
        "seconds_by_step": {
            "capture, comparison with the eager model and raising": round(report_seconds - of_passes, 1),
            **{record["name"]: round(record["seconds"], 1) for record in printed["passes"]},
            "starting, ONNX export, writing and hashing": round(seconds - report_seconds, 1),
        },
        "peak_anon_bytes": peak_anon,
        "peak_rss_bytes": peak_rss,
        "artifact_bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
    }


def measure(layers: int, passes: str) -> dict[str, object]:
    """Make a model and optimise it."""
    with tempfile.TemporaryDirectory(prefix="jettison-bench-") as scratch:
        model = Path(scratch) / "model"
        make_llama(model, layers)
        folder_bytes = sum(path.stat().st_size for path in model.iterdir())
        figures = run(model, Path(scratch) / "out", passes)
    share = round(figures["peak_anon_bytes"] / folder_bytes, 3)  # type: ignore[operator]
    figures = {"layers": layers, "folder_bytes": folder_bytes, "peak_anon_share_of_folder": share, **figures}
    print(json.dumps(figures, indent=2), flush=True)
    return figures


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--passes", default="quantize-weights{bits=4,group=32}")
    arguments = parser.parse_args()
    before = environment()
    by_layers = [measure(layers, arguments.passes) for layers in sorted(arguments.layers)]
    figures: dict[str, object] = {"pipeline": arguments.passes, **by_layers[-1], "by_layers": by_layers[:-1]}
    print(write("compile_cost", figures, before))


if __name__ == "__main__":
    main()
