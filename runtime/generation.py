"""Generation: prompts in, continuations out, over any session that can prefill and decode.

Option names and their meaning are those of `generate` in transformers 5; what jettison does not do and would change the
output is refused, never dropped silently.

Lengths follow transformers too: every row of a batch may get the same number of new tokens, counted from the longest
prompt, and a row never holds more tokens than the model's context. Generation that reaches the context ends with finish
reason "length".
"""

from __future__ import annotations

import difflib
import math
import numbers
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, Protocol

import torch

from jettison.ir.errors import OptionError, UnsupportedError
from jettison.runtime.sampling import Sampler
from jettison.runtime.tokenizer import IncrementalDecoder, StopStrings, Tokenizer

FinishReason = Literal["eos", "stop", "length"]

DEFAULT_NEW_TOKENS = 20
"""New tokens when neither max_new_tokens nor max_length is given, as in transformers."""

# Names of transformers that would change the tokens, and the values at which they do not.
_UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(["assistant_model", "custom_generate", "dola_layers", "exponential_decay_length_penalty"], ()),
    **dict.fromkeys(["forced_bos_token_id", "forced_eos_token_id", "prefix_allowed_tokens_fn"], ()),
    "watermarking_config": (),
    **dict.fromkeys(["bad_words_ids", "begin_suppress_tokens", "constraints", "force_words_ids"], ([],)),
    **dict.fromkeys(["logits_processor", "stopping_criteria", "suppress_tokens"], ([],)),
    "sequence_bias": ({}, []),
    **dict.fromkeys(["diversity_penalty", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"], (0,)),
    **dict.fromkeys(["no_repeat_ngram_size", "penalty_alpha"], (0,)),
    **dict.fromkeys(["encoder_repetition_penalty", "guidance_scale", "num_beam_groups", "num_beams"], (1,)),
    **dict.fromkeys(["num_return_sequences", "repetition_penalty"], (1,)),
    **dict.fromkeys(["remove_invalid_values", "token_healing"], (False,)),
}
# The same for names that transformers reads only when do_sample is set.
_UNSUPPORTED_WHEN_SAMPLING: dict[str, tuple[Any, ...]] = {
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
}
# Names that change what is returned, when it stops or how the cache is kept, but not which tokens are likely: refused
# when asked for in a call, ignored in a generation_config.json written for another library.
_UNSUPPORTED_IN_CALLS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(["cache_config", "cache_implementation", "max_time"], ()),
    **dict.fromkeys(["output_attentions", "output_hidden_states", "output_logits", "output_scores"], (False,)),
    "return_dict_in_generate": (False,),
}
# Names without effect on one plain decoder: of beam search, speculation, encoder-decoders, compilation and bookkeeping.
_IGNORED = (
    "assistant_confidence_threshold assistant_early_exit assistant_ensemble_weight assistant_lookbehind bos_token_id "
    "compile_config continuous_batching_config decoder_start_token_id disable_compile early_stopping is_assistant "
    "length_penalty low_memory max_cache_len max_matching_ngram_size num_assistant_tokens "
    "num_assistant_tokens_schedule prefill_chunk_size prompt_lookup_num_tokens renormalize_logits speculation_type "
    "target_lookbehind transformers_version use_cache use_mtp"
)
_NEAREST = {
    "cache_implementation": "Choose the cache when optimising, with the pass cache-kv{policy=...}",
    "num_beams": "Use do_sample=True for varied text",
    "num_return_sequences": "Pass the prompt several times in one batch",
    "min_p": "Use top_p",
    "typical_p": "Use top_p",
    "stopping_criteria": "Use stop_strings or eos_token_id",
    "max_time": "Use max_new_tokens, or stop reading from a stream",
}


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

    def prefill(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Run the prompts; `[B, V] f32`: logits after the last token of each row (rows may differ in length)."""
        ...

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """Append one token to each row; `[B, V] f32`."""
        ...


OpenSession = Callable[[int, int], Session]
"""`open_session(batch, capacity)`: capacity is the most tokens any row will hold, prompt and continuation together. It
may exceed the model's context: the factory then opens a session of the context, and generation stops there."""


@dataclass(frozen=True)
class GenerationOptions:
    """How to continue a prompt, in the names of transformers.

    Attributes:
        max_new_tokens: most new tokens per row, at least 1. Wins over max_length; None with no max_length means 20.
        max_length: most tokens of the longest row, prompt included, at least 1.
        do_sample: draw tokens at random; False takes the most likely one and ignores temperature, top_k and top_p.
        temperature: divides the logits; 0 to 1e6, at least 1e-6 when sampling.
        top_k: sample among the k best tokens; 0 means all. transformers samples with 50 unless told otherwise.
        top_p: sample among the best tokens that hold this much probability, 0 to 1; 1 means all.
        seed: of the draws, 0 to 2**63 - 1; None follows torch's default generator.
        stop_strings: end a row when its new text contains one of them; the text is cut before it. Needs a tokenizer.
            (transformers also counts one that begins in the prompt; that would leave nothing to cut.)
        eos_token_id: token id or ids that end a row; the empty list means none. Kept as a tuple.
        pad_token_id: what finished rows are fed while the others go on; it has no effect on the result.
    """

    max_new_tokens: int | None = None
    max_length: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 50
    top_p: float = 1.0
    seed: int | None = None
    stop_strings: str | Sequence[str] | None = None
    eos_token_id: int | Sequence[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        """Check every value and bring it to one form."""
        _set_integer(self, "max_new_tokens", 1, f"Set max_new_tokens={DEFAULT_NEW_TOKENS}", optional=True)
        _set_integer(self, "max_length", 1, "Set max_new_tokens instead", optional=True)
        _set_integer(self, "top_k", 0, "Set top_k=0 to keep all tokens")
        _set_integer(self, "seed", 0, "Set seed=0", optional=True)
        _set_integer(self, "pad_token_id", 0, "Leave pad_token_id out", optional=True)
        if self.seed is not None and self.seed >= 2**63:
            raise _wrong("seed", self.seed, "an integer below 2**63", "Set seed=0")
        if not isinstance(self.do_sample, bool):
            raise _wrong("do_sample", self.do_sample, "True or False", "Set do_sample=True to sample")
        _set_number(self, "temperature", 0.0, 1e6, "a number from 0 to 1e6", "Set temperature=1.0")
        # Below this, logits / temperature overflows f32.
        if self.do_sample and self.temperature < 1e-6:
            needed = "at least 1e-6 to sample, because logits are divided by it"
            raise _wrong("temperature", self.temperature, needed, "Set do_sample=False for the most likely token")
        _set_number(self, "top_p", 0.0, 1.0, "a number from 0 to 1", "Set top_p=1.0 to keep all tokens")
        object.__setattr__(self, "stop_strings", _as_strings(self.stop_strings))
        object.__setattr__(self, "eos_token_id", _as_eos_ids(self.eos_token_id))

    @classmethod
    def from_config(cls, config: Mapping[str, Any] | None = None, **overrides: Any) -> GenerationOptions:
        """Options of one call: what the caller asks for, else what the model's authors chose, else the defaults.

        An override of None means "not given", as in transformers; switch a value of the file off with its neutral value
        (`top_k=0`, `eos_token_id=[]`, `repetition_penalty=1.0`). Names in the file that neither jettison nor
        transformers knows are ignored, as transformers does.

        Args:
            config: content of generation_config.json, None where the model has none.
            overrides: by the names of transformers.

        Raises:
            OptionError: an unknown override, or a value out of range.
            UnsupportedError: a setting that jettison does not have and that would change the output.
        """
        known = {f.name for f in fields(cls)}
        given = {name: value for name, value in overrides.items() if value is not None}
        for name in overrides:
            _refuse_unknown(name, known)
        stored = {name: value for name, value in (config or {}).items() if value is not None}
        if stored.get("pad_token_id") == -1:
            del stored["pad_token_id"]  # older files write "none" so
        if "max_length" in given and "max_new_tokens" not in given:
            stored.pop("max_new_tokens", None)
        values = stored | given
        options = cls(**{name: value for name, value in values.items() if name in known})
        for name, neutral in (_UNSUPPORTED | (_UNSUPPORTED_WHEN_SAMPLING if options.do_sample else {})).items():
            _refuse_unsupported(name, values, neutral, "" if name in given else " (in generation_config.json)")
        for name, neutral in _UNSUPPORTED_IN_CALLS.items():
            _refuse_unsupported(name, given, neutral, "")
        return options


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
        rows: one entry per prompt.
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
        OptionError: as `generate`, or no tokenizer.
    """
    if tokenizer is None:
        raise OptionError(
            "[generate] stream: found no tokenizer, needs one to turn tokens into text. Pass tokenizer=, or use "
            "generate(on_token=...) for token ids."
        )
    batch = _Batch([prompt], options or GenerationOptions(), tokenizer)
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
        self.stop_strings = _as_strings(options.stop_strings)
        self.end_tokens: dict[int, FinishReason] = {}
        if self.stop_strings and tokenizer is None:
            raise OptionError(
                f"[generate] stop_strings: found {list(self.stop_strings)} but no tokenizer, needs one to compare "
                "text. Pass tokenizer=, or end rows with eos_token_id."
            )
        if tokenizer is not None:
            self.end_tokens |= dict.fromkeys(StopStrings.special_ids(self.stop_strings, tokenizer), "stop")
        self.end_tokens |= dict.fromkeys(_as_eos_ids(options.eos_token_id), "eos")
        self.rows = [_Row(self.stop_strings, tokenizer) for _ in self.prompts]

    def open(self, open_session: OpenSession) -> _Events:
        """Open a session and check the prompts against it; the model runs as the events are read."""
        wanted = self._wanted_tokens()
        session = open_session(len(self.prompts), self.longest + wanted)
        for row, prompt in enumerate(self.prompts):
            _check_prompt(row, prompt, session)
        return self._run(session, min(wanted, session.context - self.longest))

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
        options, rows = self.options, self.rows
        sampler = Sampler(len(rows), options.do_sample, options.temperature, options.top_k, options.top_p, options.seed)
        start = time.perf_counter()
        events = self._accept(sampler, session.prefill(self.prompts), budget)
        prefill_seconds, decode_seconds, steps = time.perf_counter() - start, 0.0, 0
        yield from events
        while any(row.finish_reason is None for row in rows):
            start = time.perf_counter()
            logits = session.decode([self._next_input(row, session.vocab_size) for row in rows])
            events = self._accept(sampler, logits, budget)
            decode_seconds += time.perf_counter() - start
            steps += 1
            yield from events
        generated = tuple(row.result(len(prompt)) for row, prompt in zip(rows, self.prompts, strict=True))
        return GenerationResult(generated, prefill_seconds, decode_seconds, steps)

    def _accept(self, sampler: Sampler, logits: torch.Tensor, budget: int) -> list[_Event]:
        """Choose a token for every row that goes on; finished rows draw nothing."""
        active = [i for i, row in enumerate(self.rows) if row.finish_reason is None]
        events = []
        for i, token in zip(active, sampler.choose(logits, active), strict=True):
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


def _wrong(name: str, found: object, needed: str, fix: str) -> OptionError:
    return OptionError(f"[generate] {name}: found {found!r}, needs {needed}. {fix}.")


def _set_integer(options: GenerationOptions, name: str, least: int, fix: str, optional: bool = False) -> None:
    value = getattr(options, name)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < least:
        raise _wrong(name, value, f"an integer of at least {least}", fix)
    object.__setattr__(options, name, int(value))


def _set_number(options: GenerationOptions, name: str, least: float, most: float, needed: str, fix: str) -> None:
    value = getattr(options, name)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or not least <= value <= most:
        raise _wrong(name, value, needed, fix)
    object.__setattr__(options, name, float(value))


def _as_strings(value: str | Sequence[str] | None) -> tuple[str, ...]:
    strings = () if value is None else (value,) if isinstance(value, str) else value
    if not isinstance(strings, Sequence) or not all(isinstance(string, str) and string for string in strings):
        needed = "one or more strings that are not empty"
        raise _wrong("stop_strings", value, needed, "Leave stop_strings out to stop at none")
    return tuple(strings)


def _as_eos_ids(value: int | Sequence[int] | None) -> tuple[int, ...]:
    ids = () if value is None else tuple(value) if isinstance(value, Sequence) else (value,)
    if not all(isinstance(i, numbers.Integral) and not isinstance(i, bool) and i >= 0 for i in ids):
        raise _wrong("eos_token_id", value, "a token id or a list of them", "Set eos_token_id=[] to never stop at one")
    return tuple(int(i) for i in ids)


def _refuse_unknown(name: str, known: set[str]) -> None:
    other = (
        known
        | set(_IGNORED.split())
        | _UNSUPPORTED.keys()
        | _UNSUPPORTED_WHEN_SAMPLING.keys()
        | _UNSUPPORTED_IN_CALLS.keys()
    )
    if name in other:
        return
    close = difflib.get_close_matches(name, known, cutoff=0.7) or difflib.get_close_matches(name, other, cutoff=0.7)
    hint = f"Did you mean {', '.join(close)}?" if close else f"The options are {', '.join(sorted(known))}."
    raise OptionError(f"[generate] {name}: unknown option, needs a name of transformers' generate. {hint}")


def _refuse_unsupported(name: str, values: Mapping[str, Any], neutral: tuple[Any, ...], source: str) -> None:
    value = values.get(name)
    if value is None or any(value == allowed for allowed in neutral):
        return
    off = f"set {name}={neutral[0]!r} to go without" if neutral else f"leave {name} out"
    nearest = f"{_NEAREST[name]}, or {off}" if name in _NEAREST else off[0].upper() + off[1:]
    raise UnsupportedError(
        f"[generate] {name}: found {value!r}{source}, which jettison does not do (yet) and which would change the "
        f"output. {nearest}."
    )
