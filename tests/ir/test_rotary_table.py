from __future__ import annotations

import math

import pytest
import torch

from jettison.ir.rotary_table import frequencies


def tables(angles, factor=1.0):
    return (factor * angles.cos()).float(), (factor * angles.sin()).float()


@pytest.mark.parametrize("factor", [1.0, 1.3])
@pytest.mark.parametrize("positions", [2, 100, 40_000])
def test_frequencies_are_those_the_angles_were_made_of(positions, factor):
    wanted = 10_000.0 ** -(torch.arange(16, dtype=torch.float64) / 16)
    angles = (torch.arange(positions, dtype=torch.float32)[:, None] * wanted.float()).double()
    found = torch.tensor(frequencies(*tables(angles, factor)), dtype=torch.float64)
    # After as many positions, not a fiftieth of a radian off.
    assert ((found - wanted).abs() * positions).max() < 0.02


def test_angles_that_are_not_in_proportion_have_none():
    angles = torch.arange(100, dtype=torch.float64)[:, None] ** 1.1 * torch.tensor([1.0, 0.01])
    assert frequencies(*tables(angles)) is None


def test_more_than_half_a_turn_is_known_up_to_turns():
    found = frequencies(*tables(torch.arange(50, dtype=torch.float64)[:, None] * torch.tensor([4.0])))
    assert math.isclose(found[0] % math.tau, 4.0, abs_tol=1e-5)
