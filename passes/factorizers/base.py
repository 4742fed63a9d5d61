"""What a factorizer is: the second moment of the inputs for which the factors of a weight are to be best."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from jettison.passes.methods.base import InputStatistics


class Factorizer(ABC):
    """A factorizer. Subclasses are frozen dataclasses whose fields are the options.

    Attributes:
        name: Text id, the file's name with dashes.
        needs_inputs: Whether it has to see what the linears read.
    """

    name: ClassVar[str]
    needs_inputs: ClassVar[bool] = True

    @abstractmethod
    def second_moment(self, columns: int, statistics: InputStatistics | None) -> Tensor:
        """What stands for the inputs of linears; see `passes/whitening.py` for what follows from it.

        Args:
            columns: K.
            statistics: Of the inputs; None for factorizers that need none.

        Returns:
            `[K, K]`, or `[K]` where channels count by themselves.
        """
