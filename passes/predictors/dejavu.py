"""Deja Vu: a small network, trained for each layer, that says which groups of neurons a token will use.

    score = P2 @ relu(P1 @ x + b1) + b2,  P1: [rank, E],  P2: [G, rank]

It learns the logarithm of what each group is worth to a token (mean squared error), so that one training serves every
number of kept groups, and stops early by the recall at the run-time rule: of the best `keep` groups of a token, how
many are among the `keep` with the largest scores.

With the relu, which the paper's predictor does not have: a group fires where a sum of many neurons does, which is no
linear function of x. PowerInfer's predictors have one too.

Source: Deja Vu (arXiv 2310.17157), FMInference/DejaVu, sparse_predictor/trainer_mlp.py. There labels are whether a
neuron fires, and recall is counted at a threshold of 0.5, while inference takes the best k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.passes.options import option
from jettison.passes.predictors.base import HELD_OUT, Predictor, Samples, held_out, recall

# Tokens of a training step: fewer where there are not many, so that an epoch is some steps all the same.
_BATCH, _FEWEST, _STEPS = 512, 32, 32
_EPOCHS = 20
_PATIENCE = 4
_LEARNING_RATE = 3e-3
_ENOUGH_RECALL = 0.99


@dataclass(frozen=True)
class DejaVu(Predictor):
    """See the module docstring."""

    name: ClassVar[str] = "dejavu"
    rank: int | None = option(None, doc="width of the network; E / 8 unless given, at least 64", range="1 or more")
    lookahead: Literal["same", "previous"] = option(
        "same", doc="reads what the layer reads, or the residual before the attention in front of it"
    )

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise OptionError(f"[dejavu] rank={self.rank}: needs 1 or more.")

    def fit(self, samples: Samples, kept: int, seed: int) -> dict[str, Tensor]:
        """Train; see `Predictor.fit`."""
        x, scores = samples.inputs, samples.scores
        target = torch.log1p(scores / scores.mean().clamp_min(1e-30))
        mean, deviation = x.mean(0), x.std().clamp_min(1e-12)
        train = torch.arange(len(x)) % HELD_OUT != HELD_OUT - 1
        network = _Network(x.shape[1], self.rank or max(64, x.shape[1] // 8), scores.shape[1], seed)
        best = (-1.0, network.state())
        since = 0
        inputs, wanted = (x[train] - mean) / deviation, target[train]
        unseen, unseen_scores = (held_out(x) - mean) / deviation, held_out(scores)
        for _ in range(_EPOCHS):
            network.epoch(inputs, wanted)
            with torch.no_grad():
                found = recall(network.forward(unseen), unseen_scores, kept)
            best, since = ((found, network.state()), 0) if found > best[0] else (best, since + 1)
            if found > _ENOUGH_RECALL or since == _PATIENCE:
                break
        first, bias, second, last = best[1]
        # What scales and centres x goes into the first layer.
        first = first / deviation
        return {"first": first, "first_bias": bias - first @ mean, "second": second, "second_bias": last}

    def scores(self, x: Tensor, constants: Mapping[str, Tensor], activation: str) -> Tensor:
        """See `Predictor.scores`."""
        hidden = F.relu(F.linear(x, constants["first"], constants["first_bias"]))
        return F.linear(hidden, constants["second"], constants["second_bias"])


class _Network:
    """Two layers and their optimiser.

    Args:
        width: E.
        rank: Width of the middle.
        groups: G.
        seed: Of the first weights and of the order of tokens.
    """

    def __init__(self, width: int, rank: int, groups: int, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        sizes = ((rank, width, width), (rank, None, width), (groups, rank, rank), (groups, None, rank))
        self._weights = [
            ((torch.rand(rows, *([columns] if columns else []), generator=self._generator) * 2 - 1) / inner**0.5)
            .requires_grad_()
            for rows, columns, inner in sizes
        ]  # fmt: skip
        self._optimizer = torch.optim.AdamW(self._weights, _LEARNING_RATE, weight_decay=0.01)
        self._step = 0

    def state(self) -> list[Tensor]:
        """Copies of the weights as they are."""
        return [weight.detach().clone() for weight in self._weights]

    def forward(self, x: Tensor) -> Tensor:
        """`[T, E]` to `[T, G]`."""
        first, bias, second, last = self._weights
        return F.linear(F.relu(F.linear(x, first, bias)), second, last)

    @torch.enable_grad()
    def epoch(self, x: Tensor, target: Tensor) -> None:
        """See every token once, with a learning rate that falls from epoch to epoch."""
        self._step += 1
        for options in self._optimizer.param_groups:
            options["lr"] = _LEARNING_RATE * 0.85 ** (self._step - 1)
        tokens = min(_BATCH, max(_FEWEST, len(x) // _STEPS))
        for batch in torch.randperm(len(x), generator=self._generator).split(tokens):
            loss = F.mse_loss(self.forward(x[batch]), target[batch])
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
