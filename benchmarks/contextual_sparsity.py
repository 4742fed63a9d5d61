"""What it costs and what it saves to read only the neurons that a token needs.

    python benchmarks/contextual_sparsity.py --text FILE --calibration FILE [--only SECTION ...]

`natural`: how sparse the bundled tiny-opt (ReLU) is by itself, for every layer: the share of FFN neurons that fire, the
share that covers 99 % of the mass of the activations (each neuron's activation times the norm of its row of the second
matrix), and the perplexity when only the best neurons of each token are kept, or groups of neighbours.

`hot`: how many groups nearly every token chooses, which could be read without being predicted.

`quality`: the same model after `cluster-neurons` and `predict-mlp-sparsity`, every token computed sparsely: perplexity
over dense, KL from dense, recall of each layer. `oracle` is `hire` with a full rank, whose scores are exact. In
`covering`, each layer keeps the groups that cover 99 % of the mass of its activations.

`speed`: decode steps of four layers of the feed-forward shape of OPT-6.7B (4096 to 16384, random weights, an attention
of one small head), predictor included, in interleaved rounds of processes of their own.

`step`: whole decode steps of four layers of OPT-6.7B with its head, in int4: as they are, with sparse layers, and with
an approximate head as well.

`inputs`: the bundled tiny-llama (gated SiLU) after `sparsify-inputs`, every token computed sparsely: perplexity over
dense, KL from dense, the share of channels that each kind of linear leaves out; with one rate for all inputs, too.
`inputs_speed`: what that saves a decode step of four layers of Llama-3.2-1B with a small head, beside int4 weights.

Writes benchmarks/results/contextual_sparsity.json (sections that are not asked for stay) and a plot.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from cpu_decode import Contender, rounds
from random_models import make_llama, make_opt
from record import RESULTS, environment, write
from torch import Tensor, nn

from jettison.api import optimize, parse_passes
from jettison.bench import weight_bytes_per_step
from jettison.ir.compare import run_program
from jettison.ir.program import Program
from jettison.passes import sparsify_inputs
from jettison.passes.input_errors import ErrorCurve
from jettison.passes.mlp_activity import watch
from jettison.passes.pipeline import prepare
from jettison.passes.predict_mlp_sparsity import PredictMlpSparsity
from jettison.passes.predictors import DejaVu, HiRE, Predictor
from jettison.passes.sparsify_inputs import SparsifyInputs
from jettison.runtime.tokenizer import load_tokenizer
from jettison.sample_text import load_windows
from jettison.source import open_source

MODELS = Path(__file__).resolve().parent.parent / "examples" / "models"
MODEL, GATED_MODEL = MODELS / "tiny-opt", MODELS / "tiny-llama"
WINDOW, WINDOWS = 512, 16
KEEPS = (0.02, 0.05, 0.1, 0.125, 0.2, 0.25, 0.4, 0.5, 0.75)
GROUPS = (1, 8, 32)
MASS = 0.99
CALIBRATION_WINDOWS = 64

PREDICTORS: dict[str, Predictor] = {
    "oracle": HiRE(256), "dejavu, rank 64": DejaVu(64), "dejavu, rank 64, lookahead": DejaVu(64, "previous"),
    "hire, rank 32": HiRE(32), "hire, rank 64": HiRE(64), "hire, rank 96": HiRE(96),
    "hire, int4": HiRE(estimator="int4"),
}  # fmt: skip
# A quarter of the neurons of the first layer fire: the pass leaves it dense (here the predictors are forced, whose rank
# is large beside so small a model).
FIRST = r"layers\.0\."
CURVE = (0.0625, 0.125, 0.1875, 0.25, 0.375, 0.5)
KEEPS_OF = {"oracle": CURVE, "hire, rank 64": CURVE, "dejavu, rank 64": (0.125, 0.25, 0.5)}
ERRORS = (0.001, 0.003, 0.01, 0.03)

WIDTH, NEURONS, LAYERS = 4096, 16384, 4
VOCABULARY = 50272
SPEED_KEEPS = (0.1, 0.2, 0.4)
SPARSITIES = (0.25, 0.4)

SECTIONS = ("natural", "hot", "quality", "speed", "step", "inputs", "inputs_speed")

Mask = Callable[[Tensor, Tensor], Tensor]
"""From activations `[T, M]` and their scores to activations of which some are zero."""


def best_groups(keep: float, group: int) -> Mask:
    """Keep the groups with the largest squared scores."""

    def mask(activations: Tensor, scores: Tensor) -> Tensor:
        sums = scores.square().unflatten(-1, (-1, group)).sum(-1)
        count = max(1, round(keep * sums.shape[-1]))
        kept = torch.zeros_like(sums).scatter_(-1, sums.topk(count, -1).indices, 1.0)
        return activations * kept.repeat_interleave(group, -1)

    return mask


class Sparsity:
    """Watches the second linear of every FFN: counts what it reads, and may take neurons away."""

    def __init__(self, model: Any) -> None:
        self.mask: Mask | None = None
        self.is_counting = False
        self.layers = [layer.fc2 for layer in model.model.decoder.layers]
        self.fired = [0.0] * len(self.layers)
        self.covering: list[list[Tensor]] = [[] for _ in self.layers]
        self.tokens = 0
        for index, linear in enumerate(self.layers):
            norms = linear.weight.detach().norm(dim=0)
            linear.register_forward_pre_hook(
                lambda _, given, index=index, norms=norms: (self._read(index, norms, given[0]),)
            )

    def _read(self, index: int, norms: Tensor, activations: Tensor) -> Tensor:
        flat = activations.reshape(-1, activations.shape[-1])
        scores = flat.abs() * norms
        if self.is_counting:
            self.fired[index] += float((flat != 0).float().mean(-1).sum())
            shares = scores.sort(-1, descending=True).values.cumsum(-1)
            needed = (shares < MASS * shares[:, -1:]).sum(-1) + 1
            self.covering[index].append(needed / flat.shape[-1])
        return activations if self.mask is None else self.mask(flat, scores).view_as(activations)


@torch.no_grad()
def perplexity(model: Any, windows: list[Tensor]) -> float:
    """Of every token but the first of each window."""
    losses = [model(ids[None], labels=ids[None]).loss for ids in windows]
    return math.exp(float(torch.stack(losses).mean()))


def natural(windows: list[Tensor]) -> dict[str, Any]:
    """The model as it is, and what oracles of neighbours cost."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    sparsity = Sparsity(model)
    sparsity.is_counting = True
    dense = perplexity(model, windows)
    sparsity.is_counting = False
    count = sum(len(window) for window in windows)
    layers = [
        {"fired": round(fired / count, 4), "covering_mean": round(float(torch.cat(needed).mean()), 4),
         "covering_95th_percentile": round(float(torch.cat(needed).quantile(0.95)), 4)}
        for fired, needed in zip(sparsity.fired, sparsity.covering, strict=True)
    ]  # fmt: skip
    curves: dict[str, dict[str, float]] = {}
    for group in GROUPS:
        curves[str(group)] = {}
        for keep in KEEPS:
            sparsity.mask = best_groups(keep, group)
            curves[str(group)][str(keep)] = round(perplexity(model, windows) / dense, 4)
        print(group, curves[str(group)], flush=True)
    return {"model": MODEL.name, "tokens": count, "perplexity": round(dense, 4), "mass": MASS, "layers": layers,
            "oracle_perplexity_over_dense": curves}  # fmt: skip


