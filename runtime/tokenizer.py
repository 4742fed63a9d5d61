"""Text to tokens and back: the tokenizer of a model folder, and decoding that can be streamed.

Tokenizer files are read from the folder and from nowhere else, and no code in the folder is ever run. transformers
reads them where it is installed; without it, the `tokenizers` package reads `tokenizer.json` (no chat templates then).
"""

from __future__ import annotations

import abc
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jettison.ir.errors import ArtifactError, OptionError, UnsupportedError

# Any one of these can hold a vocabulary; tokenizer_config.json alone cannot.
_VOCABULARY_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
_REPLACEMENT = "\ufffd"  # what every decoder shows for bytes that are not (yet) a character


class Tokenizer(abc.ABC):
    """What the runtime needs of a tokenizer, whichever library reads it.

    Attributes:
        vocab_size: number of token ids, added tokens included.
        eos_token_id: the token that ends a text, None where the tokenizer names none.
        special_tokens: text to id of the tokens that `decode` leaves out.
        has_chat_template: whether `apply_chat_template` works.
    """

    vocab_size: int
    eos_token_id: int | None
    special_tokens: Mapping[str, int]
    has_chat_template: bool = False

    def encode(self, text: str) -> list[int]:
        """Turn text into token ids, with the special tokens this tokenizer is configured to add and no others.

        Raises:
            OptionError: `text` is not a string.
        """
        if not isinstance(text, str):
            raise OptionError(
                f"[tokenizer] encode: found {type(text).__name__}, needs one string. Pass the texts one by one."
            )
        return self._encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Turn token ids into text, leaving special tokens out and the spaces as the tokens have them.

        Raises:
            OptionError: an id is negative.
        """
        tokens = list(ids)
        if tokens and min(tokens) < 0:
            raise OptionError(
                f"[tokenizer] decode: found token {min(tokens)}, needs ids of at least 0. Drop padding such as -100."
            )
        return self._decode(tokens)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """Turn a conversation into the token ids of the prompt the model was trained on.

        Args:
            messages: dicts with at least `role` and `content`, oldest first.
            add_generation_prompt: end with the opening of the assistant's answer.

        Raises:
            UnsupportedError: the tokenizer has no chat template, or the library that renders it is missing.
            OptionError: the template refuses these messages.
        """
        raise UnsupportedError(
            f"[tokenizer] chat template: found none in this tokenizer for {len(messages)} message(s), needs one to "
            "format a conversation. Pass a plain prompt instead."
        )

    @abc.abstractmethod
    def _encode(self, text: str) -> list[int]: ...

    @abc.abstractmethod
    def _decode(self, ids: list[int]) -> str: ...


class TransformersTokenizer(Tokenizer):
    """A tokenizer object of transformers."""

    # Any: transformers is optional, so its types cannot be named here.
    def __init__(self, tokenizer: Any) -> None:
        """Wrap a tokenizer that transformers has loaded."""
        self._tokenizer = tokenizer
        self.vocab_size = len(tokenizer)
        self.eos_token_id = tokenizer.eos_token_id
        self.has_chat_template = bool(getattr(tokenizer, "chat_template", None))
        special = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        added = getattr(tokenizer, "added_tokens_decoder", {})  # not every backend has it
        special |= {str(token): i for i, token in added.items() if token.special}
        self.special_tokens = special

    def _encode(self, text: str) -> list[int]:
        # verbose=False: the warning about model_max_length is not ours; generate() checks the real context.
        return [int(i) for i in self._tokenizer.encode(text, verbose=False)]

    def _decode(self, ids: list[int]) -> str:
        # Clean-up ("don 't" to "don't") rewrites text already streamed, and is wrong for byte-level vocabularies.
        return str(self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """As `Tokenizer.apply_chat_template`, rendered by transformers in its Jinja sandbox."""
        if not self.has_chat_template:
            return super().apply_chat_template(messages, add_generation_prompt)
        if isinstance(messages, str) or not all(isinstance(m, Mapping) and "role" in m for m in messages):
            raise OptionError(
                "[tokenizer] chat template: found messages that are not dicts with a role, needs a list such as "
                '[{"role": "user", "content": "Hello"}]. Pass a plain prompt to skip the template.'
            )
        conversation = [dict(message) for message in messages]
        try:
            ids = self._tokenizer.apply_chat_template(
                conversation, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
            )
        except ImportError as error:
            raise UnsupportedError(
                f"[tokenizer] chat template: cannot be rendered ({error}). Run `pip install 'jinja2>=3.1.6'`, or "
                "pass a plain prompt."
            ) from error
        except Exception as error:  # a template is a program of the model's author: it may raise anything
            raise OptionError(
                f"[tokenizer] chat template: the model's template refuses these {len(conversation)} message(s): "
                f"{type(error).__name__}: {error}. Change the roles or contents, or pass a plain prompt."
            ) from error
        return [int(i) for i in ids]


class TokenizersTokenizer(Tokenizer):
    """A `tokenizer.json` read by the `tokenizers` package alone."""

    # Any: tokenizers is optional, so its types cannot be named here.
    def __init__(self, tokenizer: Any, config: Mapping[str, Any] | None = None) -> None:
        """Wrap a `tokenizers.Tokenizer`; `config` is the content of tokenizer_config.json."""
        # A stored truncation or padding is for the encoder's training; transformers ignores both unless asked.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._tokenizer = tokenizer
        self._names_template = "chat_template" in (config or {})
        self.vocab_size = tokenizer.get_vocab_size(with_added_tokens=True)
        added = tokenizer.get_added_tokens_decoder()
        self.special_tokens = {token.content: i for i, token in added.items() if token.special}
        eos = (config or {}).get("eos_token")
        eos = eos.get("content") if isinstance(eos, Mapping) else eos
        self.eos_token_id = tokenizer.token_to_id(eos) if isinstance(eos, str) else None

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text).ids)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], add_generation_prompt: bool = True
    ) -> list[int]:
        """As `Tokenizer.apply_chat_template`; always refuses, since templates are rendered by transformers."""
        if self._names_template:
            raise UnsupportedError(
                "[tokenizer] chat template: found one, but transformers, which renders it, is not installed. Run "
                "`pip install 'jettison[hf]'`, or pass a plain prompt."
            )
        return super().apply_chat_template(messages, add_generation_prompt)


class IncrementalDecoder:
    """Decodes tokens as they come, never showing half a character.

    The pieces it returns add up to `tokenizer.decode` of all tokens (one exception: with byte-fallback vocabularies,
    bytes that never become valid UTF-8 may leave a different number of replacement characters). Each push decodes a
    short window of recent tokens rather than the whole text; the window starts one piece back because decoders treat
    the first token specially (they strip its leading space).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Start with no tokens."""
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._unshown = 0  # index in the window of the first token whose text has not been returned completely
        self._shown = ""  # the part of the window's text that has been returned

    def push(self, token: int) -> str:
        """Add one token and return the text that is now certain, possibly empty."""
        self._window.append(token)
        text = self._tokenizer.decode(self._window)
        # The trailing replacement characters may be the first bytes of a character that the next token completes.
        certain = text.rstrip(_REPLACEMENT)
        piece = certain[len(self._shown) :]
        if len(certain) < len(text):
            self._shown = certain if piece else self._shown
            return piece
        if piece:
            self._window = self._window[self._unshown :]
            self._unshown = len(self._window)
            self._shown = self._tokenizer.decode(self._window)
        return piece

    def finish(self) -> str:
        """Return what was held back; bytes that never became a character show as U+FFFD."""
        text = self._tokenizer.decode(self._window)
        piece = text[len(self._shown) :]
        self._shown = text
        return piece


class StopStrings:
    """Lets text through up to the first stop string, holding back what may be the beginning of one.

    Attributes:
        is_found: a stop string has come; nothing is let through any more.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Watch for any of `strings`, none of them empty."""
        self._strings = tuple(strings)
        self._held = ""
        self.is_found = False

    def push(self, text: str) -> str:
        """Add text and return what is certainly before any stop string."""
        if self.is_found:
            return ""
        text = self._held + text
        starts = [start for string in self._strings if (start := text.find(string)) >= 0]
        if starts:
            self.is_found, self._held = True, ""
            return text[: min(starts)]
        prefixes = (string[:n] for string in self._strings for n in range(1, len(string)))
        held = max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back: nothing follows that could complete a stop string."""
        held, self._held = self._held, ""
        return held

    @staticmethod
    def special_ids(strings: Sequence[str], tokenizer: Tokenizer) -> list[int]:
        """Ids of the stop strings that are special tokens: `decode` leaves those out, so no text can match them.

        Raises:
            UnsupportedError: a stop string mixes a special token with other text.
        """
        for string in strings:
            inside = [token for token in tokenizer.special_tokens if token and token in string and token != string]
            if inside and string not in tokenizer.special_tokens:
                raise UnsupportedError(
                    f"[generate] stop_strings: found {string!r}, which mixes the special token {inside[0]!r} with "
                    f"other text, needs one or the other, because special tokens are left out of the text. Use "
                    f"{inside[0]!r}."
                )
        return [tokenizer.special_tokens[string] for string in strings if string in tokenizer.special_tokens]


