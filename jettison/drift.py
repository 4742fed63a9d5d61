"""Drift: how far each pass moves a program from the model that was captured, checked while the pipeline runs.

The tokens are sampled from the captured program itself, or given: on random ids a trained model is out of its element,
and drift there says little about text. They are few (`TOKENS`, in rows of at most `MOST_ROW_TOKENS`), so this finds a
broken pass or a bad setting; what a cache policy does to sequences longer than a row, and how good the result is, is
measured by `jettison eval`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jettison.ir.compare import Difference, difference, example_input_ids, logits_drift, run_program
from jettison.ir.constants import Constant
from jettison.ir.eager_check import CAPTURE_TOLERANCE
from jettison.ir.errors import JettisonError, OptionError, PassError, UnsupportedError
from jettison.ir.interpret import run_entry
from jettison.ir.program import PassRecord, Program, input_placeholders, state_placeholders
from jettison.ir.progress import track
from jettison.passes.base import Pass
from jettison.passes.cache_kv import CacheKV
from jettison.passes.decode_only import is_decode_only
from jettison.passes.formats import format_from_text
from jettison.runtime.sampling import Sampler
from jettison.runtime.session import Session

TOKENS = 384
# Short rows hide what a cache policy that forgets does to long ones, but every token of a row is a step that reads all
# weights: rows are as long as makes sampling read this many bytes.
MOST_ROW_TOKENS, FEWEST_ROW_TOKENS = 64, 16
SAMPLING_BYTES = 16 << 30
# Logits of all tokens, kept for the captured program and for the one before a pass: fewer rows of a large vocabulary.
LOGITS_BYTES = 64 << 20
# Finding the weight that drifts most runs the program once per weight; more than this is not worth waiting for.
ATTRIBUTION_SECONDS = 60.0


class BudgetExceeded(JettisonError):  # noqa: N818 (the name that the front door documents)
    """A pass moved the program further than the user allowed. The CLI exits 3 on it.

    Attributes:
        pass_name: The pass.
        kl: Mean KL(captured || after the pass), nats per token.
        max_kl: The budget.
        layer: The weight that drifts most by itself, if one was found.
    """

    def __init__(self, message: str, *, pass_name: str, kl: float, max_kl: float, layer: str | None) -> None:
        super().__init__(message)
        self.pass_name, self.kl, self.max_kl, self.layer = pass_name, kl, max_kl, layer


@dataclass(frozen=True)
class Deviation:
    """How far one set of outputs is from another.

    Attributes:
        kl: Mean KL(reference || other) in nats per token; None for an encoder.
        max_error: Largest error, of the output where it is relatively largest.
        relative_error: The same over the largest magnitude of that output in the reference.
        top1_agreement: Fraction of tokens whose best next token is the same; None for an encoder.
    """

    kl: float | None
    max_error: float
    relative_error: float
    top1_agreement: float | None


class DriftCheck:
    """Called after every pass: records the drift, and stops the pipeline where it is more than it may be.

    Args:
        program: As captured and prepared; it may be changed afterwards.
        max_kl: Most nats per token that the program may be from the captured one, after any pass.
        seed: Of the tokens.
        windows: Token ids to use instead of sampled ones, in windows of equal length (`row_tokens(program)` is a good
            one); the first `TOKENS` tokens are used.

    Raises:
        OptionError: `max_kl` is no budget, or the program is an encoder, whose outputs have no KL divergence.
    """

    def __init__(
        self,
        program: Program,
        max_kl: float | None = None,
        seed: int = 0,
        *,
        windows: Sequence[Sequence[int]] | None = None,
    ) -> None:
        if max_kl is not None and not 0 <= max_kl < math.inf:
            raise OptionError(f"[check] max_kl={max_kl}: needs a number of nats per token, at least 0.")
        if max_kl is not None and program.info.kind != "decoder":
            raise OptionError(
                f"[check] max_kl={max_kl}: {program.info.name} is an encoder, and KL divergence is between next-token "
                "probabilities. Leave max_kl out; the report shows the largest error."
            )
        self.max_kl = max_kl
        if windows is None:
            self.input_ids = sample_input_ids(program, seed)
        else:
            self.input_ids = torch.tensor([list(row) for row in windows[: _row_count(program, len(windows[0]))]])
        self._prefill = (self.input_ids.shape[1] + 1) // 2
        self._tolerance = _tolerance(program)
        self._before = program.copy()
        self._captured = self._run(program)
        self._previous = self._captured

    def __call__(self, pass_: Pass, record: PassRecord, program: Program) -> None:
        """Measure the program after a pass.

        Args:
            pass_: What ran.
            record: Gets `kl`, `max_error` and `top1_agreement`, all against the captured program.
            program: The result.

        Raises:
            PassError: A pass that claims to be exact changed the numbers by more than rounding.
            BudgetExceeded: The program is further than `max_kl` from the captured one.
        """
        outputs = self._previous if not record.rewrites else self._run(program)
        found = deviation(self._captured, outputs, is_decoder=program.info.kind == "decoder")
        record.kl, record.max_error, record.top1_agreement = found.kl, found.max_error, found.top1_agreement
        # With a cache, a prompt is dense again (see `decode_only`): another program, and none that is further off.
        if pass_.is_exact and not is_decode_only(program):
            self._require_exact(pass_, outputs)
        if self.max_kl is not None and found.kl is not None and not found.kl <= self.max_kl:
            raise self._exceeded(pass_, found.kl, program)
        self._previous, self._before = outputs, program.copy()

    def of_prompts(self, session: Callable[[int, int], Session]) -> float:
        """KL(captured || session) where every token goes through `prefill`, in nats per token.

        Args:
            session: Opens one for a number of rows and of tokens.
        """
        rows, length = self.input_ids.shape
        logits = session(rows, length).score(self.input_ids.tolist())
        kl = deviation(self._captured[:1], (logits,), is_decoder=True).kl
        assert kl is not None, "of a decoder"
        return kl

    def _run(self, program: Program) -> tuple[Tensor, ...]:
        """Outputs `[B, S, ...]` of every token; a program with a cache decodes the second half of each row."""
        has_cache = "forward" not in program.entries
        return run_program(program, self.input_ids, prefill=self._prefill if has_cache else None)

    def _require_exact(self, pass_: Pass, outputs: tuple[Tensor, ...]) -> None:
        """Against the program just before: what came earlier may well have been lossy."""
        found = deviation(self._previous, outputs, is_decoder=False)
        if not found.relative_error <= self._tolerance:
            raise PassError(
                f"[{pass_.name}] claims to compute the same, but moves the outputs by {found.max_error:.3g}, "
                f"{found.relative_error:.3g} of the largest; rounding explains {self._tolerance:g}. Measured on "
                f"{self.input_ids.numel()} tokens sampled from the model."
            )

    def _exceeded(self, pass_: Pass, kl: float, program: Program) -> BudgetExceeded:
        layer, largest = self._worst_weight(program)
        advice = "Choose gentler options"
        if layer is not None:
            advice = (
                f"The weight that drifts most by itself is {layer} ({largest:.3g} nats per token). Leave it out of the "
                "pass, choose gentler options"
            )
        message = (
            f"[{pass_.name}] the program is {kl:.3g} nats per token from the captured model after this pass, more than "
            f"the budget of {self.max_kl:g} (max_kl). {advice}, or allow more."
        )
        assert self.max_kl is not None, "checked by the caller"
        return BudgetExceeded(message, pass_name=pass_.name, kl=kl, max_kl=self.max_kl, layer=layer)

    def _worst_weight(self, program: Program) -> tuple[str | None, float]:
        """The newly packed weight that alone drifts most from the program before, and its KL.

        Nothing where no weight was packed, or where trying them all would take too long.
        """
        packed = [name for name in program.packed if name in self._before.constants]
        ids = self.input_ids[:, :FEWEST_ROW_TOKENS]
        started = time.perf_counter()
        expected = run_program(self._before, ids)[0]
        if (time.perf_counter() - started) * len(packed) > ATTRIBUTION_SECONDS:
            return None, 0.0
        worst: tuple[str | None, float] = (None, 0.0)
        with track("find the weight that drifts", len(packed)) as advance:
            for name in packed:
                trial = self._before.copy()
                value = dense_value(program, name)
                if value is not None:
                    trial.constants[name] = Constant(name, value, trial.constants[name].dtype)
                    kl = logits_drift(expected, run_program(trial, ids)[0]).kl or 0.0
                    worst = max(worst, (name, kl), key=lambda item: item[1])
                advance(1)
        return worst


def row_tokens(program: Program) -> int:
    """Tokens of a row to check a program with: fewer for a large model, since every one of them costs a step."""
    bytes_per_step = sum(constant.nbytes for constant in program.used_constants().values())
    affordable = SAMPLING_BYTES // max(1, bytes_per_step)
    return min(program.info.context, max(FEWEST_ROW_TOKENS, min(MOST_ROW_TOKENS, affordable)))


def _row_count(program: Program, length: int) -> int:
    tokens = min(TOKENS, LOGITS_BYTES // (4 * program.info.vocab_size))
    return max(1, tokens // length)


def sample_input_ids(program: Program, seed: int) -> Tensor:
    """Tokens to check a program with: `[B, S] i64`, about `TOKENS` of them.

    Every row begins with a random token and goes on at temperature 1 as the program does. Encoders, and decoders that
    cannot be given a cache (which the pipeline will refuse), get fixed ids.

    Args:
        program: With `forward`.
        seed: Of the draws.
    """
    length = row_tokens(program)
    rows = _row_count(program, length)
    try:
        cached = program.copy()
        CacheKV().run(cached)
    except (OptionError, UnsupportedError):
        return example_input_ids(program, rows, length)
    generator = torch.Generator().manual_seed(seed)
    sampler = Sampler(rows, do_sample=True, seed=seed)
    columns = [torch.randint(program.info.vocab_size, (rows, 1), generator=generator)]
    states = {name: torch.zeros(state.sizes(rows, length), dtype=state.dtype) for name, state in cached.states.items()}
    with track("sample text", length - 1) as advance:
        for position in range(length - 1):
            entry = "decode" if position else "prefill"
            usual = {
                "input_ids": columns[-1],
                "position_ids": torch.full((rows, 1), position),
                "attention_mask": torch.ones(rows, position + 1, dtype=torch.int64),
                "logits_positions": torch.zeros(rows, 1, dtype=torch.int64),
            }
            given = {name: usual[name] for name in input_placeholders(cached.entries[entry])}
            returned = run_entry(cached, entry, {**given, **states})
            new = returned[len(cached.outputs) :]
            states = dict(zip(state_placeholders(cached.entries[entry]), new, strict=True))
            columns.append(torch.tensor(sampler.choose(returned[0][:, -1]))[:, None])
            advance(1)
    return torch.cat(columns, 1)


def _tolerance(program: Program) -> float:
    """Largest relative error of whole-model outputs that rounding explains, by the dtype the program computes in."""
    dtypes = {constant.dtype for constant in program.used_constants().values()}
    return max((CAPTURE_TOLERANCE[dtype] for dtype in dtypes if dtype in CAPTURE_TOLERANCE), default=1e-4)


def dense_value(program: Program, name: str) -> Tensor | None:
    """A packed weight as floating-point numbers.

    Args:
        program: Holds it.
        name: Of the dense weight.

    Returns:
        `[N, K] f32` or `[X, N, K] f32`, or None where the format is none of ours.
    """
    packed = program.packed[name]
    try:
        weight_format = format_from_text(packed.format)
    except OptionError:
        return None
    *rows, columns = packed.shape
    # Parts of a stack (experts) have its first axis; the format knows matrices.
    parts = {
        part: program.constants[constant].value().flatten(0, len(rows) - 1) for part, constant in packed.parts.items()
    }
    return weight_format.decode(parts, (math.prod(rows), columns)).reshape(packed.shape)


def deviation(reference: tuple[Tensor, ...], outputs: tuple[Tensor, ...], *, is_decoder: bool) -> Deviation:
    """Compare the outputs of two programs, one row at a time so that little is held in fp64.

    Args:
        reference: Outputs `[B, ...]`; the first is the logits of a decoder.
        outputs: The same of the other program.
        is_decoder: Whether to compare next-token probabilities too.
    """
    found = []
    for ours, theirs in zip(outputs, reference, strict=True):
        by_row = [difference(mine, yours) for mine, yours in zip(ours, theirs, strict=True)]
        found.append(Difference(max(row.max_error for row in by_row), max(row.magnitude for row in by_row)))
    worst = max(found, key=lambda item: item.relative)
    if not is_decoder:
        return Deviation(None, worst.max_error, worst.relative, None)
    if math.isinf(found[0].max_error):  # NaN, or another shape: there is no probability to compare
        return Deviation(math.inf, math.inf, math.inf, 0.0)
    drifts = [logits_drift(yours, mine) for yours, mine in zip(reference[0], outputs[0], strict=True)]
    # Rows have equal numbers of tokens, so the mean of their means is the mean.
    kl = sum(drift.kl or 0.0 for drift in drifts) / len(drifts)
    agreement = sum(drift.top1_agreement or 0.0 for drift in drifts) / len(drifts)
    return Deviation(kl, worst.max_error, worst.relative, agreement)