class Scorer:
    """Perplexity and KL of programs against the dense one.

    Args:
        program: Dense.
        windows: Tokens.
    """

    def __init__(self, program: Program, windows: list[Tensor]) -> None:
        self._windows = windows
        self._dense = [self._logprobs(program, window) for window in windows]

    def _logprobs(self, program: Program, window: Tensor) -> Tensor:
        return torch.log_softmax(run_program(program, window[None])[0][0, :-1].double(), -1)

    def score(self, program: Program) -> dict[str, float]:
        """Of every token but the first of each window."""
        kl, loss, loss_dense = [], [], []
        for window, dense in zip(self._windows, self._dense, strict=True):
            found = self._logprobs(program, window)
            kl.append((dense.exp() * (dense - found)).sum(-1).mean())
            loss.append(-found.gather(1, window[1:, None]).mean())
            loss_dense.append(-dense.gather(1, window[1:, None]).mean())
        ratio = math.exp(float(torch.stack(loss).mean() - torch.stack(loss_dense).mean()))
        return {"perplexity_over_dense": round(ratio, 4), "kl": round(float(torch.stack(kl).mean()), 5)}


def applied(program: Program, passes: Sequence[PredictMlpSparsity]) -> tuple[Program, list[dict[str, Any]]]:
    """A copy with passes run, and what each said of its layers."""
    copy = program.copy()
    return copy, [pass_.run(copy).layers for pass_ in passes]


