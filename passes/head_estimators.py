"""Cheap copies of a language-model head, and how far each of their rows is from the row it stands for.

| estimator | bytes                             | its rows                                                          |
|-----------|-----------------------------------|-------------------------------------------------------------------|
| `int4`    | `V * K / 2`, and 5 per 256 weights | the head in 4 bits, groups of 128                                 |
| `lowrank` | `rank * (V + K)`                  | the best product of two matrices for what the head reads, 8 bits  |
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from jettison.ir.constants import Constant, Packed, scratch_tensor
from jettison.ir.edit import Edit
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.ops import quantized_linear
from jettison.ir.ops.quantized_linear import dequantize_rows, row_chunks
from jettison.ir.program import Program
from jettison.passes.formats import Grid, IntGroups, WeightFormat
from jettison.passes.whitening import Spectrum, Whitening

aten = torch.ops.aten
ESTIMATE = "estimate"
# What kernels round on the way to an estimate, in units of |Z~_i| |x|: x to bf16 (2^-9), and where many rows are
# multiplied at once, decoded weights to bf16 (2^-9).
_OPERAND_ROUNDING = 2.0**-8
# And in fp32 sums in any order, per column, in units of the norm of what is summed. Kernels sum codes and take the zero
# points off afterwards; in words of Triton's kernels a code is 16 to 31 (see `codegen/triton/word_layout.py`).
_SUM_ROUNDING, _LARGEST_CODE = 2.0**-24, 32.0
# Scale of a group of zeros. In formats it is 1, and what is summed and taken off again large.
_ZERO_SCALE = 2.0**-20
# Norms and the bound are computed in fp32 themselves.
_ROUNDED_UP, _GRID_ROUNDED_UP = 1.0 + 2.0**-10, 1.0 + 2.0**-6


@dataclass(frozen=True)
class Head:
    """A linear that makes the logits.

    Attributes:
        node: `aten.linear` or `jettison.quantized_linear`, its weight constant.
        name: Of the dense weight.
        shape: `(V, K)`.
        nbytes: Stored bytes of the weight.
        rows: `rows(start, stop)` are rows of the weight, `[n, K]` f32.
    """

    node: fx.Node
    name: str
    shape: tuple[int, int]
    nbytes: int
    rows: Callable[[int, int], Tensor]

    @classmethod
    def of(cls, node: fx.Node, program: Program) -> Head | None:
        """The head that a node is; None where it is no linear with a constant weight."""
        if not is_call(node, aten.linear.default, quantized_linear):
            return None
        operands = arguments(node)
        if is_call(node, quantized_linear):
            names = [constant_name(operands[part]) for part in ("codes", "scales", "zeros")]
            if names[0] is None or names[1] is None or (names[2] is None and operands["zeros"] is not None):
                return None
            parts = [None if name is None else program.constants[name] for name in names]
            layout = operands["bits"], operands["group"], operands["in_features"]

            def decoded(start: int, stop: int) -> Tensor:
                codes, scales, zeros = (None if part is None else part.rows(start, stop) for part in parts)
                assert codes is not None, "checked above"
                assert scales is not None, "checked above"
                return dequantize_rows(codes, scales, zeros, *layout)

            stored = sum(part.stored_bytes for part in parts if part is not None)
            codes = program.constants[names[0]]
            return cls(node, names[0].removesuffix(".codes"), (codes.shape[0], layout[2]), stored, decoded)
        name = constant_name(operands["weight"])
        if name is None:
            return None
        weight = program.constants[name]
        shape = (weight.shape[0], weight.shape[1])
        return cls(node, name, shape, weight.stored_bytes, lambda i, j: weight.rows(i, j).to(torch.float32))

    def chunks(self) -> list[slice]:
        """Ranges of rows to work on at a time."""
        return row_chunks(*self.shape)


def group_for(columns: int) -> Literal[32, 64, 128]:
    """The largest group of a format that is not mostly padding."""
    return 32 if columns <= 32 else 64 if columns <= 64 else 128


def estimator_bytes(shape: tuple[int, int], rank: int | None) -> int:
    """Bytes of an estimator for a head `(V, K)`: `int4`, or of a rank."""
    rows, columns = shape
    if rank is None:
        return _int4(columns).bytes(shape)
    return sum(_int8(factor[1]).bytes(factor) for factor in ((rank, columns), (rows, rank)))


def _int4(columns: int) -> IntGroups:
    return IntGroups(4, group_for(columns))


def _int8(columns: int) -> IntGroups:
    return IntGroups(8, group_for(columns), symmetric=True)


def add_int4(edit: Edit, head: Head) -> fx.Node:
    """Write the estimate of a head by its copy in 4 bits, in front of it.

    Scales are rounded to bf16, which the kernel of the torch target would do, and zero points are those of symmetric
    groups: with others that kernel rounds their products with scales, too. They are stored all the same: without them
    ONNX Runtime takes a kernel on ARM that rounds x in one block, and not in the blocks that the bound is for.

    Args:
        edit: Of the entry.
        head: Of its program.

    Returns:
        `[..., V]`.
    """
    weight_format = _int4(head.shape[1])
    specs = weight_format.part_specs(head.shape)
    parts = {part: scratch_tensor(dims, dtype) for part, (dims, dtype) in specs.items()}
    for rows in head.chunks():
        for part, values in _bf16_groups(weight_format, head.rows(rows.start, rows.stop)).items():
            parts[part][rows] = values
    x, bias = head.node.args[0], arguments(head.node)["bias"]
    return _read(edit, head, x, f"{head.name}.{ESTIMATE}", weight_format, head.shape, parts, bias)


def _bf16_groups(weight_format: IntGroups, weight: Tensor) -> dict[str, Tensor]:
    groups = weight_format.split_groups(weight)
    fitted = IntGroups(weight_format.bits, weight_format.group, symmetric=True).fit(groups)
    scales = fitted.scales.to(torch.bfloat16).to(torch.float32)
    scales.masked_fill_(groups.abs().amax(-1) == 0, _ZERO_SCALE)
    grid = Grid(scales, torch.full_like(scales, 2.0 ** (weight_format.bits - 1)))
    return weight_format.pack(weight_format.round(groups, grid), grid)


def int4_errors(program: Program, head: Head) -> Constant:
    """What bounds the estimates of `add_int4`: the `errors` of `jettison.head_candidates`.

    Args:
        program: Has the estimator.
        head: As it was given there.

    Returns:
        `[2, V]` f32.
    """
    rows, columns = head.shape
    packed = program.packed[f"{head.name}.{ESTIMATE}"]
    weight_format = _int4(columns)
    errors, sums = torch.empty(2, rows), _SUM_ROUNDING * columns
    for each in head.chunks():
        parts = {part: program.constants[name].rows(each.start, each.stop) for part, name in packed.parts.items()}
        exact = head.rows(each.start, each.stop)
        estimate = weight_format.decode(parts, (len(exact), columns))
        summed = _LARGEST_CODE * weight_format.group**0.5 * parts["scales"].norm(dim=-1)
        rounding = sums * (exact.norm(dim=-1) + summed) + _OPERAND_ROUNDING * estimate.norm(dim=-1)
        errors[0, each] = ((exact - estimate).norm(dim=-1) + rounding) * _ROUNDED_UP
        errors[1, each] = estimate.norm(dim=-1) * _GRID_ROUNDED_UP
    return Constant(f"{head.name}.{ESTIMATE}.errors", errors)


def add_low_rank(edit: Edit, head: Head, rank: int, products: Tensor) -> fx.Node:
    """Write the estimate of a head by the product of two matrices in 8 bits, in front of it.

    The product is the one with the least sum of `|Z x - A B x|^2` over the tokens that `products` was summed over; see
    `passes/whitening.py`.

    Args:
        edit: Of the entry.
        head: Of its program.
        rank: Rows of B.
        products: `[K, K]` f32, sum of `x x^T` over what the head reads.

    Returns:
        `[..., V]`.
    """
    rows, columns = head.shape
    spectrum = Spectrum(head.rows, head.shape, Whitening(products), most=rank)
    down = spectrum.columns(rank)
    down_format, up_format = _int8(columns), _int8(rank)
    name = f"{head.name}.{ESTIMATE}"
    down_parts = down_format.encode(down, name)
    specs = up_format.part_specs((rows, rank))
    up_parts = {part: scratch_tensor(dims, dtype) for part, (dims, dtype) in specs.items()}
    for each in head.chunks():
        up = spectrum.rows(rank, each.start, each.stop)
        for part, made in up_format.encode_rows(up, name, each.start).items():
            up_parts[part][each] = made
    narrow = _read(edit, head, head.node.args[0], f"{name}.down", down_format, (rank, columns), down_parts, None)
    return _read(edit, head, narrow, f"{name}.up", up_format, (rows, rank), up_parts, arguments(head.node)["bias"])


def _read(
    edit: Edit, head: Head, x: fx.Node, name: str, weight_format: WeightFormat, shape: tuple[int, int],
    parts: dict[str, Tensor], bias: fx.Node | None,
) -> fx.Node:  # fmt: skip
    """Add a packed weight to the program, and a linear that reads it in front of the head."""
    constants = {part: Constant(f"{name}.{part}", values) for part, values in parts.items()}
    names = {part: constant.name for part, constant in constants.items()}
    edit.program.packed[name] = Packed(weight_format.name, shape, names)
    nodes = {part: edit.constant(constant) for part, constant in constants.items()}
    with edit.before(head.node):
        return weight_format.call_linear(edit, x, nodes, bias, shape)
