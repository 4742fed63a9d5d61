"""Divide an input of linears by factors, one per channel, in what makes it: a change of constants and of no graph.

What can divide: the weight (and bias) of the normalisation that returns the input; the rows of the linear behind which
an activation that commutes with positive factors returns it (ReLU), or that a gated activation multiplies with
(`activation(gate) * up`: the rows of up).
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from jettison.ir.constants import Constant
from jettison.ir.match import arguments, constant_name, is_call, only_user
from jettison.ir.ops import gated_activation
from jettison.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True)
class Divider:
    """What can divide an input.

    Attributes:
        vectors: Constants `[K]` to divide.
        rows: Weight `[K, ...]` whose rows are divided, or None.
    """

    vectors: tuple[str, ...]
    rows: str | None = None


def find_divider(x: fx.Node, linears: Container[fx.Node]) -> Divider | None:
    """What can divide an input, or None.

    Args:
        x: The input.
        linears: Those whose weights will be multiplied in return; something else that reads x forbids it.
    """
    if any(user not in linears or user.args[0] is not x for user in x.users):
        return None
    if is_call(x, aten.rms_norm.default, aten.layer_norm.default):
        given = arguments(x)
        return _vectors(given["weight"], *([given["bias"]] if given.get("bias") is not None else []))
    source = None
    if is_call(x, gated_activation):
        source = arguments(x)["up"]
    elif is_call(x, aten.relu.default):
        source = x.args[0]
    if not is_call(source, aten.linear.default) or only_user(source) is not x:
        return None
    given = arguments(source)
    weight = constant_name(given["weight"])
    biases = _vectors() if given["bias"] is None else _vectors(given["bias"])
    if weight is None or only_user(given["weight"]) is None or biases is None:
        return None
    return Divider(biases.vectors, weight)


def _vectors(*nodes: fx.Node | None) -> Divider | None:
    """Constants that only one node reads."""
    names = [constant_name(node) if node is not None and only_user(node) is not None else None for node in nodes]
    return Divider(tuple(name for name in names if name is not None)) if None not in names else None


def divide_vectors(program: Program, divider: Divider, scales: Tensor) -> None:
    """Divide the vectors of a divider, in the graph's dtype: a stored bf16 would round them once more."""
    for name in divider.vectors:
        constant = program.constants[name]
        program.constants[name] = Constant(name, (constant.value().to(scales.dtype) / scales).to(constant.dtype))


def divided_rows(parts: Mapping[str, Tensor], scales: Tensor) -> dict[str, Tensor]:
    """Parts of an encoded weight whose rows are divided: its scales are."""
    return {**parts, "scales": parts["scales"] / scales[:, None]}
