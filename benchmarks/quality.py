"""KL divergence and perplexity of every pipeline on a trained model and text it has not seen.

    python benchmarks/quality.py --text FILE [--model FOLDER]

Each pipeline is scored twice: whole windows, and windows of 512 tokens of which 256 are prefilled and the rest decoded
one by one. Writes benchmarks/results/quality.json.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from record import environment, write

import jettison
from jettison.evaluate import EagerReference, evaluate

ROOT = Path(__file__).resolve().parent.parent
PIPELINES = (
    "cache-kv{policy=full}",
    "merge-qkv-projections,cache-kv{policy=full}",
    "quantize-weights{bits=8,group=32},cache-kv{policy=full}",
    "quantize-weights{bits=4,group=32},cache-kv{policy=full}",
    "quantize-weights{bits=4,group=32,symmetric=true},cache-kv{policy=full}",
    "quantize-weights{bits=4,group=128},cache-kv{policy=full}",
    "cache-kv{policy=window{size=256}}",
)
# Also with prompts in 8-bit integers.
FAST_PREFILL = "quantize-weights{bits=4,group=32},cache-kv{policy=full}"


def main() -> None:
    """Score and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="a text file the model was not trained on")
    parser.add_argument("--model", default=str(ROOT / "examples" / "models" / "tiny-llama"))
    parser.add_argument("--targets", default="onnx,torch")
    parser.add_argument("--windows", type=int, default=None, help="score only the first windows' worth of text")
    arguments = parser.parse_args()
    before = environment()
    text = Path(arguments.text).read_text()
    if arguments.windows is not None:
        text = text[: arguments.windows * 4096]
    reference = EagerReference(arguments.model)
    rows = []
    for target in arguments.targets.split(","):
        fast = [(FAST_PREFILL, "fast")] if target == "onnx" else []
        for pipeline, form in [*((pipeline, "exact") for pipeline in PIPELINES), *fast]:
            model = jettison.optimize(arguments.model, pipeline, target=target, prefill=form)
            for context, prefill in ((None, None), (512, 256)):
                result = evaluate(model, text=text, reference=reference, context=context, prefill=prefill)
                row = {"target": target, "pipeline": model.report.pipeline, "prefill_form": form, "context": context,
                       "prefill": prefill}  # fmt: skip
                rows.append({**row, **result.as_dict()})
                print(rows[-1], flush=True)
    figures = {"model": Path(arguments.model).name, "text": Path(arguments.text).name, "rows": rows}
    print(write("quality", figures, before))


if __name__ == "__main__":
    main()
