"""Which of several forms each weight takes, so that all fit a budget and lose least, exactly.

A multiple-choice knapsack, written as a mixed-integer linear program: one variable per weight and form, of which one of
each weight is chosen.

Source: HAWQ-V3 (arXiv 2011.10680).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np


class Priced(Protocol):
    """A form of a weight."""

    @property
    def bytes(self) -> int:
        """That it takes."""

    @property
    def loss(self) -> float:
        """What it costs; losses add up."""


def least_bytes(choices: Mapping[str, Sequence[Priced]]) -> int:
    """Bytes of the smallest choices."""
    return sum(min(choice.bytes for choice in each) for each in choices.values())


def cheapest(choices: Mapping[str, Sequence[Priced]], budget: int) -> dict[str, int] | None:
    """The choices with the least sum of losses within a budget.

    Args:
        choices: Of each weight.
        budget: Most bytes of all.

    Returns:
        Index of the choice, by name; None where the smallest choices are larger than the budget.
    """
    if least_bytes(choices) > budget:
        return None
    # The solver may miss a constraint by a hair: then the next try has that much less.
    taken, limit = _solve(choices, budget), budget
    while (excess := sum(choices[name][index].bytes for name, index in taken.items()) - budget) > 0:
        limit -= excess
        taken = _solve(choices, limit)
    return taken


def _solve(choices: Mapping[str, Sequence[Priced]], budget: int) -> dict[str, int]:
    # Not with the module: machines that only run kernels need no SciPy.
    from scipy.optimize import Bounds, LinearConstraint, milp

    flat = [(name, index, choice) for name, each in choices.items() for index, choice in enumerate(each)]
    losses = np.array([max(choice.loss, 0.0) for _, _, choice in flat])
    sizes = np.array([choice.bytes for _, _, choice in flat], dtype=float)
    places = {name: row for row, name in enumerate(choices)}
    once = np.zeros((len(choices), len(flat)))
    once[[places[name] for name, _, _ in flat], range(len(flat))] = 1
    result = milp(
        # Near one: the solver's tolerances are absolute.
        losses / max(losses.max(initial=0.0), 1e-30),
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(once, 1, 1), LinearConstraint(sizes[None], ub=budget)],
        options={"mip_rel_gap": 0.0},
    )
    assert result.success, f"a choice fits the budget, but the solver says: {result.message}"
    return {name: index for (name, index, _), value in zip(flat, result.x, strict=True) if value > 0.5}
