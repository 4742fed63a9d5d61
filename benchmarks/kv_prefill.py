"""Working memory of a long prompt: what a process has allocated at the peak of `prefill` beyond what it had before.

    python benchmarks/kv_prefill.py [--tokens 16384] [--shapes half one]

Random weights, ONNX target, one process for each policy. Beside the peak: the bytes that the caches of all tokens take
while the prompt runs, and the bytes that the session holds afterwards. Writes benchmarks/results/kv_prefill.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from kv_speed import CONTEXT, SHAPES
from random_models import make_llama
from record import environment, write

import jettison

POLICIES = {
    "half": ("snapkv{budget=1024}", "h2o{budget=1024}", "kivi{bits=2}"),
    "one": ("snapkv{budget=1024}", "h2o{budget=1024}"),
}


def peak_bytes() -> int:
    """The most resident memory of this process since it was last forgotten."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmHWM"].split()[0]) * 1024


def run_one(artifact: str, tokens: int) -> None:
    """Print the figures of one artifact."""
    model = jettison.load(artifact)
    session = model.session(1, tokens + 256)
    session.prefill([[7] * 64])
    session = model.session(1, tokens + 256)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    Path("/proc/self/clear_refs").write_text("5")
    start = time.perf_counter()
    session.prefill([[(7 * index) % 1000 for index in range(tokens)]])
    seconds = time.perf_counter() - start
    most = peak_bytes()
    whole = sum(
        tokens * 4 * state.shape[1] * state.shape[3]
        for name, state in model.executor.states.items()
        if name.endswith((".key", ".value"))
    )
    print(json.dumps({
        "working_bytes": most - resident, "cache_bytes_of_all_tokens": whole, "state_bytes": session.state_bytes,
        "seconds": round(seconds, 1),
    }))  # fmt: skip


def main() -> None:
    """Measure each policy in a process of its own, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--shapes", nargs="+", choices=list(POLICIES), default=list(POLICIES))
    parser.add_argument("--run", metavar="ARTIFACT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_one(arguments.run, arguments.tokens)
        return
    before = environment()
    figures: dict[str, dict[str, object]] = {}
    for name in arguments.shapes:
        shape = SHAPES[name]
        with tempfile.TemporaryDirectory(prefix="jettison-bench-") as folder:
            make_llama(Path(folder) / "model", shape.layers, max_position_embeddings=CONTEXT, **shape.sizes)
            for policy in POLICIES[name]:
                artifact = Path(folder) / "artifact"
                pipeline = f"{shape.weights},cache-kv{{policy={policy}}}"
                jettison.optimize(Path(folder) / "model", pipeline).save_pretrained(artifact, overwrite=True)
                command = [sys.executable, __file__, "--tokens", str(arguments.tokens), "--run", str(artifact)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                figures.setdefault(shape.about, {})[policy] = json.loads(done.stdout.splitlines()[-1])
                print(shape.about, policy, done.stdout.strip(), flush=True)
    print(write("kv_prefill", {"tokens": arguments.tokens, **figures}, before))


if __name__ == "__main__":
    main()