def figures_of(layers: dict[str, Any], layer_count: int) -> dict[str, Any]:
    """Over the layers that became sparse, and over all."""
    kept = [each["kept"] / each["groups"] for each in layers.values()]
    return {
        "sparse_layers": len(kept),
        "kept_of_sparse_layers": round(sum(kept) / max(1, len(kept)), 4),
        "kept_of_all_layers": round((sum(kept) + layer_count - len(kept)) / layer_count, 4),
        "recall": [round(each["recall"], 3) for each in layers.values()],
    }


def covering_passes(program: Program, group: int, method: Predictor) -> list[PredictMlpSparsity]:
    """One pass per layer, which keeps the groups that hold 99 % of the mass of the activations on average."""
    template = PredictMlpSparsity(method=method, group=group, keep=1.0, force=True, stand_in=False)
    sites, _ = template.find(program)
    passes = []
    for number, (_, activity) in enumerate(watch(program, sites, group, lambda site: site.x, most=4096)):
        mass = (activity.hidden * activity.norms).unflatten(-1, (-1, group)).sum(-1)
        mass = mass[mass.sum(-1) > 0]  # some tokens fire nothing in some layers
        covered = (mass.sort(-1, descending=True).values.cumsum(-1) / mass.sum(-1, keepdim=True)).mean(0)
        needed = int((covered < MASS).sum()) + 1
        passes.append(replace(template, keep=needed / mass.shape[1], skip=rf"layers\.(?!{number}\.)"))
    return passes


def quality(windows: list[Tensor], calibration: Path, groups: Sequence[int]) -> dict[str, Any]:
    """Predictors and keeps on the trained model."""
    found: dict[str, Any] = {}
    for group in groups:
        program = calibrated(calibration)
        scorer = Scorer(program, windows)
        for pass_ in parse_passes(f"cluster-neurons{{group={group},keep=0.125}}"):
            pass_.run(program)
        in_group: dict[str, Any] = {"curve": {}, "auto": {}, "covering": {}}
        for name, method in PREDICTORS.items():
            curve = in_group["curve"][name] = {}
            for keep in KEEPS_OF.get(name, (0.125, 0.25)):
                settings = PredictMlpSparsity(method=method, keep=keep, group=group, skip=FIRST, force=True)
                made, said = applied(program, [settings])
                curve[str(keep)] = {**scorer.score(made), **figures_of(said[0], 6)}
                print(group, name, keep, curve[str(keep)], flush=True)
        for error in ERRORS:
            settings = PredictMlpSparsity(method=HiRE(64), error=error, group=group, force=True)
            made, said = applied(program, [settings])
            in_group["auto"][str(error)] = {**scorer.score(made), **figures_of(said[0], 6)}
            print(group, "auto", error, in_group["auto"][str(error)], flush=True)
        for name in ("oracle", "dejavu, rank 64", "hire, rank 64", "hire, rank 96"):
            made, said = applied(program, covering_passes(program, group, PREDICTORS[name]))
            layers = {layer: each for one in said for layer, each in one.items()}
            keeps = [round(each["kept"] / each["groups"], 4) for each in layers.values()]
            in_group["covering"][name] = {**scorer.score(made), **figures_of(layers, 6), "keep": keeps}
            print(group, "covering", name, in_group["covering"][name], flush=True)
        settings = PredictMlpSparsity(method=HiRE(256), keep=0.125, group=group, skip=FIRST, force=True, stand_in=False)
        made, _ = applied(program, [settings])
        in_group["oracle, 0.125, nothing in the place of what is left out"] = scorer.score(made)
        found[f"groups of {group}"] = in_group
    return found


