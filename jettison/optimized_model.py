"""OptimizedModel: what `optimize` and `load` return, used like a transformers model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jettison.ir.diff import diff_text
from jettison.ir.errors import OptionError
from jettison.ir.program import ModelInfo
from jettison.report import Report
from jettison.runtime.executor import Executor
from jettison.runtime.generation import GenerationResult, generate, stream
from jettison.runtime.generation_options import GenerationOptions
from jettison.runtime.session import Session
from jettison.runtime.tokenizer import Tokenizer


class OptimizedModel:
    """A model after its passes.

    Attributes:
        report: What each pass did.
        graph: Canonical text of the program after the passes.
        graph_before: The same before the passes.
        info: Facts about the model.
        folder: The artifact folder it was loaded from or saved to, if any.
        source: What was optimised in this process, a folder or a module; None for a loaded artifact.
        source_sha256: Hash of the source folder's config and weights.
    """

    def __init__(
        self,
        info: ModelInfo,
        report: Report,
        graph_before: str,
        graph: str,
        *,
        open_executor: Callable[[], Executor],
        save: Callable[[Path, bool], None],
        tokenizer: Callable[[], Tokenizer],
        generation_config: dict[str, Any],
        folder: Path | None = None,
        source: Path | nn.Module | None = None,
        source_sha256: str | None = None,
    ) -> None:
        self.info, self.report = info, report
        self.source, self.source_sha256 = source, source_sha256
        self.graph_before, self.graph = graph_before, graph
        self.folder = folder
        self._open_executor, self._save, self._open_tokenizer = open_executor, save, tokenizer
        self._generation_config = generation_config
        self._executor: Executor | None = None
        self._tokenizer: Tokenizer | None = None

    @property
    def executor(self) -> Executor:
        """What runs the entries; opened on first use."""
        if self._executor is None:
            self._executor = self._open_executor()
        return self._executor

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ArtifactError: There is none.
        """
        if self._tokenizer is None:
            self._tokenizer = self._open_tokenizer()
        return self._tokenizer

    @property
    def config(self) -> dict[str, Any]:
        """Default generation settings (the contents of generation_config.json)."""
        return dict(self._generation_config)

    def diff(self) -> str:
        """What the passes changed, as a diff of canonical texts."""
        return diff_text(self.graph_before, self.graph)

    def session(self, batch: int = 1, capacity: int | None = None) -> Session:
        """A session of `batch` rows that may grow to `capacity` tokens (default: the context)."""
        return Session(self.executor, batch, capacity or self.info.context)

    def generate(
        self, inputs: str | Sequence[Any] | Tensor | None = None, *, input_ids: Sequence[Any] | Tensor | None = None,
        attention_mask: Tensor | None = None, streamer: Any = None, **settings: Any,
    ) -> Any:  # fmt: skip
        """Continue one prompt or several.

        Args:
            inputs: Text, a list of texts, token ids, a list of lists of token ids, or a `[B, S] i64` tensor.
            input_ids: Another name of `inputs`, so that `generate(**tokenizer(text, return_tensors="pt"))` works.
            attention_mask: For a tensor: `[B, S]`, zero where a row is padded.
            streamer: A transformers streamer, for one prompt.
            **settings: Hugging Face names: `max_new_tokens`, `do_sample`, `temperature`, `top_k`, `top_p`, `min_p`,
                `repetition_penalty`, `num_return_sequences`, `stop_strings`, `eos_token_id`, and `seed`.

        Returns:
            Continuations in kind: text for text, a list of texts for a list of texts, lists of new ids for ids; for a
            tensor a `[B, S + new]` tensor of its dtype that begins with the prompt and is padded behind, as
            transformers does. With `num_return_sequences` of n above 1, a list of n for one prompt, and for several n
            times as many entries (`[B * n, S + new]`), those of one prompt behind each other.

        Raises:
            OptionError: A bad setting or prompt.
        """
        if inputs is not None and input_ids is not None:
            raise OptionError(
                "[generate] both inputs and input_ids are given: they are one argument. Give one of them."
            )
        inputs = input_ids if inputs is None else inputs
        if isinstance(inputs, Tensor):
            return self._generate_tensor(inputs, attention_mask, streamer, settings)
        if attention_mask is not None:
            raise OptionError(
                "[generate] attention_mask goes with a tensor of padded rows. Leave it out: texts and lists need no "
                "padding."
            )
        if not isinstance(inputs, Sequence) or isinstance(inputs, (bytes, bytearray)):
            raise OptionError(
                f"[generate] nothing to continue in {type(inputs).__name__}: needed text, a list of texts, token ids, "
                "a list of lists of token ids, or a [batch, tokens] tensor."
            )
        if isinstance(inputs, str):
            return _one_or_all(self.generate_rows([self.tokenizer.encode(inputs)], streamer=streamer, **settings).texts)
        inputs = list(inputs)
        if inputs and all(isinstance(item, str) for item in inputs):
            rows = [self.tokenizer.encode(text) for text in inputs]
            return self.generate_rows(rows, streamer=streamer, **settings).texts
        if inputs and all(isinstance(item, int) for item in inputs):
            return _one_or_all(self.generate_rows([inputs], streamer=streamer, **settings).token_ids)
        return self.generate_rows(inputs, streamer=streamer, **settings).token_ids

    def generate_rows(
        self, rows: Sequence[Sequence[int]], *, streamer: Any = None, **settings: Any
    ) -> GenerationResult:
        """Continue rows of token ids and return everything known about the result."""
        options = GenerationOptions.from_config(self._generation_config, **settings)
        return generate(self._session_factory(), rows, options, self._tokenizer_or_none(), streamer=streamer)

    def stream(self, prompt: str | Sequence[int], **settings: Any) -> Iterator[str]:
        """Continue one prompt, yielding text as it becomes certain; see `generate` for the settings.

        Raises:
            OptionError: A bad setting or prompt, or more than one sequence.
        """
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt
        options = GenerationOptions.from_config(self._generation_config, **settings)
        return stream(self._session_factory(), ids, options, self.tokenizer)

    def _session_factory(self) -> Callable[[int, int], Session]:
        return lambda batch, capacity: Session(self.executor, batch, min(capacity, self.info.context))

    def _tokenizer_or_none(self) -> Tokenizer | None:
        from jettison.ir.errors import ArtifactError, UnsupportedError

        try:
            return self.tokenizer
        except (ArtifactError, UnsupportedError):
            return None  # ids in, ids out needs none; a text prompt has failed before

    def _generate_tensor(
        self, ids: Tensor, attention_mask: Tensor | None, streamer: Any, settings: dict[str, Any]
    ) -> Tensor:
        if ids.dim() != 2:
            raise OptionError(f"[generate] input_ids of shape {list(ids.shape)}: needed [batch, tokens].")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise OptionError(f"[generate] input_ids of {ids.dtype}: needed integers, the ids of tokens.")
        if attention_mask is not None and attention_mask.shape != ids.shape:
            raise OptionError(
                f"[generate] attention_mask of shape {list(attention_mask.shape)}: needed {list(ids.shape)}, that of "
                "input_ids."
            )
        kept = torch.ones_like(ids) if attention_mask is None else attention_mask
        rows = [row[mask != 0].tolist() for row, mask in zip(ids, kept, strict=True)]
        result = self.generate_rows(rows, streamer=streamer, **settings)
        longest = max(len(new) for new in result.token_ids)
        options = GenerationOptions.from_config(self._generation_config, **settings)
        pad = options.pad_token_id
        if pad is None:
            eos = options.eos_token_id
            pad = eos[0] if isinstance(eos, (list, tuple)) and eos else (eos if isinstance(eos, int) else 0)
        new = torch.full((len(result.rows), longest), pad, dtype=ids.dtype)
        for row, tokens in enumerate(result.token_ids):
            new[row, : len(tokens)] = torch.tensor(tokens, dtype=ids.dtype)
        return torch.cat([ids.repeat_interleave(options.num_return_sequences, 0), new], 1)

    def __call__(self, **inputs: Tensor) -> dict[str, Tensor]:
        """Run an encoder once.

        Args:
            **inputs: `input_ids [B, S]`, and what the model takes beside it, of any integer type (masks also of
                floats or booleans); a missing `attention_mask` is all ones, missing `token_type_ids` are zeros.

        Returns:
            Outputs by name.

        Raises:
            OptionError: The model is a decoder, or an input is missing, unknown, or of a wrong type, shape or range.
        """
        signature = self.executor.entries.get("forward")
        if signature is None:
            raise OptionError(f"[call] {self.info.name} is a decoder: use generate(), stream() or session().")
        self._check_inputs(inputs, signature.inputs)
        ids = inputs["input_ids"]
        known = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids), **inputs}
        # Of one type for both targets: ONNX Runtime converts none.
        return self.executor.run("forward", {name: known[name].long() for name in signature.inputs}, {})

    def _check_inputs(self, inputs: dict[str, Any], wanted: Sequence[str]) -> None:
        """Refuse what an encoder cannot be called with."""
        takes = f"{self.info.name} takes {', '.join(wanted)}"
        optional = ("attention_mask", "token_type_ids")
        for name in wanted:
            if name not in inputs and name not in optional:
                raise OptionError(f"[call] {name} is missing: {takes}.")
        for name, value in inputs.items():
            if name not in wanted:
                raise OptionError(f"[call] no input {name!r}: {takes}.")
            if not isinstance(value, Tensor):
                raise OptionError(f"[call] {name}: needed a tensor, found {type(value).__name__}.")
            if name != "attention_mask" and (value.is_floating_point() or value.dtype == torch.bool):
                raise OptionError(f"[call] {name} of {value.dtype}: needed integers.")
        ids = inputs["input_ids"]
        if ids.dim() != 2 or not ids.numel():
            raise OptionError(f"[call] input_ids of shape {list(ids.shape)}: needed [batch, tokens].")
        if ids.shape[1] > self.info.context:
            raise OptionError(
                f"[call] input_ids of {ids.shape[1]} tokens: the context of {self.info.name} is {self.info.context}. "
                "Shorten the text."
            )
        outside = ids[(ids < 0) | (ids >= self.info.vocab_size)]
        if outside.numel():
            raise OptionError(
                f"[call] input_ids hold token {int(outside[0])}: {self.info.name} knows 0 to "
                f"{self.info.vocab_size - 1}."
            )
        for name, value in inputs.items():
            if value.shape != ids.shape:
                found, needed = list(value.shape), list(ids.shape)
                raise OptionError(f"[call] {name} of shape {found}: needed {needed}, that of input_ids.")

    def save_pretrained(self, out: str | Path, *, overwrite: bool = False) -> Path:
        """Write the artifact folder.

        Args:
            out: A folder that does not exist, unless `overwrite`.
            overwrite: Replace an artifact that is there.

        Returns:
            The folder.

        Raises:
            OptionError: The folder exists.
            ArtifactError: It cannot be written.
        """
        self._save(Path(out), overwrite)
        self.folder = Path(out)
        return self.folder


def _one_or_all(continuations: list[Any]) -> Any:
    """Of one prompt: the continuation, or the list of them where several were asked for."""
    return continuations[0] if len(continuations) == 1 else continuations
