"""Which token comes next: the best one, or a draw among those that the filters keep.

Penalty and filters mean what the logits processors of transformers mean, in the order transformers applies them
(`RepetitionPenaltyLogitsProcessor`, `TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`,
`MinPLogitsWarper`, transformers 5.23), ties included. They differ in cost: a vocabulary of 128k scores is read a few
times and never sorted, and only tokens that can survive are looked at more closely.

NumPy, one row at a time, on the calling thread: torch splits work of this size over its own threads, which then compete
with the worker threads of ONNX Runtime that spin between two steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from jettison.ir.errors import ArtifactError

Scores = NDArray[np.float32]
Positions = NDArray[np.intp]

# Scores per column in the search for the k best. Fewer columns are partitioned faster, shorter ones bound tighter.
_COLUMN = 32
# A nucleus of more candidates than this is found by buckets first: beyond, sorting them all costs more.
_SORT_AT_MOST, _BUCKETS = 8192, 4096
# Weights are summed in blocks before a running sum is taken: NumPy vectorises the one and not the other.
_BLOCK = 256


class Sampler:
    """Chooses the next token of each row.

    Randomness: every row draws from its own private generator, seeded with (seed, row number). What a row draws
    depends on its own logits, the seed and its place in the batch, never on what the other rows hold, how many there
    are or when they finish; equal prompts in one batch still get different continuations. One uniform number per token
    is turned into a token through the cumulative distribution in the order of the vocabulary, so that two targets
    whose logits differ by rounding draw the same tokens from the same seed.
    """

    def __init__(
        self,
        rows: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        seed: int | None = None,
        penalty: RepetitionPenalty | None = None,
    ) -> None:
        """Set up one generator per row.

        Args:
            rows: number of rows in the batch.
            do_sample: False takes the most likely token and ignores temperature, filters and seed.
            temperature: divides the logits; above 0.
            top_k: as in `keep_best`; 0 keeps all.
            top_p: as in `keep_nucleus`; 1.0 keeps all.
            min_p: as in `keep_likely`; 0.0 keeps all.
            seed: None draws a seed from torch's default generator, so `torch.manual_seed` decides, as it does in
                transformers.
            penalty: of the same rows; is told what they choose.
        """
        self.do_sample, self.temperature, self.penalty = do_sample, temperature, penalty
        self._top_k = top_k
        self._filters: list[Callable[[Scores], Positions]] = []
        if top_k:
            self._filters.append(partial(keep_best, k=top_k))
        if top_p < 1.0:
            self._filters.append(partial(keep_nucleus, top_p=top_p))
        if min_p:
            self._filters.append(partial(keep_likely, min_p=min_p))
        self._generators: list[torch.Generator] = []
        if not do_sample:
            return
        base = int(torch.randint(2**63 - 1, ()).item()) if seed is None else seed
        for row in range(rows):
            # SeedSequence mixes (seed, row) so that seed 1 row 0 and seed 0 row 1 share nothing.
            mixed = np.random.SeedSequence(base, spawn_key=(row,)).generate_state(1, np.uint64)[0]
            self._generators.append(torch.Generator().manual_seed(int(mixed) >> 1))

    def choose(self, logits: torch.Tensor, rows: Sequence[int] | None = None) -> list[int]:
        """Choose one token per row.

        Args:
            logits: `[N, V] f32`; not changed.
            rows: the N rows they belong to; None means all, in order.

        Returns:
            One token id per entry of `rows`, in that order.

        Raises:
            ArtifactError: a row's logits hold NaN (or `+inf`, or nothing but `-inf` when sampling).
        """
        values = logits.detach().to("cpu", torch.float32).numpy()
        wanted = range(len(values)) if rows is None else rows
        # Damaged logits may overflow here; they are refused below.
        with np.errstate(over="ignore", invalid="ignore"):
            return [self._choose(row, scores) for row, scores in zip(wanted, values, strict=True)]

    @property
    def enough(self) -> int:
        """How many of the best tokens `choose_best` needs to see; 0 if it needs all."""
        if self.penalty is not None:
            return 0
        if not self.do_sample:
            return 1
        # One more shows whether others are tied with the last.
        return self._top_k + 1 if self._top_k else 0

    def choose_best(self, logits: torch.Tensor, tokens: torch.Tensor, rows: Sequence[int] | None = None) -> list[int]:
        """Choose one token per row among the best ones: the token that `choose` chooses from all of them.

        With `top_k`, more tokens may be tied with the last than are seen; those with the lowest ids stay then.

        Args:
            logits: `[N, K] f32`, largest first, K at least `enough`, or all there are.
            tokens: Their ids, `[N, K] i64`.
            rows: the N rows they belong to; None means all, in order.

        Returns:
            One token id per entry of `rows`, in that order.

        Raises:
            ArtifactError: See `choose`.
        """
        values, ids = logits.numpy(), tokens.numpy()
        chosen = []
        for index, row in enumerate(range(len(values)) if rows is None else rows):
            if not np.isfinite(values[index, 0]):
                raise _not_numbers(row)
            # A draw goes through the tokens in the order of the vocabulary.
            order = np.argsort(ids[index])
            chosen.append(int(ids[index][order][self._choose(row, values[index][order])]))
        return chosen

    def candidates(self, row: int, logits: Scores) -> tuple[Scores, Positions | None]:
        """What a draw chooses among: penalty, temperature and filters applied.

        Args:
            row: the row they belong to.
            logits: `[V] f32`; not changed.

        Returns:
            `(scores, tokens)`: `[N] f32` and the ids they belong to, ascending; tokens is None where all are left.

        Raises:
            ArtifactError: the logits hold NaN or `+inf`, or nothing but `-inf`.
        """
        scores = logits if self.penalty is None else self.penalty.apply(row, logits)
        if self.temperature != 1.0:
            # Penalised scores are a copy already.
            scores = np.divide(scores, self.temperature, out=None if scores is logits else scores)
        if not np.isfinite(scores.max()):
            raise _not_numbers(row)
        tokens: Positions | None = None
        for keep in self._filters:
            kept = keep(scores)
            scores, tokens = scores[kept], kept if tokens is None else tokens[kept]
        return scores, tokens

    def _choose(self, row: int, logits: Scores) -> int:
        token = self._draw(row, logits) if self.do_sample else self._best(row, logits)
        if self.penalty is not None:
            self.penalty.add(row, token)
        return token

    def _best(self, row: int, logits: Scores) -> int:
        scores = logits if self.penalty is None else self.penalty.apply(row, logits)
        token = int(scores.argmax())
        # argmax returns a NaN where there is one, so this one value tells about the whole row.
        if np.isnan(scores[token]):
            raise _not_numbers(row)
        return token

    def _draw(self, row: int, logits: Scores) -> int:
        scores, tokens = self.candidates(row, logits)
        uniform = torch.rand(1, dtype=torch.float64, generator=self._generators[row]).item()
        position = _pick(np.exp(scores - scores.max()), uniform)
        return position if tokens is None else int(tokens[position])


class RepetitionPenalty:
    """Makes tokens that a row already holds, prompt included, less likely; each once, however often it occurs."""

    def __init__(self, penalty: float, prompts: Sequence[Sequence[int]], vocab_size: int) -> None:
        """Remember the prompts.

        Args:
            penalty: divides positive scores and multiplies negative ones; above 0, and below 1 a reward.
            prompts: what each row begins with.
            vocab_size: token ids are below it; the model may have logits for fewer.
        """
        self._penalty = penalty
        self._seen = np.zeros((len(prompts), vocab_size), dtype=np.bool_)
        for seen, prompt in zip(self._seen, prompts, strict=True):
            seen[list(prompt)] = True

    def apply(self, row: int, logits: Scores) -> Scores:
        """The row's logits with the penalty, `[V] f32`, a copy."""
        scores = logits.copy()
        seen = np.flatnonzero(self._seen[row, : len(logits)])
        old = scores[seen]
        scores[seen] = np.where(old < 0, old * self._penalty, old / self._penalty)
        return scores

    def add(self, row: int, token: int) -> None:
        """Remember that the row now holds this token too."""
        self._seen[row, token] = True


