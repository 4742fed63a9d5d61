"""What the methods and formats of `quantize-weights`, and the plans of `allocate-bits`, cost in KL and in bytes.

    python benchmarks/weights_quality.py --text FILE --calibration FILE [--models FOLDER ...] [--encoder FOLDER]
        [--windows N] [--only REGEX]

Decoders are scored with the decoded weights in the eager model in fp32, on the first windows of a text they were not
trained on, as `jettison.evaluate` defines KL and perplexity; the encoder, a folder with all-MiniLM-L6-v2, as
`weights_peers.py` says. Bytes are those of all constants of the program: codes, scales, zero points, codebooks, and
what stays dense as the checkpoint stores it. `planted` is the first model with one channel in 37 of every normalised
input thirty times as large, and the columns that read it smaller by as much: it computes the same. Settings whose name
REGEX finds are measured, the others stay as the JSON has them. Writes benchmarks/results/weights_quality.json.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import torch
from record import RESULTS, environment, write
from safetensors.torch import load_file, save_file
from torch import Tensor
from weights_peers import DecoderScorer, encoder_scorer

from jettison.api import parse_passes
from jettison.calibration import Calibration
from jettison.drift import dense_value
from jettison.ir.program import PassRecord, Program
from jettison.passes.allocate_bits import AllocateBits
from jettison.passes.methods.sensitivity import Choice, Probe
from jettison.passes.pipeline import prepare
from jettison.source import ModelSource, open_source

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "examples" / "models"
LINEARS = "skip='embed|lm_head'"
MENU = "+".join(
    [
        "nf4{group=64,double=true}",
        *(
            f"int{{bits={bits},group={group}}}"
            for bits, group in ((8, 128), (4, 32), (4, 128), (3, 64), (3, 128), (2, 32))
        ),
    ]
)
PLANTED_EVERY, PLANTED_FACTOR = 37, 30.0
_NORMED = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def linear_settings() -> dict[str, str]:
    """Linears alone, groups of 128; embedding and head as they are."""
    settings = {
        f"{method} {bits}": f"quantize-weights{{bits={bits},group=128,method={method},{LINEARS}}}"
        for bits in (4, 3, 2)
        for method in ("rtn", "hqq", "awq", "gptq")
    }
    for group in (32, 64):
        for method in ("rtn", "gptq"):
            settings[f"{method} 4 g{group}"] = f"quantize-weights{{bits=4,group={group},method={method},{LINEARS}}}"
    symmetric = f"quantize-weights{{bits=4,group=128,symmetric=true,method=gptq,{LINEARS}}}"
    return {
        **settings,
        "gptq 4 symmetric": symmetric,
        "rtn nf4": f"quantize-weights{{format=nf4{{group=64,double=true}},{LINEARS}}}",
        "gptq nf4": f"quantize-weights{{format=nf4{{group=64,double=true}},method=gptq,{LINEARS}}}",
    }


def whole_settings() -> dict[str, str]:
    """The tied embedding and head, too."""
    return {
        f"whole {method} {bits}": f"quantize-weights{{bits={bits},group=128,method={method}}}"
        for bits in (4, 3)
        for method in ("rtn", "gptq")
    }


def weights_of(program: Program, names: set[str]) -> dict[str, Tensor]:
    """Weights of a program by the names of the checkpoint, packed ones decoded, f32."""
    kept = {name: each for name, each in program.constants.items() if name in names and each.dtype.is_floating_point}
    dense = {name: constant.value().float() for name, constant in kept.items()}
    for name in program.packed:
        value = dense_value(program, name)
        assert value is not None, "a format of ours"
        dense[name] = value
    return dense


class Priced(AllocateBits):
    """Remembers prices: they do not depend on the budget."""

    prices: ClassVar[dict[Any, dict[str, list[Choice]]]] = {}

    def price(self, program: Program, probe: Probe) -> dict[str, list[Choice]]:
        """See `AllocateBits`."""
        key = (id(program.calibration), self.metric, self.method)
        if key not in self.prices:
            self.prices[key] = super().price(program, probe)
        return self.prices[key]


class Bench:
    """One model: captured once, compressed and scored for each setting.

    Args:
        folder: The model.
        calibration: A text.
        score: Takes weights by name to measures.
        names: Of the checkpoint's weights.
    """

    def __init__(self, folder: Path, calibration: Path, score: Callable[[dict[str, Tensor]], Any]) -> None:
        self.source: ModelSource = open_source(folder)
        prepare(self.source.program)
        self.tokens = Calibration(self.source, calibration)
        self.tokens.tokens()
        self.score, self.names = score, set(load_file(folder / "model.safetensors"))

    def row(self, name: str, pipeline: str) -> tuple[dict[str, Any], PassRecord]:
        """Compress a copy and score it."""
        program = self.source.program.copy()
        program.calibration = self.tokens
        started = time.perf_counter()
        (pass_,) = parse_passes(pipeline)
        if isinstance(pass_, AllocateBits):
            pass_ = Priced(**vars(pass_))
        record = pass_.run(program)
        row = {"name": name, "pipeline": pipeline, "bytes": program.weight_bytes(),
               "seconds": round(time.perf_counter() - started, 1)}  # fmt: skip
        row |= self.score(weights_of(program, self.names))
        if record.plan is not None:
            row |= {"plan": record.plan, "predicted_kl": record.predicted_kl, "measured_kl": record.measured_kl}
        print({key: value for key, value in row.items() if key != "plan"}, flush=True)
        return row, record


def allocation_settings(bytes_of: dict[str, int]) -> Iterator[tuple[str, str]]:
    """Budgets of uniform 4 bits, and between 3 and 4; both with GPTQ throughout."""
    budgets = {"4": bytes_of["whole gptq 4"], "3.5": (bytes_of["whole gptq 4"] + bytes_of["whole gptq 3"]) // 2}
    for metric in ("kl", "hessian"):
        for label, budget in budgets.items():
            options = f"budget={budget},formats={MENU},metric={metric},method=gptq"
            yield f"allocate {metric} {label}", f"allocate-bits{{{options}}}"


def plant(folder: Path, out: Path) -> Path:
    """A model with outlier channels that computes the same."""
    shutil.copytree(folder, out)
    weights = {name: value.float() for name, value in load_file(folder / "model.safetensors").items()}
    channels = slice(0, None, PLANTED_EVERY)
    for name in list(weights):
        found = re.fullmatch(r"(.*layers\.\d+\.)(\w+)\.weight", name)
        for reader in _NORMED.get(found[2], ()) if found is not None else ():
            weights[name][channels] *= PLANTED_FACTOR if reader == _NORMED[found[2]][0] else 1.0
            weights[f"{found[1]}{reader}.weight"][:, channels] /= PLANTED_FACTOR
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def measure(
    bench: Bench, known: dict[str, Any], only: re.Pattern[str], settings: dict[str, str], keep: Callable[[], object]
) -> None:
    """Fill `known` with rows by name of the setting, and keep them after each."""
    for name, pipeline in settings.items():
        if name not in known or (only.pattern and only.search(name)):
            known[name] = bench.row(name, pipeline)[0]
            keep()


def main() -> None:
    """Score and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, type=Path, help="a text the models were not trained on")
    parser.add_argument("--calibration", required=True, type=Path, help="a text to calibrate on")
    parser.add_argument("--models", nargs="*", type=Path, default=[MODELS / "tiny-llama"])
    parser.add_argument("--encoder", type=Path, help="a folder with all-MiniLM-L6-v2")
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--only", default="", help="measure these settings anew, and what is missing")
    arguments = parser.parse_args()
    before, only = environment(), re.compile(arguments.only)
    path = RESULTS / "weights_quality.json"
    rows: dict[str, dict[str, Any]] = json.loads(path.read_text())["models"] if path.is_file() else {}
    text = arguments.text.read_text()

    def keep() -> Path:
        return write("weights_quality", {"windows": arguments.windows, "models": rows}, before)

    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        for folder in arguments.models:
            bench = Bench(folder, arguments.calibration, DecoderScorer(folder, text, arguments.windows))
            known = rows.setdefault(folder.name, {})
            measure(bench, known, only, linear_settings() | whole_settings(), keep)
            sizes = {name: row["bytes"] for name, row in known.items()}
            measure(bench, known, only, dict(allocation_settings(sizes)), keep)
        planted = plant(arguments.models[0], Path(scratch) / "planted")
        bench = Bench(planted, arguments.calibration, DecoderScorer(planted, text, arguments.windows))
        chosen = {name: each for name, each in linear_settings().items() if re.fullmatch("(rtn|awq|gptq) [43]", name)}
        measure(bench, rows.setdefault("planted", {}), only, chosen, keep)
        if arguments.encoder is not None:
            bench = Bench(arguments.encoder, arguments.calibration, encoder_scorer(arguments.encoder, text))
            chosen = {name: each.replace("embed|lm_head", "embeddings") for name, each in linear_settings().items()}
            measure(bench, rows.setdefault("all-MiniLM-L6-v2", {}), only, chosen, keep)
    print(keep())


if __name__ == "__main__":
    main()
