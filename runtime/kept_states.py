"""States that keep only some of the tokens, as a session holds them: how many each row has, and room for more."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from jettison.ir.program import Retention, State
from jettison.runtime.executor import Executor


class KeptStates:
    """The states of one retention.

    Args:
        retention: Which.
        declared: Declaration of every state of the program.
        states: Those of the session by name; the ones with slots of this retention are replaced as they grow.
        batch: Rows.

    Attributes:
        held: Tokens that each row holds.
    """

    def __init__(
        self, retention: Retention, declared: Mapping[str, State], states: dict[str, Tensor], batch: int
    ) -> None:
        self.retention = retention
        self.held = [0] * batch
        self.slots = 0
        self._declared = {name: state for name, state in declared.items() if retention.name in state.shape}
        self._states = states
        self.resize(0)

    @property
    def names(self) -> tuple[str, ...]:
        """States that have a value for every slot."""
        return tuple(self._declared)

    def reserve(self, slots: int) -> None:
        """Make room for so many tokens in every row; what they hold stays."""
        if slots > self.slots:
            self.resize(slots)

    def resize(self, slots: int) -> None:
        """Have exactly so many slots; what the first of them hold stays."""
        shared = min(slots, self.slots)
        for name, tensor in self.allocate(len(self.held), slots).items():
            if shared:
                self._axis(name, tensor, shared).copy_(self._axis(name, self._states[name], shared))
            self._states[name] = tensor
        self.slots = slots

    def slots_of(self, states: Mapping[str, Tensor]) -> int:
        """Slots that other states of this retention have; 0 where that cannot be told."""
        for name, state in self._declared.items():
            if name in states and states[name].dim() == len(state.shape):
                return states[name].shape[state.shape.index(self.retention.name)]
        return 0

    def allocate(self, rows: int, slots: int) -> dict[str, Tensor]:
        """Empty states for some rows, by name."""
        return {
            name: torch.zeros(state.sizes(rows, slots), dtype=state.dtype) for name, state in self._declared.items()
        }

    def copy_row(self, row: int, source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
        """Copy the tokens that a row holds from one set of states to another, of one row each."""
        for name in self._declared:
            count = self.held[row]
            self._axis(name, target[name], count).copy_(self._axis(name, source[name], count))

    def _axis(self, name: str, tensor: Tensor, count: int) -> Tensor:
        return tensor.narrow(self._declared[name].shape.index(self.retention.name), 0, count)

    def mask(self, first_row: int, rows: int, steps: int) -> Tensor:
        """The input `Retention.mask` of a call of `steps` tokens: `[rows, T] i64`."""
        total = torch.tensor(self.held[first_row : first_row + rows])[:, None] + steps
        return (torch.arange(int(total.max()))[None] < total).to(torch.int64)

    def drop(self, executor: Executor, row: int, token_count: int, states: Mapping[str, Tensor]) -> None:
        """Run the entry that drops tokens on a row.

        Args:
            executor: What runs it.
            row: Which row.
            token_count: Tokens that it has seen.
            states: Every state, of this row alone; updated in place.
        """
        inputs = {
            self.retention.mask: torch.ones(1, self.held[row], dtype=torch.int64),
            "token_count": torch.tensor([token_count]),
        }
        taken = executor.entries[self.retention.name].states
        for layer in self.retention.layers:
            own = {name: states[self.retention.name_in(layer, name)] for name in taken}
            executor.run(self.retention.name, inputs, own)
        self.held[row] = self.retention.budget
