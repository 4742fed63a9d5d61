"""A session: one batch of sequences running through an executor, with its states and positions."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from jettison.ir.errors import ArtifactError, OptionError
from jettison.runtime.approximate_head import Candidates, has_approximate_head
from jettison.runtime.executor import Executor, SelectingExecutor, allocate_states
from jettison.runtime.kept_states import KeptStates, SlottedStates

SLOT_GRANULE = 64
# Tokens of a prompt that run through `prefill` at a time; bounds the memory of long prompts.
PREFILL_CHUNK = 512
# `logits_positions` below zero count from the last token of this call.
LAST_TOKEN = -1


class Session:
    """Rows of tokens that grow together, one cache slot per token as the policy decides.

    Positions are kept here, per row, and given to every call; they are never derived from the cache. Rows of different
    length need no padding: a ragged prompt runs row by row into its part of the states.

    Args:
        executor: What runs the entries; must have `prefill` and `decode`.
        batch: Rows, at least 1.
        capacity: Most tokens a row may come to hold, at least 1; rounded up to a multiple of 64, at most the context.
        prefill_chunk: Tokens of a prompt per call, at least 1.

    Raises:
        OptionError: The program generates nothing (an encoder), or a number is out of range.
    """

    def __init__(self, executor: Executor, batch: int, capacity: int, *, prefill_chunk: int = PREFILL_CHUNK) -> None:
        if "decode" not in executor.entries:
            raise OptionError(
                f"[generate] {executor.info.name} is an encoder: it has no next token. Call it to get its outputs."
            )
        for name, number in (("batch", batch), ("capacity", capacity), ("prefill_chunk", prefill_chunk)):
            if number < 1:
                raise OptionError(f"[session] {name}={number}: needed at least 1.")
        if capacity > executor.info.context:
            raise OptionError(
                f"[session] capacity {capacity}: the model's context is {executor.info.context} tokens. Ask for at "
                "most that many."
            )
        self.executor = executor
        self.batch = batch
        self.context = executor.info.context
        self.vocab_size = executor.info.vocab_size
        self.capacity = min(-(-capacity // SLOT_GRANULE) * SLOT_GRANULE, self.context)
        self.prefill_chunk = self._fitting_chunk(prefill_chunk)
        self.has_approximate_head = has_approximate_head(executor)
        self.lengths = [0] * batch
        kept = {*executor.retentions, *executor.storages}
        whole = {name: state for name, state in executor.states.items() if kept.isdisjoint(state.shape)}
        self.states = allocate_states(whole, batch, self.capacity, executor.device)
        storages = {storage.retention: storage for storage in executor.storages.values()}
        self.kept = [
            KeptStates(each, storages.get(name), executor.states, self.states, batch, executor.device)
            for name, each in executor.retentions.items()
        ]

    def _fitting_chunk(self, prefill_chunk: int) -> int:
        """Tokens of a prompt per call that the memory has room for in which weights were placed.

        Raises:
            OptionError: It has no room for the whole session.
        """
        placement = self.executor.placement
        if placement is None or not placement.context:
            return prefill_chunk
        planned = -(-placement.context // SLOT_GRANULE) * SLOT_GRANULE
        if self.batch * self.capacity > placement.batch * planned:
            limits = ", ".join(f"{size:,} bytes of the {tier}" for tier, size in placement.limits.items())
            raise OptionError(
                f"[session] {self.batch} x {self.capacity} tokens: weights were placed beside {placement.batch} x "
                f"{placement.context}, so that all fit {limits or 'the memory'}. Ask for fewer tokens, or place the "
                f"weights again: `jettison place ... --batch {self.batch} --context {self.capacity}`."
            )
        return max(1, min(prefill_chunk, placement.batch * placement.prompt // self.batch))

    @property
    def state_bytes(self) -> int:
        """Allocated bytes of all states."""
        return sum(state.untyped_storage().nbytes() for state in self.states.values())

    def prefill(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens to each row: a prompt, or more of it.

        Args:
            rows: Token ids, at least one per row.

        Returns:
            `[B, V] f32`, logits after the last token of each row.

        Raises:
            OptionError: A row is empty, holds something that is no token, or would outgrow the session's capacity.
        """
        self._check_tokens(rows)
        if self._can_run_together(rows):
            return self._run("prefill", _as_tensor(rows), 0, [LAST_TOKEN])[:, 0]
        self._make_room([len(row) for row in rows], is_prompt=True)
        return torch.cat([self._prefill_row(index, row)[:, -1] for index, row in enumerate(rows)])

    def score(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Append tokens of equal number to each row and return the logits after every one of them.

        Args:
            rows: Token ids, `B` rows of `S`.

        Returns:
            `[B, S, V] f32`.

        Raises:
            OptionError: As `prefill`, or the rows differ in length.
        """
        self._check_tokens(rows)
        if len({len(row) for row in rows}) != 1:
            raise OptionError(
                f"[session] score: rows of {', '.join(str(len(row)) for row in rows)} tokens: needed the same number, "
                "because the result is one tensor. Score rows of different length in sessions of their own."
            )
        if self._can_run_together(rows):
            tokens = _as_tensor(rows)
            return self._run("prefill", tokens, 0, list(range(tokens.shape[1])))
        self._make_room([len(row) for row in rows], is_prompt=True)
        return torch.cat([self._prefill_row(index, row, every=True) for index, row in enumerate(rows)])

    def decode(self, tokens: Sequence[int]) -> Tensor:
        """Append one token to each row.

        Args:
            tokens: One id per row.

        Returns:
            `[B, V] f32`, logits after it.

        Raises:
            OptionError: As `prefill`.
        """
        if self.has_approximate_head:
            return self.decode_candidates(tokens).whole(self.executor)
        rows = self._rows_to_decode(tokens)
        return self._run("decode", rows, 0, [LAST_TOKEN])[:, 0]

    def decode_candidates(self, tokens: Sequence[int]) -> Candidates:
        """Append one token to each row of a program with an approximate head.

        Args:
            tokens: One id per row.

        Returns:
            The tokens that may be the best next ones.

        Raises:
            OptionError: As `prefill`, or the program computes all logits at each step.
        """
        if not self.has_approximate_head:
            raise OptionError(
                f"[session] candidates: {self.executor.info.name} computes all logits at each step. Use decode, or "
                "optimise it with approximate-lm-head."
            )
        inputs = self._inputs("decode", self._rows_to_decode(tokens), 0, [LAST_TOKEN])
        found = Candidates.of(self.executor.run("decode", inputs, self.states))
        self._grow(0, self.batch, 1)
        return found

    @property
    def most_best(self) -> int:
        """Most tokens that `decode_best` picks for a row; 0 where it cannot."""
        if self.has_approximate_head:  # where there are too few candidates, the whole head is asked
            return self.vocab_size
        return self.executor.most_best if isinstance(self.executor, SelectingExecutor) else 0

    def decode_best(self, tokens: Sequence[int], count: int) -> tuple[Tensor, Tensor]:
        """Append one token to each row, and let the executor, or an approximate head, pick the best next ones.

        Args:
            tokens: One id per row.
            count: How many to pick for each row, 1 to `most_best`.

        Returns:
            Their logits `[B, count] f32`, largest first, and their ids `[B, count] i64`.

        Raises:
            OptionError: As `prefill`, or the executor picks fewer.
        """
        if self.has_approximate_head and 1 <= count <= self.most_best:
            return self.decode_candidates(tokens).best(count, self.executor)
        if not 1 <= count <= self.most_best or not isinstance(self.executor, SelectingExecutor):
            raise OptionError(f"[session] the best {count} tokens: this target picks at most {self.most_best}.")
        rows = self._rows_to_decode(tokens)
        inputs = self._inputs("decode", rows, 0, [LAST_TOKEN])
        values, ids = self.executor.run_best("decode", inputs, self.states, count)
        self._grow(0, self.batch, 1)
        return values[:, 0], ids[:, 0]

    def _rows_to_decode(self, tokens: Sequence[int]) -> Tensor:
        rows = [[token] for token in tokens]
        self._check_tokens(rows)
        if self.kept:
            self._make_room([1] * self.batch, is_prompt=False)
            for row in range(self.batch):
                self._free_slots(row)
        return _as_tensor(rows)

    def _can_run_together(self, rows: Sequence[Sequence[int]]) -> bool:
        length = len(rows[0])
        same = all(len(row) == length for row in rows)
        # `GroupQueryAttention` takes several tokens behind a past for one row at a time only.
        is_whole = self.batch == 1 or not any(self.lengths)
        return same and length <= self.prefill_chunk and is_whole and not self.kept

    def _make_room(self, new: Sequence[int], *, is_prompt: bool) -> None:
        """Slots for the tokens that rows will keep, now that it is known how many come at once."""
        left = [self.capacity - length - count for length, count in zip(self.lengths, new, strict=True)]
        for kept in self.kept:
            kept.make_room(new, left, is_prompt=is_prompt)

    def _prefill_row(self, index: int, row: Sequence[int], every: bool = False) -> Tensor:
        own = self._row_states(index)
        states = dict(own)
        staged = {}
        for kept in self.kept:
            loaded, budget = kept.stored_tokens(index), kept.retention.budget
            if kept.stored is not None:
                # A prompt reads nothing in compressed form: what there is, is decompressed once.
                states |= kept.stored.allocate(1, 0)
            if kept.held[index] + loaded + len(row) <= kept.slots and not loaded:
                continue
            # Where nothing is compressed, a long prompt is dropped from as it comes.
            is_dropped_late = kept.retention.every is None or kept.stored is not None
            at_once = len(row) if is_dropped_late else min(len(row), self.prefill_chunk)
            states |= kept.allocate(1, max(kept.held[index] + loaded, budget or 0) + at_once)
            kept.copy(own, states, kept.held[index], into=loaded)
            if loaded:
                kept.load(self.executor, index, own, states)
            staged[kept] = loaded
        pieces = []
        for start in range(0, len(row), self.prefill_chunk):
            chunk = _as_tensor([row[start : start + self.prefill_chunk]])
            wanted = list(range(chunk.shape[1])) if every else [LAST_TOKEN]
            pieces.append(self._run("prefill", chunk, index, wanted, states))
            is_last = start + chunk.shape[1] == len(row)
            for kept in self.kept:
                retention, held = kept.retention, kept.held[index]
                if retention.budget is None or held <= retention.budget:
                    continue
                if is_last or (retention.every is not None and kept.stored is None):
                    if kept.stored is not None and kept.oldest_to:  # all that is kept is compressed anew
                        staged[kept] = kept.stored.filled[index] = 0
                    self._strip(kept, index, states, staged.pop(kept, 0))
                    kept.drop(self.executor, index, self.lengths[index], states, own)
        for kept in self.kept:
            self._put_back(kept, index, states, own, staged.get(kept, 0))
        return torch.cat(pieces, 1) if every else pieces[-1]

    def _put_back(
        self, kept: KeptStates, row: int, states: Mapping[str, Tensor], own: Mapping[str, Tensor], loaded: int
    ) -> None:
        """Keep what a row holds after a prompt: in its own slots, or in compressed form.

        Args:
            kept: Of these states.
            row: Which row.
            states: Of this row, during the prompt.
            own: Of this row in the session.
            loaded: How many of the first tokens are in compressed form already.
        """
        self._strip(kept, row, states, loaded)
        if kept.oldest_to:
            kept.store(self.executor, row, states, own)
        if states[kept.names[0]] is not own[kept.names[0]]:
            kept.copy(states, own, kept.held[row])

    def _strip(self, kept: KeptStates, row: int, states: Mapping[str, Tensor], loaded: int) -> None:
        """Take the first tokens out of a row's slots: they were there for a prompt only."""
        if loaded:
            kept.held[row] -= loaded
            kept.shift(states, loaded, kept.held[row])

    def _free_slots(self, row: int) -> None:
        """Drop or compress tokens of a row where it has no slot for another one."""
        states = self._row_states(row)
        for kept in self.kept:
            retention, held = kept.retention, kept.held[row]
            if kept.oldest_to:
                if held == kept.oldest_to.residual:
                    kept.store(self.executor, row, states, states)
            elif retention.budget is not None and held == retention.budget + (retention.every or self.context):
                kept.drop(self.executor, row, self.lengths[row], states, states)

    def _row_states(self, row: int) -> dict[str, Tensor]:
        return {name: state[row : row + 1] for name, state in self.states.items()}

    def _run(
        self,
        entry: str,
        tokens: Tensor,
        first_row: int,
        wanted: list[int],
        states: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        inputs = self._inputs(entry, tokens, first_row, wanted)
        logits = self.executor.run(entry, inputs, self.states if states is None else states)["logits"]
        self._grow(first_row, first_row + tokens.shape[0], tokens.shape[1])
        return logits

    def _inputs(self, entry: str, tokens: Tensor, first_row: int, wanted: list[int]) -> dict[str, Tensor]:
        rows, steps = tokens.shape
        before = torch.tensor(self.lengths[first_row : first_row + rows], dtype=torch.int64)
        columns = torch.arange(steps)[None]
        total = before + steps
        positions = before[:, None] + columns
        mask = (torch.arange(int(total.max()))[None] < total[:, None]).to(torch.int64)
        logits_positions = torch.tensor([wanted], dtype=torch.int64).repeat(rows, 1)
        inputs = {
            "input_ids": tokens, "position_ids": positions, "attention_mask": mask,
            "logits_positions": logits_positions,
        }  # fmt: skip
        for kept in self.kept:
            inputs |= kept.inputs(first_row, rows, steps, is_prompt=entry == "prefill")
        return inputs

    def _grow(self, first_row: int, last_row: int, steps: int) -> None:
        for row in range(first_row, last_row):
            self.lengths[row] += steps
            for kept in self.kept:
                kept.held[row] += steps

    def _check_tokens(self, rows: Sequence[Sequence[int]]) -> None:
        """Refuse before anything runs: a call that fails half-way would leave some rows longer than others."""
        if len(rows) != self.batch:
            raise OptionError(f"[session] {len(rows)} rows given: this session has {self.batch}. Give one for each.")
        for index, (row, length) in enumerate(zip(rows, self.lengths, strict=True)):
            if not len(row):
                raise OptionError(f"[session] row {index} is empty: needed at least one token.")
            if not all(0 <= token < self.vocab_size for token in row):
                wrong = next(token for token in row if not 0 <= token < self.vocab_size)
                raise OptionError(
                    f"[session] row {index} holds token {wrong}: {self.executor.info.name} knows 0 to "
                    f"{self.vocab_size - 1}. Use the model's own tokenizer."
                )
            if length + len(row) > self.capacity:
                raise OptionError(
                    f"[session] row {index} holds {length} tokens and {len(row)} more do not fit the session's "
                    f"{self.capacity}. Open the session with a larger capacity (at most {self.context})."
                )

    def repeated(self, times: int) -> Session:
        """A session in which every row stands `times` times, to be continued in as many ways."""
        wide = Session(self.executor, self.batch * times, self.capacity, prefill_chunk=self.prefill_chunk)
        wide.lengths = [length for length in self.lengths for _ in range(times)]
        for kept, own in zip(wide.kept, self.kept, strict=True):
            kept.reserve(own.slots)
            kept.held = [held for held in own.held for _ in range(times)]
            if kept.stored is not None and own.stored is not None:
                kept.stored.reserve(own.stored.slots)
                kept.stored.filled = [filled for filled in own.stored.filled for _ in range(times)]
        for name, state in wide.states.items():
            state.unflatten(0, (-1, times)).copy_(self.states[name][:, None])
        return wide

    def save(self, path: str | Path) -> None:
        """Write states and positions to a safetensors file, from which `restore` continues identically.

        The file appears whole or not at all.

        Args:
            path: Where to write; a file that is there is replaced.

        Raises:
            ArtifactError: It cannot be written.
        """
        from safetensors import SafetensorError
        from safetensors.torch import save_file

        path = Path(path)
        name = self.executor.info.name
        held = {name: counts for name, (_, counts) in self.counted().items()}
        metadata = {"lengths": json.dumps(self.lengths), "capacity": str(self.capacity), "model": name,
                    "held": json.dumps(held)}  # fmt: skip
        aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
        try:
            save_file(self.states, str(aside), metadata)
            os.replace(aside, path)
        except (SafetensorError, OSError) as error:
            raise ArtifactError(
                f"[session] {path}: cannot be written: {str(error).splitlines()[0]}. Choose a folder that exists, may "
                f"be written to and has {self.state_bytes / 1e6:,.1f} MB free."
            ) from error
        finally:
            aside.unlink(missing_ok=True)

    def restore(self, path: str | Path) -> None:
        """Continue from a file that `save` wrote for the same program, batch and capacity, whatever the target.

        Raises:
            ArtifactError: The file cannot be read, or belongs to another program, batch or capacity. The session is
                as it was then.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as saved:
                metadata = saved.metadata() or {}
                found = {name: saved.get_tensor(name) for name in saved.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"[session] {path}: not a saved session: {str(error).splitlines()[0]}") from error
        lengths = _counts(metadata.get("lengths", ""), self.batch, self.capacity)
        held = self._saved_held(metadata.get("held", "{}"))
        counted = self.counted()
        sizes = {name: states.slots_of(found) for name, (states, _) in counted.items()}
        model = self.executor.info.name
        wanted = {}
        for name, state in self.executor.states.items():
            own = next((sizes[size] for size in state.shape if size in sizes), self.capacity)
            wanted[name] = (state.sizes(self.batch, own), state.dtype)
        given = {name: (tuple(state.shape), state.dtype) for name, state in found.items()}
        is_same = wanted == given and metadata.get("capacity") == str(self.capacity) and metadata.get("model") == model
        fits = held is not None and all(max(held[name]) <= count for name, count in sizes.items())
        if not is_same or lengths is None or held is None or not fits:
            raise ArtifactError(
                f"[session] {path}: holds states of another program, batch or capacity (found {len(given)} states for "
                f"{metadata.get('model', 'an unknown model')} with capacity {metadata.get('capacity', '?')}, needed "
                f"{len(wanted)} for {model} with capacity {self.capacity}). Open the session with the same artifact, "
                "batch and capacity as when it was saved."
            )
        for name, (states, counts) in counted.items():
            states.resize(sizes[name])
            counts[:] = held[name]
        for name, state in found.items():
            self.states[name].copy_(state)
        self.lengths = lengths

    def counted(self) -> dict[str, tuple[SlottedStates, list[int]]]:
        """States that are not as long as the rows, by what their slots are called, and how many each row has taken."""
        counted: dict[str, tuple[SlottedStates, list[int]]] = {}
        for kept in self.kept:
            counted[kept.retention.name] = kept, kept.held
            if kept.stored is not None:
                counted[kept.stored.storage.name] = kept.stored, kept.stored.filled
        return counted

    def _saved_held(self, text: str) -> dict[str, list[int]] | None:
        """Slots that each row has taken, by their name, or None if that cannot be true of this session."""
        try:
            held = json.loads(text)
        except ValueError:
            return None
        if not isinstance(held, dict) or set(held) != set(self.counted()):
            return None
        counts = {name: _counts(json.dumps(rows), self.batch, self.capacity) for name, rows in held.items()}
        return None if None in counts.values() else counts  # type: ignore[return-value]


def _counts(text: str, rows: int, most: int) -> list[int] | None:
    """A count for each row as a file states them, or None if they are none."""
    try:
        counts = json.loads(text)
    except ValueError:
        return None
    is_sound = (
        isinstance(counts, list)
        and len(counts) == rows
        and all(type(count) is int and 0 <= count <= most for count in counts)
    )
    return counts if is_sound else None


def _as_tensor(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([list(row) for row in rows], dtype=torch.int64)
