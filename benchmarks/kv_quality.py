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
import math
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
    "sinks{{budget={budget},evict=always,positions=cache}}",
    "mikv{{budget={budget}}}",
)
# What compresses every token, and what drops and then compresses down to a quarter of the prompt's bytes.
STORING = (
    "int8", "int4", "kivi{bits=4}", "kivi{bits=2}", "kivi{bits=2,residual=64}", "xquant{bits=8}",
    "xquant{bits=8,group=128}", "xquant{bits=4}", "xquant{bits=4,group=128}", "xquant{bits=2}",
)  # fmt: skip
COMPOSED = (
    "snapkv{budget=512}+kivi{bits=4,residual=32}",
    "snapkv{budget=544,window=16}+kivi{bits=4,residual=32}",
    "snapkv{budget=614}+kivi{bits=4,residual=32}",
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


def share_in_16_bits(model: OptimizedModel, prompt: list[int]) -> float:
    """Bytes held after a prompt over those of all its keys and values, every uncompressed number counted as 16 bits."""
    session = model.session(1, WINDOW)
    session.prefill([prompt])
    slots = {name: taken[0] for name, (_, taken) in session.counted().items()} | {"capacity": len(prompt)}
    held = whole = 0
    for name, state in model.executor.states.items():
        sizes = [slots.get(size, 1) if isinstance(size, str) else size for size in state.shape]
        held += math.prod(sizes) * min(2, state.dtype.itemsize)
        if name.endswith((".key", ".value")):
            whole += math.prod(size for size in state.shape if isinstance(size, int)) * len(prompt) * 2
    return held / whole


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
    texts += [(None, policy) for policy in (*STORING, *COMPOSED)]
    for budget, policy in texts:
        model = jettison.optimize(folder, f"cache-kv{{policy={policy}}}", target="torch")
        found = evaluate(model, windows=chosen, reference=reference, prefill=PREFILL).as_dict()
        share = round(share_in_16_bits(model, chosen[0][:PREFILL]), 4)
        rows.append({"policy": policy, "budget": budget, "share_in_16_bits": share, **found,
                     "recall_nll": recall_nll(model, items, tail)})  # fmt: skip
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
        figures["kl_over_best_press_at_a_quarter"] = ratios_at_a_quarter(figures)
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


def ratios_at_a_quarter(figures: dict[str, Any]) -> dict[str, float]:
    """KL of each composition that holds at most a quarter of the bytes, over that of the best press with a quarter."""
    best = min(row["kl"] for row in figures["kvpress"]["rows"] if row["kept_tokens"] == PREFILL // 4)
    return {
        row["policy"]: round(row["kl"] / best, 3)
        for row in figures["jettison"]
        if "+" in row["policy"] and row["share_in_16_bits"] <= 0.25
    }


def plot(figures: dict[str, Any]) -> Path:
    """KL against state bytes, a panel for each model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chart, panels = pyplot.subplots(1, len(figures), figsize=(6.5 * len(figures), 4.5), squeeze=False)
    seen: dict[str, int] = {}
    handles: dict[str, Any] = {}
    for axes, (name, found) in zip(panels[0], figures.items(), strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        whole = max(row["state_bytes"] for row in found["jettison"])
        for row in found["jettison"]:
            if row["state_bytes"] == whole:  # `full`, and what does not apply to the model
                continue
            label = row["policy"].replace(f"budget={row['budget']}", "").replace("{}", "").replace("{,", "{")
            label = "snapkv+kivi{bits=4,residual=32}" if "+" in label else label
            lines.setdefault(label, []).append((row["state_bytes"] / 1e6, row["kl"]))
        for row in found.get("kvpress", {}).get("rows", []):
            kept = row["kept_tokens"]
            if kept < PREFILL:  # their bytes are of what was kept; ours have room for the tokens behind it too
                state_bytes = row["state_bytes"] * (kept + WINDOW - PREFILL) / kept
                lines.setdefault(f"kvpress {row['press']}", []).append((state_bytes / 1e6, row["kl"]))
        for label, points in lines.items():
            style = "--" if label.startswith("kvpress") else "-"
            index = seen.setdefault(label, len(seen))  # one look in every panel
            colour, marker = pyplot.get_cmap("tab10")(index % 10), "os^"[index // 10]
            look = {"color": colour, "marker": marker, "markersize": 4, "label": label}
            handles[label] = axes.plot(*zip(*sorted(points), strict=True), style, **look)[0]
        axes.set(title=name, xlabel="state bytes of a sequence (MB)", ylabel="KL (nats per token)", yscale="log")
    panels[0][-1].legend(handles=handles.values(), fontsize=7, loc="center left", bbox_to_anchor=(1.02, 0.5))
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
