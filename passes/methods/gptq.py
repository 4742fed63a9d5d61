"""GPTQ: weights are rounded column by column, and the columns to come make up for the error of those that are done.

With `H = sum x xT` over the tokens that a linear reads, rounding row `w` to `q` costs `(w - q) H (w - q)T`, the squared
error of its outputs. `UT U = (H + damping * mean(diag H) * I)^-1`, U upper triangular; column i gives the error
`e = (w_i - q_i) / U_ii`, and the columns behind it become `w_j - e * U_ij`, at once within a block of 128 and in one
product for all that is behind it.

Columns are taken in falling order of `H_ii` (`order=activation`), so that those that matter find most others still to
make up for them. Groups stay where they are: their grids are fitted to the original weights beforehand, so that no
index of groups has to be stored and no input permuted; with `clip` to the part of each group's range with the least
`sum |e|^2.4`.

Then `sweeps` of coordinate descent over the scales and the codes, see `descent.py`.

Rows are independent of each other given H. Columns that were zero in every token are rounded to nearest.

Source: GPTQ (arXiv 2210.17323), whose code has the power of 2.4; static groups with activation order as in AutoGPTQ and
llm-compressor. The widespread code sets the weights of columns that were never active to zero; here they stay, since
another text may use them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.passes.formats import Grid, WeightFormat
from jettison.passes.methods.base import InputStatistics, Method, RowEncoder
from jettison.passes.methods.clipping import clipped_grid
from jettison.passes.methods.descent import BLOCK, column_grids, descend
from jettison.passes.options import option

_SOLVED_AT_ONCE = 512
_CLIP_STEPS, _CLIP_LOWEST, _CLIP_POWER = 10, 0.5, 2.4


@dataclass(frozen=True)
class GPTQ(Method):
    """See the module docstring."""

    name: ClassVar[str] = "gptq"
    needs_inputs: ClassVar[bool] = True
    weights_at_once: ClassVar[int | None] = 1 << 24
    damping: float = option(0.01, doc="added to the diagonal, as a part of its mean", range="above 0, at most 1")
    order: Literal["activation", "none"] = option("activation", doc="columns that matter first, or as they come")
    clip: bool = option(True, doc="search the range of each group, instead of all of it")
    sweeps: int = option(2, doc="of coordinate descent over scales and codes behind it", range="0 to 100")

    def __post_init__(self) -> None:
        if not 0 < self.damping <= 1:
            raise OptionError(
                f"[gptq] damping={self.damping!r}: needs a number above 0 and at most 1, because the products of "
                "correlated inputs have no inverse without. 0.01 is usual."
            )
        if type(self.sweeps) is not int or not 0 <= self.sweeps <= 100:
            raise OptionError(f"[gptq] sweeps={self.sweeps!r}: needs a whole number from 0 to 100.")

    def row_encoder(self, weight_format: WeightFormat, statistics: InputStatistics | None) -> RowEncoder:
        """Rounds to nearest where there are no statistics."""
        if statistics is None:
            return weight_format.encode_rows
        columns = torch.arange(len(statistics.magnitudes))
        if self.order == "activation":
            columns = statistics.products.diagonal().argsort(descending=True, stable=True)
        # Of tens of thousands of columns these are gigabytes, so no more copies than must be.
        factor = inverse_factor(statistics.products, columns, self.damping)
        products = statistics.products
        added = self.damping * (float(products.diagonal().mean()) or 1.0)

        def encode(rows: Tensor, where: str, first_row: int) -> dict[str, Tensor]:
            groups = weight_format.split_groups(rows)
            weight_format.check_values(groups, where, first_row)
            grid = weight_format.stored(self._grid(weight_format, groups))
            codes = round_columns(weight_format, groups, grid, columns, factor)
            weight = groups.flatten(1)[:, : len(columns)]
            codes, grid = descend(weight_format, weight, codes, grid, products, added, self.sweeps)
            return weight_format.pack(codes, grid)

        return encode

    def _grid(self, weight_format: WeightFormat, groups: Tensor) -> Grid:
        if not self.clip:
            return weight_format.fit(groups)
        return clipped_grid(
            weight_format, groups, lambda error: error.abs_().pow_(_CLIP_POWER).sum(-1),
            steps=_CLIP_STEPS, lowest=_CLIP_LOWEST,
        )  # fmt: skip


def inverse_factor(products: Tensor, columns: Tensor, damping: float) -> Tensor:
    """U, upper triangular, with `UT U = (H + damping * mean(diag H) * I)^-1`.

    Args:
        products: H `[K, K]` f32.
        columns: `[K]` i64, the order of the columns of U.
        damping: As a part of the mean of the diagonal; ten times as much, and so on, where that is not enough.

    Returns:
        `[K, K]` f32.
    """
    # H reversed is L LT, so H is R RT with R = L reversed, upper triangular; and U is the inverse of R. One
    # factorisation, and no inverse of H, which fp32 would not survive.
    backwards = columns.flip(0)
    lower = products[backwards[:, None], backwards]
    lower.diagonal().add_(damping * (float(lower.diagonal().mean()) or 1.0))
    failed = torch.empty((), dtype=torch.int32)
    torch.linalg.cholesky_ex(lower, out=(lower, failed))
    if int(failed) and damping < 1:
        return inverse_factor(products, columns, 10 * damping)
    upper = lower.flip(0, 1)
    del lower
    return _inverted(upper)


def _inverted(upper: Tensor) -> Tensor:
    """The inverse of an upper triangular matrix, by halves: products, where a solver would work on zeros as well."""
    size = len(upper)
    if size <= _SOLVED_AT_ONCE:
        return torch.linalg.solve_triangular(upper, torch.eye(size), upper=True)
    first, second = slice(None, size // 2), slice(size // 2, None)
    inverse = torch.zeros_like(upper)
    inverse[first, first] = _inverted(upper[first, first])
    inverse[second, second] = _inverted(upper[second, second])
    torch.mm(inverse[first, first], upper[first, second] @ inverse[second, second], out=inverse[first, second]).neg_()
    return inverse


def round_columns(weight_format: WeightFormat, groups: Tensor, grid: Grid, columns: Tensor, factor: Tensor) -> Tensor:
    """Round rows column by column, correcting the columns to come.

    Args:
        weight_format: Rounds.
        groups: `[n, k_blocks, group]` f32.
        grid: Of these groups.
        columns: `[K]` i64, the order.
        factor: `[K, K]` f32, of the columns in that order; see `inverse_factor`.

    Returns:
        Codes `[n, k_blocks, group]` u8.
    """
    rows, k_blocks, group = groups.shape
    # Transposed, so that a column is contiguous.
    left = groups.view(rows, -1).T[columns]
    grids = column_grids(grid)
    codes = weight_format.round(groups, grid).view(rows, -1).T.contiguous()
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        errors = torch.empty(stop - start, rows)
        for index in range(start, stop):
            column = int(columns[index])
            own = grids[column // group]
            weight = left[index][:, None, None]
            code = weight_format.round(weight, own)
            codes[column] = code.view(-1)
            error = errors[index - start]
            torch.sub(weight, weight_format.values(code, own), out=error.view(-1, 1, 1)).div_(factor[index, index])
            left[index + 1 : stop].addr_(factor[index, index + 1 : stop], error, alpha=-1)
        left[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    return codes.T.reshape(rows, k_blocks, group)