def keep_best(scores: Scores, k: int) -> Positions:
    """The k best tokens and every token tied with the k-th.

    Args:
        scores: `[N] f32`.
        k: at least 1; all tokens where there are fewer.

    Returns:
        Their positions, ascending.
    """
    if k >= len(scores):
        return np.arange(len(scores))
    columns = len(scores) // _COLUMN
    if columns < k:
        return np.flatnonzero(scores >= _kth_best(scores, k))
    # At least k tokens reach the k-th best of the columns' maxima, so the k-th best token does.
    maxima = scores[: columns * _COLUMN].reshape(_COLUMN, columns).max(0)
    near = np.flatnonzero(scores >= _kth_best(maxima, k))
    candidates = scores[near]
    return near[candidates >= _kth_best(candidates, k)]


def keep_nucleus(scores: Scores, top_p: float) -> Positions:
    """The smallest set of best tokens that holds at least this much probability, and never less than one token.

    Of several tied tokens at the edge of the set, those with the lowest positions stay.

    Args:
        scores: `[N] f32`.
        top_p: 0 to 1.

    Returns:
        Their positions, ascending.
    """
    best = scores.max()
    weights = np.exp(scores - best)
    total = float(weights.sum(dtype=np.float64))
    wanted = top_p * total
    # Tokens below this weight hold less than 1 - top_p all together, so none of them is in the set. Half: rounding.
    near = np.flatnonzero(weights > (1.0 - top_p) * total / len(scores) / 2)
    candidates = scores[near]
    edge, before, held = candidates, 0, 0.0
    if len(near) > _SORT_AT_MOST:
        edge, before, held = _bucket_at(candidates, best, weights[near], wanted)
    ordered = np.sort(edge)[::-1]
    mass = held + np.exp(ordered - best).cumsum(dtype=np.float64)
    # A token stays while the mass before it is short of what is wanted.
    last = min(int(mass.searchsorted(wanted)), len(ordered) - 1)
    threshold = ordered[last]
    is_kept = candidates >= threshold
    surplus = int(np.count_nonzero(is_kept)) - (before + last + 1)
    if surplus:
        is_kept[np.flatnonzero(candidates == threshold)[-surplus:]] = False
    return near[np.flatnonzero(is_kept)]


