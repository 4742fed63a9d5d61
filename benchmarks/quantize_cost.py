"""What the methods of `quantize-weights` cost on the shape of Llama-3.2-1B: seconds, and memory against the folder.

    python benchmarks/quantize_cost.py --calibration FILE [--methods rtn hqq awq gptq] [--layers N]

`optimize` runs as a user runs it, in a process of its own, with the calibration that it has by default: 64 windows of
512 tokens, of FILE here. The weights are random bf16 (the cost does not depend on their values), the tokenizer that of
the bundled model. Rows that are in the JSON stay there unless their method is asked for. Writes
benchmarks/results/quantize_cost.json.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from compile_cost import ROOT, run
from random_models import make_llama
from record import RESULTS, environment, write

TOKENIZER = ROOT / "examples" / "models" / "tiny-llama"
LIMITS = {"rtn": 60.0, "gptq": 25 * 60.0}
PEAK_SHARE = 1.6


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--methods", nargs="+", default=["rtn", "hqq", "awq", "gptq"])
    parser.add_argument("--layers", type=int, default=16)
    arguments = parser.parse_args()
    before = environment()
    path = RESULTS / "quantize_cost.json"
    rows = json.loads(path.read_text())["methods"] if path.is_file() else {}
    with tempfile.TemporaryDirectory(prefix="jettison-bench-") as scratch:
        model = Path(scratch) / "model"
        make_llama(model, arguments.layers)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TOKENIZER / name, model)
        folder_bytes = sum(each.stat().st_size for each in model.iterdir())
        for method in arguments.methods:
            pipeline = f"quantize-weights{{bits=4,group=128,method={method}}}"
            options = () if method in ("rtn", "hqq") else ("--calibration", str(arguments.calibration))
            out = Path(scratch) / method
            row = {"pipeline": pipeline, "folder_bytes": folder_bytes, **run(model, out, pipeline, *options)}
            shutil.rmtree(out)
            row["peak_anon_share_of_folder"] = round(row["peak_anon_bytes"] / folder_bytes, 3)
            if method in LIMITS:
                row["limits"] = {"seconds": LIMITS[method], "peak_anon_share_of_folder": PEAK_SHARE}
            rows[method] = {"layers": arguments.layers, **row}
            print(json.dumps({method: rows[method]}, indent=2), flush=True)
            write("quantize_cost", {"methods": rows}, before)
    print(path)


if __name__ == "__main__":
    main()
