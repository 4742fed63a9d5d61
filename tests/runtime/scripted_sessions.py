"""Sessions with made-up logits, a tokenizer of bytes, and what collects what they say."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch

from jettison.runtime.generation import GenerationResult
from jettison.runtime.tokenizer import Tokenizer


class PrefixSession:
    """Logits are a function of a row's own tokens, so a row alone and the row in a batch must agree."""

    most_best = 0

    def __init__(
        self,
        logits_of: Callable[[list[int]], torch.Tensor],
        batch: int,
        capacity: int,
        vocab_size: int,
        context: int = 64,
    ) -> None:
        self.logits_of, self.batch, self.capacity = logits_of, batch, min(capacity, context)
        self.vocab_size, self.context = vocab_size, context
        self.lengths = [0] * batch
        self.states = {"tokens": torch.zeros(batch, self.capacity, dtype=torch.int64)}
        self.prefilled: list[list[int]] = []
        self.fed: list[list[int]] = []

    def prefill(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        assert not any(self.lengths), "one prefill per session"
        self.prefilled = [list(row) for row in rows]
        return self._append(self.prefilled)

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        assert len(tokens) == self.batch
        self.fed.append(list(tokens))
        assert all(0 <= token < self.vocab_size for token in tokens), "an embedding would be read out of bounds"
        return self._append([[token] for token in tokens])

    def decode_best(self, tokens: Sequence[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        assert 1 <= count <= self.most_best
        self.asked = count
        values, ids = self.decode(tokens).sort(dim=1, descending=True, stable=True)
        return values[:, :count], ids[:, :count]

    def repeated(self, times: int) -> PrefixSession:
        wide = PrefixSession(self.logits_of, self.batch * times, self.capacity, self.vocab_size, self.context)
        wide.lengths = [length for length in self.lengths for _ in range(times)]
        wide.states["tokens"].copy_(self.states["tokens"].repeat_interleave(times, 0))
        self.wide = wide
        return wide

    def _append(self, rows: list[list[int]]) -> torch.Tensor:
        assert len(rows) == self.batch
        logits = []
        for row, (tokens, new) in enumerate(zip(self.states["tokens"], rows, strict=True)):
            before, self.lengths[row] = self.lengths[row], self.lengths[row] + len(new)
            assert self.lengths[row] <= self.capacity, "a row outgrew what the session was opened for"
            tokens[before : self.lengths[row]] = torch.tensor(new)
            logits.append(self.logits_of(tokens[: self.lengths[row]].tolist()))
        return torch.stack(logits)


class Opener:
    """Opens sessions and remembers them."""

    def __init__(self, logits_of: Callable[[list[int]], torch.Tensor], vocab_size: int, context: int = 64) -> None:
        self.logits_of, self.vocab_size, self.context = logits_of, vocab_size, context
        self.opened: list[tuple[int, int]] = []
        self.sessions: list[PrefixSession] = []

    def __call__(self, batch: int, capacity: int) -> PrefixSession:
        self.opened.append((batch, capacity))
        self.sessions.append(PrefixSession(self.logits_of, batch, capacity, self.vocab_size, self.context))
        return self.sessions[-1]


def seeded(vocab_size: int = 50, context: int = 64) -> Opener:
    """Random logits, the same for the same tokens."""

    def logits_of(row: list[int]) -> torch.Tensor:
        state = np.random.SeedSequence([len(row), *row]).generate_state(1)[0]
        return torch.randn(vocab_size, generator=torch.Generator().manual_seed(int(state)))

    return Opener(logits_of, vocab_size, context)


def scripted(*scripts: Sequence[int], vocab_size: int = 300, prompt_tokens: int = 1) -> Opener:
    """Every row says its script, whatever it is fed; the row is known by the first token of its prompt."""

    def logits_of(row: list[int]) -> torch.Tensor:
        script = scripts[row[0]]
        said = len(row) - prompt_tokens
        logits = torch.zeros(vocab_size)
        logits[script[min(said, len(script) - 1)]] = 1.0
        return logits

    return Opener(logits_of, vocab_size)


class ByteTokenizer(Tokenizer):
    """One token per byte, and 256 for the end: every character outside ASCII is split over tokens."""

    vocab_size, eos_token_id, special_tokens = 257, 256, {"<end>": 256}

    def _encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _decode(self, ids: list[int]) -> str:
        return bytes(i for i in ids if i < 256).decode("utf-8", errors="replace")


def drain(pieces) -> tuple[list[str], GenerationResult]:
    collected = []
    while True:
        try:
            collected.append(next(pieces))
        except StopIteration as end:
            return collected, end.value


class RecordingStreamer:
    def __init__(self) -> None:
        self.values: list[torch.Tensor] = []
        self.ended = 0

    def put(self, value: torch.Tensor) -> None:
        self.values.append(value)

    def end(self) -> None:
        self.ended += 1
