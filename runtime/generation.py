"""Generation: prompts in, continuations out, over any session that can prefill and decode.

Lengths follow transformers 5: every row of a batch may get the same number of new tokens, counted from the longest
prompt, and a row never holds more tokens than the model's context. Generation that reaches the context ends with finish
reason "length".
"""

from __future__ import annotations

import numbers
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from jettison.ir.errors import OptionError
from jettison.runtime.generation_options import DEFAULT_NEW_TOKENS, GenerationOptions, as_strings, as_token_ids
from jettison.runtime.sampling import RepetitionPenalty, Sampler
from jettison.runtime.tokenizer import IncrementalDecoder, StopStrings, Tokenizer

FinishReason = Literal["eos", "stop", "length"]


class Session(Protocol):
    """A batch of sequences and their state, as the executors provide it."""

    @property
    def context(self) -> int:
        """Most tokens a row may hold."""
        ...

    @property
    def vocab_size(self) -> int:
        """Number of token ids the model has embeddings for."""
        ...

    @property
    def lengths(self) -> list[int]:
        """Tokens that each row holds."""
        ...

    def prefill(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Run the prompts; `[B, V] f32`: logits after the last token of each row (rows may differ in length)."""
        ...

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to each row; `[B, V] f32`."""
        ...

    @property
    def most_best(self) -> int:
        """Most tokens that `decode_best` picks for a row; 0 where it cannot."""
        ...

    def decode_best(self, tokens: Sequence[int], count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append one token to each row; logits `[B, count] f32` of the best next ones, best first, and their ids."""
        ...

    def repeated(self, times: int) -> Session:
        """A session in which every row stands so many times, each to be continued in a way of its own."""
        ...


OpenSession = Callable[[int, int], Session]
"""`open_session(batch, capacity)`: capacity is the most tokens any row will hold, prompt and continuation together. It
may exceed the model's context: the factory then opens a session of the context, and generation stops there."""


@dataclass(frozen=True)
class GeneratedRow:
    """The continuation of one prompt.

    Attributes:
        token_ids: the new tokens, up to and including the one that ended the row (end of text, or completing a stop
            string), as transformers returns them.
        text: their text without special tokens, cut before the stop string; None without a tokenizer.
        finish_reason: "eos" an end token, "stop" a stop string, "length" the token limit or the context.
        prompt_tokens: length of the prompt.
    """

    token_ids: tuple[int, ...]
    text: str | None
    finish_reason: FinishReason
    prompt_tokens: int


@dataclass(frozen=True)
class GenerationResult:
    """Continuations of a batch, in the order of the prompts, and where the time went.

    Attributes:
        rows: `num_return_sequences` entries per prompt.
        prefill_seconds: running the prompts and choosing each row's first token.
        decode_seconds: everything after that, without the caller's own time in callbacks.
        steps: decode calls made, each of one token per row.
    """

    rows: tuple[GeneratedRow, ...]
    prefill_seconds: float
    decode_seconds: float
    steps: int

    @property
    def token_ids(self) -> list[list[int]]:
        """New token ids of each row."""
        return [list(row.token_ids) for row in self.rows]

    @property
    def texts(self) -> list[str | None]:
        """New text of each row."""
        return [row.text for row in self.rows]


class Streamer(Protocol):
    """What transformers calls a streamer (`TextStreamer`, `TextIteratorStreamer`)."""

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt `[1, S] i64` first, then each new token `[1] i64`."""
        ...

    def end(self) -> None:
        """Be told that nothing follows."""
        ...


def generate(
    open_session: OpenSession,
    prompts: Sequence[Sequence[int]],
    options: GenerationOptions | None = None,
    tokenizer: Tokenizer | None = None,
    on_token: Callable[[int, int], None] | None = None,
    streamer: Streamer | None = None,
) -> GenerationResult:
    """Continue every prompt of a batch.

    Args:
        open_session: opens a session for a batch.
        prompts: token ids, one list per row; rows may differ in length.
        options: None means the defaults.
        tokenizer: for `text` in the result; needed by stop_strings.
        on_token: called as (row, token id) for each new token, in order.
        streamer: an object of transformers that is fed the prompt and then each token; one prompt only.

    Returns:
        The continuations.

    Raises:
        OptionError: a prompt is empty, too long, or holds something that is no token of this model.
        UnsupportedError: a stop string that cannot be found in text.
        ArtifactError: the model's logits are not numbers.
    """
    batch = _Batch(prompts, options or GenerationOptions(), tokenizer)
    if streamer is None:
        return _drain(batch.open(open_session), on_token)
    if len(batch.prompts) != 1:
        raise OptionError(
            f"[generate] streamer: found {len(batch.prompts)} prompts, needs one, because a streamer prints one text. "
            "Pass the prompts one by one, or use on_token."
        )
    _refuse_several("streamer", batch.options)
    put = streamer.put

    def put_token(row: int, token: int) -> None:
        put(torch.tensor([token]))
        if on_token is not None:
            on_token(row, token)

    events = batch.open(open_session)
    put(torch.tensor([batch.prompts[0]]))
    try:
        return _drain(events, put_token)
    finally:
        streamer.end()  # also after an error: a TextIteratorStreamer's reader would wait for ever


def stream(
    open_session: OpenSession,
    prompt: Sequence[int],
    options: GenerationOptions | None = None,
    tokenizer: Tokenizer | None = None,
) -> Generator[str, None, GenerationResult]:
    """Continue one prompt, yielding text as it becomes certain.

    No piece ends inside a character, and no piece holds text that may turn out to be part of a stop string. The pieces
    add up to the `text` that `generate` returns. Options and prompt are checked before this returns; the model runs as
    the pieces are read, and stops when the reader stops.

    Args:
        open_session: opens a session for a batch of one.
        prompt: token ids.
        options: None means the defaults.
        tokenizer: needed, since this yields text.

    Returns:
        A generator of non-empty pieces, whose return value (`StopIteration.value`) is the result.

    Raises:
        OptionError: as `generate`, no tokenizer, or more than one sequence.
    """
    if tokenizer is None:
        raise OptionError(
            "[generate] stream: found no tokenizer, needs one to turn tokens into text. Pass tokenizer=, or use "
            "generate(on_token=...) for token ids."
        )
    batch = _Batch([prompt], options or GenerationOptions(), tokenizer)
    _refuse_several("stream", batch.options)
    return _pieces(batch.open(open_session))


_Event = tuple[int, int, str]  # a row got a token: (row, token id, text that became certain)
_Events = Generator[_Event, None, GenerationResult]


def _drain(events: _Events, on_token: Callable[[int, int], None] | None) -> GenerationResult:
    while True:
        try:
            row, token, _ = next(events)
        except StopIteration as end:
            result: GenerationResult = end.value
            return result
        if on_token is not None:
            on_token(row, token)


def _pieces(events: _Events) -> Generator[str, None, GenerationResult]:
    while True:
        try:
            _, _, piece = next(events)
        except StopIteration as end:
            result: GenerationResult = end.value
            return result
        if piece:
            yield piece


class _Batch:
    """The prompts of one call, checked, and the loop that continues them."""

    def __init__(
        self, prompts: Sequence[Sequence[int]], options: GenerationOptions, tokenizer: Tokenizer | None
    ) -> None:
        self.options = options
        self.prompts = _as_prompts(prompts)
        self.longest = max(len(prompt) for prompt in self.prompts)
        self.stop_strings = as_strings(options.stop_strings)
        self.end_tokens: dict[int, FinishReason] = {}
        if self.stop_strings and tokenizer is None:
            raise OptionError(
                f"[generate] stop_strings: found {list(self.stop_strings)} but no tokenizer, needs one to compare "
                "text. Pass tokenizer=, or end rows with eos_token_id."
            )
        if tokenizer is not None:
            self.end_tokens |= dict.fromkeys(StopStrings.special_ids(self.stop_strings, tokenizer), "stop")
        self.end_tokens |= dict.fromkeys(as_token_ids(options.eos_token_id), "eos")
        # The prompt of each row: the sequences of one prompt follow each other.
        self.row_prompts = [prompt for prompt in self.prompts for _ in range(options.num_return_sequences)]
        self.rows = [_Row(self.stop_strings, tokenizer) for _ in self.row_prompts]

    def open(self, open_session: OpenSession) -> _Events:
        """Open a session and check the prompts against it; the model runs as the events are read."""
        wanted = self._wanted_tokens()
        capacity = self.longest + wanted
        session = open_session(len(self.prompts), capacity)
        for row, prompt in enumerate(self.prompts):
            _check_prompt(row, prompt, session)
        budget = min(wanted, session.context - self.longest)
        return self._run(session, budget)

    def _wanted_tokens(self) -> int:
        options = self.options
        if options.max_new_tokens is not None:
            return options.max_new_tokens
        if options.max_length is None:
            return DEFAULT_NEW_TOKENS
        if options.max_length <= self.longest:
            raise OptionError(
                f"[generate] max_length: found {options.max_length} with a prompt of {self.longest} tokens, needs more "
                f"than the prompt, because max_length counts the prompt too. Set max_new_tokens={DEFAULT_NEW_TOKENS}."
            )
        return options.max_length - self.longest

    def _run(self, session: Session, budget: int) -> _Events:
        """Yield the tokens of each step; times leave out what the reader does meanwhile."""
        rows, sampler = self.rows, self._sampler(session.vocab_size)
        start = time.perf_counter()
        session, logits = self._prefill(session)
        events = self._accept(sampler.choose, (logits,), budget)
        best = sampler.enough if 0 < sampler.enough <= session.most_best else 0
        prefill_seconds, decode_seconds, steps = time.perf_counter() - start, 0.0, 0
        yield from events
        while any(row.finish_reason is None for row in rows):
            start = time.perf_counter()
            tokens = [self._next_input(row, session.vocab_size) for row in rows]
            if best:
                events = self._accept(sampler.choose_best, session.decode_best(tokens, best), budget)
            else:
                events = self._accept(sampler.choose, (session.decode(tokens),), budget)
            decode_seconds += time.perf_counter() - start
            steps += 1
            yield from events
        generated = tuple(row.result(len(prompt)) for row, prompt in zip(rows, self.row_prompts, strict=True))
        return GenerationResult(generated, prefill_seconds, decode_seconds, steps)

    def _sampler(self, vocab_size: int) -> Sampler:
        options = self.options
        penalty = None
        if options.repetition_penalty != 1.0:
            penalty = RepetitionPenalty(options.repetition_penalty, self.row_prompts, vocab_size)
        return Sampler(
            len(self.rows), options.do_sample, temperature=options.temperature, top_k=options.top_k,
            top_p=options.top_p, min_p=options.min_p, seed=options.seed, penalty=penalty,
        )  # fmt: skip

    def _prefill(self, session: Session) -> tuple[Session, torch.Tensor]:
        """Run each prompt once; a session with a row for every sequence, and the logits `[B, V] f32` of its rows."""
        logits, times = session.prefill(self.prompts), self.options.num_return_sequences
        if times == 1:
            return session, logits
        return session.repeated(times), logits.repeat_interleave(times, 0)

    def _accept(self, choose: Callable[..., list[int]], logits: tuple[torch.Tensor, ...], budget: int) -> list[_Event]:
        """Choose a token for every row that goes on; finished rows draw nothing."""
        active = [i for i, row in enumerate(self.rows) if row.finish_reason is None]
        logits = logits if len(active) == len(self.rows) else tuple(each[active] for each in logits)
        events = []
        for i, token in zip(active, choose(*logits, active), strict=True):
            is_last = len(self.rows[i].token_ids) + 1 >= budget
            events.append((i, token, self.rows[i].accept(token, self.end_tokens.get(token), is_last)))
        return events

    def _next_input(self, row: _Row, vocab_size: int) -> int:
        """What a row is fed next; a finished row only keeps its place in the batch."""
        pad = self.options.pad_token_id
        # Some models name a padding token that they have no embedding for.
        if row.finish_reason is None or pad is None or pad >= vocab_size:
            return row.token_ids[-1]
        return pad


class _Row:
    """The growing continuation of one prompt."""

    def __init__(self, stop_strings: tuple[str, ...], tokenizer: Tokenizer | None) -> None:
        self.token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None
        self._decoder = None if tokenizer is None else IncrementalDecoder(tokenizer)
        self._stops = StopStrings(stop_strings)
        self._text: list[str] = []

    def accept(self, token: int, ends: FinishReason | None, is_last: bool) -> str:
        """Append one token; returns the text that became certain."""
        self.token_ids.append(token)
        piece = "" if self._decoder is None else self._stops.push(self._decoder.push(token))
        if ends is None and self._stops.is_found:
            ends = "stop"
        if ends is None and is_last:
            ends = "length"
        if ends is not None and self._decoder is not None:
            piece += self._stops.push(self._decoder.finish()) + self._stops.finish()
        self.finish_reason = ends
        self._text.append(piece)
        return piece

    def result(self, prompt_tokens: int) -> GeneratedRow:
        text = None if self._decoder is None else "".join(self._text)
        return GeneratedRow(tuple(self.token_ids), text, self.finish_reason or "length", prompt_tokens)


def _refuse_several(where: str, options: GenerationOptions) -> None:
    """Refuse several sequences where one text is written."""
    if options.num_return_sequences > 1:
        raise OptionError(
            f"[generate] {where}: found num_return_sequences={options.num_return_sequences}, needs 1, because one text "
            "is written as it comes. Set num_return_sequences=1, or use generate without a streamer."
        )


def _as_prompts(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Check everything about the prompts that can be checked without the model."""
    if isinstance(prompts, str) or not len(prompts):
        found = "text" if prompts else "no prompts"
        raise OptionError(
            f"[generate] prompts: found {found}, needs a list with one list of token ids per row. Encode the text with "
            "the model's tokenizer first."
        )
    checked = []
    for row, prompt in enumerate(prompts):
        # Tensors and arrays become Python integers; `tolist` of a scalar is no list and is refused below.
        ids: Any = prompt.tolist() if hasattr(prompt, "tolist") else prompt
        if isinstance(ids, str) or not isinstance(ids, Sequence):
            raise OptionError(
                f"[generate] prompt {row}: found {type(ids).__name__}, needs a list of token ids. Encode text with the "
                "model's tokenizer, and wrap a single prompt in a list."
            )
        if not ids:
            raise OptionError(
                f"[generate] prompt {row}: found no tokens, needs at least 1 to continue from. Start with the "
                "beginning-of-text token of the model, or any text."
            )
        for position, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, numbers.Integral):
                raise OptionError(
                    f"[generate] prompt {row}, position {position}: found {token!r} ({type(token).__name__}), needs an "
                    "integer token id. Encode the text with the model's tokenizer."
                )
        checked.append([int(token) for token in ids])
    return checked


def _check_prompt(row: int, prompt: list[int], session: Session) -> None:
    """Check a prompt against the model's vocabulary and context."""
    if min(prompt) < 0 or max(prompt) >= session.vocab_size:
        position, token = next((p, t) for p, t in enumerate(prompt) if not 0 <= t < session.vocab_size)
        raise OptionError(
            f"[generate] prompt {row}, position {position}: found token {token}, needs 0 to {session.vocab_size - 1}, "
            f"because the model's vocabulary has {session.vocab_size} tokens. Use the tokenizer of this model, and "
            "drop padding."
        )
    if len(prompt) >= session.context:
        raise OptionError(
            f"[generate] prompt {row}: found {len(prompt)} tokens, needs at most {session.context - 1}, because the "
            f"model's context holds {session.context} and one must be left to generate. Shorten the prompt, for "
            f"example to its last {session.context - 1} tokens."
        )
