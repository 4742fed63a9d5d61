"""The tokens that passes are calibrated on: read from a text, or written by the model itself."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jettison.ir.compare import usual_inputs
from jettison.ir.errors import OptionError
from jettison.ir.program import Program, input_placeholders
from jettison.passes.cache_kv import CacheKV
from jettison.passes.methods.finished_layers import FinishedLayers
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime.artifact import library_versions
from jettison.runtime.tokenizer import Tokenizer, load_tokenizer
from jettison.runtime.torch_executor import TorchExecutor
from jettison.sample_text import cut_windows, framed_tokens, load_text, named_start_token, sample_windows
from jettison.source import ModelSource

WINDOWS, LENGTH = 64, 512
# Tokens that run together: more hold more values at a time and gain nothing.
_BATCH_TOKENS = 2048


@dataclass
class Calibration:
    """Windows of tokens, made when the first pass asks for them.

    Attributes:
        sha256: Of the tokens, once they are made.
        shape: `(windows, tokens of each)`, once they are made.

    Args:
        source: The model, its tokenizer and its graph.
        text: A text file; None lets the model write.
        windows: How many, at most.
        length: Tokens of each, at most; a shorter text is one window.
        seed: Of what the model writes.
    """

    source: ModelSource
    text: Path | None = None
    windows: int = WINDOWS
    length: int = LENGTH
    seed: int = 0
    sha256: str | None = None
    shape: tuple[int, int] | None = None
    _made: Tensor | None = field(default=None, repr=False)
    _program: Program | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        for name, value, least in (("windows", self.windows, 1), ("length", self.length, 2)):
            if type(value) is not int or value < least:
                raise OptionError(f"[calibration] {name}={value!r}: needs a whole number, at least {least}.")
        # What the model writes is written by the model as it came, whatever passes do before they ask.
        self._program = self.source.program.copy()

    @classmethod
    def of(cls, source: ModelSource, text: str | Path | None, size: tuple[int, int], seed: int) -> Calibration:
        """The calibration of a source, which its program can ask from now on, unless there is no text for it."""
        made = cls(source, None if text is None else Path(text), *size, seed=seed)
        source.program.calibration = made if made.is_possible else None
        return made

    @property
    def is_possible(self) -> bool:
        """Whether there is a text, or a model that can write one."""
        return self.text is not None or self.source.program.info.kind == "decoder"

    def __call__(self) -> list[dict[str, Tensor]]:
        """Inputs of `forward` by name, for batches of windows.

        Raises:
            OptionError: There is no tokenizer for the text, or the text has less than two tokens.
        """
        tokens = self.tokens()
        wanted = input_placeholders(self.source.program.entries["forward"])
        batches = tokens.split(max(1, _BATCH_TOKENS // tokens.shape[1]))
        return [{name: usual_inputs(batch)[name] for name in wanted} for batch in batches]

    def tokens(self) -> Tensor:
        """`[windows, length] i64`."""
        if self._made is None:
            made = self._from_text(self.text) if self.text is not None else self._from_model()
            self._made = torch.tensor(made)
            self.sha256 = hashlib.sha256(self._made.numpy().tobytes()).hexdigest()
            self.shape = (self._made.shape[0], self._made.shape[1])
            self._program = None
        return self._made

    def _from_text(self, path: Path) -> list[list[int]]:
        if self.source.folder is None:
            raise OptionError("[calibration] a module has no tokenizer for the text. Give a model folder.")
        front, tokens, behind = framed_tokens(load_tokenizer(self.source.folder), load_text(path))
        info = self.source.program.info
        length = min(self.length, info.context)
        # An encoder knows texts with their first and last token, a decoder any piece of one.
        framed = len(front) + len(behind)
        if info.kind != "encoder" or length < framed + 2:
            front, behind, framed = [], [], 0
        windows = cut_windows(tokens, min(length - framed, max(2, len(tokens))), where=str(path))
        windows = [[*front, *window, *behind] for window in windows]
        # Spread over the text, whose parts may differ.
        step = max(1, len(windows) // self.windows)
        return windows[::step][: self.windows]

    def _from_model(self) -> list[list[int]]:
        """Written by the model with its weights in 8 bits: as good to calibrate on, and it fits."""
        assert self._program is not None, "made once"
        program, self._program = self._program, None
        for pass_ in (QuantizeWeights(bits=8, group=32), CacheKV()):
            pass_.run(program)
        tokenizer = _tokenizer(self.source)
        start = named_start_token(self.source.config, tokenizer, program.info.vocab_size)
        length = min(self.length, program.info.context)
        return sample_windows(TorchExecutor(program), start, count=self.windows, length=length, seed=self.seed)

    def as_dict(self) -> dict[str, Any] | None:
        """For the report: where the tokens came from; None if no pass asked for them."""
        if self.shape is None:
            return None
        source = {"text": str(self.text)} if self.text is not None else {"seed": self.seed}
        return {**source, "windows": self.shape[0], "length": self.shape[1], "sha256": self.sha256}


def finished_layers(folder: Path, source: ModelSource, pipeline: str, tokens: Calibration) -> FinishedLayers:
    """Where calibrated passes keep what they have done; see `FinishedLayers`.

    Args:
        folder: Need not exist.
        source: The model.
        pipeline: Canonical text of the passes.
        tokens: What they are calibrated on.

    Raises:
        OptionError: The model is a module, whose weights nothing identifies, or the folder holds something else.
    """
    if source.content_hash is None:
        raise OptionError(
            "[resume] a module was given: needs a model folder, because finished layers are of use only for the same "
            "weights. Save the model first."
        )
    if folder.exists() and not (folder / "identity").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise OptionError(f"[resume] {folder}: holds something other than finished layers. Give another folder.")
    text = None if tokens.text is None else hashlib.sha256(tokens.text.read_bytes()).hexdigest()
    depends_on = [source.content_hash, pipeline, text, tokens.windows, tokens.length, tokens.seed, library_versions()]
    return FinishedLayers(folder, hashlib.sha256(json.dumps(depends_on).encode()).hexdigest())


def _tokenizer(source: ModelSource) -> Tokenizer | None:
    """The model's tokenizer, or None for a module, or a folder without."""
    if source.folder is None or not source.tokenizer_files:
        return None
    return load_tokenizer(source.folder)