def keep_likely(scores: Scores, min_p: float) -> Positions:
    """The tokens at least `min_p` times as likely as the best one.

    Args:
        scores: `[N] f32`.
        min_p: above 0, at most 1.

    Returns:
        Their positions, ascending.
    """
    # p >= min_p * p_max in logarithms: no probability has to be computed.
    return np.flatnonzero(scores >= float(scores.max()) + math.log(min_p))


def _kth_best(scores: Scores, k: int) -> np.float32:
    return np.partition(scores, len(scores) - k)[len(scores) - k]


def _bucket_at(scores: Scores, best: np.float32, weights: Scores, wanted: float) -> tuple[Scores, int, float]:
    """The bucket of scores in which the running mass of the best tokens reaches `wanted`.

    Returns:
        The scores in it, and number and mass of the better ones.
    """
    depth = best - scores
    bucket = (depth * (_BUCKETS / max(float(depth.max()), 1e-30))).astype(np.intp)
    mass = np.bincount(bucket, weights).cumsum()
    at = min(int(mass.searchsorted(wanted)), len(mass) - 1)
    return scores[bucket == at], int(np.count_nonzero(bucket < at)), float(mass[at - 1]) if at else 0.0


def _pick(weights: Scores, uniform: float) -> int:
    """The position at which the running sum of weights passes a share of their sum.

    Args:
        weights: `[N] f32`, not normalised, at least one above zero.
        uniform: the share, 0 to 1.

    Returns:
        A position of a weight above zero.
    """
    # f64: over 128k tokens the rounding of an f32 running sum is as large as the tail it adds up.
    sums = np.add.reduceat(weights, np.arange(0, len(weights), _BLOCK), dtype=np.float64).cumsum()
    target = _below(uniform * sums[-1], sums[-1])
    block = int(sums.searchsorted(target, side="right"))
    inside = weights[block * _BLOCK : (block + 1) * _BLOCK].cumsum(dtype=np.float64)
    target = _below(target - (sums[block - 1] if block else 0.0), inside[-1])
    return block * _BLOCK + int(inside.searchsorted(target, side="right"))


def _below(value: float, limit: float) -> float:
    """Strictly below the limit, or rounding could pick a token past the last one with a probability."""
    return min(value, float(np.nextafter(limit, 0.0)))


def _not_numbers(row: int) -> ArtifactError:
    return ArtifactError(
        f"[generate] row {row}: the model's logits are not numbers (NaN), needs finite ones to choose a token: a "
        "weight is damaged, or an activation overflowed its dtype. Run `jettison verify` on the folder; if it passes, "
        "optimise again with float32 activations."
    )
