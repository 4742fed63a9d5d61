"""What a predictor is: scores for the groups of neurons of a feed-forward layer, from what is known before it runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

HELD_OUT = 20


@dataclass(frozen=True)
class Samples:
    """What was seen of a layer on the calibration tokens.

    Attributes:
        inputs: `[T, E] f32`, what the predictor reads.
        scores: `[T, G] f32`, what leaving a group out costs a token: the sum of the squares of its neurons' activations
            times the norms of their rows of the second matrix.
        up: `[F, E] f32`, the first matrix, decoded.
        up_bias: `[F] f32`, or None.
        gate: `[F, E] f32`, or None.
        norms: `[F] f32`, of the neurons' rows of the second matrix.
        activation: A key of `ACTIVATIONS`.
    """

    inputs: Tensor
    scores: Tensor
    up: Tensor
    up_bias: Tensor | None
    gate: Tensor | None
    norms: Tensor
    activation: str


class Predictor(ABC):
    """A predictor. Subclasses are frozen dataclasses whose fields are the options.

    Attributes:
        name: Text id, the file's name.
        lookahead: What it reads: `same`, what the layer reads; `previous`, the residual in front of the attention
            before it, so that it can run beside that attention.
    """

    name: ClassVar[str]
    lookahead: str = "same"

    @abstractmethod
    def fit(self, samples: Samples, kept: int, seed: int) -> dict[str, Tensor]:
        """Make the predictor of a layer.

        Args:
            samples: Of the layer.
            kept: Groups that each token keeps.
            seed: Of whatever is drawn.

        Returns:
            Its constants, by name; f32, or codes.
        """

    @abstractmethod
    def scores(self, x: Tensor, constants: Mapping[str, Tensor], activation: str) -> Tensor:
        """Score groups, in plain torch operations, which become nodes of the graph.

        Args:
            x: `[..., E]`, what the predictor reads.
            constants: What `fit` returned.
            activation: A key of `ACTIVATIONS`.

        Returns:
            `[..., G]`, larger for groups that matter more.
        """


def held_out(values: Tensor) -> Tensor:
    """The rows `[T', ...]` of some values that no predictor learns from: every 20th token."""
    return values[HELD_OUT - 1 :: HELD_OUT] if len(values) >= HELD_OUT else values


def recall(predicted: Tensor, scores: Tensor, kept: int) -> float:
    """Share of the groups that matter most to each token which the predictor finds, by the rule of run time.

    Args:
        predicted: `[T, G]`.
        scores: `[T, G]`; a group whose score is zero need not be found.
        kept: Groups that each token keeps.
    """
    best = _chosen(scores, kept) * (scores > 0)
    return float((_chosen(predicted, kept) * best).sum() / best.sum().clamp_min(1))


def _chosen(scores: Tensor, kept: int) -> Tensor:
    return scores.new_zeros(scores.shape).scatter_(-1, scores.topk(kept, -1).indices, 1.0)
