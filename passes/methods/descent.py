"""Coordinate descent: codes and scales of a rounded weight, each moved to where it does best while the others stay.

With `r = w - q` and `H = sum x xT`, damped, a row costs `r H rT`. A sweep first gives every group the scale factor
`1 + (H r)_g q_g / (q_g H_gg q_g)`, which is the best one, and then rounds column after column to the nearest code of
`q_k + (H r)_k / H_kk`, the best real number. Neither can raise the cost by more than the rounding of a scale.

Source: cyclic coordinate descent on the layer-wise objective is QuantEase (arXiv 2309.01885); here it starts from
GPTQ's solution and moves scales, too.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from jettison.passes.formats import Grid, WeightFormat

BLOCK = 128
# A scale may at most halve or double in a step: a group of nearly nothing says little about where it should go.
_LEAST_FACTOR, _MOST_FACTOR = 0.5, 2.0


def descend(
    weight_format: WeightFormat, weight: Tensor, codes: Tensor, grid: Grid, products: Tensor, damping: float,
    sweeps: int,
) -> tuple[Tensor, Grid]:  # fmt: skip
    """Sweep over the scales and the codes of some rows.

    Args:
        weight_format: Rounds; its values are proportional to its scales.
        weight: `[n, K]` f32.
        codes: `[n, k_blocks, group]` u8.
        grid: Of these groups.
        products: H `[K, K]` f32.
        damping: What its diagonal is short of; not added to it, because others read it, and it is large.
        sweeps: How many.

    Returns:
        Codes and grid.
    """
    if not sweeps:
        return codes, grid
    state = _State(weight_format, weight, codes, grid, products, damping)
    for sweep in range(sweeps):
        state.move_scales()
        state.move_codes(is_last=sweep == sweeps - 1)
    return state.codes.T.reshape(codes.shape), state.grid


class _State:
    """Rows on their way; everything by columns `[K, n]`, which a sweep takes one after the other.

    Attributes:
        codes: Of the columns, those of padding too.
        grid: Of the rows.
    """

    def __init__(
        self, weight_format: WeightFormat, weight: Tensor, codes: Tensor, grid: Grid, products: Tensor, damping: float
    ) -> None:
        self._damping = damping
        self.codes, self.grid = codes.flatten(1).T.contiguous(), grid
        self._format, self._weight, self._products = weight_format, weight, products
        self._group = codes.shape[2]
        self._set_values()

    def _set_values(self) -> None:
        """The values of all codes, and `H r` of what they leave."""
        rows, columns = self._weight.shape
        blocks = self.codes.T.reshape(rows, -1, self._group)
        self._rounded = self._format.values(blocks, self.grid).flatten(1)[:, :columns].T.contiguous()
        left = self._weight.T - self._rounded
        self._slopes = (self._products @ left).add_(left, alpha=self._damping)

    def move_scales(self) -> None:
        """Give every group its best scale, one after the other."""
        factors = torch.ones_like(self.grid.scales)
        for block in range(factors.shape[1]):
            own = slice(block * self._group, min((block + 1) * self._group, len(self._rounded)))
            values = self._rounded[own]
            curvature = ((self._products[own, own] @ values).add_(values, alpha=self._damping) * values).sum(0)
            step = (values * self._slopes[own]).sum(0) / curvature
            factor = torch.where(curvature > 0, 1 + step, 1.0).nan_to_num_(1.0).clamp_(_LEAST_FACTOR, _MOST_FACTOR)
            move = (factor - 1) * values
            self._slopes.addmm_(self._products[:, own], move, alpha=-1)
            self._slopes[own].sub_(move, alpha=self._damping)
            values *= factor
            factors[:, block] = factor
        moved = replace(self.grid, scales=self.grid.scales * factors)
        self.grid = self._format.stored(moved)
        if self.grid is not moved:
            self._set_values()

    def move_codes(self, *, is_last: bool) -> None:
        """Give every column its best codes, one after the other."""
        columns, rows = self._rounded.shape
        products, curvature = self._products, self._products.diagonal() + self._damping
        grids = column_grids(self.grid)
        for start in range(0, columns, BLOCK):
            stop = min(start + BLOCK, columns)
            moves = torch.empty(stop - start, rows)
            slopes = self._slopes[start:stop].clone()
            for column in range(start, stop):
                own, move = grids[column // self._group], moves[column - start]
                rounded = self._rounded[column]
                best = torch.add(rounded, slopes[column - start], alpha=1 / float(curvature[column]))
                code = self._format.round(best[:, None, None], own)
                torch.sub(self._format.values(code, own).view(-1), rounded, out=move)
                self.codes[column] = code.view(-1)
                slopes[column - start + 1 :].addr_(products[column + 1 : stop, column], move, alpha=-1)
            # Columns that are done ask again in the next sweep only.
            read = slice(stop if is_last else 0, None)
            self._slopes[read].addmm_(products[read, start:stop], moves, alpha=-1)
            if not is_last:
                self._slopes[start:stop].sub_(moves, alpha=self._damping)
            self._rounded[start:stop] += moves


def column_grids(grid: Grid) -> list[Grid]:
    """The grid of every group as that of single columns `[n, 1, 1]`."""
    scales = grid.scales.T.contiguous()
    zeros = None if grid.zeros is None else grid.zeros.T.contiguous()
    return [
        replace(grid, scales=scale[:, None], zeros=None if zeros is None else zeros[block][:, None])
        for block, scale in enumerate(scales)
    ]
