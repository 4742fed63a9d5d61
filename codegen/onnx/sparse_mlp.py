"""Feed-forward layers that are read by groups of neurons, as ONNX.

Over quantised weights the groups are the experts of one `com.microsoft::QMoE`, whose CPU kernel runs those that a token
chose and no others. It wants the second matrix cut into slabs, so `cut_into_slabs` stores it like that, once: a prompt,
whose linears it was, reads the same slabs as a mixture of all experts. That takes up to twice as long as a product with
the whole matrix (`benchmarks/results/contextual_sparsity.json`); a second copy of the matrix would take as many bytes
as the sparsity saves.

Over floating-point weights the rows of the chosen groups are gathered for each token and multiplied.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from jettison.ir import ops
from jettison.ir.constants import Constant
from jettison.ir.edit import Edit
from jettison.ir.errors import UnsupportedError
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.ir.ops.quantized_linear import pack_zeros, unpack_zeros
from jettison.ir.ops.sparse_mlp import add_absent
from jettison.ir.program import Program

# What the kernel calls an activation, without and with a gate.
_KERNEL_ACTIVATIONS = {"relu": "relu", "silu": "silu"}
_GATED_ACTIVATIONS = {"silu": "swiglu"}
_SWIGLU = {"activation_alpha": 1.0, "activation_beta": 0.0, "swiglu_fusion": 1}
_KERNEL_BITS = (4, 8)


def sparse_mlp(
    x: Tensor, indices: Tensor | None, gate: Tensor | None, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, absent: Tensor | None, activation: str, group: int,
) -> Tensor:  # fmt: skip
    """`Gather` of slabs and two products for every token; without indices two products with the whole matrices."""
    rows, activate = x.reshape(-1, x.shape[-1]), ACTIVATIONS[activation]
    if indices is None:
        hidden = _gemm(rows, up, up_bias)
        hidden = activate(hidden) if gate is None else activate(_gemm(rows, gate, None)) * hidden
        return add_absent(hidden @ down, None, None, down_bias).reshape(x.shape)
    named = indices.reshape(-1, indices.shape[-1])

    def slabs(matrix: Tensor) -> Tensor:
        taken = matrix.unflatten(0, (-1, group))[named]
        return taken.flatten(1, 2)

    def product(matrix: Tensor) -> Tensor:
        taken = slabs(matrix)
        shape = (rows.shape[0], 1, taken.shape[1])
        operands = (rows.unsqueeze(1), taken)
        return symbolic("com.microsoft::FusedMatMul", operands, {"transB": 1}, dtype=x.dtype, shape=shape, version=1)

    hidden = product(up)
    if up_bias is not None:
        hidden = hidden + up_bias.unflatten(0, (-1, group))[named].flatten(1, 2).unsqueeze(1)
    hidden = activate(hidden) if gate is None else activate(product(gate)) * hidden
    out = torch.matmul(hidden, slabs(down)).squeeze(1)
    return add_absent(out, named, absent, down_bias).reshape(x.shape)


def _gemm(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear that leaves its weight as it is: `Gemm` transposes inside the kernel."""
    operands = (x, weight) if bias is None else (x, weight, bias)
    return symbolic("::Gemm", operands, {"transB": 1}, dtype=x.dtype, shape=(x.shape[0], weight.shape[0]))


def cut_into_slabs(program: Program) -> Program:
    """A copy of the program in which sparse layers over quantised weights, and the same layers of a prompt, are `QMoE`.

    Args:
        program: Left as it is; the copy shares its constants.

    Returns:
        The copy, or the program itself where there is nothing to do.

    Raises:
        UnsupportedError: The kernel does not know the activation, the bits, or groups of two sizes.
    """
    decode = program.entries.get("decode")
    sparse = [] if decode is None else [n for n in decode.graph.nodes if is_call(n, ops.quantized_sparse_mlp)]
    if not sparse:
        return program
    copy = program.copy()
    slabs = {str(constant_name(arguments(node)["down_codes"])): _Slabs(node, program) for node in sparse}
    for entry_name, entry in copy.entries.items():
        edit = Edit(copy, entry_name, "cut-into-slabs")
        for node in list(entry.graph.nodes):
            if is_call(node, ops.quantized_sparse_mlp):
                own = slabs[str(constant_name(arguments(node)["down_codes"]))]
                operands = arguments(node)
                own.insert(node, operands["x"], operands["indices"], operands["down_bias"], operands["absent"], edit)
            elif is_call(node, ops.quantized_linear) and constant_name(node.args[1]) in slabs:
                hidden = node.args[0]
                up = hidden.args[1] if is_call(hidden, ops.gated_activation) else hidden.args[0]
                slabs[str(constant_name(node.args[1]))].insert(
                    node, up.args[0], None, arguments(node)["bias"], None, edit
                )
        edit.eliminate_dead_code()
    return copy


