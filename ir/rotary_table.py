"""By how much a model rotates at each position, as its own graph computes it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from jettison.ir.program import Program

# A model computes its angles in fp32, which is that far off at a position of 100,000.
LARGEST_MISFIT = 0.02


def angle_table(program: Program, node: fx.Node, positions: int) -> Tensor | None:
    """Evaluate an angle that depends on `position_ids` alone at every position.

    Args:
        program: Holds the constants.
        node: Computes `[B, S, R/2]` from `position_ids [B, S]`.
        positions: How many positions, from 0.

    Returns:
        `[positions, R/2] f32`, or None if the angle depends on anything else.
    """
    position_ids = torch.arange(positions)[None]
    environment: dict[fx.Node, Any] = {}
    for ancestor in _ancestors(node):
        if ancestor.op == "placeholder":
            if "constant" in ancestor.meta:
                environment[ancestor] = program.constants[ancestor.meta["constant"]].value()
            elif ancestor.name == "position_ids":
                environment[ancestor] = position_ids
            elif ancestor.name == "input_ids" and all(
                user.target is torch.ops.aten.sym_size.int for user in ancestor.users if user in _ancestors(node)
            ):
                environment[ancestor] = position_ids  # only its sizes are read
            else:
                return None
            continue
        args = fx.map_arg(ancestor.args, lambda n: environment[n])
        kwargs = fx.map_arg(ancestor.kwargs, lambda n: environment[n])
        environment[ancestor] = ancestor.target(*args, **kwargs)
    table = environment[node]
    if table.dim() != 3 or table.shape[:2] != (1, positions):
        return None
    return table[0].to(torch.float32).contiguous()


def frequencies(cos: Tensor, sin: Tensor) -> tuple[float, ...] | None:
    """Radians per position, if every angle is its position times a constant.

    Args:
        cos: `[P, R/2]`, a table of positions from 0, at least two of them.
        sin: `[P, R/2]`; cosines and sines may have a common factor.

    Returns:
        R/2 of them, each known up to whole turns; None if the angles are others.
    """
    turns = torch.complex(cos.double(), sin.double())
    turns = turns / turns.abs().clamp_min(1e-30)
    positions = torch.arange(len(turns), dtype=torch.float64)[:, None]
    found = (turns[1:] * turns[:-1].conj()).sum(0).angle()
    # What a small error adds up to over all positions tells how large it is.
    residual = (turns * torch.polar(torch.ones_like(positions), -positions * found)).angle()
    found = found + (residual * positions).sum(0) / positions.square().sum()
    misfit = (turns - torch.polar(torch.ones_like(positions), positions * found)).abs().max()
    return tuple(found.tolist()) if misfit < LARGEST_MISFIT else None


def _ancestors(node: fx.Node) -> dict[fx.Node, None]:
    """`node` and everything it depends on, in topological order."""
    order: dict[fx.Node, None] = {}
    stack: list[tuple[fx.Node, bool]] = [(node, False)]
    while stack:
        current, is_ready = stack.pop()
        if is_ready:
            order.setdefault(current)
        elif current not in order:
            stack.append((current, True))
            stack.extend((operand, False) for operand in current.all_input_nodes)
    return order
