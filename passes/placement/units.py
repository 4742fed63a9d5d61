"""What can be streamed: weights as wholes. A CPU takes some rows at a time, a GPU all that one launch reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from jettison.ir import ops
from jettison.ir.constants import Constant
from jettison.ir.cost import CallCost
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.packed_parts import PackedParts, joint_weights, parts_read
from jettison.ir.program import MissRecord, Program, constant_reads
from jettison.ir.roofline import SLAB_BYTES
from jettison.ir.text import target_text

aten = torch.ops.aten
_PAGE, _LINE = 4096, 64
# Where parts begin in the ring of a GPU (runtime/device_stream.py).
_GPU_ALIGNMENT = 512
# What ONNX Runtime's packed integers take over those stored, with groups of 32 (benchmarks/results/offload_onnx.json).
_ONNX_PACKED = 1.2
_OTHER_OPERANDS = ("input", "x", "indices", "bias")
# Rows that packed layouts can be cut at.
_ROWS_TOGETHER = 64


@dataclass(frozen=True)
class Unit:
    """A weight that is on one tier as a whole.

    Attributes:
        name: Of the dense weight.
        constants: Its parts, and those of weights that a kernel reads together with it.
        memory_bytes: That it takes where it is pinned.
        read_bytes: That a decode step reads of it; of an encoder, a forward pass.
        slab_bytes: Of the rows that are streamed at once.
        is_table: Whether single rows of it are looked up and nothing else is read.
    """

    name: str
    constants: tuple[str, ...]
    memory_bytes: int
    read_bytes: int
    slab_bytes: int
    is_table: bool


def find_units(program: Program, call: CallCost) -> tuple[list[Unit], list[MissRecord]]:
    """Weights that can be streamed, in the order in which a call reads them, and why others cannot.

    Args:
        program: Any.
        call: What a decode step reads, or a forward pass of an encoder.
    """
    used = program.used_constants()
    refused = {name: reason for name in used if (reason := _why_not(name, program)) is not None}
    read = call.bytes_by_constant()
    only_looked_up = _only_looked_up(program)
    units, misses = [], []
    for names in _together(program, used):
        reasons = [refused[name] for name in names if name in refused]
        largest = max(names, key=lambda name: used[name].nbytes)
        if not reasons:
            units.append(_unit(names, program, read, is_table=only_looked_up.issuperset(names)))
        elif len(used[largest].shape) > 1 and reasons[0]:
            misses.append(MissRecord(largest, reasons[0]))
    order = {name: index for index, name in enumerate(read)}
    units.sort(key=lambda unit: min(order.get(name, len(order)) for name in unit.constants))
    return units, misses


def _unit(names: tuple[str, ...], program: Program, read: Counter[str], *, is_table: bool) -> Unit:
    used = {name: program.constants[name] for name in names}
    total = sum(constant.nbytes for constant in used.values())
    dense, read_bytes = names[0].rpartition(".")[0], sum(read[name] for name in names)
    name = dense if dense in program.packed else names[0]
    if has_gpu(program):
        held = _bytes_on_gpu(names, program)
        return Unit(name, names, held, read_bytes, held, is_table)
    held = total + _kept_twice(names, program)
    if program.target == "onnx" and (packed := _bytes_in_onnx_runtime(names, program)) is not None:
        looked_up = total if any(is_call(user, ops.quantized_embedding) for user in _users(names, program)) else 0
        held, read_bytes, total = packed + looked_up, max(read_bytes, packed), packed
    rows = max(constant.shape[0] for constant in used.values())
    least = -(-total // rows) * min(rows, _ROWS_TOGETHER)
    slab = _pages(min(total, max(SLAB_BYTES, least)), len(names))
    return Unit(name, names, held, read_bytes, slab, is_table)


def _bytes_in_onnx_runtime(names: tuple[str, ...], program: Program) -> int | None:
    """What linears read of integers once ONNX Runtime has packed them; None where it does not."""
    packed = [user for user in _users(names, program) if is_call(user, ops.quantized_linear)]
    total = sum(program.constants[name].nbytes for name in names)
    return math.ceil(_ONNX_PACKED * total) if packed else None


def _users(names: tuple[str, ...], program: Program) -> list[fx.Node]:
    return [user for name in names for user, _ in constant_reads(program, name)]


def _bytes_on_gpu(names: tuple[str, ...], program: Program) -> int:
    """At most: kernels read scales and zero points in the dtype of x, and each part begins at a multiple."""
    widest = max(user.meta["val"].dtype.itemsize for user in _users(names, program))
    codes = {parts.codes for parts in _packed_parts(names, program)}
    total = 0
    for name in names:
        constant = program.constants[name]
        is_scale = bool(codes) and name not in codes
        size = max(constant.nbytes, math.prod(constant.shape) * widest) if is_scale else constant.nbytes
        total += -(-size // _GPU_ALIGNMENT) * _GPU_ALIGNMENT
    return total


def _packed_parts(names: tuple[str, ...], program: Program) -> list[PackedParts]:
    return [parts for parts in map(parts_read, _users(names, program)) if parts is not None]


def has_gpu(program: Program) -> bool:
    """Whether products are computed on a GPU."""
    return program.target == "triton"


def _pages(count: int, parts: int) -> int:
    """Whole pages for some parts that begin at cache lines."""
    return -(-(count + parts * _LINE) // _PAGE) * _PAGE


def _kept_twice(names: tuple[str, ...], program: Program) -> int:
    """Scales and zero points that the 4-bit kernel of a tied table holds beside its own."""
    users = _users(names, program)
    is_both = any(is_call(user, ops.quantized_embedding) for user in users)
    is_both &= any(is_call(user, ops.quantized_linear) and arguments(user)["bits"] == 4 for user in users)
    codes = {parts.codes for parts in _packed_parts(names, program)}
    return sum(program.constants[name].nbytes for name in names if name not in codes) if is_both else 0


def _only_looked_up(program: Program) -> set[str]:
    tables = (aten.embedding.default, ops.quantized_embedding)
    return {
        name
        for name in program.constants
        if (users := [user for user, _ in constant_reads(program, name)]) and all(is_call(u, *tables) for u in users)
    }


_LINEARS = (aten.linear.default, ops.quantized_linear)
# Operators whose weights a CPU can be given a slab at a time.
_OPERATORS = (*_LINEARS, aten.embedding.default, ops.quantized_embedding, ops.bitmap_linear)


def _why_not(name: str, program: Program) -> str | None:
    """Why a constant cannot be streamed; empty for what is no weight."""
    on_gpu = has_gpu(program)
    for user, placeholder in constant_reads(program, name):
        if not is_call(user, *(_LINEARS if on_gpu else _OPERATORS)):
            kinds = "linears are streamed to a GPU" if on_gpu else "linears and embeddings are streamed"
            return f"{target_text(user.target)} reads it, and only weights of {kinds}"
        if arguments(user).get("bias") is placeholder:
            return ""
        if is_call(user, aten.linear.default) and arguments(user)["input"] is placeholder:
            return "a linear multiplies it as its input"
        if not on_gpu and is_call(user, ops.quantized_linear, ops.quantized_embedding):
            reason = _why_unpacked(user)
            if reason is not None:
                return reason
    return None


def _why_unpacked(node: fx.Node) -> str | None:
    """Why no kernel holds the weight of a node in packed form."""
    read = arguments(node)
    if read["bits"] == 3:
        return "no kernel reads 3-bit weights as they are"
    zeros = read["zeros"]
    if read["bits"] != 4 and zeros is not None and zeros.meta["val"].is_floating_point():
        return "no kernel reads zero points in floating point with these bits"
    return None


def _together(program: Program, used: Mapping[str, Constant]) -> list[tuple[str, ...]]:
    """Constants in groups of those that are parts of one weight, or of weights that a kernel reads as one."""
    group_of = {name: name for name in used}

    def first(name: str) -> str:
        while group_of[name] != name:
            name = group_of[name]
        return name

    def join(names: list[str]) -> None:
        for name in names[1:]:
            group_of[first(name)] = first(names[0])

    first_of: dict[tuple[fx.GraphModule, object], str] = {}
    for packed in program.packed.values():
        join([name for name in packed.parts.values() if name in used])
    for entry in program.entries.values():
        for node in entry.graph.nodes:
            if is_call(node, *_OPERATORS):
                # What is multiplied with the weight is no part of it.
                parts = [each for key, each in arguments(node).items() if key not in _OTHER_OPERANDS]
                names = [name for name in map(constant_name, parts) if name is not None]
                join(names)
                if has_gpu(program) and is_call(node, *_LINEARS) and names:
                    # One launch may read them all, and would have them all in one place.
                    read = arguments(node)
                    launch = entry, read.get("x", read.get("input"))
                    join([first_of.setdefault(launch, names[0]), names[0]])
    for joint in joint_weights(program):
        join([parts.codes for parts in joint.parts])
    groups: dict[str, list[str]] = {}
    for name in used:
        groups.setdefault(first(name), []).append(name)
    return [tuple(names) for names in groups.values()]
