"""What `factorize-linear` leaves in a graph: linears that read few values which one linear without a bias makes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from jettison.ir.match import arguments, constant_name, is_call, only_user
from jettison.ir.ops import quantized_linear

aten = torch.ops.aten


@dataclass(frozen=True)
class LowRankForm:
    """A factored linear, or several that share columns.

    Attributes:
        x: What they read, `[..., K]`.
        columns: `aten.linear(x, @columns)`, `[..., r]`.
        rows: `aten.linear(columns, @rows, bias)` of each, `[..., N]`.
    """

    x: fx.Node
    columns: fx.Node
    rows: tuple[fx.Node, ...]

    @classmethod
    def of(cls, node: fx.Node) -> LowRankForm | None:
        """The form that a linear is the first or a second one of; None where two linears only follow each other."""
        if not _is_linear(node):
            return None
        users = list(node.users)
        is_first = bool(users) and all(_reads(user, node) for user in users)
        for columns in (node, arguments(node)["input"]) if is_first else (arguments(node)["input"],):
            rows = tuple(columns.users)
            if not _is_linear(columns) or not all(_reads(user, columns) for user in rows):
                continue
            rank, width = (int(size) for size in arguments(columns)["weight"].meta["val"].shape)
            outputs = sum(int(user.meta["val"].shape[-1]) for user in rows)
            if arguments(columns)["bias"] is None and rank * (width + outputs) < width * outputs:
                return cls(arguments(columns)["input"], columns, rows)
        return None


def is_remainder(node: fx.Node) -> bool:
    """Whether a quantised linear is what is added to a factored one that reads the same."""
    user = only_user(node)
    if not is_call(node, quantized_linear) or not is_call(user, aten.add.Tensor):
        return False
    form = next((LowRankForm.of(each) for each in user.all_input_nodes if each is not node), None)
    return form is not None and form.x is arguments(node)["x"]


def _is_linear(node: fx.Node) -> bool:
    return is_call(node, aten.linear.default) and constant_name(arguments(node)["weight"]) is not None


def _reads(user: fx.Node, node: fx.Node) -> bool:
    return _is_linear(user) and arguments(user)["input"] is node
