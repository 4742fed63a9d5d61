"""What a decode step of an approximate head returns, and which of it may be believed.

`decode` of such a program returns candidates (see `passes/head_forms.py`). A session takes the best of them where they
are proven to be the best of all, and asks the entry `head` for the other rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

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
        bound: `[B]` f32, no other token has a larger logit; None where nothing is proven.
        head_input: `[B, 1, E]`, what the entry `head` takes.
    """

    tokens: Tensor
    logits: Tensor
    bound: Tensor | None
    head_input: Tensor

    @classmethod
    def of(cls, outputs: Mapping[str, Tensor]) -> Candidates:
        """Sort what `decode` returned for one token per row."""
        tokens, logits = outputs[CANDIDATES][:, 0], outputs["candidate_logits"][:, 0]
        # Stable, so that tokens of equal logits stay in the order of their ids.
        tokens, by_id = tokens.sort(-1)
        logits, order = logits.gather(-1, by_id).sort(stable=True, descending=True)
        bound = outputs["bound"][:, 0] if "bound" in outputs else None
        return cls(tokens.gather(-1, order), logits, bound, outputs["head_input"])

    def certified(self, count: int) -> Tensor:
        """Rows whose best `count` candidates are proven to be the best tokens: `[B]` bool.

        One that is as good as the bound may be tied with a token outside; it is not certified.
        """
        if self.bound is None or count > self.logits.shape[1]:
            return torch.zeros(len(self.logits), dtype=torch.bool)
        return self.logits[:, count - 1] > self.bound

    def best(self, count: int, executor: Executor) -> tuple[Tensor, Tensor]:
        """The best tokens of each row, from the whole head where the candidates are not certified.

        Candidates without any bound are taken as they are, if there are enough of them.

        Args:
            count: How many.
            executor: Whose `head` to ask.

        Returns:
            Logits `[B, count]` f32, largest first, and tokens `[B, count]` i64.
        """
        taken = self.certified(count)
        if self.bound is None and count <= self.logits.shape[1]:
            taken = ~taken
        values, tokens = self.logits[:, :count], self.tokens[:, :count]
        open_rows = (~taken).nonzero().flatten()
        if not len(open_rows):
            return values, tokens
        found = [_best_of_all(row, count) for row in self.whole(executor, open_rows)]
        if len(open_rows) < len(taken):
            values, tokens = values.clone(), tokens.clone()
        else:
            values, tokens = values.new_empty(len(taken), count), tokens.new_empty(len(taken), count)
        for row, (own_values, own_tokens) in zip(open_rows.tolist(), found, strict=True):
            values[row], tokens[row] = own_values, own_tokens
        return values, tokens

    def whole(self, executor: Executor, rows: Tensor | None = None) -> Tensor:
        """Logits of all tokens.

        Args:
            executor: Whose `head` to ask.
            rows: Of these rows only, i64.

        Returns:
            `[N, V]` f32.
        """
        hidden = self.head_input if rows is None else self.head_input[rows]
        return executor.run("head", {"head_input": hidden.contiguous()}, {})["logits"][:, 0]


def _best_of_all(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest of `[V]`, in descending order, the lower token first of two that are equal."""
    scores = logits.to(torch.float32).numpy()
    if count == 1 or not np.isfinite(scores).all():  # a NaN comes first, and is refused by who reads it
        best = int(scores.argmax())
        return logits[best : best + 1], torch.tensor([best])
    near = keep_best(scores, count)
    order = near[np.argsort(-scores[near], kind="stable")[:count]]
    return torch.from_numpy(scores[order]), torch.from_numpy(order.astype(np.int64))
