"""Quality of an optimised model: perplexity of a text, and distance from the source model's weights in fp32.

Text is cut into windows of `min(context, 1024)` tokens; no token is added and the remainder is dropped. In a window of
W tokens the logits after token i score token i + 1:

- without `prefill`, tokens 0 to W - 2 go through the `prefill` entry in chunks, and tokens 1 to W - 1 are scored: W - 1
  tokens per window (the first has nothing before it);
- with `prefill=P`, tokens 0 to P - 1 go through `prefill` and P to W - 2 one by one through `decode`; tokens P to W - 1
  are scored: W - P per window. The first of them is scored by the last logits of `prefill`.

With an approximate head, what `decode` returns is scored twice: `top1_agreement` and `certified_fraction` are those of
the candidates alone, before anything falls back; perplexity and KL are those of the whole head, which has all logits.

The last token of a window is scored and never run. KL(reference || artifact) is summed in fp64 over the scored tokens
and divided by their number, in nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from jettison.ir.capture_source import module_inputs
from jettison.ir.checkpoint import Checkpoint
from jettison.ir.errors import ArtifactError, CaptureError, OptionError
from jettison.ir.progress import track
from jettison.ir.upcast import UpcastWeights
from jettison.optimized_model import OptimizedModel
from jettison.runtime.session import Session
from jettison.runtime.tokenizer import Tokenizer
from jettison.sample_text import cut_windows, rows_that_fit, sample_text, text_tokens, tokenizer_or_none

LONGEST_WINDOW = 1024
# Windows that are sampled from the model where no text is given.
SAMPLED_WINDOWS = 8
# Reference logits held at a time, and tokens that prefill together.
MOST_REFERENCE_BYTES = 256 << 20
MOST_PREFILL_TOKENS = 4096
# Logits become fp64 log-probabilities this many bytes at a time.
CHUNK_BYTES = 16 << 20
_LARGEST_EXPONENT = 709.0  # of exp in fp64


@dataclass(frozen=True)
class EvalResult:
    """What an evaluation measured.

    Attributes:
        perplexity: exp of the mean negative log-likelihood of the scored tokens.
        bits_per_byte: The same sum in bits, over the UTF-8 bytes of the text of the scored tokens; None without a
            tokenizer. The text of a window's scored tokens is what the window's text has beyond the text of its first,
            unscored tokens; special tokens have no text, and a character that is cut by the edge of a window counts as
            the three bytes of the replacement character.
        kl: Mean KL(reference || artifact) in nats per scored token; None without a reference.
        top1_agreement: Fraction of scored tokens for which both find the same token likeliest; None likewise. Of an
            approximate head, without falling back.
        tokens: Scored tokens.
        weight_bytes: Bytes of the weights as the target holds them.
        state_bytes: Allocated bytes of the states of one sequence of a window's length.
        certified_fraction: Fraction of decoded tokens for which an approximate head proved that it found the
            likeliest; None where the head is exact, or nothing was decoded.
    """

    perplexity: float
    bits_per_byte: float | None
    kl: float | None
    top1_agreement: float | None
    tokens: int
    weight_bytes: int
    state_bytes: int
    certified_fraction: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """The result as JSON-ready values; the keys are stable."""
        return asdict(self)


class EagerReference:
    """A source model by its own eager code, in fp32: what every KL divergence is measured against.

    Weights stay as they are stored (mapped, perhaps bf16) and are converted while they are used. A model from a folder
    runs with the library's plain attention; a module runs as it is.

    Attributes:
        name: For messages: the folder, or the class.
        vocab_size: Rows of the token embedding, where that is known.

    Args:
        model: A Hugging Face folder, a transformers model, or a module whose forward takes `input_ids`.

    Raises:
        CaptureError: The folder is no model, or the module takes no `input_ids`.
        OptionError: The folder holds an encoder.
    """

    def __init__(self, model: str | Path | nn.Module) -> None:
        if isinstance(model, nn.Module):
            is_library_model = hasattr(model, "config") and hasattr(model, "set_attn_implementation")
            self.name = type(model).__name__
            self._inputs = module_inputs(model)
            self._call: dict[str, Any] = {"use_cache": False} if is_library_model else {}
            self._model = model
            self.vocab_size = _embedding_rows(model)
            return
        from jettison.ir.huggingface import open_checkpoint

        checkpoint, source = open_checkpoint(model)
        if source.kind == "encoder" or source.eager is None:
            raise OptionError(
                f"[eval] reference {checkpoint.folder}: {source.name} is an encoder, and KL is measured on next-token "
                "probabilities. Give the decoder that the artifact was made from."
            )
        self.name, self._inputs, self._call = str(checkpoint.folder), source.inputs, source.call
        self._model = source.eager()
        self.vocab_size = source.vocab_size

    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Logits after every token of a sequence.

        Args:
            tokens: Token ids, `S` of them.

        Returns:
            `[S, V] f32`.
        """
        ids = torch.tensor([list(tokens)], dtype=torch.int64)
        known = {
            "input_ids": ids, "position_ids": torch.arange(ids.shape[1])[None],
            "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids),
        }  # fmt: skip
        with _evaluation_mode(self._model), torch.no_grad(), UpcastWeights(self._model, torch.float32):
            returned = self._model(**{name: known[name] for name in self._inputs}, **self._call)
        if not isinstance(returned, Tensor):
            returned = returned["logits"] if hasattr(returned, "keys") else returned[0]
        return returned[0].float()


