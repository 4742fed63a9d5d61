"""What a pruner is: which weights of a matrix become zero, and what becomes of the others.

Weights are chosen by rank, never by a threshold that others may equal: exactly as many as asked for, of equal scores
those that come first. So zeros that are there already are among the chosen, and pruning twice changes nothing.
"""

from __future__ import annotations

import math
import re
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Protocol

import numpy as np
import torch
from torch import Tensor

from jettison.ir.errors import OptionError

UNSTRUCTURED = "unstructured"
_DEFAULT_SPARSITY = 0.5


class Statistics(Protocol):
    """Sums over the tokens that a linear reads."""

    def add(self, x: Tensor) -> None:
        """Count the tokens `[..., K]` of a batch."""

    def is_finite(self) -> bool:
        """Whether something can be learned from them."""


@dataclass(frozen=True)
class Pattern:
    """How many weights become zero, and where.

    Attributes:
        sparsity: Their share.
        kept: Weights of a group that stay, where there are groups.
        group: Consecutive columns of a group; 0 for none.
    """

    sparsity: float
    kept: int = 0
    group: int = 0

    @classmethod
    def of(cls, text: str, sparsity: float | None) -> Pattern:
        """From the options of a pass.

        Args:
            text: `unstructured`, or `n:m` for n weights of every m that stay.
            sparsity: None for 0.5, or for what the groups say.

        Raises:
            OptionError: The two do not fit, or one is out of range.
        """
        groups = re.fullmatch(r"([0-9]{1,4}):([0-9]{1,4})", text)
        if groups is None and text != UNSTRUCTURED:
            raise OptionError(
                f"[prune-weights] pattern={text!r}: needs {UNSTRUCTURED}, or n:m for n weights that stay of every m "
                "consecutive columns, such as 2:4."
            )
        if groups is None:
            share = _DEFAULT_SPARSITY if sparsity is None else sparsity
            if not 0 <= share < 1:
                raise OptionError(f"[prune-weights] sparsity={share}: needs a share from 0, below 1.")
            return cls(share)
        kept, group = int(groups[1]), int(groups[2])
        if not 0 < kept <= group:
            raise OptionError(f"[prune-weights] pattern={text}: needs n:m with n from 1 to m, such as 2:4.")
        if sparsity is not None and sparsity != 1 - kept / group:
            raise OptionError(
                f"[prune-weights] sparsity={sparsity} with pattern={text}: the pattern makes {1 - kept / group:.4g} of "
                "the weights zero. Leave sparsity out."
            )
        return cls(1 - kept / group, kept, group)

    def count(self, weights: int) -> int:
        """How many of so many weights become zero."""
        # 0.29 * 100 is 28.999999999999996.
        return math.floor(self.sparsity * weights + 1e-9)


class Pruner(ABC):
    """A pruner. Subclasses are frozen dataclasses whose fields are the options.

    Attributes:
        name: Text id, the file's name.
        needs_inputs: Whether it has to see what the linears read.
    """

    name: ClassVar[str]
    needs_inputs: ClassVar[bool] = True

    def statistics(self, columns: int) -> Statistics | None:
        """What it counts of inputs `[..., K]`; None where it needs none."""
        return None

    @abstractmethod
    def prune(self, weight: Tensor, pattern: Pattern, statistics: Statistics | None) -> Tensor:
        """Make weights zero.

        Args:
            weight: `[N, K] f32`, finite; may be overwritten. K is a multiple of the pattern's group.
            pattern: Which.
            statistics: What `statistics` made, of the input of its linear.

        Returns:
            `[N, K] f32`.
        """


def lowest(scores: Tensor, count: int) -> Tensor:
    """The `count` lowest of each row, of equal ones those that come first: `[n, k]` to `[n, k]` bool."""
    if count <= 0:
        return torch.zeros(scores.shape, dtype=torch.bool)
    if count >= scores.shape[1]:
        return torch.ones(scores.shape, dtype=torch.bool)
    # NumPy selects with vector instructions, `Tensor.kthvalue` without.
    border = torch.from_numpy(np.partition(scores.numpy(), count - 1, axis=1)[:, count - 1 : count])
    chosen = scores <= border
    if bool((chosen.sum(1) == count).all()):
        return chosen
    below, equal = scores < border, scores == border
    missing = count - below.sum(1, keepdim=True)
    return below | (equal & (equal.cumsum(1) <= missing))


def lowest_of_groups(scores: Tensor, pattern: Pattern) -> Tensor:
    """Those of every `pattern.group` columns that do not stay: `[n, k]` to `[n, k]` bool."""
    groups = scores.reshape(-1, pattern.group)
    order = groups.argsort(dim=1, stable=True)[:, : pattern.group - pattern.kept]
    return torch.zeros(groups.shape, dtype=torch.bool).scatter_(1, order, True).view(scores.shape)
