"""Text to calibrate and evaluate on: read from a file, or sampled from the model itself when there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jettison.ir.errors import ArtifactError, OptionError, UnsupportedError
from jettison.ir.progress import track
from jettison.runtime.executor import Executor
from jettison.runtime.sampling import Sampler
from jettison.runtime.session import Session
from jettison.runtime.tokenizer import Tokenizer

if TYPE_CHECKING:
    from jettison.optimized_model import OptimizedModel

# Rows that decode together: beyond this many a step of a small model gains little more.
MOST_ROWS = 16
# States of all rows of a session that this package opens for itself.
MOST_STATE_BYTES = 256 << 20


@dataclass(frozen=True)
class SampledText:
    """What a model wrote by itself.

    Attributes:
        windows: Token ids, windows of equal length; each begins with the start token.
        text: The windows as text, a blank line between them; None where the model has no tokenizer.
    """

    windows: list[list[int]]
    text: str | None


def load_text(path: str | Path) -> str:
    """Read a text file, without its byte order mark and with line ends as newlines.

    Args:
        path: A UTF-8 file.

    Raises:
        OptionError: It is missing, no file, not UTF-8, or empty.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise OptionError(f"[text] {path}: no such file. Check the path.") from error
    except UnicodeDecodeError as error:
        raise OptionError(
            f"[text] {path}: byte {error.start} ({error.object[error.start]:#04x}) is not UTF-8, which text must be "
            "to be cut into tokens. Convert the file, for example with iconv."
        ) from error
    except OSError as error:
        raise OptionError(f"[text] {path}: cannot be read ({error.strerror}). Give a text file.") from error
    if not text.strip():
        raise OptionError(
            f"[text] {path}: holds no text: found 0 tokens, needs at least 2, because the first one is not scored. "
            "Give a file with text."
        )
    return text


