"""Which token comes next: greedy, or a draw after temperature, top-k and top-p.

The filters mean what the logits warpers of transformers mean, in the order transformers applies them
(`TemperatureLogitsWarper`, `TopKLogitsWarper`, `TopPLogitsWarper`, transformers 5.23), ties at the k-th score included.
They work on the few candidates that can survive instead of on the whole vocabulary, because sorting 128k scores takes
longer than a decode step of a small model.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from jettison.ir.errors import ArtifactError

# Nucleus sampling without top-k looks at this many best tokens before it pays for a full sort; after temperature, a
# trained model keeps far fewer than this for any usual top_p.
_NUCLEUS_CANDIDATES = 1024


def filter_scores(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Apply temperature, top-k and top-p, keeping only the tokens that can still be drawn.

    Args:
        logits: `[B, V] f32`.
        temperature: divides the logits; above 0.
        top_k: keep the k best tokens and every token tied with the k-th; 0 keeps all.
        top_p: keep the smallest set of best tokens whose probabilities sum to at least this; 1.0 keeps all, 0.0 the
            best one. Which of several tied tokens stay at the edge of the set is unspecified, as in transformers.

    Returns:
        `(scores, tokens)`: scores `[B, N] f32` in descending order, `-inf` where a row keeps fewer than N, and the
        token ids `[B, N] i64` they belong to; `tokens` is None when nothing was filtered (scores are in vocabulary
        order then, N = V).
    """
    scores = logits if temperature == 1.0 else logits / temperature
    vocab_size = scores.shape[-1]
    if top_k and top_k < vocab_size:
        best, tokens = _best_with_ties(scores, top_k)
        return _cut_nucleus(best, tokens, top_p) if top_p < 1.0 else (best, tokens)
    if top_p < 1.0:
        return _nucleus(scores, top_p)
    return scores, None


class Sampler:
    """Chooses the next token of each row.

    Randomness: every row draws from its own private generator, seeded with (seed, row number). What a row draws
    depends on its own logits, the seed and its place in the batch, never on what the other rows hold, how many there
    are or when they finish; equal prompts in one batch still get different continuations. One uniform number per token
    is turned into a token through the cumulative distribution, so that two targets whose logits differ by rounding
    draw the same tokens from the same seed.
    """

    def __init__(
        self,
        rows: int,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> None:
        """Set up one generator per row.

        Args:
            rows: number of rows in the batch.
            do_sample: False takes the most likely token and ignores everything below.
            temperature: as in `filter_scores`.
            top_k: as in `filter_scores`.
            top_p: as in `filter_scores`.
            seed: None draws a seed from torch's default generator, so `torch.manual_seed` decides, as it does in
                transformers.
        """
        self.do_sample, self.temperature, self.top_k, self.top_p = do_sample, temperature, top_k, top_p
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
            logits: `[B, V] f32`, one row per row of the batch; not changed.
            rows: the rows to choose for; None means all of them.

        Returns:
            One token id per entry of `rows`, in that order.

        Raises:
            ArtifactError: a row's logits hold NaN (or `+inf`, or nothing but `-inf` when sampling).
        """
        wanted = list(range(logits.shape[0])) if rows is None else list(rows)
        logits = logits if len(wanted) == logits.shape[0] else logits[wanted]
        logits = logits if logits.dtype == torch.float32 else logits.float()
        chosen = self._draw(logits, wanted) if self.do_sample else _best(logits, wanted)
        return [int(token) for token in chosen.tolist()]

    def _draw(self, logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
        """Draw one token per row: `[B, V] f32` to `[B] i64`."""
        scores, tokens = filter_scores(logits, self.temperature, self.top_k, self.top_p)
        # f64: over 128k tokens the rounding of an f32 running sum is as large as the tail it adds up.
        cumulative = torch.softmax(scores, -1, dtype=torch.float64).cumsum(-1)
        total = cumulative[:, -1:]
        _refuse_nan(total[:, 0], rows)
        uniform = torch.stack([torch.rand(1, dtype=torch.float64, generator=self._generators[row]) for row in rows]).to(
            total.device
        )
        # Strictly below the total, or rounding could pick a token past the last one with a probability.
        target = torch.minimum(uniform * total, torch.nextafter(total, torch.zeros_like(total)))
        choice = torch.searchsorted(cumulative, target, right=True)
        return (choice if tokens is None else tokens.gather(-1, choice))[:, 0]


def _best(logits: torch.Tensor, rows: list[int]) -> torch.Tensor:
    tokens = logits.argmax(-1)
    # argmax returns a NaN where there is one, so this one value per row tells about the whole row.
    _refuse_nan(logits.gather(-1, tokens[:, None])[:, 0], rows)
    return tokens


def _refuse_nan(values: torch.Tensor, rows: list[int]) -> None:
    bad = values.isnan().nonzero()
    if len(bad):
        raise ArtifactError(
            f"[generate] row {rows[int(bad[0, 0])]}: the model's logits are not numbers (NaN), needs finite ones to "
            "choose a token: a weight is damaged, or an activation overflowed its dtype. Run `jettison verify` on the "
            "folder; if it passes, optimise again with float32 activations."
        )


def _best_with_ties(scores: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best of each row (`k < V`) and every token tied with the k-th, descending."""
    best, tokens = torch.topk(scores, k + 1)
    threshold = best[:, k - 1 : k]
    if bool((best[:, k:] >= threshold).any()):
        n = int((scores >= threshold).sum(-1).max())
        best, tokens = torch.topk(scores, max(n, k))
        return best.masked_fill(best < threshold, -torch.inf), tokens
    return best[:, :k], tokens[:, :k]


def _nucleus(scores: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-p over the whole vocabulary, without a full sort where the best tokens already hold the mass."""
    if scores.shape[-1] > _NUCLEUS_CANDIDATES:
        best, tokens = torch.topk(scores, _NUCLEUS_CANDIDATES)
        mass = torch.exp(best.double() - torch.logsumexp(scores.double(), -1, keepdim=True)).cumsum(-1)
        if bool((mass[:, -1] >= top_p).all()):
            # A token stays while the mass strictly before it is short of top_p; the first one always stays.
            kept = torch.cat([torch.ones_like(mass[:, :1], dtype=torch.bool), mass[:, :-1] < top_p], -1)
            return _trim(best, tokens, kept)
    best, tokens = torch.sort(scores, descending=True)
    return _cut_nucleus(best, tokens, top_p)


def _cut_nucleus(best: torch.Tensor, tokens: torch.Tensor, top_p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-p over descending candidates that hold all the mass, in the arithmetic of `TopPLogitsWarper`."""
    ascending = best.flip(-1).softmax(-1).cumsum(-1)
    kept = (ascending > 1 - top_p).flip(-1)
    kept[:, 0] = True
    return _trim(best, tokens, kept)


def _trim(best: torch.Tensor, tokens: torch.Tensor, kept: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop the columns that no row keeps; `kept` is a prefix of every row."""
    n = int(kept.sum(-1).max())
    return best[:, :n].masked_fill(~kept[:, :n], -torch.inf), tokens[:, :n]
