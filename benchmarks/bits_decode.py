"""Decode on a CPU with the weights in 2, 4 and 8 bits and in nf4, beside llama.cpp's Q4_0, in interleaved rounds.

    python benchmarks/bits_decode.py [--model HF_FOLDER] [--llama-cpp PYTHON MODEL.gguf] [--prompt N] [--rounds N]

Embedding and head are quantised and counted as the rest is. Contenders, their set-up and the random model of the shape
of Llama-3.2-1B are those of `cpu_decode.py`. Writes benchmarks/results/bits_decode.json.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from cpu_decode import Contender, rounds
from random_models import make_llama
from record import environment, write

PIPELINES = {
    "int2": "quantize-weights{bits=2,group=128}",
    "int4": "quantize-weights{bits=4,group=128}",
    "int8": "quantize-weights{bits=8,group=128}",
    "nf4": "quantize-weights{format=nf4{group=64,double=true}}",
}
WITHIN = {"int2": 1.0, "int8": 1.9}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--llama-cpp", nargs=2, metavar=("PYTHON", "GGUF"))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    before, cores = environment(), torch.get_num_threads()
    with tempfile.TemporaryDirectory(prefix="jettison-bench-") as scratch:
        model = arguments.model or Path(scratch) / "model"
        if arguments.model is None:
            make_llama(model, 16)
        plan = []
        for name, pipeline in PIPELINES.items():
            out = Path(scratch) / name
            command = ["optimize", str(model), "--passes", pipeline, "--out", str(out)]
            subprocess.run([sys.executable, "-m", "jettison", *command], check=True, stdout=subprocess.DEVNULL)
            plan.append((name, sys.executable, "run_jettison.py", str(out)))
        if arguments.llama_cpp:
            plan.append(("llama.cpp Q4_0", arguments.llama_cpp[0], "run_llama_cpp.py", arguments.llama_cpp[1]))
        contenders = [Contender(*each, cores) for each in plan]
        figures = rounds(contenders, 1, arguments.prompt, arguments.new, arguments.rounds)
        about = {each.name: {**each.about, **each.memory()} for each in contenders}
        for each in contenders:
            each.close()
    over_int4 = {name: round(figures[name]["decode_ms"] / figures["int4"]["decode_ms"], 3) for name in about}
    limits = {name: {"limit": limit, "met": over_int4[name] < limit} for name, limit in WITHIN.items()}
    document = {"pipelines": PIPELINES, "prompt": arguments.prompt, "contenders": about, "decode": figures,
                "decode_ms_over_int4": over_int4, "limits_over_int4": limits}  # fmt: skip
    print(write("bits_decode", document, before))


if __name__ == "__main__":
    main()
