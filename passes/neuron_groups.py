"""Which neurons of a layer go together: groups of equal size of which few hold most of each token's activations."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_MOST_ROUNDS = 20
# A better grouping than the one at hand is taken from this gain of the kept share on: less is noise.
_WORTHWHILE = 0.01


def kept_share(scores: Tensor, groups: Tensor, kept: int) -> float:
    """Share of the scores that the best groups of each token hold.

    Args:
        scores: `[T, F]`, not negative.
        groups: `[F] i64`, the group of each neuron.
        kept: Groups that each token keeps.
    """
    sums = _group_sums(scores, groups)
    return float(sums.topk(kept, -1).values.sum() / scores.sum().clamp_min(1e-30))


def group_neurons(scores: Tensor, group: int, kept: int) -> Tensor | None:
    """Group neurons so that the best groups of each token hold as much as possible.

    In turn, every token picks its best groups, and every neuron moves to the group that the tokens it fires for have
    picked, as far as there is room: both steps raise the share that is kept, so it settles. It starts from the order as
    it is and from neurons that fire together, and the better end is taken.

    Args:
        scores: `[T, F] f32`, not negative: what dropping a neuron costs a token.
        group: Neurons of a group; divides F.
        kept: Groups that each token keeps.

    Returns:
        `[F] i64`, the neurons in their new order, groups with the largest sums first; None where the order at hand is
        as good.
    """
    neurons = scores.shape[1]
    at_hand = torch.arange(neurons) // group
    before = kept_share(scores, at_hand, kept)
    found = [_settled(scores, start, kept) for start in (at_hand, _together(scores, group))]
    share, groups = max(found, key=lambda each: each[0])
    if share < before + _WORTHWHILE:
        return None
    sums = torch.zeros(neurons // group).index_add_(0, groups, scores.sum(0))
    place = sums.argsort(descending=True, stable=True).argsort()
    return place[groups].argsort(stable=True)


def _group_sums(scores: Tensor, groups: Tensor) -> Tensor:
    """`[T, G]`."""
    return torch.zeros(len(scores), int(groups.max()) + 1).index_add_(1, groups, scores)


def _settled(scores: Tensor, groups: Tensor, kept: int) -> tuple[float, Tensor]:
    """The best share on the way, and its groups."""
    best, count = (0.0, groups), int(groups.max()) + 1
    size = scores.shape[1] // count
    for _ in range(_MOST_ROUNDS):
        sums = _group_sums(scores, groups)
        picked = torch.zeros_like(sums).scatter_(1, sums.topk(kept, -1).indices, 1.0)
        share = float((sums * picked).sum() / scores.sum().clamp_min(1e-30))
        if share <= best[0] + 1e-4:
            break
        best = (share, groups)
        groups = _assign(scores.T @ picked, size)
    return best


def _assign(gains: Tensor, size: int) -> Tensor:
    """Neurons to groups with room for `size` each, with nearly the largest sum of gains.

    Every neuron without a place asks for the best group with room; one that is asked by too many takes those with most
    to lose.

    Args:
        gains: `[F, G]`.
        size: Neurons of a group.
    """
    neurons, count = gains.shape
    groups = torch.full((neurons,), -1)
    room = torch.full((count,), size)
    while bool((groups < 0).any()):
        free = (groups < 0).nonzero().flatten()
        open_gains = gains[free].masked_fill(room == 0, -torch.inf)
        best = open_gains.topk(min(2, count), -1)
        regret = (best.values[:, 0] - best.values[:, -1]).nan_to_num(posinf=torch.inf)
        wanted = best.indices[:, 0]
        order = regret.argsort(descending=True, stable=True)
        order = order[wanted[order].argsort(stable=True)]
        asked = torch.bincount(wanted, minlength=count)
        rank = torch.arange(len(free)) - (asked.cumsum(0) - asked)[wanted[order]]
        taken = order[rank < room[wanted[order]]]
        groups[free[taken]] = wanted[taken]
        room -= torch.bincount(wanted[taken], minlength=count)
    return groups


def _together(scores: Tensor, group: int) -> Tensor:
    """Groups of neurons that fire for the same tokens, the strongest neurons first."""
    unit = F.normalize(scores.sqrt(), dim=0)
    groups = torch.full((scores.shape[1],), -1)
    order = scores.sum(0).argsort(descending=True, stable=True)
    for number in range(scores.shape[1] // group):
        free = groups < 0
        seed = order[free[order]][0]
        # The neurons nearest to the seed say where the middle of the group is.
        near = (unit.T @ unit[:, seed]).masked_fill(~free, -1.0).topk(max(1, group // 4)).indices
        members = (unit.T @ unit[:, near].sum(1)).masked_fill(~free, -1.0).topk(group).indices
        groups[members] = number
    return groups