def hot(calibration: Path, groups: Sequence[int]) -> dict[str, Any]:
    """Groups that nearly every token would choose by itself, of those that it keeps, layer by layer."""
    found: dict[str, Any] = {}
    for group in groups:
        program = calibrated(calibration)
        for pass_ in parse_passes(f"cluster-neurons{{group={group},keep=0.125}}"):
            pass_.run(program)
        sites, _ = PredictMlpSparsity(group=group).find(program)
        counts = []
        for _, activity in watch(program, sites, group, lambda site: site.x, most=4096):
            kept = activity.scores.shape[1] // 8
            best = activity.scores.topk(kept, -1).indices
            chosen = torch.zeros_like(activity.scores).scatter_(1, best, 1.0).mean(0)
            counts.append({str(share): int((chosen > share).sum()) for share in (0.95, 0.8, 0.5)})
        found[f"groups of {group}"] = {"kept": kept, "chosen_by_more_than": counts}
    return found


def one_rate(curves: Sequence[ErrorCurve], wanted: float) -> list[int]:
    """In the place of `allocate`: the same share of the channels of every input."""
    share = wanted / sum(curve.kept[0] * curve.site.row_weights for curve in curves)
    return [sum(kept > (1 - share) * curve.kept[0] + 1 for kept in curve.kept) for curve in curves]


def inputs(text: Path, calibration: Path) -> dict[str, Any]:
    """Inputs of a gated model: what leaving them out costs, and which are left out."""
    program = calibrated(calibration, GATED_MODEL)
    windows = [torch.tensor(ids) for ids in load_windows(text, load_tokenizer(GATED_MODEL), WINDOW)[:WINDOWS]]
    scorer = Scorer(program, windows)
    found: dict[str, Any] = {}
    variants = {"": (False, sparsify_inputs.allocate), ", forced": (True, sparsify_inputs.allocate),
                ", one rate for all": (True, one_rate)}  # fmt: skip
    for sparsity in SPARSITIES:
        for variant, (force, rule) in variants.items():
            copy = program.copy()
            with patch.object(sparsify_inputs, "allocate", rule):
                layers = SparsifyInputs(sparsity=sparsity, force=force).run(copy).layers
            left_out: dict[str, list[float]] = {}
            for name, each in layers.items():
                kind = name.removesuffix(".weight.transposed").rpartition(".")[2]
                left_out.setdefault(kind, []).append(round(1 - each["kept"] / each["channels"], 2))
            key = f"{sparsity}{variant}"
            found[key] = {**scorer.score(copy), "left_out": left_out, "linears": len(layers)}
            print(key, found[key], flush=True)
    return {"model": GATED_MODEL.name, "sparsity": found}


def calibrated(text: Path, model: Path = MODEL) -> Program:
    """A bundled model, prepared, with its calibration tokens."""
    from jettison.calibration import Calibration

    source = open_source(model, dtype="float32", context=None)
    prepare(source.program)
    Calibration.of(source, text, (CALIBRATION_WINDOWS, WINDOW), 0)
    return source.program


