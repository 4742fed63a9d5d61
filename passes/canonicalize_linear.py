"""Spell every product with a constant matrix as `aten.linear` on the unflattened input.

Before:
    %1: f32[s0*s1,64] = aten.reshape(%x, [-1, 64])
    %2: f32[s0*s1,192] = aten.addmm(@c_attn.bias, %1, @c_attn.weight)
    %3: f32[s0,s1,192] = aten.reshape(%2, [%0, %s, 192])
After:
    %1: f32[s0,s1,192] = aten.linear(%x, @c_attn.weight.T, @c_attn.bias)

Fires when: `addmm`, `mm` or `matmul` with a constant `[K, N]` on the right (the Conv1D of GPT-2), or with the transpose
    of a constant `[N, K]`; and where such a product stands between two reshapes that only flatten the leading axes.
Declines when: `addmm` scales its operands.
Numerics: exact; the constant is a transposed view of the stored tensor, no byte is copied.
Saves: nothing by itself; quantisation, merging and lowering see one kind of node.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from jettison.ir.constants import Constant
from jettison.ir.edit import Edit
from jettison.ir.match import Miss, arguments, constant_name, is_call, only_user
from jettison.ir.program import Program
from jettison.passes.base import Pass

aten = torch.ops.aten


@dataclass(frozen=True)
class Product:
    """`x @ matrix + bias`, where `is_transposed` tells that the constant itself is `[N, K]`."""

    node: fx.Node
    x: fx.Node
    matrix: fx.Node
    bias: fx.Node | None
    is_transposed: bool


@dataclass(frozen=True)
class Flattened:
    """A linear between a reshape to two axes and a reshape back."""

    linear: fx.Node
    x: fx.Node
    restored: fx.Node


@dataclass(frozen=True)
class CanonicalizeLinear(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "canonicalize-linear"

    def match(self, node: fx.Node, program: Program) -> Product | Flattened | Miss | None:
        """A product with a constant matrix, or a linear on flattened axes."""
        if is_call(node, aten.addmm.default):
            operands = arguments(node)
            if constant_name(operands["mat2"]) is None:
                return None
            if operands["beta"] != 1 or operands["alpha"] != 1:
                return Miss("addmm scales its operands", node)
            if list(operands["self"].meta["val"].shape) != [node.meta["val"].shape[-1]]:
                return Miss("addmm adds something else than one bias per column", node)
            return Product(node, operands["mat1"], operands["mat2"], operands["self"], False)
        if is_call(node, aten.mm.default, aten.matmul.default):
            x, matrix = node.args[:2]
            if constant_name(matrix) is not None and matrix.meta["val"].dim() == 2:
                return Product(node, x, matrix, None, False)
            if _is_transpose_of_constant(matrix):
                return Product(node, x, matrix.args[0], None, True)
        return self._flattened(node)

    def _flattened(self, node: fx.Node) -> Flattened | None:
        if not is_call(node, aten.linear.default) or not is_call(node.args[0], aten.reshape.default):
            return None
        flat, restored = node.args[0], only_user(node)
        x = flat.args[0]
        if flat.meta["val"].dim() != 2 or x.meta["val"].dim() < 3 or not is_call(restored, aten.reshape.default):
            return None
        before, after = x.meta["val"].shape, restored.meta["val"].shape
        keeps_axes = len(before) == len(after) and all(
            str(a) == str(b) for a, b in zip(before[:-1], after[:-1], strict=True)
        )
        is_flatten = str(flat.meta["val"].shape[-1]) == str(before[-1])
        return Flattened(node, x, restored) if keeps_axes and is_flatten else None

    def rewrite(self, match: Product | Flattened, edit: Edit) -> None:
        """Emit the linear."""
        if isinstance(match, Flattened):
            with edit.before(match.restored):
                linear = edit.call(aten.linear.default, match.x, *match.linear.args[1:])
            linear.meta.update({k: v for k, v in match.linear.meta.items() if k == "where"})
            edit.replace(match.restored, linear)
            return
        weight = match.matrix
        if not match.is_transposed:
            weight = edit.constant(_transposed(edit.program.constants[weight.meta["constant"]]))
        operands = (match.x, weight) if match.bias is None else (match.x, weight, match.bias)
        with edit.before(match.node):
            linear = edit.call(aten.linear.default, *operands)
        edit.replace(match.node, linear)


def _is_transpose_of_constant(node: fx.Node) -> bool:
    if is_call(node, aten.t.default, aten.mT.default):
        return constant_name(node.args[0]) is not None
    if not is_call(node, aten.transpose.int, aten.permute.default) or node.meta["val"].dim() != 2:
        return False
    axes = [axis % 2 for axis in (node.args[1:] if is_call(node, aten.transpose.int) else node.args[1])]
    is_swap = axes == [1, 0] or (is_call(node, aten.transpose.int) and axes == [0, 1])
    return is_swap and constant_name(node.args[0]) is not None


def _transposed(constant: Constant) -> Constant:
    stored = constant.blocks[0] if len(constant.blocks) == 1 else torch.cat(constant.blocks)
    return Constant(f"{constant.name}.T", stored.t(), constant.dtype)
