"""What KV-cache policies cost in KL, beside kvpress on the same tokens and budgets.

    python benchmarks/kv_quality.py --text FILE [--kvpress PYTHON]

Windows of 1024 tokens: 768 go through `prefill`, the rest is decoded and scored against the eager model with a full
cache. Recall: the likelihood of a name that was planted early (`recall_task.py`), the question decoded after the prompt
was dropped from. PYTHON is that of a virtual environment with kvpress, see `peers/run_kvpress.py`; without it the rows
of kvpress are missing. Writes benchmarks/results/kv_quality.json, and a plot of KL against state bytes beside it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from recall_task import QUESTION, make_recall
from record import RESULTS, environment, write

import jettison
from jettison.evaluate import EagerReference, evaluate
from jettison.optimized_model import OptimizedModel
from jettison.sample_text import cut_windows, text_tokens

MODELS = Path(__file__).resolve().parent.parent / "examples" / "models"
PREFILL, WINDOW = 768, 1024
RATIOS = (0.5, 0.25, 0.125)
POLICIES = (
    "sinks{{budget={budget}}}",
    "h2o{{budget={budget}}}",
    "h2o{{budget={budget},age=true}}",
    "snapkv{{budget={budget}}}",
    "sinks{{budget={budget},evict=always}}",
    "h2o{{budget={budget},evict=always}}",
    "snapkv{{budget={budget},evict=always}}",
)
RECALL_ITEMS, RECALL_TOKENS = 8, 900
# Our name of a method by that of the press.
PRESSES = {"StreamingLLM": "sinks", "ObservedAttention": "h2o", "SnapKV": "snapkv", "Knorm": None}


def recall_nll(model: OptimizedModel, items: list[dict[str, list[int]]], tail: int) -> float:
    """Mean negative log-likelihood of the answers' tokens in nats; the last `tail` tokens of a prompt are decoded."""
    total, count = 0.0, 0
    for item in items:
        session = model.session(1, len(item["prompt"]) + len(item["answer"]))
        logits = session.prefill([item["prompt"][:-tail]])
        for token in item["prompt"][-tail:]:
            logits = session.decode([token])
        for token in item["answer"]:
            total -= float(logits[0].double().log_softmax(-1)[token])
            count += 1
            logits = session.decode([token])
    return total / count


def measure(folder: Path, text: str, windows: int, kvpress: str | None) -> dict[str, Any]:
    """Rows of one model."""
    full = jettison.optimize(folder, "cache-kv{policy=full}", target="torch")
    chosen = cut_windows(text_tokens(full.tokenizer, text), WINDOW)[:windows]
    items = make_recall(full.tokenizer.encode, text, items=RECALL_ITEMS, prompt_tokens=RECALL_TOKENS, seed=0)
    tail = len(full.tokenizer.encode(QUESTION))
    reference = EagerReference(folder)
    rows = []
    texts = [(None, "full")]
    texts += [
        (int(PREFILL * ratio), policy.format(budget=int(PREFILL * ratio))) for ratio in RATIOS for policy in POLICIES
    ]
    for budget, policy in texts:
        model = jettison.optimize(folder, f"cache-kv{{policy={policy}}}", target="torch")
        found = evaluate(model, windows=chosen, reference=reference, prefill=PREFILL).as_dict()
        rows.append({"policy": policy, "budget": budget, **found, "recall_nll": recall_nll(model, items, tail)})
        print(folder.name, rows[-1], flush=True)
    figures: dict[str, Any] = {"windows": len(chosen), "jettison": rows}
    if kvpress is not None:
        with tempfile.TemporaryDirectory() as scratch:
            given = {"windows": chosen, "prefill": PREFILL, "ratios": RATIOS, "recall": items, "recall_tail": tail}
            (Path(scratch) / "windows.json").write_text(json.dumps(given))
            script = Path(__file__).resolve().parent / "peers" / "run_kvpress.py"
            command = [kvpress, str(script), str(folder), "windows.json", "out.json"]
            subprocess.run(command, cwd=scratch, check=True, stdout=subprocess.DEVNULL)
            figures["kvpress"] = json.loads((Path(scratch) / "out.json").read_text())
        figures["kl_over_kvpress"] = ratios(figures)
    return figures


def ratios(figures: dict[str, Any]) -> dict[str, dict[str, float]]:
    """KL of each of our policies that drops after the prompt, over that of the same press with the same budget."""
    presses = {(PRESSES.get(row["press"]), row["kept_tokens"]): row["kl"] for row in figures["kvpress"]["rows"]}
    found: dict[str, dict[str, float]] = {}
    for row in figures["jettison"]:
        key = (row["policy"].partition("{")[0], row["budget"])
        if key in presses and "always" not in row["policy"]:
            name = row["policy"].replace(f"budget={row['budget']}", "")
            found.setdefault(name, {})[str(row["budget"])] = round(row["kl"] / presses[key], 3)
    return found


def plot(figures: dict[str, Any]) -> Path:
    """KL against state bytes, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, panels = pyplot.subplots(1, len(figures), figsize=(6 * len(figures), 4.5), squeeze=False)
    for axes, (name, found) in zip(panels[0], figures.items(), strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in found["jettison"]:
            if row["budget"] is not None:
                label = row["policy"].replace(f"budget={row['budget']}", "").replace("{}", "").replace("{,", "{")
                lines.setdefault(label, []).append((row["state_bytes"] / 1e6, row["kl"]))
        for row in found.get("kvpress", {}).get("rows", []):
            kept = row["kept_tokens"]
            if kept < PREFILL:  # their bytes are of what was kept; ours have room for the tokens behind it too
                state_bytes = row["state_bytes"] * (kept + WINDOW - PREFILL) / kept
                lines.setdefault(f"kvpress {row['press']}", []).append((state_bytes / 1e6, row["kl"]))
        for label, points in lines.items():
            style = "--" if label.startswith("kvpress") else "-"
            axes.plot(*zip(*sorted(points), strict=True), style, marker="o", markersize=3, label=label)
        axes.set(title=name, xlabel="state bytes of a sequence (MB)", ylabel="KL (nats per token)", yscale="log")
        axes.legend(fontsize=6)
    path = RESULTS / "kv_quality.png"
    chart.tight_layout()
    chart.savefig(path, dpi=120, metadata={"Software": None})
    return path


def main() -> None:
    """Measure, write, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--start", type=int, default=20_000, help="first character of the text")
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--kvpress", metavar="PYTHON")
    parser.add_argument("--models", nargs="+", default=["tiny-llama", "tiny-opt"])
    arguments = parser.parse_args()
    before = environment()
    text = Path(arguments.text).read_text()[arguments.start :]
    figures = {name: measure(MODELS / name, text, arguments.windows, arguments.kvpress) for name in arguments.models}
    print(write("kv_quality", figures, before))
    print(plot(figures))


if __name__ == "__main__":
    main()
