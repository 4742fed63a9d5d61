"""Where values of a layer come from and go to: the residual stream before an attention, and behind a linear."""

from __future__ import annotations

from collections import deque

import torch
from torch import fx

from jettison.ir.match import is_call, only_user
from jettison.ir.ops import bitmap_linear, lut_linear, quantized_linear, sparse_linear

aten = torch.ops.aten
NORMS = (aten.layer_norm.default, aten.rms_norm.default)
PACKED_LINEARS = (quantized_linear, lut_linear, bitmap_linear)
LINEARS = (aten.linear.default, sparse_linear, *PACKED_LINEARS)


def residual_before_attention(x: fx.Node) -> fx.Node | None:
    """What the attention in front of a feed-forward layer adds to, or None where that cannot be told.

    From the layer's input x back through its norm to the sum that the attention ends in: of its two operands, the one
    that the other is computed from.
    """
    node = x
    while is_call(node, *NORMS) or is_call(node, aten.reshape.default):
        node = node.args[0]
    if not is_call(node, aten.add.Tensor):
        return None
    left, right = node.args[:2]
    for earlier, later in ((left, right), (right, left)):
        if isinstance(earlier, fx.Node) and isinstance(later, fx.Node) and earlier in ancestors(later):
            return earlier
    return None


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Everything that a node is computed from."""
    found: set[fx.Node] = set()
    waiting = [node]
    while waiting:
        for operand in waiting.pop().all_input_nodes:
            if operand not in found:
                found.add(operand)
                waiting.append(operand)
    return found


def residual_after(linear: fx.Node) -> tuple[fx.Node, fx.Node]:
    """What is added to the residual stream behind a linear, and the sum: its own result, or that of a later linear.

    The linear itself twice where there is no such sum.
    """
    waiting, seen = deque([linear]), {linear}
    while waiting:
        node = waiting.popleft()
        found = _added(node) if is_call(node, *LINEARS) else None
        if found is not None:
            return found
        later = [user for user in node.users if user not in seen]
        waiting.extend(later)
        seen.update(later)
    return linear, linear


def _added(linear: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The result of a linear where something is added to it, perhaps behind a norm or a factor, and the last sum."""
    part: fx.Node | None = linear
    while part is not None:
        user = only_user(part)
        if is_call(user, aten.add.Tensor):
            break
        part = user if is_call(user, aten.reshape.default, aten.mul.Tensor, *NORMS) else None
    if part is None:
        return None
    total = part
    while is_call(user := only_user(total), aten.add.Tensor):
        total = user
    return (part, total) if total.meta["val"].dim() == part.meta["val"].dim() else None
