"""Compare numbers: a tensor with its reference, and a program with the program it came from.

Everything that calls two results "the same" goes through `difference` (and its raising form `assert_close`), so there
is one meaning of the word: the largest error, measured in fp64, over the largest magnitude of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from jettison.ir.interpret import run_entry
from jettison.ir.program import (
    HEAD,
    HEAD_INPUT,
    LAYER,
    Program,
    Retention,
    Storage,
    input_placeholders,
    state_name,
    state_placeholders,
)

# Largest error over the largest reference magnitude that counts as rounding, by the dtype under test.
DEFAULT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
# Logits are turned into fp64 log-probabilities this many bytes at a time.
_CHUNK_BYTES = 16 << 20
_SLOT_GRANULE = 64


@dataclass(frozen=True)
class Difference:
    """How far a tensor is from its reference.

    Attributes:
        max_error: Largest `|actual - expected|` in fp64; infinite when either holds a NaN, when an infinity stands in
            one only, or when the shapes differ.
        magnitude: Largest finite `|expected|`.
        where: Index of the largest error; None when the shapes differ or there are no elements.
        note: What is wrong beyond a number (`shape (2,) for (3,)`, `NaN`), or the empty string.
    """

    max_error: float
    magnitude: float
    where: tuple[int, ...] | None = None
    note: str = ""

    @property
    def relative(self) -> float:
        """`max_error / magnitude`; against an all-zero reference any error is infinite."""
        if self.max_error == 0:
            return 0.0
        return self.max_error / self.magnitude if self.magnitude else math.inf


def difference(actual: Tensor, expected: Tensor) -> Difference:
    """Measure `actual` against `expected`.

    Infinities are equal to themselves (a mask of minus infinity is a value like any other); a NaN equals nothing.

    Args:
        actual: Any shape and dtype.
        expected: The reference, of the same shape; give it in the wider dtype if there is one.

    Returns:
        The largest error and where it is.
    """
    if actual.shape != expected.shape:
        return Difference(math.inf, 0.0, None, f"shape {tuple(actual.shape)} for {tuple(expected.shape)}")
    if not actual.numel():
        return Difference(0.0, 0.0)
    ours, theirs = actual.detach().cpu().double(), expected.detach().cpu().double()
    finite = theirs.abs()[theirs.isfinite()]
    magnitude = finite.max().item() if finite.numel() else 0.0
    error = torch.where(ours == theirs, 0.0, (ours - theirs).abs())
    is_nan = error.isnan()
    error = error.masked_fill(is_nan, math.inf)
    flat = int(error.argmax())
    where = tuple(int(index) for index in torch.unravel_index(torch.tensor(flat), error.shape))
    return Difference(error.flatten()[flat].item(), magnitude, where, "NaN" if bool(is_nan.any()) else "")


def assert_close(
    actual: Tensor, expected: Tensor, *, tolerance: float | None = None, reason: str = "", what: str = "value"
) -> Difference:
    """Raise unless `actual` is `expected` up to a tolerance.

    Args:
        actual: Any shape and dtype.
        expected: The reference, of the same shape.
        tolerance: Largest error over the largest reference magnitude; default by the dtype of `actual`, and 0 for
            integers and booleans.
        reason: Why a tolerance wider than the default is right; required then.
        what: How to call it in the message.

    Returns:
        The difference that was found small enough.

    Raises:
        AssertionError: The difference exceeds the tolerance.
        ValueError: The tolerance is wider than the default and no reason is given, or is not a number.
    """
    default = DEFAULT_TOLERANCE.get(actual.dtype, 0.0)
    if tolerance is None:
        tolerance = default
    if not tolerance >= 0 or math.isinf(tolerance):
        raise ValueError(f"tolerance {tolerance}: needed a finite number, at least 0")
    if tolerance > default and not reason.strip():
        raise ValueError(f"tolerance {tolerance:g} is wider than {default:g}, the default of {actual.dtype}: say why")
    found = difference(actual, expected)
    # Compared as a product, so that an all-zero reference asks for zeros instead of dividing by one.
    if not found.max_error <= tolerance * found.magnitude:
        detail = found.note or f"largest error {found.max_error:.3g} at {found.where}"
        raise AssertionError(
            f"{what} ({actual.dtype}): {detail}; relative {found.relative:.3g}, tolerance {tolerance:g} of the "
            f"largest reference magnitude {found.magnitude:.3g}"
        )
    return found


@dataclass(frozen=True)
class Drift:
    """How far a program is from a reference program on some tokens.

    Attributes:
        kl: Mean KL(reference || program) in nats per token, summed in fp64; None where the outputs are not logits.
        max_error: Largest error, of the output where it is relatively largest.
        magnitude: Largest magnitude of that output in the reference.
        top1_agreement: Fraction of tokens whose best next token is the same; None where the outputs are not logits.
        tokens: Number of tokens compared.
    """

    kl: float | None
    max_error: float
    magnitude: float
    top1_agreement: float | None
    tokens: int

    @property
    def relative_error(self) -> float:
        """`max_error / magnitude`, comparable with `DEFAULT_TOLERANCE`."""
        return Difference(self.max_error, self.magnitude).relative


def logits_drift(reference: Tensor, actual: Tensor) -> Drift:
    """KL divergence, largest error and top-1 agreement of two sets of logits.

    Args:
        reference: `[..., V]`.
        actual: `[..., V]`, the same shape.

    Returns:
        The drift over all tokens. A NaN gives an infinite `kl`, so that no comparison with a budget passes by accident.

    Raises:
        ValueError: The shapes differ, or there is no token.
    """
    if reference.shape != actual.shape or not reference.numel():
        raise ValueError(f"logits {tuple(actual.shape)} against {tuple(reference.shape)}: needed equal, non-empty")
    found = difference(actual, reference)
    vocabulary = reference.shape[-1]
    ours, theirs = actual.detach().reshape(-1, vocabulary), reference.detach().reshape(-1, vocabulary)
    rows = max(1, _CHUNK_BYTES // (8 * vocabulary))
    total, agreed = 0.0, 0
    for p_logits, q_logits in zip(theirs.split(rows), ours.split(rows), strict=True):
        log_p, log_q = p_logits.double().log_softmax(-1), q_logits.double().log_softmax(-1)
        p = log_p.exp()
        # A token that the reference rules out contributes nothing; its logarithms are minus infinity.
        terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
        total += terms.sum().item()
        agreed += int((p_logits.argmax(-1) == q_logits.argmax(-1)).sum())
    tokens = theirs.shape[0]
    kl = math.inf if math.isnan(total) else max(0.0, total / tokens)
    return Drift(kl, found.max_error, found.magnitude, agreed / tokens, tokens)


def example_input_ids(program: Program, batch: int = 2, length: int = 16) -> Tensor:
    """Token ids `[batch, length] i64` inside the vocabulary, the same on every machine; at most a whole context."""
    length = min(length, program.info.context)
    return ((torch.arange(batch * length) * 7919 + 13) % program.info.vocab_size).reshape(batch, length)


def run_program(
    program: Program, input_ids: Tensor, *, prefill: int | None = None, inputs: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, ...]:
    """Run a program on whole sequences, from empty states, through whichever entries it has.

    Args:
        program: With `forward`, or with `prefill` and `decode`.
        input_ids: `[B, S] i64`.
        prefill: For a program with states: how many tokens go through `prefill`; the rest go through `decode` one by
            one. Default all of them.
        inputs: Run-time inputs by name, instead of the usual ones (positions from 0, every token real, logits of
            every token). Not for `decode`.

    Returns:
        The program's outputs, those of the tokens `[B, S, ...]` joined over the calls.

    Raises:
        ValueError: The program takes an input that is neither usual nor given, or `prefill` is out of range.
    """
    length = input_ids.shape[1]
    if prefill is not None and not 1 <= prefill <= length:
        raise ValueError(f"prefill={prefill}: needed at least 1 and at most the {length} tokens")
    if "forward" in program.entries:
        return _call(program, "forward", input_ids, 0, {}, inputs)[0]
    # As the sessions choose it: the tokens rounded up, so that there are empty slots, as there are in use.
    capacity = min(-(-length // _SLOT_GRANULE) * _SLOT_GRANULE, max(length, program.info.context))
    first = length if prefill is None else prefill
    cache = _Cache(program, input_ids.shape[0], capacity, first)
    outputs = cache.call("prefill", input_ids[:, :first], 0, inputs)
    cache.make_room(first, is_prompt=True)
    calls = [outputs]
    for position in range(first, length):
        cache.make_room(position, is_prompt=False)
        found = cache.call("decode", input_ids[:, position : position + 1], position, None)
        calls.append(_completed(program, found))
    return tuple(torch.cat(pieces, 1) for pieces in zip(*calls, strict=True))


class _Cache:
    """States of rows of equal length, whose tokens are dropped and stored where a session would.

    Attributes:
        states: By name.
        held: Tokens that each row has in the slots of a retention.
        filled: Slots that each row has filled of a storage.
    """

    def __init__(self, program: Program, batch: int, capacity: int, prompt: int) -> None:
        self.program, self.batch = program, batch
        counts = {"capacity": capacity}
        for name, kept in program.retentions.items():
            counts[name] = max(capacity, prompt, (kept.budget or 0) + 1)
        for name, storage in program.storages.items():
            counts[name] = max(1, storage.moving(capacity))
        self.states = {
            name: torch.zeros(
                state.sizes(batch, next((counts[size] for size in state.shape if size in counts), capacity)),
                dtype=state.dtype,
            )
            for name, state in program.states.items()
        }
        self.held = dict.fromkeys(program.retentions, 0)
        self.filled = dict.fromkeys(program.storages, 0)

    def call(self, entry: str, input_ids: Tensor, start: int, given: Mapping[str, Tensor] | None) -> tuple[Tensor, ...]:
        """One call of an entry at positions `start, start + 1, ...`: its outputs."""
        program, length = self.program, input_ids.shape[1]
        self.held = {name: count + length for name, count in self.held.items()}
        more = {program.retentions[name].mask: self._ones(count) for name, count in self.held.items()}
        more |= {program.storages[name].count: torch.full((self.batch,), count) for name, count in self.filled.items()}
        outputs, self.states = _call(program, entry, input_ids, start, self.states, {**more, **(given or {})})
        return outputs

    def make_room(self, seen: int, *, is_prompt: bool) -> None:
        """Drop and store tokens, of which each row has seen so many."""
        for name, kept in self.program.retentions.items():
            if kept.budget is None:
                continue
            most = kept.budget + (0 if is_prompt else kept.every or seen)
            if self.held[name] > kept.budget and self.held[name] >= most:
                inputs = {kept.mask: self._ones(self.held[name]), "token_count": torch.full((self.batch,), seen)}
                for layer in kept.layers:
                    self._run(name, kept, layer, inputs)
                for storage in self.program.storages.values():
                    if storage.takes_dropped and storage.retention == name:
                        self._store(storage, kept.budget)
                self.held[name] = kept.budget
        for storage in self.program.storages.values():
            is_full = self.held[storage.retention] >= storage.residual
            if not storage.takes_dropped and (is_prompt or is_full):
                self._store(storage, 0)

    def _store(self, storage: Storage, start: int) -> None:
        """Compress tokens from a slot on, and free their slots."""
        kept, held, filled = (
            self.program.retentions[storage.retention], self.held[storage.retention], self.filled[storage.name]
        )  # fmt: skip
        count = storage.moving(held)
        moved = count * storage.tokens
        if not count:
            return
        slots = torch.arange(filled, filled + count).repeat(self.batch, 1)
        for layer in kept.layers:
            key, value = (
                self.states[state_name(layer, short)][:, :, start : start + moved].unflatten(2, (count, storage.tokens))
                for short in ("key", "value")
            )
            self._run(storage.name, kept, layer, {"new_key": key, "new_value": value, "stored_slots": slots})
        for name, state in self.program.states.items():
            if kept.name in state.shape:
                axis = state.shape.index(kept.name)
                before, _, after = self.states[name].split_with_sizes(
                    [start, moved, self.states[name].shape[axis] - start - moved], axis
                )
                empty = before.new_zeros(state.sizes(self.batch, moved))
                self.states[name] = torch.cat([before, after, empty], axis)
        self.held[kept.name], self.filled[storage.name] = held - moved, filled + count

    def _run(self, entry: str, kept: Retention, layer: int, inputs: Mapping[str, Tensor]) -> None:
        """Run an entry that rewrites the states of a layer."""
        taken = list(state_placeholders(self.program.entries[entry]))
        own = [kept.name_in(layer, each) for each in taken]
        given = {each: self.states[actual] for each, actual in zip(taken, own, strict=True)}
        if LAYER in input_placeholders(self.program.entries[entry]):
            given[LAYER] = torch.tensor([kept.layers.index(layer)])
        new = run_entry(self.program, entry, {**given, **inputs})
        self.states |= dict(zip(own, new, strict=True))

    def _ones(self, count: int) -> Tensor:
        return torch.ones(self.batch, count, dtype=torch.int64)


def usual_inputs(input_ids: Tensor, start: int = 0) -> dict[str, Tensor]:
    """Run-time inputs by name for tokens at positions `start, start + 1, ...`: every token real, logits of every one.

    Args:
        input_ids: `[B, S] i64`.
        start: Tokens of each row that came before.
    """
    batch, length = input_ids.shape
    columns = torch.arange(length)[None].repeat(batch, 1)
    return {
        "input_ids": input_ids,
        "position_ids": start + columns,
        "attention_mask": torch.ones(batch, start + length, dtype=torch.int64),
        "token_type_ids": torch.zeros_like(input_ids),
        "logits_positions": columns,
    }


def _call(
    program: Program,
    entry: str,
    input_ids: Tensor,
    start: int,
    states: Mapping[str, Tensor],
    given: Mapping[str, Tensor] | None,
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """One call of an entry at positions `start, start + 1, ...`: its outputs, and the new states by name."""
    available = {**usual_inputs(input_ids, start), **(given or {})}
    wanted = input_placeholders(program.entries[entry])
    unknown = [name for name in wanted if name not in available]
    if unknown:
        raise ValueError(f"entry {entry} takes {', '.join(unknown)}: give it in `inputs`")
    names = list(state_placeholders(program.entries[entry]))
    values = run_entry(program, entry, {**states, **{name: available[name] for name in wanted}})
    count = len(program.outputs_of(entry))
    return tuple(values[:count]), {**states, **dict(zip(names, values[count:], strict=True))}


def _completed(program: Program, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The program's outputs of a decode step that may have returned candidates only."""
    if HEAD not in program.entries:
        return outputs
    hidden = dict(zip(program.outputs_of("decode"), outputs, strict=True))[HEAD_INPUT]
    return run_entry(program, HEAD, {HEAD_INPUT: hidden})


