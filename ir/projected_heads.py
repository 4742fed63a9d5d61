"""How keys or values come from the input of their layer: by one linear whose columns are sorted into heads."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.ops import lut_linear, quantized_linear
from jettison.ir.ops.lut_linear import group_scales, look_up_reference
from jettison.ir.ops.quantized_linear import dequantize_reference
from jettison.ir.program import Program

aten = torch.ops.aten
# What sorts columns into heads; none of them looks at a position.
_SORTING = (
    aten.transpose.int, aten.permute.default, aten.reshape.default, aten.view.default, aten.unflatten.int,
    aten.flatten.using_ints, aten.slice.Tensor, aten.split_with_sizes.default, aten.split.Tensor,
    aten.chunk.default, aten.select.int, aten.unsqueeze.default, aten.squeeze.dim, aten.contiguous.default,
    aten.clone.default, operator.getitem,
)  # fmt: skip
# Linears, and the operands of each that must be constants.
_LINEARS = {
    aten.linear.default: ("weight",),
    quantized_linear: ("codes", "scales"),
    lut_linear: ("codes", "lut"),
}


@dataclass(frozen=True)
class ProjectedHeads:
    """Keys or values `[B, Hkv, S, D]` as a projection of the layer's input `[B, S, E]`.

    Attributes:
        source: The layer's input.
        linear: The product, of `aten.linear`, `jettison.quantized_linear` or `jettison.lut_linear`.
        columns: `[Hkv * D] i64`, the column of the product that each channel is.
        factors: `[Hkv * D] f32`, weights of the norm behind the product; None without a norm.
    """

    source: fx.Node
    linear: fx.Node
    columns: Tensor
    factors: Tensor | None

    @property
    def in_features(self) -> int:
        """E."""
        return int(self.source.meta["val"].shape[-1])

    def weight(self, program: Program) -> Tensor:
        """`[E, Hkv * D] f32`, as the model computes with it; behind a norm up to a factor per token and head."""
        operands = arguments(self.linear)
        if is_call(self.linear, quantized_linear):
            codes, scales = (_value(operands[part], program) for part in ("codes", "scales"))
            zeros = None if operands["zeros"] is None else _value(operands["zeros"], program)
            layout = operands["bits"], operands["group"], operands["in_features"]
            weight = dequantize_reference(codes, scales, zeros, *layout)
        elif is_call(self.linear, lut_linear):
            codes, lut = (_value(operands[part], program) for part in ("codes", "lut"))
            scales, steps = (
                None if operands[part] is None else _value(operands[part], program) for part in ("scales", "steps")
            )
            layout = operands["bits"], operands["group"], operands["in_features"]
            weight = look_up_reference(codes, lut, group_scales(scales, steps), *layout)
        else:
            weight = _value(operands["weight"], program)
        rows = weight[self.columns].to(torch.float32)
        return (rows if self.factors is None else rows * self.factors[:, None]).t()

    def bias(self, program: Program) -> Tensor | None:
        """`[Hkv * D] f32`, or None; None behind a norm, which mixes it with what depends on the token."""
        bias = arguments(self.linear)["bias"]
        return (
            None if bias is None or self.factors is not None else _value(bias, program)[self.columns].to(torch.float32)
        )


@dataclass(frozen=True)
class KeyValueProjection:
    """How keys, before they are rotated, and values are made from one input; equal if it is of the same kind.

    Attributes:
        in_features: Channels of the input.
        is_normed: Whether a norm stands behind a product.
        has_bias: Of the keys and of the values.
        key: Of the keys.
        value: Of the values.
        program: Holds the constants.
    """

    in_features: int
    is_normed: bool
    has_bias: tuple[bool, bool]
    key: ProjectedHeads = field(compare=False)
    value: ProjectedHeads = field(compare=False)
    program: Program = field(compare=False, repr=False)

    @classmethod
    def of(cls, key: fx.Node, value: fx.Node, program: Program) -> KeyValueProjection | str:
        """Look where `[B, Hkv, S, D]` come from; a clause if that is nothing of the kind."""
        found = []
        for what, node in (("keys", key), ("values", value)):
            heads = projected_heads(node, program)
            if isinstance(heads, str):
                return f"its {what} {heads}"
            found.append(heads)
        if found[0].source is not found[1].source:
            return "its keys and its values are projections of different inputs"
        is_normed = any(heads.factors is not None for heads in found)
        has_bias = (found[0].bias(program) is not None, found[1].bias(program) is not None)
        return cls(found[0].in_features, is_normed, has_bias, found[0], found[1], program)

    def weights(self) -> dict[str, Tensor]:
        """Those of `key` and `value`."""
        return {"key": self.key.weight(self.program), "value": self.value.weight(self.program)}

    def biases(self) -> dict[str, Tensor | None]:
        """Those of `key` and `value`."""
        return {"key": self.key.bias(self.program), "value": self.value.bias(self.program)}


def _value(node: fx.Node, program: Program) -> Tensor:
    return program.constants[str(constant_name(node))].value()


def projected_heads(node: fx.Node, program: Program) -> ProjectedHeads | str:
    """Trace heads back to the linear that they come from.

    Args:
        node: Computes `[B, Hkv, S, D]`; keys before they are rotated.
        program: Holds the constants.

    Returns:
        How they come about, or why that cannot be told: a clause about them.
    """
    path: list[fx.Node] = []
    while not is_call(node, *_LINEARS):
        if not is_call(node, *_SORTING, aten.rms_norm.default):
            return f"are computed by {node.target if node.op == 'call_function' else node.name} from their projection"
        path.insert(0, node)
        node = node.args[0]
    operands = arguments(node)
    stored = _LINEARS[node.target]
    if any(constant_name(operands[part]) is None for part in stored):
        return "come from a projection whose weight is computed"
    bias = operands["bias"]
    if bias is not None and constant_name(bias) is None:
        return "come from a projection whose bias is computed"
    return _sorted(node, path, program)


def _sorted(linear: fx.Node, path: list[fx.Node], program: Program) -> ProjectedHeads | str:
    """Follow the numbers of the columns through one token of one row."""
    current: Any = torch.arange(linear.meta["val"].shape[-1])[None, None]
    factors, is_normed = torch.ones(current.numel()), False
    last = linear
    for node in path:
        if is_call(node, aten.rms_norm.default):
            weight = arguments(node)["weight"]
            if weight is not None and constant_name(weight) is None:
                return "pass a norm whose weight is computed"
            scales = torch.ones(()) if weight is None else program.constants[str(constant_name(weight))].value()
            # The last dimension is normalised; a column is there once.
            factors[current.flatten()] = scales.to(torch.float32).expand(current.shape).flatten()
            is_normed, last = True, node
            continue
        # Symbolic sizes are those of the batch and of the tokens, and their products.
        read, current, last = last, current, node
        args, kwargs = (_resolved(each, read, current) for each in (node.args, node.kwargs))
        current = node.target(*args, **kwargs)
    columns = current[0, :, 0].flatten()
    return ProjectedHeads(arguments(linear)["input" if is_call(linear, aten.linear.default) else "x"], linear, columns,
                          factors[columns] if is_normed else None)  # fmt: skip


def _resolved(args: Any, read: fx.Node, value: Any) -> Any:
    return fx.map_arg(args, lambda node: value if node is read else 1)
