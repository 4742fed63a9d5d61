"""What a method is: how weights are rounded to a format, given what their linears read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.passes.formats import WeightFormat

# Rows of a weight `[n, K]`, its name and the index of the first row, for messages; returns the parts of these rows.
RowEncoder: TypeAlias = Callable[[Tensor, str, int], dict[str, Tensor]]

# Columns of the products of inputs that are made at a time.
_BLOCK = 512


class InputStatistics:
    """Sums over the tokens that a linear reads.

    Attributes:
        tokens: How many.
        magnitudes: `[K] f32`, sum of `|x|`.

    Args:
        columns: K.
    """

    def __init__(self, columns: int) -> None:
        self.tokens = 0
        self.magnitudes = torch.zeros(columns)
        # Blocks below the diagonal are those above it, and filled in when somebody asks: half of the multiplications.
        self._products = torch.zeros(columns, columns)
        self._is_mirrored = True

    @property
    def products(self) -> Tensor:
        """`[K, K] f32`, sum of `x xT`: half the Hessian of the squared error of an output in its row of weights."""
        if not self._is_mirrored:
            for start, stop in self._blocks():
                self._products[stop:, start:stop] = self._products[start:stop, stop:].T
            self._is_mirrored = True
        return self._products

    def _blocks(self) -> list[tuple[int, int]]:
        columns = len(self._products)
        return [(start, min(start + _BLOCK, columns)) for start in range(0, columns, _BLOCK)]

    def add(self, x: Tensor) -> None:
        """Count the tokens `[..., K]` of a batch."""
        flat = x.reshape(-1, x.shape[-1]).to(torch.float32)
        self.tokens += len(flat)
        for start, stop in self._blocks():
            self._products[start:stop, start:].addmm_(flat[:, start:stop].T, flat[:, start:])
        self._is_mirrored = False
        self.magnitudes += flat.abs().sum(0)

    def merge(self, other: InputStatistics) -> None:
        """Count the tokens of another input of the same width, too."""
        self.tokens += other.tokens
        self._products = self.products + other.products
        self.magnitudes += other.magnitudes

    def divided(self, scales: Tensor) -> InputStatistics:
        """The statistics of `x / scales`.

        Args:
            scales: `[K] f32`, positive.
        """
        found = InputStatistics(0)
        found.tokens, found.magnitudes = self.tokens, self.magnitudes / scales
        found._products = self.products / scales / scales[:, None]
        return found


class Method(ABC):
    """A method. Subclasses are frozen dataclasses whose fields are the options.

    Attributes:
        name: Text id, the file's name.
        needs_inputs: Whether it has to see what the linears read.
        scales_inputs: Whether `input_scales` is to be asked.
        weights_at_once: Most weights to give to a row encoder; None for as many as operators decode at a time.
    """

    name: ClassVar[str]
    needs_inputs: ClassVar[bool] = False
    scales_inputs: ClassVar[bool] = False
    weights_at_once: ClassVar[int | None] = None

    def adapted(self, weight_format: WeightFormat) -> WeightFormat:
        """The format that the method stores: the given one, or one with more freedom.

        Raises:
            OptionError: The method has nothing to choose in this format.
        """
        if weight_format.is_exact:
            raise OptionError(
                f"[{self.name}] format {weight_format}: needs a format that rounds, because this one stores weights as "
                "they are and leaves a method nothing to choose. Take method=rtn."
            )
        if weight_format.is_for_zeros:
            raise OptionError(
                f"[{self.name}] format {weight_format}: needs a format that stores every weight, because this method "
                "moves weights that are zero, too, which this one does not store. Take method=rtn, behind "
                "prune-weights{method=sparsegpt} for weights that make up for those left out."
            )
        return weight_format

    def input_scales(
        self, weights: Sequence[Tensor], weight_format: WeightFormat, statistics: InputStatistics
    ) -> Tensor | None:
        """Factors for the columns of weights that read one input, which will be divided by them.

        Args:
            weights: Each `[N, K] f32`, of all linears that read it; or some of their rows.
            weight_format: What they will be stored in.
            statistics: Of the input.

        Returns:
            `[K] f32`, positive; None to leave the input as it is.
        """
        return None

    @abstractmethod
    def row_encoder(self, weight_format: WeightFormat, statistics: InputStatistics | None) -> RowEncoder:
        """Prepare to encode the weights of linears that read the same input.

        Args:
            weight_format: What they are stored in.
            statistics: Of the input; None for tables, and for methods that need none.
        """