def _embedding_rows(model: nn.Module) -> int | None:
    """Vocabulary of a module, as capture finds it: its first embedding is that of the tokens."""
    sizes = (module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding))
    return getattr(model, "vocab_size", None) or next(sizes, None)


@contextmanager
def _evaluation_mode(model: nn.Module) -> Any:
    """Dropout off inside, and the module back as it was after."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def recorded_reference(model: OptimizedModel) -> EagerReference | None:
    """The model that `optimize` read in this process, if it is still there and its content is still the same.

    An artifact records the name and hash of its source but no path, so a loaded one has no recorded reference.

    Args:
        model: What `optimize` returned.
    """
    source = model.source
    if source is None or isinstance(source, nn.Module):
        return None if source is None else EagerReference(source)
    try:
        checkpoint = Checkpoint.open(Path(source))
        with track("hash weights", checkpoint.total_bytes) as advance:
            found = checkpoint.content_hash(on_progress=_by_increments(advance))
    except (CaptureError, OSError):
        return None  # moved or deleted since
    return EagerReference(source) if found == model.source_sha256 else None


def _by_increments(advance: Callable[[float], None]) -> Callable[[int, int], None]:
    """A progress function of (done, total) from one that is told increments."""
    last = 0

    def report(done: int, total: int) -> None:
        nonlocal last
        advance(done - last)
        last = done

    return report


def evaluate(
    model: OptimizedModel,
    *,
    text: str | None = None,
    windows: Sequence[Sequence[int]] | None = None,
    reference: EagerReference | str | Path | nn.Module | None = None,
    context: int | None = None,
    prefill: int | None = None,
    seed: int = 0,
) -> EvalResult:
    """Measure perplexity, and KL divergence from a reference; the module's docstring says what is scored.

    Reference and artifact run in turn, a few windows at a time. Open the model with ONNX Runtime's spinning off where
    a reference is given: threads that spin between its steps slow the reference down.

    Args:
        model: A decoder.
        text: Text to cut into windows.
        windows: Token ids instead of text, windows of equal length. With neither, `SAMPLED_WINDOWS` windows are sampled
            from the model itself.
        reference: The source model; default what `optimize` read in this process, if it has not changed.
        context: Window length, where that is less than 1024; default the model's context.
        prefill: Tokens of each window that go through `prefill`; the rest is decoded. Default all, and all but the
            first are scored.
        seed: Of sampled text.

    Returns:
        The measures.

    Raises:
        OptionError: The model is an encoder, the text is too short, an option is out of range, or the reference has
            another vocabulary.
        ArtifactError: The model's logits are not numbers; or `text` is given and there is no tokenizer.
        CaptureError: The reference cannot be read.
    """
    chosen = _windows_of(model, text, windows, context, prefill, seed)
    length = len(chosen[0])
    if reference is None:
        reference = recorded_reference(model)
    elif not isinstance(reference, EagerReference):
        reference = EagerReference(reference)
    if reference is not None and reference.vocab_size not in (None, model.info.vocab_size):
        raise _not_comparable(reference, f"has a vocabulary of {reference.vocab_size} tokens", model)
    scoring = _Scoring(model, reference, prefill or 1, length)
    with track("evaluate", len(chosen) * (length - scoring.first)) as advance:
        if prefill is None:
            for window in chosen:
                scoring.score_in_chunks(window, advance)
        else:
            rows = scoring.rows_together()
            for start in range(0, len(chosen), rows):
                scoring.score_by_decoding(chosen[start : start + rows], advance)
    return scoring.result(chosen)


def _windows_of(
    model: OptimizedModel,
    text: str | None,
    windows: Sequence[Sequence[int]] | None,
    context: int | None,
    prefill: int | None,
    seed: int,
) -> list[list[int]]:
    """The windows to score, checked against the model, at least one."""
    if model.info.kind != "decoder":
        raise OptionError(
            f"[eval] {model.info.name} is an encoder: it has no next token to score. Compare its outputs with "
            "`optimize(..., check=True)` instead."
        )
    if text is not None and windows is not None:
        raise OptionError("[eval] text and windows: found both, needs at most one of them.")
    length = _window_length(model, context)
    if windows is not None:
        chosen = [list(window) for window in windows]
        _check_windows(chosen, model)
        length = len(chosen[0])
    _check_prefill(prefill, length)
    if text is not None:
        chosen = cut_windows(text_tokens(model.tokenizer, text), length)
    elif windows is None:
        chosen = sample_text(model, windows=SAMPLED_WINDOWS, length=length, seed=seed).windows
    _check_tokens(chosen, model)
    return chosen


def _window_length(model: OptimizedModel, context: int | None) -> int:
    most = model.info.context
    if context is not None and not 2 <= context <= most:
        raise OptionError(
            f"[eval] context={context}: needs 2 to {most}, the context of {model.info.name}, because the first token "
            "of a window is not scored. Leave it out for the longest."
        )
    return min(context or most, LONGEST_WINDOW)


def _check_prefill(prefill: int | None, length: int) -> None:
    if prefill is not None and not 1 <= prefill < length:
        raise OptionError(
            f"[eval] prefill={prefill}: needs 1 to {length - 1}, fewer than the {length} tokens of a window, because "
            "only what comes after them is scored. Choose a smaller prefill or a larger context."
        )


def _check_windows(windows: list[list[int]], model: OptimizedModel) -> None:
    lengths = sorted({len(window) for window in windows})
    if len(lengths) != 1 or not 2 <= lengths[0] <= model.info.context:
        raise OptionError(
            f"[eval] windows: found {len(windows)} of length {', '.join(map(str, lengths)) or 'none'}, needs at least "
            f"one, all of one length from 2 to the model's context of {model.info.context}. Cut the tokens with "
            "jettison.sample_text.cut_windows."
        )


def _check_tokens(windows: list[list[int]], model: OptimizedModel) -> None:
    vocab_size = model.info.vocab_size
    wrong = next((token for window in windows for token in window if not 0 <= token < vocab_size), None)
    if wrong is not None:
        raise OptionError(
            f"[eval] found token {wrong}, needs 0 to {vocab_size - 1}, the vocabulary of {model.info.name}. "
            "The tokens are of another model's tokenizer: use the one of this model."
        )


def _not_comparable(reference: EagerReference, wrong: str, model: OptimizedModel) -> OptionError:
    return OptionError(
        f"[eval] reference {reference.name}: {wrong}, needs finite logits of the {model.info.vocab_size} tokens of "
        f"{model.info.name}, or there is nothing to compare. Give the model that the artifact was made from."
    )


class _Scoring:
    """Sums over the scored tokens of all windows."""

    def __init__(self, model: OptimizedModel, reference: EagerReference | None, first: int, length: int) -> None:
        self.model, self.reference, self.first, self.length = model, reference, first, length
        self.tokens, self.agreed, self.negative_log_likelihood, self.divergence = 0, 0, 0.0, 0.0
        self.certified, self.decoded = 0, 0
        self.state_bytes = 0

    def rows_together(self) -> int:
        """Windows that are decoded as rows of one session, so that weights are read once for all of them."""
        rows = min(rows_that_fit(self.model.executor, self.length), MOST_PREFILL_TOKENS // self.first)
        if self.reference is not None:
            window_bytes = (self.length - self.first) * self.model.info.vocab_size * 4
            rows = min(rows, MOST_REFERENCE_BYTES // window_bytes)
        return max(1, rows)

    def reference_logits(self, window: list[int]) -> Tensor | None:
        """Logits `[W - first, V] f32` that score the tokens from `first` on."""
        if self.reference is None:
            return None
        logits, vocab_size = self.reference.logits(window[:-1]), self.model.info.vocab_size
        wrong = None
        if logits.shape[-1] != vocab_size:
            wrong = f"gives logits of {logits.shape[-1]} tokens"
        elif not bool(logits.isfinite().all()):
            wrong = "gives NaN or infinite logits"
        if wrong is not None:
            raise _not_comparable(self.reference, wrong, self.model)
        return logits[self.first - 1 :]

    def score_in_chunks(self, window: list[int], advance: Callable[[float], None]) -> None:
        """Run a window through `prefill`, a chunk at a time so that no more logits than those are held."""
        expected = self.reference_logits(window)
        session = self.model.session(1, self.length)
        for start in range(0, self.length - 1, session.prefill_chunk):
            stop = min(start + session.prefill_chunk, self.length - 1)
            logits = session.score([window[start:stop]])[0]
            self.add(logits, window[start + 1 : stop + 1], None if expected is None else expected[start:stop])
            advance(stop - start)
        self.state_bytes = session.state_bytes  # of caches that drop tokens not known before

    def score_by_decoding(self, group: list[list[int]], advance: Callable[[float], None]) -> None:
        """Run the first tokens of some windows through `prefill` and the rest through `decode`."""
        expected = None  # [W - first, B, V]
        for row, window in enumerate(group):
            found = self.reference_logits(window)
            if found is not None:
                if expected is None:
                    expected = found.new_empty((found.shape[0], len(group), found.shape[1]))
                expected[:, row] = found
        session = self.model.session(len(group), self.length)
        # Steps are scored many at a time: one step's few rows are too little work to spread over threads.
        most = max(1, _rows_per_chunk(self.model.info.vocab_size) // len(group))
        steps = [session.prefill([window[: self.first] for window in group])]
        best = [steps[0].argmax(-1)]
        for position in range(self.first, self.length):
            is_last = position + 1 == self.length
            if len(steps) == most or is_last:
                scored = slice(position + 1 - len(steps), position + 1)
                targets = [window[at] for at in range(scored.start, scored.stop) for window in group]
                wanted = None if expected is None else expected[scored.start - self.first : scored.stop - self.first]
                expected_here = None if wanted is None else wanted.flatten(0, 1)
                self.add(torch.cat(steps), targets, expected_here, torch.cat(best))
                steps.clear()
                best.clear()
            if not is_last:
                logits, likeliest = self._decode(session, [window[position] for window in group])
                steps.append(logits)
                best.append(likeliest)
            advance(len(group))
        self.state_bytes = session.state_bytes // len(group)

    def _decode(self, session: Session, tokens: list[int]) -> tuple[Tensor, Tensor]:
        """Logits `[B, V]` after one more token of each row, and the tokens `[B]` that a step finds likeliest."""
        if not session.has_approximate_head:
            logits = session.decode(tokens)
            return logits, logits.argmax(-1)
        found = session.decode_candidates(tokens)
        self.certified += int(found.certified(1).sum())
        self.decoded += len(tokens)
        return found.whole(session.executor), found.tokens[:, 0]

    def add(self, logits: Tensor, targets: list[int], expected: Tensor | None, likeliest: Tensor | None = None) -> None:
        """Add some scored tokens.

        Args:
            logits: `[N, V] f32` of the artifact.
            targets: The tokens that came, `N` of them.
            expected: `[N, V] f32` of the reference, or None.
            likeliest: `[N] i64`, tokens that the artifact finds likeliest; default those of the logits.
        """
        likeliest = logits.argmax(-1) if likeliest is None else likeliest
        rows = _rows_per_chunk(logits.shape[-1])
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            log_q = logits[chunk].double().log_softmax(-1)
            likelihood = log_q.gather(-1, torch.tensor(targets[chunk])[:, None]).sum().item()
            if not math.isfinite(likelihood):
                raise ArtifactError(
                    f"[eval] {self.model.info.name}: its logits are not finite numbers, so nothing can be scored: a "
                    "weight is damaged or an activation overflowed. Run `jettison verify` on the artifact; if it "
                    "passes, optimise again with fewer passes to find the one at fault."
                )
            self.negative_log_likelihood -= likelihood
            if expected is not None:
                log_p = expected[chunk].double().log_softmax(-1)
                p = log_p.exp()
                # A token that the reference rules out contributes nothing, whatever its logarithms are.
                self.divergence += torch.where(p == 0, 0.0, p * (log_p - log_q)).sum().item()
                self.agreed += int((expected[chunk].argmax(-1) == likeliest[chunk]).sum())
        self.tokens += len(targets)

    def result(self, windows: list[list[int]]) -> EvalResult:
        """The means."""
        tokenizer = tokenizer_or_none(self.model)
        scored_bytes = 0 if tokenizer is None else sum(_scored_bytes(tokenizer, each, self.first) for each in windows)
        bits = self.negative_log_likelihood / math.log(2)
        mean = self.negative_log_likelihood / self.tokens
        has_reference = self.reference is not None
        return EvalResult(
            perplexity=math.exp(mean) if mean < _LARGEST_EXPONENT else math.inf,
            bits_per_byte=bits / scored_bytes if scored_bytes else None,
            # Rounding leaves a tiny negative sum where both are the same.
            kl=max(0.0, self.divergence / self.tokens) if has_reference else None,
            top1_agreement=self.agreed / self.tokens if has_reference else None,
            tokens=self.tokens,
            weight_bytes=self.model.executor.weight_bytes,
            state_bytes=self.state_bytes,
            certified_fraction=self.certified / self.decoded if self.decoded else None,
        )


def _rows_per_chunk(vocab_size: int) -> int:
    return max(1, CHUNK_BYTES // (8 * vocab_size))


def _scored_bytes(tokenizer: Tokenizer, window: list[int], first: int) -> int:
    """UTF-8 bytes that the scored tokens add to the text of a window."""
    # Decoded from the start of the window both times: decoders treat the first token of a text in a special way.
    return len(tokenizer.decode(window).encode()) - len(tokenizer.decode(window[:first]).encode())
