"""How sparse a trained ReLU model is by itself: what fires, and what dropping the rest costs.

    python benchmarks/contextual_sparsity.py --text FILE

On the bundled tiny-opt, for every layer: the share of FFN neurons that fire, the share that covers 99 % of the mass of
the activations (each neuron's activation times the norm of its row of the second matrix), and, for all layers at once,
the perplexity when only the best neurons of each token are kept, or the best groups of neighbouring ones. What is best
is known here (an oracle); a predictor comes on top. Writes benchmarks/results/contextual_sparsity.json and a plot.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, environment, write
from torch import Tensor

from jettison.runtime.tokenizer import load_tokenizer
from jettison.sample_text import load_windows

MODEL = Path(__file__).resolve().parent.parent / "examples" / "models" / "tiny-opt"
WINDOW, WINDOWS = 512, 16
KEEPS = (0.02, 0.05, 0.1, 0.125, 0.2, 0.25, 0.4, 0.5, 0.75)
GROUPS = (1, 8, 32)
MASS = 0.99

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


def plot(curves: dict[str, dict[str, float]], path: Path) -> None:
    """Relative perplexity against the share that is kept."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for group, points in curves.items():
        axes.plot([float(keep) for keep in points], list(points.values()), marker="o", label=f"groups of {group}")
    axes.set(xlabel="share of the neurons that is kept", ylabel="perplexity over dense", xscale="log", yscale="log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, type=Path)
    arguments = parser.parse_args()
    from transformers import AutoModelForCausalLM

    before = environment()
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()
    windows = [torch.tensor(ids) for ids in load_windows(arguments.text, load_tokenizer(MODEL), WINDOW)[:WINDOWS]]
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
    figures = {"model": MODEL.name, "text": arguments.text.name, "tokens": count, "perplexity": round(dense, 4),
               "mass": MASS, "layers": layers, "oracle_perplexity_over_dense": curves}  # fmt: skip
    plot(curves, RESULTS / "contextual_sparsity.png")
    print(write("contextual_sparsity", {"natural": figures}, before))


if __name__ == "__main__":
    main()