def plot(curves: dict[str, Any], path: Path) -> None:
    """KL against the share that is kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for group, in_group in curves.items():
        if group == "environment":
            continue
        for name, points in in_group["curve"].items():
            if len(points) > 2:
                kls = [point["kl"] for point in points.values()]
                axes.plot([float(keep) for keep in points], kls, marker="o", label=f"{name}, {group}")
    axes.set(xlabel="share of the groups that is kept, layer 0 dense", ylabel="KL from dense (nats per token)")
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


class Block(nn.Module):
    """A small attention and a wide feed-forward layer, of which few neurons fire."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, 64, bias=False) for _ in range(3))
        self.out = nn.Linear(64, WIDTH, bias=False)
        self.fc1, self.fc2 = nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH)
        with torch.no_grad():
            self.fc1.bias.fill_(-0.8)  # of a standard deviation of 0.58: 8 % fire

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, E]` to `[B, S, E]`."""
        h = self.norm1(x)
        heads = [f(h).unsqueeze(1) for f in (self.query, self.key, self.value)]
        x = x + self.out(F.scaled_dot_product_attention(*heads, is_causal=True).squeeze(1))
        return x + self.fc2(F.relu(self.fc1(self.norm2(x))))


class Wide(nn.Module):
    """Four blocks between a narrow table and a narrow head."""

    context = 512

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.widen = nn.Embedding(VOCABULARY, 64), nn.Linear(64, WIDTH)
        self.layers = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.narrow, self.head = nn.Linear(WIDTH, 64), nn.Linear(64, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """`[B, S] i64` twice to logits `[B, S, V]`."""
        x = self.widen(self.tokens(input_ids) + position_ids[..., None].to(self.head.weight.dtype) / self.context)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.narrow(x))


def wide_artifacts(scratch: Path) -> dict[str, dict[str, tuple[Path, int]]]:
    """Folder and weight bytes per token of each contender, by target."""
    torch.manual_seed(0)
    module = Wide().to(torch.bfloat16).eval()
    predictor = "method=dejavu{rank=512}"
    small = "quantize-weights{bits=8,group=128,only='predictor'}"
    int4 = "quantize-weights{bits=4,group=128}"
    pipelines = {"torch bf16": {"dense": ""}, "onnx int4": {"dense": int4}, "torch int4": {"dense": int4}}
    for keep in SPEED_KEEPS:
        rows, slabs = (f"predict-mlp-sparsity{{keep={keep},group={g},force=true,{predictor}}}" for g in (32, 128))
        pipelines["torch bf16"][f"{keep} kept"] = rows
        for target in ("onnx int4", "torch int4"):
            pipelines[target][f"{keep} kept"] = f"{int4},{slabs},{small}"
    made: dict[str, dict[str, tuple[Path, int]]] = {}
    for target, wanted in pipelines.items():
        for name, pipeline in wanted.items():
            out = scratch / f"{target} {name}".replace(" ", "-")
            dtype = "bfloat16" if "bf16" in target else "float32"
            source = module if dtype == "bfloat16" else module.to(torch.float32)
            model = optimize(source, pipeline, target=target.split()[0], dtype=dtype, calibration_size=(4, 64))
            model.save_pretrained(out)
            made.setdefault(target, {})[name] = (out, weight_bytes_per_step(model.graph, 1))
            module = module.to(torch.bfloat16)
            print(target, name, made[target][name][1], flush=True)
    return made


def speed(number: int) -> dict[str, Any]:
    """Decode steps, dense and sparse, by target."""
    found: dict[str, Any] = {"shape": {"width": WIDTH, "neurons": NEURONS, "layers": LAYERS}}
    with tempfile.TemporaryDirectory() as folder:
        for target, wanted in wide_artifacts(Path(folder)).items():
            contenders = [Contender(n, sys.executable, "run_jettison.py", str(p), 0) for n, (p, _) in wanted.items()]
            bytes_read = {name: read for name, (_, read) in wanted.items()}
            found[target] = compared(contenders, rounds(contenders, 1, 16, 24, number), bytes_read)
    return found


def compared(
    contenders: Sequence[Contender], figures: dict[str, dict[str, float]], bytes_read: dict[str, int]
) -> dict[str, dict[str, float]]:
    """Figures of contenders, closed now, with how much faster than the first one they are, and the bytes they read."""
    first = figures[contenders[0].name]["decode_ms"]
    for each in contenders:
        own = figures[each.name]
        del own["weight_gb_per_s"]  # of all weights, as if every token read them
        own["weight_bytes_per_token"] = bytes_read[each.name]
        own["times_faster"] = round(first / own["decode_ms"], 2)
        each.close()
    return figures


def step(number: int) -> dict[str, Any]:
    """Whole decode steps: int4 alone, and with sparse layers and an approximate head."""
    found: dict[str, Any] = {"shape": {"width": WIDTH, "neurons": NEURONS, "layers": LAYERS, "vocabulary": 50272}}
    int4 = "quantize-weights{bits=4,group=128}"
    sparse = "predict-mlp-sparsity{keep=0.1,group=128,force=true,method=dejavu{rank=512}}"
    small = "quantize-weights{bits=8,group=128,only='predictor'}"
    head = "approximate-lm-head{estimator=lowrank,rank=512}"
    pipelines = {"int4": int4, "int4, sparse layers": f"{int4},{sparse},{small}",
                 "int4, sparse layers, approximate head": f"{int4},{sparse},{small},{head}"}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        make_opt(Path(folder) / "model", LAYERS, fires=0.08)
        for target in ("onnx", "torch"):
            found[target] = decode(Path(folder) / "model", target, "float32", pipelines, number)
    return found


def decode(model: Path, target: str, dtype: str, pipelines: dict[str, str], number: int) -> dict[str, Any]:
    """Decode steps of a model after each of some pipelines, the first of which the others are compared with."""
    with tempfile.TemporaryDirectory() as folder:
        contenders, bytes_read = [], {}
        for name, pipeline in pipelines.items():
            out = Path(folder) / f"{len(contenders)}"
            made = optimize(model, pipeline, target=target, dtype=dtype, calibration_size=(4, 64))
            made.save_pretrained(out)
            bytes_read[name] = weight_bytes_per_step(made.graph, 1)
            contenders.append(Contender(name, sys.executable, "run_jettison.py", str(out), 0))
        return compared(contenders, rounds(contenders, 1, 128, 24, number), bytes_read)


def inputs_speed(number: int) -> dict[str, Any]:
    """Decode steps of four layers of the shape of Llama-3.2-1B that leave inputs out, by target."""
    found: dict[str, Any] = {"shape": {"layers": LAYERS, "vocabulary": 32000}}
    pipelines = {"dense": "", "int4": "quantize-weights{bits=4,group=128}"}
    pipelines |= {
        f"{each} left out": f"sparsify-inputs{{sparsity={each},force=true}}" for each in (0.25, 0.4, 0.6, 0.8)
    }
    with tempfile.TemporaryDirectory() as folder:
        make_llama(Path(folder) / "model", LAYERS, vocab_size=32000)
        for target, dtype in (("torch", "bfloat16"), ("onnx", "float32")):
            found[f"{target} {dtype}"] = decode(Path(folder) / "model", target, dtype, pipelines, number)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[])
    parser.add_argument("--groups", nargs="+", type=int, default=[8, 32], help="neurons of a group, for quality")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    before = environment()
    windows = [torch.tensor(ids) for ids in load_windows(arguments.text, load_tokenizer(MODEL), WINDOW)[:WINDOWS]]
    path = RESULTS / "contextual_sparsity.json"
    figures = json.loads(path.read_text()) if path.exists() else {}
    figures.pop("environment", None)
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "natural": lambda: natural(windows),
        "hot": lambda: hot(arguments.calibration, arguments.groups),
        "quality": lambda: quality(windows, arguments.calibration, arguments.groups),
        "speed": lambda: speed(arguments.rounds),
        "step": lambda: step(arguments.rounds),
        "inputs": lambda: inputs(arguments.text, arguments.calibration),
        "inputs_speed": lambda: inputs_speed(arguments.rounds),
    }
    for name, measure in sections.items():
        if not arguments.only or name in arguments.only:
            measured = {**measure(), "environment": before}
            if path.exists():  # sections may come from several runs
                figures = json.loads(path.read_text())
                figures.pop("environment", None)
            figures[name] = measured
            print(write("contextual_sparsity", figures, before), flush=True)
    if "quality" in figures:
        plot(figures["quality"], RESULTS / "contextual_sparsity.png")


if __name__ == "__main__":
    main()
