"""What the weights of other quantisers cost in KL and bytes, beside our own `quantize-weights`, scored in one place.

    python benchmarks/weights_peers.py --text FILE --calibration FILE --scratch FOLDER [--llm-compressor PYTHON]
        [--nncf PYTHON] [--onnxruntime PYTHON] [--models FOLDER ...] [--encoder FOLDER]

Each PYTHON is that of a virtual environment with one tool; `peers/run_*.py` say how to make it, and what the settings
mean. They leave dequantised weights and byte counts in SCRATCH; a setting whose figures are there is not run again.
Every tool is given the same calibration windows. A decoder with the weights of a tool in fp32, its own where the tool
left them alone, is scored against the eager model as `jettison.evaluate` defines it. The encoder, a folder with
all-MiniLM-L6-v2, is scored on sentences of the text: the mean cosine between its embedding of a sentence and that of
the original, and the rank correlation (Spearman) of all pairs' similarities. Scores are remembered in SCRATCH too.
Writes benchmarks/results/weights_peers.json.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from record import environment, write
from safetensors.torch import load_file
from torch import Tensor

import jettison
from jettison.evaluate import EagerReference, evaluate
from jettison.sample_text import cut_windows

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "examples" / "models"
SCRIPTS = {"llm-compressor": "run_llm_compressor.py", "nncf": "run_nncf.py", "onnxruntime": "run_ort_quantizer.py"}
CALIBRATION_WINDOWS, CALIBRATION_TOKENS, ENCODER_TOKENS = 64, 512, 128
# AWQ of llm-compressor runs every parent module twenty times per window; a quarter of the windows keeps it in minutes.
AWQ_WINDOWS = 16
WINDOW = 1024
SENTENCES = 200
CACHE = "cache-kv{policy=full}"
HEAD = "lm_head.weight"
ENCODER = "all-MiniLM-L6-v2"
OURS = tuple(
    f"quantize-weights{{bits=4,group={group},symmetric={symmetric},skip='embed|lm_head'}},{CACHE}"
    for group in (32, 64, 128)
    for symmetric in ("false", "true")
)
Setting = dict[str, Any]


def llm_compressor_settings() -> list[Setting]:
    """Linears only unless `whole`; fp32 but for one in the dtype of the checkpoints."""

    def one(method: str, bits: int, group: int, symmetric: bool, **more: Any) -> Setting:
        kind = "sym" if symmetric else "asym"
        extra = "".join(f"-{value if isinstance(value, str) else key}" for key, value in more.items())
        name = f"{method}-w{bits}g{group}-{kind}{extra}"
        base = {"name": name, "method": method, "bits": bits, "group": group, "symmetric": symmetric}
        return {**base, "dtype": "float32", "whole": False, **more}

    rounded = [one("rtn", bits, 128, symmetric) for bits in (4, 3) for symmetric in (True, False)]
    gptq = [one("gptq", 4, 128, True), one("gptq", 3, 128, True), one("gptq", 4, 128, False)]
    gptq += [one("gptq", bits, 128, False, observer="mse") for bits in (4, 3)]
    gptq += [one("gptq", 4, 128, True, whole=True), one("gptq", 4, 32, True), one("gptq", 3, 128, False)]
    gptq += [one("gptq", 4, 128, True, dtype="bfloat16"), one("gptq", 4, 32, False)]
    return [*rounded, *gptq, one("awq", 4, 128, False, windows=AWQ_WINDOWS)]


def nncf_settings() -> list[Setting]:
    """Without and with data; `tables` say what becomes of the embedding and the head."""

    def one(mode: str, group: int, tables: str = "dense", **options: bool) -> Setting:
        name = "-".join([mode.replace("_", "-"), f"g{group}", *options, *([tables] if tables != "dense" else [])])
        return {"name": name, "mode": mode, "group": group, "tables": tables, "options": options}

    plain = [one(mode, group) for mode in ("int4_asym", "int4_sym") for group in (128, 64, 32)]
    with_data: list[Setting] = []
    for options in ({"gptq": True}, {"scale_estimation": True}, {"gptq": True, "scale_estimation": True}):
        with_data += [one(mode, 128, **options) for mode in ("int4_asym", "int4_sym", "int3_sym")]
    with_data += [one("int4_asym", 128, awq=True), one("int4_asym", 128, awq=True, scale_estimation=True)]
    with_data.append(one("int4_asym", 32, gptq=True))
    whole = [one("int4_asym", 128, "backup"), one("int4_asym", 128, "primary"), one("int4_sym", 128, "primary")]
    return [*plain, one("int3_sym", 128), one("int3_sym", 32), one("nf4", 64), *whole, *with_data]


def onnxruntime_settings() -> list[Setting]:
    """Its round to nearest (`default`), HQQ, k_quant, and the round to nearest of its copy of Neural Compressor."""

    def one(method: str, bits: int, group: int, symmetric: bool = False, whole: bool = False) -> Setting:
        name = f"{method}-w{bits}g{group}-{'sym' if symmetric else 'asym'}{'-whole' if whole else ''}"
        base = {"name": name, "method": method, "bits": bits, "group": group, "symmetric": symmetric}
        return {**base, "dtype": "float32", "whole": whole}

    found = []
    for group in (128, 64, 32):
        found += [one("default", 4, group, True), one("default", 4, group), one("hqq", 4, group)]
        found.append(one("k_quant", 4, group))
    found += [one("rtn", 4, 128, True), one("default", 2, 32), one("hqq", 2, 32), one("default", 3, 128)]
    return [*found, one("default", 4, 128, whole=True), one("hqq", 4, 128, whole=True)]


SETTINGS: dict[str, Callable[[], list[Setting]]] = {
    "llm-compressor": llm_compressor_settings,
    "nncf": nncf_settings,
    "onnxruntime": onnxruntime_settings,
}


def calibration_windows(folder: Path, text: str, is_encoder: bool) -> list[list[int]]:
    """Windows of equal length, spread evenly over the text; those of an encoder begin and end with its tokens."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    length = ENCODER_TOKENS - 2 if is_encoder else CALIBRATION_TOKENS
    windows = cut_windows(tokens, length)
    chosen = [windows[index * len(windows) // CALIBRATION_WINDOWS] for index in range(CALIBRATION_WINDOWS)]
    if is_encoder:
        return [[tokenizer.cls_token_id, *window, tokenizer.sep_token_id] for window in chosen]
    return chosen


def run_peer(tool: str, python: str, folder: Path, windows: list[list[int]], scratch: Path) -> None:
    """Let a tool do the settings whose figures are not there yet, a process for each number of windows."""
    out = scratch / folder.name / tool
    out.mkdir(parents=True, exist_ok=True)
    todo = [each for each in SETTINGS[tool]() if not (out / f"{each['name']}.json").is_file()]
    for count in sorted({each.get("windows", len(windows)) for each in todo}, reverse=True):
        settings = [each for each in todo if each.get("windows", len(windows)) == count]
        spread = [windows[index * len(windows) // count] for index in range(count)]
        request = out / "request.txt"
        request.write_text(json.dumps({"settings": settings, "windows": spread}))
        script = ROOT / "benchmarks" / "peers" / SCRIPTS[tool]
        with (out / "log.txt").open("a") as log:
            command = [python, str(script), str(folder), str(request), str(out)]
            subprocess.run(command, check=True, stdout=log, stderr=log)


class DecoderScorer:
    """KL divergence and perplexity of a decoder with other weights, as `jettison.evaluate` defines them.

    Both sides are the eager model; a captured one would be captured again for every row.

    Args:
        folder: Hugging Face folder.
        text: Unseen text.
        windows: How many windows of it are scored.
    """

    def __init__(self, folder: Path, text: str, windows: int) -> None:
        self.folder = folder
        self.key = f"{windows} windows"
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        self.windows = cut_windows(tokens, WINDOW)[:windows]
        self.original = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}

    @cached_property
    def expected(self) -> list[Tensor]:
        """Log-probabilities `[W - 1, V] f64` of the original, by window."""
        return [logits.double().log_softmax(-1) for logits in self.logits({})]

    def logits(self, changed: dict[str, Tensor]) -> Iterator[Tensor]:
        """Logits `[W - 1, V] f32` of each window; a head among the changed weights ties no more."""
        model = transformers.AutoModelForCausalLM.from_pretrained(
            self.folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
        if HEAD in changed:
            model.lm_head.weight = torch.nn.Parameter(changed[HEAD])
        unknown = model.load_state_dict({**self.original, **changed}, strict=False).unexpected_keys
        if unknown:
            raise SystemExit(f"{self.folder.name}: found weights {unknown[:3]}, needs names of its parameters")
        eager = EagerReference(model)
        for window in self.windows:
            yield eager.logits(window[:-1])

    def __call__(self, changed: dict[str, Tensor]) -> dict[str, Any]:
        """Measures of changed weights."""
        divergence, likelihood, agreed, tokens = 0.0, 0.0, 0, 0
        for window, log_p, logits in zip(self.windows, self.expected, self.logits(changed), strict=True):
            log_q = logits.double().log_softmax(-1)
            divergence += (log_p.exp() * (log_p - log_q)).sum().item()
            likelihood += log_q.gather(-1, torch.tensor(window[1:])[:, None]).sum().item()
            agreed += int((log_p.argmax(-1) == log_q.argmax(-1)).sum())
            tokens += len(window) - 1
        return {"kl": divergence / tokens, "perplexity": math.exp(-likelihood / tokens),
                "top1_agreement": agreed / tokens, "tokens": tokens}  # fmt: skip

    def ours(self, pipelines: Sequence[str]) -> list[dict[str, Any]]:
        """Rows of our own pass on the same windows, by `evaluate`."""
        rows = []
        reference = EagerReference(self.folder)
        for pipeline in pipelines:
            model = jettison.optimize(self.folder, pipeline, target="torch")
            found = evaluate(model, windows=self.windows, reference=reference).as_dict()
            kept = {name: found[name] for name in ("kl", "perplexity", "top1_agreement", "tokens", "weight_bytes")}
            rows.append({"tool": "jettison", "name": model.report.pipeline, **kept})
            print(self.folder.name, rows[-1], flush=True)
        return rows


def sentences_of(text: str) -> list[str]:
    """Sentences spread evenly over a text."""
    found = [each.strip() for each in re.split(r"(?<=[.!?])\s+", text) if 40 <= len(each.strip()) <= 300]
    return [found[index * len(found) // SENTENCES] for index in range(SENTENCES)]


def ranks(values: Tensor) -> Tensor:
    """Rank of each value."""
    return values.argsort().argsort().double()


def encoder_scorer(folder: Path, text: str) -> Callable[[dict[str, Tensor]], Any]:
    """A function from changed weights to how near the sentence embeddings stay."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    sentences = sentences_of(text)
    inputs = tokenizer(sentences, padding=True, truncation=True, max_length=ENCODER_TOKENS, return_tensors="pt")
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    original = {name: value.clone() for name, value in model.state_dict().items()}
    upper = torch.triu(torch.ones(SENTENCES, SENTENCES, dtype=torch.bool), 1)

    def embed(changed: dict[str, Tensor]) -> Tensor:
        model.load_state_dict(original | changed, strict=True)
        with torch.no_grad():
            hidden = model(**inputs).last_hidden_state
        mask = inputs["attention_mask"][..., None].float()
        return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)

    reference = embed({})
    expected = (reference @ reference.T)[upper]

    def score(changed: dict[str, Tensor]) -> dict[str, Any]:
        found = embed(changed)
        cosines = (found * reference).sum(-1)
        pairs = torch.stack([ranks((found @ found.T)[upper]), ranks(expected)])
        return {"cosine": cosines.mean().item(), "smallest_cosine": cosines.min().item(),
                "rank_correlation": torch.corrcoef(pairs)[0, 1].item()}  # fmt: skip

    return score


def scored(path: Path, key: str, score: Callable[[dict[str, Tensor]], Any] | None) -> dict[str, Any] | None:
    """Measures of the weights in a file, remembered beside it as long as the file is the same; or only from memory."""
    memory = path.with_suffix(".score.txt")
    stamp = [key, path.stat().st_mtime]
    if memory.is_file():
        known = json.loads(memory.read_text())
        if known["stamp"] == stamp:
            return known["measures"]
    if score is None:
        return None
    measures = score(load_file(path))
    memory.write_text(json.dumps({"stamp": stamp, "measures": measures}))
    return measures


def rows_of(
    folder: Path, scratch: Path, key: str, score: Callable[[dict[str, Tensor]], Any], remembered_only: bool
) -> list[dict[str, Any]]:
    """What each tool left for a model, scored; or only what was scored before."""
    rows = []
    for tool, setting in ((tool, setting) for tool, settings in SETTINGS.items() for setting in settings()):
        path = scratch / folder.name / tool / f"{setting['name']}.json"
        if not path.is_file():
            continue
        about = json.loads(path.read_text())
        row = {"tool": tool, "name": setting["name"]}
        if "error" in about:
            rows.append({**row, "error": about["error"][:300]})
            continue
        measures = scored(path.with_suffix(".safetensors"), key, None if remembered_only else score)
        if measures is None:
            continue
        kept = ("seconds", "encoded", "bytes", "relative_error", "notes", "setting", "versions")
        rows.append({**row, **measures, **{key: about[key] for key in kept}})
        print(folder.name, tool, setting["name"], measures, flush=True)
    return rows


def main() -> None:
    """Run the peers, score, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--scratch", required=True, type=Path)
    parser.add_argument("--windows", type=int, default=16, help="windows of the text that are scored")
    parser.add_argument("--models", nargs="*", type=Path, default=[MODELS / "tiny-llama", MODELS / "tiny-opt"])
    parser.add_argument("--encoder", type=Path)
    parser.add_argument("--run-only", action="store_true", help="leave scoring to a later call")
    parser.add_argument("--remembered", action="store_true", help="write what was scored before, score nothing")
    for tool in SCRIPTS:
        parser.add_argument(f"--{tool}", metavar="PYTHON")
    arguments = parser.parse_args()
    before = environment()
    text, calibration = Path(arguments.text).read_text(), Path(arguments.calibration).read_text()
    encoders = [] if arguments.encoder is None else [arguments.encoder]
    figures: dict[str, Any] = {"windows": arguments.windows, "models": {}}
    for folder in (*arguments.models, *encoders):
        windows = calibration_windows(folder, calibration, folder in encoders)
        for tool in SCRIPTS:
            python = getattr(arguments, tool.replace("-", "_"))
            if python is not None:
                run_peer(tool, python, folder.resolve(), windows, arguments.scratch)
        if arguments.run_only:
            continue
        if folder in encoders:
            score, key = encoder_scorer(folder, text), f"{SENTENCES} sentences"
            figures["models"][ENCODER] = rows_of(folder, arguments.scratch, key, score, arguments.remembered)
            continue
        scorer = DecoderScorer(folder, text, arguments.windows)
        rows = rows_of(folder, arguments.scratch, scorer.key, scorer, arguments.remembered)
        memory = arguments.scratch / folder.name / "jettison.txt"
        if not arguments.remembered:
            memory.write_text(json.dumps(scorer.ours((CACHE, *OURS))))
        figures["models"][folder.name] = [*json.loads(memory.read_text()), *rows]
    if not arguments.run_only:
        print(write("weights_peers", figures, before))


if __name__ == "__main__":
    main()
