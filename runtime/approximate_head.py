"""What a decode step of an approximate head returns, and which of it may be believed.

`decode` of such a program returns candidates (see `passes/head_forms.py`). A session takes the best of them where they
are proven to be the best of all, and asks the entries `head_rows` and `head` otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jettison.ir.program import HEAD, HEAD_INPUT, HEAD_ROWS, HEAD_TOKENS
from jettison.runtime.executor import Executor
from jettison.runtime.sampling import keep_best

CANDIDATES = "candidates"


def has_approximate_head(executor: Executor) -> bool:
    """Whether decode steps return candidates instead of all logits."""
    return "decode" in executor.entries and CANDIDATES in executor.entries["decode"].outputs


@dataclass(frozen=True)
class Candidates:
    """Of the last token of each row.

    Attributes:
        tokens: `[B, k]` i64, best first, the lower id first of two that are equally good.
        logits: `[B, k]` f32, theirs.
        reserve: `[B, R]` i64, the next tokens; None where nothing is proven.
        bounds: `[B, R + 1]` f32, not rising: entry j bounds the logits of reserve token j and of all tokens that are
            neither candidates nor in front of it.
        head_input: `[B, 1, E]`, what the entries `head` and `head_rows` take.
    """

    tokens: Tensor
    logits: Tensor
    reserve: Tensor | None
    bounds: Tensor | None
    head_input: Tensor

    @classmethod
    def of(cls, outputs: Mapping[str, Tensor]) -> Candidates:
        """Sort what `decode` returned for one token per row."""
        logits, tokens = _sorted(outputs["candidate_logits"][:, 0], outputs[CANDIDATES][:, 0])
        reserve, bounds = (outputs[name][:, 0] if name in outputs else None for name in ("reserve", "bounds"))
        return cls(tokens, logits, reserve, bounds, outputs[HEAD_INPUT])

    def certified(self, count: int, *, with_reserve: bool = False) -> Tensor:
        """Rows whose best `count` candidates are proven to be the best tokens: `[B]` bool.

        One that is as good as a bound may be tied with a token outside; it is not certified.

        Args:
            count: How many.
            with_reserve: Whether the tokens in reserve may be computed to prove it.
        """
        if self.bounds is None or count > self.logits.shape[1]:
            return torch.zeros(len(self.logits), dtype=torch.bool)
        return self.logits[:, count - 1] > self.bounds[:, -1 if with_reserve else 0]

    def best(self, count: int, executor: Executor) -> tuple[Tensor, Tensor]:
        """The best tokens of each row.

        Where the candidates do not prove it, tokens in reserve are computed that may be among them, and all logits
        where those in reserve are not enough. Candidates without any bounds are taken as they are, if there are enough.

        Args:
            count: How many.
            executor: Whose `head` and `head_rows` to ask.

        Returns:
            Logits `[B, count]` f32, largest first, and tokens `[B, count]` i64.
        """
        values, tokens = self.logits[:, :count], self.tokens[:, :count]
        done = self.certified(count)
        if bool(done.all()) or (self.bounds is None and count <= self.logits.shape[1]):
            return values, tokens
        if count > self.logits.shape[1]:  # room for what comes instead
            values, tokens = (each.new_empty(len(each), count) for each in (values, tokens))
        values, tokens, near = values.clone(), tokens.clone(), self.certified(count, with_reserve=True) & ~done
        if bool(near.any()):
            values[near], tokens[near] = self._with_reserve(near, count, executor)
        far = ~(done | near)
        if bool(far.any()):
            found = [_best_of_all(row, count) for row in self.whole(executor, far)]
            values[far], tokens[far] = (torch.stack(each) for each in zip(*found, strict=True))
        return values, tokens

    def _with_reserve(self, rows: Tensor, count: int, executor: Executor) -> tuple[Tensor, Tensor]:
        """The best of candidates and reserve, for rows where that is proven."""
        assert self.bounds is not None, "or nothing is proven"
        assert self.reserve is not None, "or nothing is proven"
        logits, tokens = self.logits[rows], self.tokens[rows]
        # Bounds do not rise: those that reach the last of the best come first.
        needed = int((self.bounds[rows] >= logits[:, count - 1 : count]).sum(-1).max())
        more = self.reserve[rows][:, :needed]
        given = {HEAD_INPUT: self.head_input[rows].contiguous(), HEAD_TOKENS: more[:, None].contiguous()}
        computed = executor.run(HEAD_ROWS, given, {})["logits"][:, 0].to(torch.float32)
        values, found = _sorted(torch.cat([logits, computed], -1), torch.cat([tokens, more], -1))
        return values[:, :count], found[:, :count]

    def whole(self, executor: Executor, rows: Tensor | None = None) -> Tensor:
        """Logits of all tokens.

        Args:
            executor: Whose `head` to ask.
            rows: Of these rows only, `[B]` bool.

        Returns:
            `[N, V]` f32.
        """
        hidden = self.head_input if rows is None else self.head_input[rows]
        return executor.run(HEAD, {HEAD_INPUT: hidden.contiguous()}, {})["logits"][:, 0]


def _sorted(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """`[B, N]` with the largest logits first, the lower token first of two that are equal."""
    tokens, by_token = tokens.sort(-1)
    values, order = logits.gather(-1, by_token).sort(stable=True, descending=True)
    return values, tokens.gather(-1, order)


def _best_of_all(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of `[V]`, in descending order, the lower token first of two that are equal."""
    scores = logits.to(torch.float32).numpy()
    if count == 1 or np.isnan(scores).any():  # a NaN comes first, and is refused by who reads it
        best = int(scores.argmax())
        return logits[best].expand(count), torch.full((count,), best)
    near = keep_best(scores, count)
    order = near[np.argsort(-scores[near], kind="stable")[:count]]
    return torch.from_numpy(scores[order]), torch.from_numpy(order.astype(np.int64))