def compare_programs(
    before: Program,
    after: Program,
    input_ids: Tensor | None = None,
    *,
    prefill: int | None = None,
    inputs: Mapping[str, Tensor] | None = None,
) -> Drift:
    """Run two programs on the same tokens and measure how far `after` is from `before`.

    Args:
        before: The reference.
        after: What a pass made of it.
        input_ids: `[B, S] i64`; default `example_input_ids`.
        prefill: See `run_program`.
        inputs: See `run_program`.

    Returns:
        The drift: for a decoder KL and top-1 agreement of the first output, and the largest error of all outputs.
    """
    input_ids = example_input_ids(before) if input_ids is None else input_ids
    reference = run_program(before, input_ids, prefill=prefill, inputs=inputs)
    actual = run_program(after, input_ids, prefill=prefill, inputs=inputs)
    found = [difference(ours, theirs) for ours, theirs in zip(actual, reference, strict=True)]
    worst = max(found, key=lambda item: item.relative)
    if before.outputs[0] != "logits" or before.info.kind != "decoder" or math.isinf(found[0].max_error):
        kl = None if before.info.kind != "decoder" else math.inf
        return Drift(kl, worst.max_error, worst.magnitude, None, input_ids.numel())
    drift = logits_drift(reference[0], actual[0])
    return Drift(drift.kl, worst.max_error, worst.magnitude, drift.top1_agreement, drift.tokens)
