"""A session: one batch of sequences running through an executor, with its states and positions."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from jettison.ir.errors import ArtifactError, OptionError
from jettison.runtime.executor import Executor, allocate_states

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
        self.prefill_chunk = prefill_chunk
        self.lengths = [0] * batch
        self.states = allocate_states(executor.states, batch, self.capacity)

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
        rows = [[token] for token in tokens]
        self._check_tokens(rows)
        return self._run("decode", _as_tensor(rows), 0, [LAST_TOKEN])[:, 0]

    def _can_run_together(self, rows: Sequence[Sequence[int]]) -> bool:
        length = len(rows[0])
        same = all(len(row) == length for row in rows)
        # `GroupQueryAttention` takes several tokens behind a past for one row at a time only.
        return same and length <= self.prefill_chunk and (self.batch == 1 or not any(self.lengths))

    def _prefill_row(self, index: int, row: Sequence[int], every: bool = False) -> Tensor:
        pieces = []
        for start in range(0, len(row), self.prefill_chunk):
            chunk = _as_tensor([row[start : start + self.prefill_chunk]])
            wanted = list(range(chunk.shape[1])) if every else [LAST_TOKEN]
            pieces.append(self._run("prefill", chunk, index, wanted))
        return torch.cat(pieces, 1) if every else pieces[-1]

    def _run(self, entry: str, tokens: Tensor, first_row: int, wanted: list[int]) -> Tensor:
        rows, steps = tokens.shape
        last_row = first_row + rows
        before = torch.tensor(self.lengths[first_row:last_row], dtype=torch.int64)
        columns = torch.arange(steps)[None]
        total = before + steps
        positions = before[:, None] + columns
        mask = (torch.arange(int(total.max()))[None] < total[:, None]).to(torch.int64)
        logits_positions = torch.tensor([wanted], dtype=torch.int64).repeat(rows, 1)
        inputs = {
            "input_ids": tokens, "position_ids": positions, "attention_mask": mask,
            "logits_positions": logits_positions,
        }  # fmt: skip
        states = self.states
        if rows != self.batch:
            states = {name: state[first_row:last_row] for name, state in states.items()}
        logits = self.executor.run(entry, inputs, states)["logits"]
        for row in range(first_row, last_row):
            self.lengths[row] += steps
        return logits

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
        metadata = {"lengths": json.dumps(self.lengths), "capacity": str(self.capacity), "model": name}
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
        wanted = {name: (tuple(state.shape), state.dtype) for name, state in self.states.items()}
        given = {name: (tuple(state.shape), state.dtype) for name, state in found.items()}
        lengths = self._saved_lengths(metadata)
        model = self.executor.info.name
        if wanted != given or lengths is None or metadata.get("model") != model:
            raise ArtifactError(
                f"[session] {path}: holds states of another program, batch or capacity (found {len(given)} states for "
                f"{metadata.get('model', 'an unknown model')} with capacity {metadata.get('capacity', '?')}, needed "
                f"{len(wanted)} for {model} with capacity {self.capacity}). Open the session with the same artifact, "
                "batch and capacity as when it was saved."
            )
        for name, state in found.items():
            self.states[name].copy_(state)
        self.lengths = lengths

    def _saved_lengths(self, metadata: dict[str, str]) -> list[int] | None:
        """Tokens of each row as a file states them, or None if that cannot be true of this session."""
        try:
            lengths = json.loads(metadata.get("lengths", ""))
        except ValueError:
            return None
        is_sound = (
            isinstance(lengths, list)
            and len(lengths) == self.batch
            and all(type(length) is int and 0 <= length <= self.capacity for length in lengths)
        )
        return lengths if is_sound and metadata.get("capacity") == str(self.capacity) else None


def _as_tensor(rows: Sequence[Sequence[int]]) -> Tensor:
    return torch.tensor([list(row) for row in rows], dtype=torch.int64)