class _Slabs:
    """The operands of `QMoE` for one layer.

    Args:
        node: Its sparse form.
        program: Holds its constants.
    """

    def __init__(self, node: fx.Node, program: Program) -> None:
        read = self._read = arguments(node)
        self._constants = program.constants
        self._groups, self._size = read["neurons"] // read["group"], read["group"]
        self._is_gated = read["gate_codes"] is not None
        known = _GATED_ACTIVATIONS if self._is_gated else _KERNEL_ACTIVATIONS
        where = str(constant_name(read["up_codes"])).removesuffix(".codes")
        wrong = None
        if read["activation"] not in known or (self._is_gated and read["up_bias"] is not None):
            wrong = f"a layer of {read['activation']}{', gated' if self._is_gated else ''}"
        elif read["up_group"] != read["down_group"] or read["width"] % read["up_group"]:
            wrong = f"groups of {read['up_group']} and {read['down_group']} columns of {read['width']}"
        elif read["up_bits"] not in _KERNEL_BITS or read["down_bits"] != read["up_bits"]:
            wrong = f"{read['up_bits']} and {read['down_bits']} bits"
        elif any(_is_between_codes(read[f"{name}_zeros"]) for name in ("gate", "up", "down")):
            wrong = "zero points between the codes"
        if wrong is not None:
            raise UnsupportedError(
                f"[onnx] {where}: found {wrong} read by groups of neurons, needs relu, silu or a gated silu, 4 or 8 "
                "bits, the same in both matrices, whole zero points, and whole groups of one size, because the "
                "kernel QMoE takes no others. Leave it out of predict-mlp-sparsity (skip=), quantise it otherwise, or "
                'use target="torch".'
            )
        self.attributes: dict[str, Any] = {
            "block_size": read["up_group"], "expert_weight_bits": read["up_bits"], "accuracy_level": 4,
            "normalize_routing_weights": 0, "activation_type": known[read["activation"]],
            **(_SWIGLU if self._is_gated else {}),
        }  # fmt: skip
        self._made = {name: self._constant(name) for name in ("codes1", "scales1", "zeros1", "bias1")}
        self._made |= {name: self._constant(name) for name in ("codes2", "scales2", "zeros2")}

    def insert(
        self, node: fx.Node, x: fx.Node, indices: fx.Node | None, bias: fx.Node | None, absent: fx.Node | None,
        edit: Edit,
    ) -> None:  # fmt: skip
        """Put the kernel in the place of a node."""
        placed = [None if constant is None else edit.constant(constant) for constant in self._made.values()]
        call = partial(group_mixture, attributes=self.attributes)
        call.__name__ = "group_mixture"  # type: ignore[attr-defined]
        with edit.before(node):
            new = edit.call(call, x, indices, *placed, bias, absent)
        edit.replace(node, new)

    def _constant(self, name: str) -> Constant | None:
        part, matrix = name[:-1], "up" if name.endswith("1") else "down"
        operand = self._read["up_bias" if part == "bias" else f"{matrix}_{part}"]
        if operand is None:
            return None
        stored = self._constants[str(constant_name(operand))]
        if part == "bias":
            return _Cut(f"{stored.name}.slabs", stored, stored.value().reshape(self._groups, -1))
        if matrix == "up":
            others = [stored]
            if self._is_gated:
                others.insert(0, self._constants[str(constant_name(self._read[f"gate_{part}"]))])
            rows = [each.value().reshape(self._groups, self._size, 1, -1) for each in others]
            return _Cut(f"{stored.name}.slabs", stored, torch.cat(rows, 2).flatten(1, 2))
        value = stored.value()
        if part == "zeros":
            blocks = self._read["neurons"] // self._read["down_group"]
            bits = self._read["down_bits"]
            zeros = unpack_zeros(value, bits, blocks).unflatten(1, (self._groups, -1)).transpose(0, 1)
            packed = pack_zeros(zeros.flatten(0, 1), bits)
            return _Cut(f"{stored.name}.slabs", stored, packed.unflatten(0, (self._groups, -1)))
        cut = value.flatten(1).unflatten(1, (self._groups, -1)).transpose(0, 1)
        return _Cut(f"{stored.name}.slabs", stored, cut.contiguous())


def _is_between_codes(zeros: fx.Node | None) -> bool:
    return zeros is not None and bool(zeros.meta["val"].is_floating_point())


class _Cut(Constant):
    """A part of a packed matrix by slabs; equal ones are stored once (the serial is the part's own).

    Args:
        name: Of this form.
        constant: The part.
        value: In its form.
    """

    def __init__(self, name: str, constant: Constant, value: Tensor) -> None:
        super().__init__(name, value, constant.dtype)
        self.serial = constant.serial


def group_mixture(
    x: Tensor, indices: Tensor | None, codes1: Tensor, scales1: Tensor, zeros1: Tensor | None, bias1: Tensor | None,
    codes2: Tensor, scales2: Tensor, zeros2: Tensor | None, down_bias: Tensor | None, absent: Tensor | None, *,
    attributes: Mapping[str, Any],
) -> Tensor:  # fmt: skip
    """`com.microsoft::QMoE` whose experts are groups of neurons, all with a weight of one."""
    rows, groups = x.reshape(-1, x.shape[-1]), codes1.shape[0]
    if indices is None:
        named, count = None, groups
        chosen = torch.ones(rows.shape[0], groups, dtype=x.dtype)
    else:
        named, count = indices.reshape(-1, indices.shape[-1]), indices.shape[-1]
        chosen = (named.unsqueeze(-1) == torch.arange(groups)).to(x.dtype).amax(1)
    operands = (
        rows,
        chosen,
        codes1,
        scales1,
        bias1,
        codes2,
        scales2,
        None,
        None,
        None,
        None,
        zeros1,
        zeros2,
        None,
        chosen,
    )
    out = symbolic(
        "com.microsoft::QMoE", operands, {"k": count, **attributes}, dtype=x.dtype, shape=rows.shape, version=1
    )
    return add_absent(out, named, absent, down_bias).reshape(x.shape)


def is_group_mixture(node: fx.Node) -> bool:
    """Whether a node is one that `cut_into_slabs` made."""
    return isinstance(node.target, partial) and node.target.func is group_mixture