def text_tokens(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text alone: the special tokens that a tokenizer adds around every text are taken off.

    Args:
        tokenizer: The model's.
        text: Any text.
    """
    return framed_tokens(tokenizer, text)[1]


def framed_tokens(tokenizer: Tokenizer, text: str) -> tuple[list[int], list[int], list[int]]:
    """Token ids of a text, and in front of them and behind them those that the tokenizer adds around every text.

    Args:
        tokenizer: The model's.
        text: Any text.
    """
    tokens = tokenizer.encode(text)
    added = tokenizer.encode("")
    # What is added to the empty text is added in front of any text, behind it, or some on either side.
    for front in range(len(added), -1, -1):
        behind = len(tokens) - (len(added) - front)
        if tokens[:front] == added[:front] and tokens[behind:] == added[front:]:
            return added[:front], tokens[front:behind], added[front:]
    return [], tokens, []


def cut_windows(tokens: Sequence[int], length: int, *, where: str = "text") -> list[list[int]]:
    """Cut tokens into windows that follow each other; the remainder is dropped.

    Args:
        tokens: Token ids.
        length: Tokens of a window, at least 2.
        where: What the tokens are of, for the message.

    Raises:
        OptionError: There are fewer tokens than one window.
    """
    if len(tokens) < length:
        raise OptionError(
            f"[text] {where}: found {len(tokens)} tokens, needs at least {length}, the length of one window, because "
            f"a remainder is not scored. Give a longer text, or a context of at most {max(len(tokens), 2)} tokens."
        )
    return [list(tokens[start : start + length]) for start in range(0, len(tokens) - length + 1, length)]


def load_windows(path: str | Path, tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Windows of a text file; see `load_text`, `text_tokens` and `cut_windows`."""
    return cut_windows(text_tokens(tokenizer, load_text(path)), length, where=str(path))


def rows_that_fit(executor: Executor, capacity: int) -> int:
    """Rows whose states together stay below `MOST_STATE_BYTES`; 1 to `MOST_ROWS`.

    Args:
        executor: What runs the session.
        capacity: Tokens a row may hold.
    """
    row_bytes = sum(torch.Size(s.sizes(1, capacity)).numel() * s.dtype.itemsize for s in executor.states.values())
    return max(1, min(MOST_ROWS, MOST_STATE_BYTES // max(1, row_bytes)))


def sample_windows(
    executor: Executor, start: int | None, *, count: int, length: int, seed: int = 0, rows: int | None = None
) -> list[list[int]]:
    """Sample windows of tokens at temperature 1 from the whole distribution.

    An end-of-text token inside a window is kept and the model goes on behind it, as in its training text. Every window
    draws from its own generator, seeded with (seed, index), so it does not depend on how many rows run together (as far
    as the executor computes the same logits for one row and for several).

    Args:
        executor: Must have `prefill` and `decode`.
        start: First token of every window; None gives each window a random one.
        count: Windows.
        length: Tokens of a window, the first included.
        seed: Of the draws.
        rows: Windows sampled together; default what fits.

    Returns:
        `count` lists of `length` token ids.

    Raises:
        OptionError: A number is out of range, or the program is an encoder.
        ArtifactError: The model's logits are not numbers.
    """
    for name, value, least in (("count", count, 1), ("length", length, 2), ("seed", seed, 0)):
        if value < least:
            raise OptionError(f"[sample] {name}={value}: needs at least {least}.")
    vocab_size = executor.info.vocab_size
    if start is not None and not 0 <= start < vocab_size:
        raise OptionError(f"[sample] start token {start}: needs 0 to {vocab_size - 1}, the model's vocabulary.")
    together = rows or rows_that_fit(executor, length)
    sampler = Sampler(count, do_sample=True, seed=seed)
    firsts = torch.randint(vocab_size, (count,), generator=torch.Generator().manual_seed(seed)).tolist()
    windows: list[list[int]] = []
    with track("sample text", count * (length - 1)) as advance:
        for begin in range(0, count, together):
            group = list(range(begin, min(begin + together, count)))
            session = Session(executor, len(group), length)
            grown = [[firsts[index] if start is None else start] for index in group]
            logits = session.prefill(grown)
            for position in range(1, length):
                for row, token in zip(grown, sampler.choose(logits, group), strict=True):
                    row.append(token)
                if position + 1 < length:
                    logits = session.decode([row[-1] for row in grown])
                advance(len(group))
            windows += grown
    return windows


def start_token(model: OptimizedModel) -> int | None:
    """The token that begins a text; see `named_start_token`."""
    return named_start_token(model.config, tokenizer_or_none(model), model.info.vocab_size)


def named_start_token(config: Mapping[str, Any], tokenizer: Tokenizer | None, vocab_size: int) -> int | None:
    """The token that begins a text: the model's BOS token, else its EOS token, else the tokenizer's.

    Args:
        config: The model's config.json.
        tokenizer: The model's, if it has one.
        vocab_size: Ids are below it.

    Returns:
        The id, or None where nothing names one inside the vocabulary.
    """
    named: list[object] = [config.get("bos_token_id")]
    eos = config.get("eos_token_id")
    named += eos if isinstance(eos, list) else [eos]
    named.append(None if tokenizer is None else tokenizer.eos_token_id)
    return next((token for token in named if isinstance(token, int) and 0 <= token < vocab_size), None)


def tokenizer_or_none(model: OptimizedModel) -> Tokenizer | None:
    """The model's tokenizer, or None where it has none that can be loaded."""
    try:
        return model.tokenizer
    except (ArtifactError, UnsupportedError):
        return None


def sample_text(model: OptimizedModel, *, windows: int, length: int, seed: int = 0) -> SampledText:
    """Text that a model writes by itself, to calibrate or evaluate on without data.

    Args:
        model: A decoder.
        windows: How many.
        length: Tokens of each, at most the model's context.
        seed: Of the draws.

    Returns:
        Windows that begin with `start_token(model)`, and their text.

    Raises:
        OptionError: See `sample_windows`.
    """
    sampled = sample_windows(model.executor, start_token(model), count=windows, length=length, seed=seed)
    tokenizer = tokenizer_or_none(model)
    text = None if tokenizer is None else "\n\n".join(tokenizer.decode(window) for window in sampled)
    return SampledText(sampled, text)
