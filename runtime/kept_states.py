"""States whose slots do not count a row's tokens one by one, as a session holds them.

Some keep only some of the tokens, some pass them on to a compressed form: how many each row has, and room for more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from jettison.ir.program import LAYER, Retention, State, Storage, state_name
from jettison.runtime.executor import Executor


class SlottedStates:
    """States that have the same number of slots.

    Args:
        size: What the declarations call that number.
        declared: Declaration of every state of the program.
        states: Those of the session by name; the ones with these slots are replaced as they grow.
        batch: Rows.
        device: Where they are.

    Attributes:
        slots: How many there are.
    """

    def __init__(
        self, size: str, declared: Mapping[str, State], states: dict[str, Tensor], batch: int, device: torch.device
    ) -> None:
        self.slots = 0
        self._batch, self._device = batch, device
        self._declared = {name: state for name, state in declared.items() if size in state.shape}
        self._axes = {name: state.shape.index(size) for name, state in self._declared.items()}
        self._states = states
        self.resize(0)

    @property
    def names(self) -> tuple[str, ...]:
        """The states."""
        return tuple(self._declared)

    def reserve(self, slots: int) -> None:
        """Have at least so many slots in every row; what they hold stays."""
        if slots > self.slots:
            self.resize(slots)

    def resize(self, slots: int) -> None:
        """Have exactly so many slots; what the first of them hold stays."""
        shared = min(slots, self.slots)
        for name, tensor in self.allocate(self._batch, slots).items():
            if shared:
                self._axis(name, tensor, 0, shared).copy_(self._axis(name, self._states[name], 0, shared))
            self._states[name] = tensor
        self.slots = slots

    def slots_of(self, states: Mapping[str, Tensor]) -> int:
        """Slots that other states of this kind have; 0 where that cannot be told."""
        for name, state in self._declared.items():
            if name in states and states[name].dim() == len(state.shape):
                return states[name].shape[self._axes[name]]
        return 0

    def allocate(self, rows: int, slots: int) -> dict[str, Tensor]:
        """Empty states for some rows, by name."""
        return {
            name: torch.zeros(state.sizes(rows, slots), dtype=state.dtype, device=self._device)
            for name, state in self._declared.items()
        }

    def copy(self, source: Mapping[str, Tensor], target: Mapping[str, Tensor], count: int, into: int = 0) -> None:
        """Copy what the first `count` slots hold from one set of states to another, to slots from `into` on."""
        for name in self._declared:
            self._axis(name, target[name], into, count).copy_(self._axis(name, source[name], 0, count))

    def shift(self, states: Mapping[str, Tensor], by: int, count: int) -> None:
        """Move what `count` slots hold to the first slots; those that they leave are empty then.

        Args:
            states: Updated in place.
            by: First slot of those to move.
            count: How many.
        """
        for name in self._declared:
            self._axis(name, states[name], 0, count).copy_(self._axis(name, states[name], by, count).clone())
        self.clear(states, count, by)

    def clear(self, states: Mapping[str, Tensor], start: int, count: int) -> None:
        """Empty some slots."""
        for name in self._declared:
            self._axis(name, states[name], start, count).zero_()

    def _axis(self, name: str, tensor: Tensor, start: int, count: int) -> Tensor:
        return tensor.narrow(self._axes[name], start, count)


class StoredStates(SlottedStates):
    """The compressed states of a storage.

    Attributes:
        storage: Which.
        filled: Slots that each row has filled.
    """

    def __init__(
        self,
        storage: Storage,
        declared: Mapping[str, State],
        states: dict[str, Tensor],
        batch: int,
        device: torch.device,
    ) -> None:
        super().__init__(storage.name, declared, states, batch, device)
        self.storage = storage
        self.filled = [0] * batch

    def tokens(self, row: int) -> int:
        """Tokens that a row has stored."""
        return self.filled[row] * self.storage.tokens


class KeptStates(SlottedStates):
    """The states of a retention, with a slot for every token held.

    Args:
        retention: Which.
        storage: Where its tokens go when they leave their slots, or None.
        declared: Declaration of every state of the program.
        states: Those of the session by name.
        batch: Rows.
        device: Where they are.

    Attributes:
        held: Tokens that each row holds.
        stored: Their compressed form, or None.
    """

    def __init__(
        self,
        retention: Retention,
        storage: Storage | None,
        declared: Mapping[str, State],
        states: dict[str, Tensor],
        batch: int,
        device: torch.device,
    ) -> None:
        super().__init__(retention.name, declared, states, batch, device)
        self.retention = retention
        self.held = [0] * batch
        self.stored = None if storage is None else StoredStates(storage, declared, states, batch, device)

    @property
    def oldest_to(self) -> Storage | None:
        """The storage that takes the oldest tokens of every row, if there is one."""
        return None if self.stored is None or self.stored.storage.takes_dropped else self.stored.storage

    def stored_tokens(self, row: int) -> int:
        """Tokens that a row has in compressed form."""
        return 0 if self.stored is None else self.stored.tokens(row)

    def make_room(self, new: Sequence[int], left: Sequence[int], *, is_prompt: bool) -> None:
        """Have slots for the tokens that rows will keep.

        Args:
            new: Tokens that come now, by row.
            left: Tokens that may come later.
            is_prompt: Whether those that come now are a prompt, behind which a budget holds.
        """
        budget, every, needed = self.retention.budget, self.retention.every, 0
        for row, (count, later) in enumerate(zip(new, left, strict=True)):
            held = self.held[row] + count + (self.stored_tokens(row) if self.oldest_to else 0)
            if budget is not None and every is not None:
                needed = max(needed, min(held + later, budget + every))
            elif budget is not None and is_prompt:
                needed = max(needed, min(held, budget) + later)
            else:
                needed = max(needed, held + later)
        if self.stored is not None:
            seen = [self.held[row] + self.stored_tokens(row) + new[row] + left[row] for row in range(len(new))]
            self.stored.reserve(self.stored.storage.moving(needed if self.oldest_to else max(seen)))
        self.reserve(needed if self.oldest_to is None else min(needed, self.oldest_to.residual))

    def inputs(self, first_row: int, rows: int, steps: int, *, is_prompt: bool) -> dict[str, Tensor]:
        """What a call of `steps` tokens is told about these states; `is_prompt`: nothing is read from the storage."""
        last_row = first_row + rows
        total = torch.tensor(self.held[first_row:last_row])[:, None] + steps
        given = {self.retention.mask: (torch.arange(int(total.max()))[None] < total).to(torch.int64)}
        if self.stored is not None:
            filled = torch.tensor(self.stored.filled[first_row:last_row])
            given[self.stored.storage.count] = torch.zeros_like(filled) if is_prompt else filled
        return given

    def drop(
        self,
        executor: Executor,
        row: int,
        token_count: int,
        states: Mapping[str, Tensor],
        compressed: Mapping[str, Tensor],
    ) -> None:
        """Run the entry that drops tokens on a row, or that puts them behind the budget to be compressed.

        Args:
            executor: What runs it.
            row: Which row.
            token_count: Tokens that it has seen.
            states: Every state, of this row alone; updated in place.
            compressed: Compressed states of this row alone; updated in place.
        """
        budget = self.retention.budget
        assert budget is not None, "only retentions with a budget drop"
        inputs = {
            self.retention.mask: torch.ones(1, self.held[row], dtype=torch.int64),
            "token_count": torch.tensor([token_count]),
        }
        for layer in self.retention.layers:
            self._run(executor, self.retention.name, layer, inputs, states)
        if self.stored is not None and self.stored.storage.takes_dropped:
            self._compress(executor, row, states, compressed, budget, self.held[row] - budget)
            self.clear(states, budget, self.held[row] - budget)
        self.held[row] = budget

    def store(
        self, executor: Executor, row: int, states: Mapping[str, Tensor], compressed: Mapping[str, Tensor]
    ) -> None:
        """Compress the oldest tokens of a row and free their slots, if it holds enough.

        Args:
            executor: What runs the entry.
            row: Which row.
            states: States with a slot per token, of this row alone; updated in place.
            compressed: Compressed states of this row alone; updated in place.
        """
        assert self.stored is not None, "only retentions with a storage store"
        storage = self.stored.storage
        moved = storage.moving(self.held[row]) * storage.tokens
        if moved:
            self._compress(executor, row, states, compressed, 0, moved)
            self.held[row] -= moved
            self.shift(states, moved, self.held[row])

    def _compress(
        self,
        executor: Executor,
        row: int,
        states: Mapping[str, Tensor],
        compressed: Mapping[str, Tensor],
        start: int,
        tokens: int,
    ) -> None:
        """Compress what some slots hold."""
        assert self.stored is not None, "only retentions with a storage compress"
        storage, filled = self.stored.storage, self.stored.filled[row]
        count = tokens // storage.tokens
        inputs = {"stored_slots": torch.arange(filled, filled + count)[None]}
        for layer in self.retention.layers:
            for short in ("key", "value"):
                given = states[state_name(layer, short)][:, :, start : start + tokens]
                inputs[f"new_{short}"] = given.unflatten(2, (count, storage.tokens)).contiguous()
            self._run(executor, storage.name, layer, inputs, compressed)
        self.stored.filled[row] += count

    def load(
        self, executor: Executor, row: int, compressed: Mapping[str, Tensor], states: Mapping[str, Tensor]
    ) -> None:
        """Decompress what a row has stored into the first slots of other states; it stays stored.

        Args:
            executor: What runs the entry.
            row: Which row.
            compressed: Compressed states of this row alone.
            states: States with a slot per token, of this row alone; updated in place.
        """
        assert self.stored is not None, "only retentions with a storage load"
        count = self.stored.tokens(row)
        for layer in self.retention.layers:
            found = self._run(executor, self.stored.storage.load, layer, {}, compressed)
            for short in ("key", "value"):
                states[state_name(layer, short)][:, :, :count] = found[short][:, :, :count]
            positions = states.get(state_name(layer, "positions"))
            if positions is not None:
                # Nobody noted them. They are the oldest and in order, which is all that is asked of such tokens.
                positions[:, :, :count] = torch.arange(1, count + 1)
        self.held[row] += count

    def _run(
        self,
        executor: Executor,
        entry: str,
        layer: int,
        inputs: Mapping[str, Tensor],
        states: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        signature = executor.entries[entry]
        own = {name: states[self.retention.name_in(layer, name)] for name in signature.states}
        which = {LAYER: torch.tensor([self.retention.layers.index(layer)])} if LAYER in signature.inputs else {}
        return executor.run(entry, {**inputs, **which}, own)