def has_tokenizer(folder: str | Path) -> bool:
    """Whether the folder holds the files of a tokenizer."""
    return any((Path(folder) / name).is_file() for name in _VOCABULARY_FILES)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """Load the tokenizer of a model or artifact folder, offline and without running code from it.

    Args:
        folder: a local folder; never looked up anywhere else.

    Raises:
        ArtifactError: the folder or its tokenizer files are missing or damaged.
        UnsupportedError: the files need a library that is not installed, or code that comes with the model.
    """
    path = Path(folder)
    if not path.is_dir():
        raise ArtifactError(f"[tokenizer] {path}: not a folder, needs the folder of a model. Check the path.")
    if not has_tokenizer(path):
        raise ArtifactError(
            f"[tokenizer] {path}: no tokenizer files, needs one of {', '.join(_VOCABULARY_FILES)} to turn text into "
            "tokens. Copy them from the original model into the folder, or pass token ids instead of text."
        )
    config = _read_json(path / "tokenizer_config.json")
    _read_json(path / "tokenizer.json")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return _load_without_transformers(path, config)
    try:
        loaded = AutoTokenizer.from_pretrained(str(path), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the loaders raise anything from KeyError to a bare Exception
        if "auto_map" in config:
            raise UnsupportedError(
                f"[tokenizer] {path}: tokenizer_config.json asks for Python code of its own ({config['auto_map']}), "
                "and jettison runs no code from a model folder. Save the tokenizer as tokenizer.json with "
                "transformers, without auto_map, or pass token ids instead of text."
            ) from error
        raise _damaged(path, error) from error
    return TransformersTokenizer(loaded)


def _load_without_transformers(path: Path, config: Mapping[str, Any]) -> Tokenizer:
    if not (path / "tokenizer.json").is_file():
        raise UnsupportedError(
            f"[tokenizer] {path}: no tokenizer.json, and the other tokenizer files need transformers, which is not "
            "installed. Run `pip install 'jettison[hf]'`, or pass token ids instead of text."
        )
    try:
        import tokenizers
    except ImportError as error:
        raise UnsupportedError(
            f"[tokenizer] {path}: reading tokenizer.json needs the transformers or the tokenizers package; found "
            "neither. Run `pip install 'jettison[hf]'`, or pass token ids instead of text."
        ) from error
    try:
        loaded = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise _damaged(path, error) from error
    if (path / "chat_template.jinja").is_file():
        config = {**config, "chat_template": ""}  # only its presence matters: it cannot be rendered here
    return TokenizersTokenizer(loaded, config)


def _read_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, empty where the file does not exist."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(file, error) from error
    if not isinstance(content, dict):
        raise _damaged(file, f"holds a JSON {type(content).__name__}, not an object")
    return content


def _damaged(path: Path, error: object) -> ArtifactError:
    reason = f"{type(error).__name__}: {error}" if isinstance(error, Exception) else str(error)
    return ArtifactError(
        f"[tokenizer] {path}: cannot be read ({reason}), needs the tokenizer files as the model's authors saved them. "
        "Copy them again from the original model (or install what the reason names), or pass token ids instead of text."
    )
