"""Layers of routed experts and nothing else, traced from a small module."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.ops import experts
from jettison.ir.program import Program
from jettison.passes.pipeline import prepare
from tests.helpers import Apply, Embedded, export_tiny

EXPERTS, WIDTH, LAYERS = 4, 64, 2


def mixture_program(inner: int, activation: str = "silu") -> Program:
    """Two layers in a row: what a kernel does to its input shows in the second.

    Args:
        inner: Width of an expert.
        activation: Of its gate.

    Returns:
        An encoder, prepared: tokens read themselves alone.
    """

    def function(self: Any, x: Tensor) -> Tensor:
        for number in range(LAYERS):
            tokens = (x * 4).reshape(-1, WIDTH)
            shares, indices = torch.softmax(F.linear(tokens, self.get_parameter(f"router{number}")), -1).topk(2)
            stacks = (self.get_parameter(f"{name}{number}") for name in ("gate_up", "down"))
            x = x + experts(tokens, indices, shares * (1 + number), *stacks, activation).reshape(x.shape)
        return x

    shapes = {"router": (EXPERTS, WIDTH), "gate_up": (EXPERTS, 2 * inner, WIDTH), "down": (EXPERTS, WIDTH, inner)}
    named = {f"{name}{number}": shape for number in range(LAYERS) for name, shape in shapes.items()}
    module = Apply(function, **named)
    program = export_tiny(Embedded(module, width=WIDTH), kind="encoder")
    prepare(program)
    return program
