"""Groups of neurons that fire together, from scores alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jettison.passes.neuron_groups import _assign, _together, group_neurons, kept_share

KINDS, SIZE = 6, 8
NEURONS = KINDS * SIZE


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def planted(seed: int, noise: float = 0.02, tokens: int = 200) -> tuple[Tensor, Tensor]:
    """Scores `[T, F]`, and the kind of each neuron: a token scores with the neurons of one kind, some kinds more."""
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randperm(NEURONS, generator=generator) % KINDS
    of_token = torch.arange(tokens) % KINDS
    is_own = kinds[None] == of_token[:, None]
    strength = 1 + torch.arange(KINDS)[kinds] * 0.5
    return is_own * (strength + random(tokens, NEURONS, seed=seed)) + noise * random(
        tokens, NEURONS, seed=seed + 1
    ), kinds


def share(scores: Tensor, order: Tensor, size: int, kept: int) -> float:
    """Of what is kept with the neurons in some order."""
    return kept_share(scores[:, order], torch.arange(len(order)) // size, kept)


@pytest.mark.parametrize("seed", range(4))
def test_planted_groups_are_found(seed: int):
    scores, kinds = planted(seed)
    order = group_neurons(scores, SIZE, 1)
    assert order is not None
    assert order.sort().values.tolist() == list(range(NEURONS))
    found = kinds[order].reshape(KINDS, SIZE)
    assert (found == found[:, :1]).all()
    assert share(scores, order, SIZE, 1) > 0.9 > 0.5 > share(scores, torch.arange(NEURONS), SIZE, 1)


def test_the_strongest_group_comes_first_and_neighbours_keep_their_order():
    scores, kinds = planted(0)
    order = group_neurons(scores, SIZE, 1)
    assert order is not None
    assert kinds[order].reshape(KINDS, SIZE)[:, 0].tolist() == [5, 4, 3, 2, 1, 0]
    assert all(group.tolist() == sorted(group.tolist()) for group in order.reshape(KINDS, SIZE))


def test_kinds_larger_than_a_group_are_split_and_smaller_ones_share():
    """12 neurons of two kinds and 4 of three each, in groups of 8."""
    sizes = (12, 12, 4, 4, 4, 4, 4, 4)
    kinds = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    kinds = kinds[torch.randperm(NEURONS, generator=torch.Generator().manual_seed(2))]
    scores = (kinds[None] == (torch.arange(160) % len(sizes))[:, None]) * (1 + random(160, NEURONS))
    order = group_neurons(scores, SIZE, 2)
    assert order is not None
    assert share(scores, order, SIZE, 2) > 0.97
    assert share(scores, order, SIZE, 2) > share(scores, torch.arange(NEURONS), SIZE, 2) + 0.2


@pytest.mark.parametrize("kept", [1, 3])
def test_nothing_where_the_order_is_as_good(kept: int):
    scores, kinds = planted(1)
    in_order = scores[:, kinds.argsort(stable=True)]
    assert group_neurons(in_order, SIZE, kept) is None
    # Nor where all that is possible is a little more than what is there, or there is nothing to gain.
    assert group_neurons(torch.ones(50, NEURONS), SIZE, kept) is None
    assert group_neurons(torch.zeros(50, NEURONS), SIZE, kept) is None
    assert group_neurons(scores, NEURONS, 1) is None


def test_a_second_search_finds_nothing_better():
    scores, _ = planted(3)
    order = group_neurons(scores, SIZE, 2)
    assert order is not None
    assert group_neurons(scores[:, order], SIZE, 2) is None


@settings(deadline=None, max_examples=25)
@given(
    groups=st.integers(2, 7), size=st.integers(2, 6), tokens=st.integers(1, 40), seed=st.integers(0, 99), data=st.data()
)
def test_random_scores_lose_nothing(groups: int, size: int, tokens: int, seed: int, data: st.DataObject):
    """Skewed ones with zeros among them, so that many choices tie."""
    kept = data.draw(st.integers(1, groups - 1))
    scores = random(tokens, groups * size, seed=seed).pow(8).mul(20).floor()
    order = group_neurons(scores, size, kept)
    again = group_neurons(scores.clone(), size, kept)
    if order is None:
        assert again is None
        return
    assert again is not None
    assert torch.equal(order, again)
    assert order.sort().values.tolist() == list(range(groups * size))
    before = share(scores, torch.arange(groups * size), size, kept)
    assert share(scores, order, size, kept) >= before + 0.0099


@pytest.mark.parametrize(("groups", "size"), [(1, 5), (2, 1), (5, 4), (16, 3)])
def test_groups_are_of_one_size(groups: int, size: int):
    gains = random(groups * size, groups)
    # Everybody wants the first one.
    gains[:, 0] += 2
    for found in (_assign(gains, size), _together(random(30, groups * size), size)):
        assert torch.bincount(found, minlength=groups).tolist() == [size] * groups


def test_room_goes_to_those_with_most_to_lose():
    gains = torch.tensor([[9.0, 8.0], [9.0, 1.0], [7.0, 6.0], [5.0, 0.0]])
    assert _assign(gains, 2).tolist() == [1, 0, 1, 0]


def test_kept_share_counts_the_best_groups_of_each_token():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 5.0, 0.0]])
    groups = torch.tensor([0, 1, 0, 1])
    assert kept_share(scores, groups, 1) == pytest.approx((6 + 5) / 15)
    assert kept_share(scores, groups, 2) == pytest.approx(1)
