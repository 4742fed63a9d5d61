"""What a pass answers about a node, and small predicates for reading graphs."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import fx


@dataclass(frozen=True)
class Miss:
    """It looked like a place for the pass, and this is what stopped it.

    Attributes:
        reason: One clause, in the user's terms.
        node: The culprit.
    """

    reason: str
    node: fx.Node


def is_call(node: Any, *targets: Any) -> TypeGuard[fx.Node]:
    """Whether `node` is a call of one of `targets`."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


def arguments(node: fx.Node) -> dict[str, Any]:
    """Arguments of a call by schema name, defaults filled in."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        bound: dict[str, Any] = {}
        for position, argument in enumerate(target._schema.arguments):
            if position < len(node.args):
                bound[argument.name] = node.args[position]
            else:
                bound[argument.name] = node.kwargs.get(argument.name, argument.default_value)
        return bound
    signature = inspect.signature(target).bind(*node.args, **node.kwargs)
    signature.apply_defaults()
    return dict(signature.arguments)


def constant_name(node: Any) -> str | None:
    """Name of the constant a placeholder stands for, or None."""
    return node.meta.get("constant") if isinstance(node, fx.Node) and node.op == "placeholder" else None


def only_user(node: fx.Node) -> fx.Node | None:
    """The single user of a node, or None when it has none or several."""
    return next(iter(node.users)) if len(node.users) == 1 else None


def layer_index(name: str) -> int | None:
    """Layer number in a parameter or module path (`model.layers.3.mlp` gives 3), or None."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else None
