"""Which weights of a program are streamed, who reads them, and in which order a step does.

A weight can be streamed where all who read it are linears, which take it slab by slab, and embeddings, which look
single rows up. Weights of other operators have to be pinned.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from jettison.ir import ops
from jettison.ir.errors import UnsupportedError
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.packed_parts import (
    BitmapParts,
    JointWeight,
    PackedParts,
    bitmap_parts_read,
    bitmap_weights,
    joint_weights,
    parts_read,
)
from jettison.ir.program import Program, constant_placeholders

aten = torch.ops.aten


@dataclass(frozen=True)
class StreamedRead:
    """A weight that is streamed.

    Attributes:
        name: Of the constant that stands for it.
        packed: Its parts if it is packed; several are read as one, row after row.
        is_multiplied: Whether a linear reads it.
        is_table: Whether an embedding looks rows up.
        bitmap: Its parts if it is a bitmap and values.
    """

    name: str
    packed: JointWeight | None
    is_multiplied: bool
    is_table: bool
    bitmap: BitmapParts | None = None

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of all constants it is made of."""
        if self.bitmap is not None:
            return self.bitmap.names
        return (self.name,) if self.packed is None else self.packed.constants


def constants_on_disk(program: Program) -> set[str]:
    """Constants that entries read and that are placed on disk."""
    placement = program.placement
    return set() if placement is None else {name for name in program.used_constants() if placement.of(name) == "disk"}


def streamed_reads(program: Program) -> list[StreamedRead]:
    """The weights of a program that are on disk, those first that a step reads first.

    Args:
        program: Its metadata are not needed.

    Raises:
        UnsupportedError: A constant is on disk that cannot be streamed, or some parts of a packed weight only.
    """
    on_disk = constants_on_disk(program)
    if not on_disk:
        return []
    bitmaps = [
        StreamedRead(parts.bitmap, None, True, False, parts)
        for parts in bitmap_weights(program)
        if on_disk.issuperset(parts.names)
    ]
    found = [*_packed_reads(program, on_disk), *_dense_reads(program, on_disk), *bitmaps]
    left = sorted(on_disk - {name for read in found for name in read.constants})
    if left:
        others = f" and {len(left) - 1} others are" if len(left) > 1 else " is"
        raise UnsupportedError(
            f"[placement] {left[0]}{others} on disk; only whole matrices that linears and embeddings read can be "
            "streamed (quantised ones in 2, 4 or 8 bits or as bitmaps, with all of their parts on disk). Leave the "
            "tier of the others out, so that they stay in memory."
        )
    by_name = {read.name: read for read in found}
    return [by_name[name] for name in dict.fromkeys((*read_order(program, found), *by_name))]


def read_order(program: Program, reads: list[StreamedRead]) -> list[str]:
    """Names of streamed weights in the order in which linears of a decode step read them, once for each time.

    Programs without `decode` are run by `forward`.
    """
    entry = program.entries.get("decode") or next(iter(program.entries.values()))
    made_of = {part: read for read in reads for part in read.constants}
    order, done = [], set()
    for node in entry.graph.nodes:
        read = made_of.get(_linear_weight(node) or "")
        if read is None:
            continue
        # Several linears of one x run as one, where the first of them stands.
        call = (read.name, arguments(node).get("x"))
        if read.packed is None or read.packed.is_alone or call not in done:
            order.append(read.name)
        done.add(call)
    return order


def _linear_weight(node: fx.Node) -> str | None:
    if is_call(node, aten.linear.default):
        return constant_name(arguments(node)["weight"])
    bitmap = bitmap_parts_read(node)
    if bitmap is not None:
        return bitmap.bitmap
    return constant_name(arguments(node)["codes"]) if is_call(node, ops.quantized_linear) else None


def _packed_reads(program: Program, on_disk: set[str]) -> Iterator[StreamedRead]:
    def is_placed(parts: PackedParts) -> bool:
        return all(name is None or name in on_disk for name in (parts.codes, parts.scales, parts.zeros))

    slabbed = {name for name in on_disk for user in _users(program, name) if parts_read(user) is None}
    taken = set()
    for joint in split_by_tier(joint_weights(program), program):
        taken |= set(joint.parts)
        if is_placed(joint.parts[0]) and not any(parts.has_part(name) for parts in joint.parts for name in slabbed):
            yield StreamedRead(joint.name, joint, True, joint.is_table)
    # Tables that no linear reads.
    for name in sorted(on_disk):
        users = _users(program, name)
        found = {parts_read(user) for user in users}
        parts = found.pop() if len(found) == 1 else None
        is_looked_up = all(is_call(user, ops.quantized_embedding) for user in users)
        if parts is not None and parts not in taken and parts.codes == name and is_looked_up and is_placed(parts):
            rows = program.constants[name].shape[0]
            yield StreamedRead(name, JointWeight((parts,), (rows,), True), False, True)


def split_by_tier(joint: list[JointWeight], program: Program) -> list[JointWeight]:
    """Weights that run as one, those on disk apart from those in memory."""
    on_disk = constants_on_disk(program)
    split = []
    for each in joint:
        for placed in (True, False):
            chosen = [index for index, parts in enumerate(each.parts) if (parts.codes in on_disk) == placed]
            if chosen:
                rows = tuple(each.rows[index] for index in chosen)
                parts = tuple(each.parts[index] for index in chosen)
                split.append(JointWeight(parts, rows, each.is_table, None if rows == each.rows else sum(each.rows)))
    return split


def _dense_reads(program: Program, on_disk: set[str]) -> Iterator[StreamedRead]:
    for name in sorted(on_disk):
        users = _users(program, name)
        linears = [user for user in users if _reads_dense(user, name, aten.linear.default)]
        lookups = [user for user in users if _reads_dense(user, name, aten.embedding.default)]
        if users and len(linears) + len(lookups) == len(users) and len(program.constants[name].shape) == 2:
            yield StreamedRead(name, None, bool(linears), bool(lookups))


def _reads_dense(node: fx.Node, name: str, operator: object) -> bool:
    """Whether a node reads a constant as the weight of an operator, and not otherwise."""
    if not is_call(node, operator):
        return False
    named = [key for key, value in arguments(node).items() if constant_name(value) == name]
    return named == ["weight"]


def _users(program: Program, name: str) -> list[fx.Node]:
    return [
        user
        for entry in program.entries.values()
        for each, node in constant_placeholders(entry).items()
        if each == name
        for user in node.users
    ]
