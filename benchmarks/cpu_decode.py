"""Prefill and decode on a CPU beside llama.cpp, ONNX Runtime GenAI and transformers, in interleaved rounds.

    python benchmarks/cpu_decode.py --model HF_FOLDER \
        --llama-cpp PYTHON MODEL.gguf --genai PYTHON FOLDER --transformers

Each contender runs in a process of its own and is asked in turn, so that all meet the same machine; figures are medians
over the rounds. Peers are optional. To set them up, each in a virtual environment of its own:

    llama.cpp   pip install llama-cpp-python gguf safetensors torch; python benchmarks/peers/make_gguf.py FOLDER OUT
                (built for the machine: CMAKE_ARGS="-DGGML_NATIVE=ON")
    GenAI       pip install onnxruntime-genai; python -m onnxruntime_genai.models.builder -i FOLDER -o OUT -p int4
                -e cpu -c CACHE --extra_options block_size=128 accuracy_level=4

Without --model, a random model of the shape of Llama-3.2-1B is made: speed does not depend on the values of weights.
Writes benchmarks/results/cpu_decode.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from random_models import make_llama
from record import environment, write

PEERS = Path(__file__).resolve().parent / "peers"
PIPELINE = "quantize-weights{bits=4,group=128}"


class Contender:
    """A worker process; see `peers/worker.py`."""

    def __init__(self, name: str, python: str, script: str, model: str, threads: int) -> None:
        self.name = name
        command = [python, str(PEERS / script), model, str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        started = time.perf_counter()
        self.about = self._answer()
        self.load_seconds = round(time.perf_counter() - started, 2)
        self.answers: list[dict[str, Any]] = []

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} died: run its command by hand: {self.process.args}")
        return json.loads(line)

    def ask(self, batch: int, prompt: int, new: int) -> dict[str, Any]:
        """One prefill and `new` decode steps."""
        assert self.process.stdin is not None
        print(json.dumps({"batch": batch, "prompt": prompt, "new": new}), file=self.process.stdin, flush=True)
        return self._answer()

    def memory(self) -> dict[str, int]:
        """Resident and anonymous bytes now."""
        lines = Path(f"/proc/{self.process.pid}/status").read_text().splitlines()
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith(("VmRSS", "Rss"))}
        return {"rss_bytes": found["VmRSS"], "anon_bytes": found["RssAnon"]}

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def read_bandwidth(megabytes: int = 1024) -> float:
    """Best of nine sums over a buffer that no cache holds, with every core, in GB/s."""
    buffer = torch.ones(megabytes * 2**18)
    best = min(_seconds(buffer.sum) for _ in range(9))
    return buffer.nbytes / best / 1e9


def _seconds(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def rounds(contenders: list[Contender], batch: int, prompt: int, new: int, number: int) -> dict[str, Any]:
    """Medians by contender; the first round warms up."""
    answers: dict[str, list[dict[str, Any]]] = {each.name: [] for each in contenders}
    bandwidths = []
    for _ in range(1 + number):
        bandwidths.append(read_bandwidth())
        for each in contenders:
            answers[each.name].append(each.ask(batch, prompt, new))
    figures: dict[str, Any] = {"read_gb_per_s": round(statistics.median(bandwidths), 1)}
    for each in contenders:
        counted = answers[each.name][1:]
        step = statistics.median(statistics.median(answer["step_seconds"]) for answer in counted)
        prefill = statistics.median(answer["prefill_seconds"] for answer in counted)
        figures[each.name] = {
            "prefill_tokens_per_s": round(batch * prompt / prefill, 1),
            "decode_ms": round(1e3 * step, 2),
            "decode_tokens_per_s": round(batch / step, 2),
            "weight_gb_per_s": round(each.about["weight_bytes"] / step / 1e9, 1),
        }
        print(f"batch {batch} prompt {prompt} {each.name:24} {figures[each.name]}", flush=True)
    return figures


def artifacts(arguments: argparse.Namespace, scratch: Path) -> dict[str, Path]:
    """The model and the artifacts made of it, by contender."""
    model = Path(arguments.model) if arguments.model else scratch / "model"
    if not arguments.model:
        make_llama(model, 16)
    made = {"model": model}
    for form in ("exact", "fast") if arguments.fast else ("exact",):
        name = "jettison" if form == "exact" else "jettison prefill=fast"
        made[name] = scratch / form
        command = ["optimize", str(model), "--passes", PIPELINE, "--prefill", form, "--out", str(made[name])]
        subprocess.run([sys.executable, "-m", "jettison", *command], check=True, stdout=subprocess.DEVNULL)
    return made


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--llama-cpp", nargs=2, metavar=("PYTHON", "GGUF"))
    parser.add_argument("--genai", nargs=2, metavar=("PYTHON", "FOLDER"))
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--fast", action="store_true", help="also an artifact with prefill=fast")
    parser.add_argument("--prompts", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    before, cores = environment(), torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="jettison-bench-") as folder:
        made = artifacts(arguments, Path(folder))
        own = [(name, sys.executable, "run_jettison.py", str(path)) for name, path in made.items() if name != "model"]
        plan = list(own)
        if arguments.llama_cpp:
            plan.append(("llama.cpp Q4_0", arguments.llama_cpp[0], "run_llama_cpp.py", arguments.llama_cpp[1]))
        if arguments.genai:
            plan.append(("GenAI int4 block 128", arguments.genai[0], "run_genai.py", arguments.genai[1]))
        if arguments.transformers:
            plan.append(("transformers bf16", sys.executable, "run_transformers.py", str(made["model"])))
        contenders = [Contender(*each, cores) for each in plan]
        by_prompt = {
            str(prompt): rounds(contenders, 1, prompt, arguments.new, arguments.rounds) for prompt in arguments.prompts
        }
        about = {each.name: {**each.about, "load_seconds": each.load_seconds, **each.memory()} for each in contenders}
        for each in contenders[len(own) :]:
            each.close()
        by_batch = {
            str(batch): rounds(contenders[: len(own)], batch, 128, arguments.new, 2) for batch in arguments.batches
        }
        for each in contenders[: len(own)]:
            each.close()
        profile = [sys.executable, str(PEERS.parent / "operator_profile.py"), str(made["jettison"]), "--prompts"]
        shown = subprocess.run([*profile, *map(str, arguments.prompts)], check=True, stdout=subprocess.PIPE)
        by_threads = {}
        for threads in [0, *arguments.threads]:
            each = Contender(*own[0], threads)
            by_threads[str(threads or "default")] = rounds([each], 1, 128, arguments.new, 3)[each.name]
            each.close()
    figures = {"pipeline": PIPELINE, "threads_of_peers": cores, "contenders": about, "batch_1_by_prompt": by_prompt,
               "prompt_128_by_batch": by_batch, "prompt_128_by_threads": by_threads,
               "jettison_by_operator": json.loads(shown.stdout)}  # fmt: skip
    print(write("cpu_decode", figures, before))


if __name__ == "__main__":
    main()
