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
    weight_format: WeightFormat, weight: Tensor, codes: Tensor, grid: Grid, products: Tensor
) -> tuple[Tensor, Grid]:
    """One sweep over the scales and the codes of some rows.

    Args:
        weight_format: Rounds; its values are proportional to its scales.
        weight: `[n, K]` f32.
        codes: `[n, k_blocks, group]` u8.
        grid: Of these groups.
        products: H `[K, K]` f32, damped.

    Returns:
        Codes and grid.
    """
    grid = weight_format.stored(_best_scales(weight_format, weight, codes, grid, products))
    return _best_codes(weight_format, weight, codes, grid, products), grid


def _best_scales(weight_format: WeightFormat, weight: Tensor, codes: Tensor, grid: Grid, products: Tensor) -> Grid:
    columns, group = weight.shape[1], codes.shape[2]
    rounded = weight_format.values(codes, grid).flatten(1)[:, :columns]
    slopes = (weight - rounded) @ products
    factors = torch.ones_like(grid.scales)
    for block in range(grid.scales.shape[1]):
        own = slice(block * group, min((block + 1) * group, columns))
        values = rounded[:, own]
        curvature = ((values @ products[own, own]) * values).sum(-1)
        step = (values * slopes[:, own]).sum(-1) / curvature
        factor = torch.where(curvature > 0, 1 + step, 1.0).nan_to_num_(1.0).clamp_(_LEAST_FACTOR, _MOST_FACTOR)
        slopes -= ((factor - 1)[:, None] * values) @ products[own]
        factors[:, block] = factor
    return replace(grid, scales=grid.scales * factors)


def _best_codes(weight_format: WeightFormat, weight: Tensor, codes: Tensor, grid: Grid, products: Tensor) -> Tensor:
    rows, columns = weight.shape
    group = codes.shape[2]
    # Transposed, so that a column is contiguous.
    rounded = weight_format.values(codes, grid).flatten(1)[:, :columns].T.contiguous()
    slopes = products @ (weight.T - rounded)
    found = codes.flatten(1).T.contiguous()
    curvature = products.diagonal()
    grids = column_grids(grid)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        moves = torch.empty(stop - start, rows)
        for column in range(start, stop):
            own = grids[column // group]
            best = torch.add(rounded[column], slopes[column], alpha=1 / float(curvature[column]))
            code = weight_format.round(best[:, None, None], own)
            move = torch.sub(weight_format.values(code, own).view(-1), rounded[column], out=moves[column - start])
            found[column] = code.view(-1)
            slopes[column + 1 : stop].addr_(products[column + 1 : stop, column], move, alpha=-1)
        slopes[stop:].addmm_(products[stop:, start:stop], moves, alpha=-1)
    return found.T.reshape(codes.shape)


def column_grids(grid: Grid) -> list[Grid]:
    """The grid of every group as that of single columns `[n, 1, 1]`."""
    scales = grid.scales.T.contiguous()
    zeros = None if grid.zeros is None else grid.zeros.T.contiguous()
    return [
        replace(grid, scales=scale[:, None], zeros=None if zeros is None else zeros[block][:, None])
        for block, scale in enumerate(scales)
    ]
