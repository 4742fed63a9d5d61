"""Grids for a range smaller than that of the weights: fewer weights are far off, if some large ones are cut.

Source: the clipping search of AWQ (arXiv 2306.00978) and the `mse` option of the GPTQ code, over any weight format.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from jettison.passes.formats import Grid, WeightFormat


def clipped_grid(
    weight_format: WeightFormat, groups: Tensor, weigh: Callable[[Tensor], Tensor], *, steps: int, lowest: float
) -> Grid:
    """The grid of each group that rounds it best, among those fitted to `1, ..., lowest` of its range.

    Args:
        weight_format: Fits and rounds.
        groups: `[n, b, g]` f32.
        weigh: Takes errors `[n, b, g]` to what they cost, `[n, b]`.
        steps: Grids to try.
        lowest: Smallest fraction of the range.
    """
    low, high = groups.amin(-1, keepdim=True).clamp_(max=0), groups.amax(-1, keepdim=True).clamp_(min=0)
    best: Grid | None = None
    least = torch.empty(0)
    for step in range(steps):
        part = 1 - (1 - lowest) * step / max(1, steps - 1)
        grid = weight_format.fit(groups if step == 0 else torch.minimum(torch.maximum(groups, low * part), high * part))
        cost = weigh(weight_format.values(weight_format.round(groups, grid), grid) - groups)
        if best is None:
            best, least = grid, cost
            continue
        is_better = cost < least
        least = torch.where(is_better, cost, least)
        scales = torch.where(is_better, grid.scales, best.scales)
        has_zeros = grid.zeros is not None and best.zeros is not None
        best = replace(grid, scales=scales, zeros=torch.where(is_better, grid.zeros, best.zeros) if has_zeros else None)
    assert best is not None, "at least one step"
    return best
