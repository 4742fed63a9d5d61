"""Where the time of a decode step and of a prefill goes, by operator of an ONNX artifact.

    python benchmarks/operator_profile.py ARTIFACT_FOLDER [--prompts 128 512 2048] [--new 12]

Prints JSON: for every prompt length the median decode step and the prefill, as ONNX Runtime's profiler saw them.
`benchmarks/cpu_decode.py` writes the same into its result.
"""

from __future__ import annotations

import argparse
import collections
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import onnxruntime
from peers.worker import prompt_tokens

import jettison
from jettison.runtime import onnx_executor

# Share of a run that an operator needs to be named.
_SHOWN = 0.002


def profiled_run(artifact: str, prompt: int, new: int) -> dict[str, Any]:
    """Milliseconds by operator of the prefill and of the median decode step, batch 1."""
    opened: list[onnxruntime.InferenceSession] = []
    open_session = onnx_executor.open_session

    def open_profiled(path: Path, options: Any) -> Any:
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / path.name)
        opened.append(open_session(path, options))
        return opened[-1]

    with tempfile.TemporaryDirectory(prefix="jettison-profile-") as folder:
        onnx_executor.open_session = open_profiled
        try:
            session = jettison.load(artifact).session(1, prompt + new)
        finally:
            onnx_executor.open_session = open_session
        session.prefill([prompt_tokens(prompt)])
        for token in prompt_tokens(new, seed=1):
            session.decode([token])
        events = [event for each in opened for event in json.loads(Path(each.end_profiling()).read_text())]
    runs = sorted((event for event in events if event.get("name") == "model_run"), key=lambda run: run["ts"])
    kernels = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("kernel_time")]
    prefill, *steps = (_by_operator(run, kernels) for run in runs)
    median = statistics.median_low(step["run_ms"] for step in steps)
    return {"prefill": prefill, "decode": next(step for step in steps if step["run_ms"] == median)}


def _by_operator(run: dict[str, Any], kernels: list[dict[str, Any]]) -> dict[str, Any]:
    """Times of one call of the graph; what no kernel spent is the runtime's own."""
    inside = [event for event in kernels if run["ts"] <= event["ts"] <= run["ts"] + run["dur"]]
    spent: dict[str, dict[str, Any]] = collections.defaultdict(lambda: {"calls": 0, "ms": 0.0})
    for event in inside:
        spent[event["args"]["op_name"]]["calls"] += 1
        spent[event["args"]["op_name"]]["ms"] += event["dur"] / 1e3
    operators = {
        name: {"calls": each["calls"], "ms": round(each["ms"], 3)}
        for name, each in sorted(spent.items(), key=lambda item: -item[1]["ms"])
        if each["ms"] >= _SHOWN * run["dur"] / 1e3
    }
    total = sum(each["ms"] for each in spent.values())
    return {
        "run_ms": round(run["dur"] / 1e3, 3),
        "operators": operators,
        "other_operators_ms": round(total - sum(each["ms"] for each in operators.values()), 3),
        "between_operators_ms": round(run["dur"] / 1e3 - total, 3),
    }


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--new", type=int, default=12)
    arguments = parser.parse_args()
    print(json.dumps({str(prompt): profiled_run(arguments.artifact, prompt, arguments.new)
                      for prompt in arguments.prompts}, indent=2))  # fmt: skip


if __name__ == "__main__":
    main()
