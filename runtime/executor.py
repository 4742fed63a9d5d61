"""What runs the entries of a program, whatever the target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from jettison.ir.placement import Placement
from jettison.ir.program import ModelInfo, Retention, State, Storage

CPU = torch.device("cpu")


@dataclass(frozen=True)
class EntrySignature:
    """Names an entry takes and returns.

    Attributes:
        inputs: Run-time inputs.
        states: States taken.
        outputs: Outputs before the new states.
    """

    inputs: tuple[str, ...]
    states: tuple[str, ...]
    outputs: tuple[str, ...]


class Executor(Protocol):
    """Runs entries; owns weights and kernels, not states.

    Attributes:
        info: Facts about the model.
        entries: Signature of each entry.
        states: Declaration of each state.
        retentions: Of the states that drop tokens.
        storages: Of the states that compress tokens.
        weight_bytes: Bytes of the weights as this target holds them.
        device: Where states are; inputs and outputs are on the CPU.
        placement: What the memory has room for, which sessions keep to; None if nothing was placed.
    """

    info: ModelInfo
    entries: dict[str, EntrySignature]
    states: dict[str, State]
    retentions: dict[str, Retention]
    storages: dict[str, Storage]
    weight_bytes: int
    device: torch.device
    placement: Placement | None

    def run(self, entry: str, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run an entry once.

        Args:
            entry: Its name.
            inputs: Every run-time input, contiguous.
            states: Every state that the entry takes, contiguous; updated in place.

        Returns:
            Outputs by name.
        """


@runtime_checkable
class SelectingExecutor(Executor, Protocol):
    """An executor that picks the best tokens where the logits are, so that only these have to be handed over.

    Attributes:
        most_best: Most tokens of a row that it picks.
    """

    most_best: int

    def run_best(
        self, entry: str, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor], count: int
    ) -> tuple[Tensor, Tensor]:
        """Run an entry once that returns `logits`, `[B, P, V]`.

        Args:
            entry: Its name.
            inputs: See `run`.
            states: See `run`.
            count: How many tokens of each row, from 1 to `most_best`.

        Returns:
            Logits `[B, P, count] f32`, largest first, the lower of two equally good tokens first; and their tokens,
            i64. A logit that is no number comes first, as infinity.
        """


def allocate_states(
    states: Mapping[str, State], batch: int, capacity: int, device: torch.device = CPU
) -> dict[str, Tensor]:
    """Empty states of a session.

    Args:
        states: Declarations.
        batch: Rows.
        capacity: Slots per row.
        device: Where.

    Returns:
        Zeroed tensors by name.
    """
    return {
        name: torch.zeros(state.sizes(batch, capacity), dtype=state.dtype, device=device)
        for name, state in states.items()
    }
