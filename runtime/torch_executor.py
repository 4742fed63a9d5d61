"""Runs a program with PyTorch: each entry as generated Python code, states updated in place, weights held once.

Weights that a `Placement` puts on disk pass through a ring of buffers (`streamed_weight.py`). The others of such a
program are read into memory of the process: pages mapped from a file could be dropped, and read again one at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, fx

from jettison.ir.allocator import forget_pages, give_back
from jettison.ir.constants import Constant
from jettison.ir.errors import OptionError
from jettison.ir.packed_parts import (
    BitmapParts,
    JointWeight,
    PackedParts,
    bitmap_weights,
    joint_weights,
    sparse_parts_read,
)
from jettison.ir.program import Program, input_placeholders, state_placeholders
from jettison.runtime.bitmap_weight import BitmapWeight, pack_bitmap
from jettison.runtime.executor import CPU, EntrySignature
from jettison.runtime.lowered_entry import lower_entry
from jettison.runtime.packed_experts import ExpertParts, PackedExperts, pack_experts, packable_experts
from jettison.runtime.packed_linear import PackedWeight, pack_weight
from jettison.runtime.streamed_reads import constants_on_disk, split_by_tier, streamed_reads
from jettison.runtime.streamed_weight import WeightStore, open_streamed

KERNELS = ("packed", "reference")
SMALL_BYTES = 1 << 20


class TorchExecutor:
    """See `Executor`. Weights are held once: packed ones as their kernel reads them, others in the graph's dtype.

    Args:
        program: What to run; its metadata are not needed.
        kernels: `packed` reads quantised weights with the fastest kernel there is; with 4 bits it rounds to bf16 on
            the way (`Int4Weight`). `reference` decodes them for every call and multiplies in fp32: the numbers that the
            program defines, thirty times slower.
        store: Of the weights that are on disk; by default they are written to a temporary file first.

    Attributes:
        stream: What passes weights through memory; None if all are there.

    Raises:
        OptionError: `kernels` is neither, or cannot be streamed to; or the ring of the placement is too small.
        UnsupportedError: A weight is on disk that cannot be streamed.
        ArtifactError: The store cannot be read or written.
    """

    def __init__(
        self,
        program: Program,
        *,
        kernels: Literal["packed", "reference"] = "packed",
        store: WeightStore | None = None,
    ) -> None:
        if kernels not in KERNELS:
            raise OptionError(f"[torch] kernels={kernels!r}: needed one of {', '.join(KERNELS)}.")
        on_disk = constants_on_disk(program)
        if on_disk and kernels != "packed":
            raise OptionError(
                f"[torch] kernels={kernels!r} with {len(on_disk)} constants on disk: they are streamed in the layout "
                "of the packed kernels. Use kernels='packed', or a program without a placement."
            )
        self.info, self.device = program.info, CPU
        self.states = dict(program.states)
        self.retentions, self.storages = dict(program.retentions), dict(program.storages)
        self.placement = program.placement
        self._values: dict[str, Tensor | PackedWeight | PackedExperts | BitmapWeight] = {}
        self._is_placed = bool(on_disk)
        reads = {read.name: read for read in streamed_reads(program)}
        wanted = split_by_tier(joint_weights(program), program) if kernels == "packed" else []
        wanted = [joint for joint in wanted if joint.name not in reads]
        cut = {parts for entry in program.entries.values() for node in entry.graph.nodes for parts in _cut(node)}
        packed = [joint for joint in wanted if self._pack(program, joint, is_cut=not cut.isdisjoint(joint.parts))]
        partial = _partial(program, packed)
        for joint in [joint for joint in packed if not partial.isdisjoint(joint.parts)]:
            packed.remove(joint)
            del self._values[joint.name]
        wanted_experts = packable_experts(program) if kernels == "packed" else []
        experts = [parts for parts in wanted_experts if self._pack_experts(program, parts)]
        wanted_bitmaps = bitmap_weights(program) if kernels == "packed" else []
        bitmaps = [each for each in wanted_bitmaps if each.bitmap in reads or self._pack_bitmap(program, each)]
        packed += [read.packed for read in reads.values() if read.packed is not None]
        dense = {name for name, read in reads.items() if read.packed is None and read.bitmap is None}
        is_beside_packed = bool(packed or experts or bitmaps)
        lowered = {name: lower_entry(entry, packed, experts, bitmaps, dense) for name, entry in program.entries.items()}
        for constant in {name: None for entry in lowered.values() for name in entry.constants}:
            if constant not in self._values and constant not in reads:
                self._values[constant] = self._held(program.constants[constant], is_beside_packed=is_beside_packed)
        # The ring comes last: what loading takes for a moment and the ring are not held together.
        if self._is_placed:
            give_back()
        streamed, self.stream = open_streamed(program, store)
        self._values |= streamed
        self._one_at_a_time = threading.Lock()
        self._calls = {name: entry.call for name, entry in lowered.items()}
        self._constants = {
            name: [self._values[constant] for constant in entry.constants] for name, entry in lowered.items()
        }
        self.entries = {
            name: EntrySignature(
                tuple(input_placeholders(entry)), tuple(state_placeholders(entry)), program.outputs_of(name)
            )
            for name, entry in program.entries.items()
        }
        self.weight_bytes = sum(value.nbytes for value in self._values.values())

    def _held(self, constant: Constant, *, is_beside_packed: object) -> Tensor:
        """The value of a constant: mapped from its file, unless the program says what is in memory."""
        if self._is_placed:
            return read_into_memory(constant)
        value = constant.value()
        # One small tensor mapped from a file would keep all of it mapped, packed weights' codes included.
        return value.clone() if is_beside_packed and value.nbytes < SMALL_BYTES else value

    def _pack(self, program: Program, joint: JointWeight, *, is_cut: bool) -> bool:
        """Hold a weight as its kernel reads it, if there is one."""

        def stacked(names: list[str]) -> Tensor:
            values = [program.constants[name].value() for name in names]
            return values[0] if len(values) == 1 else torch.cat(values)

        first = joint.parts[0]
        zeros = [parts.zeros for parts in joint.parts if parts.zeros is not None]
        with torch.no_grad():
            weight = pack_weight(
                stacked([parts.codes for parts in joint.parts]), stacked([parts.scales for parts in joint.parts]),
                stacked(zeros) if zeros else None, first.bits, first.group, first.columns, is_table=joint.is_table,
                is_cut=is_cut, whole_rows=joint.whole_rows,
            )  # fmt: skip
        if weight is not None:
            self._values[joint.name] = weight
        self._forget(program, joint.constants)
        return weight is not None

    def _pack_experts(self, program: Program, parts: ExpertParts) -> bool:
        """Hold stacks of weights as their kernel reads them, if there is one."""
        with torch.no_grad():
            stacks = pack_experts(program, parts)
        if stacks is not None:
            self._values[parts.name] = stacks
        return stacks is not None

    def _pack_bitmap(self, program: Program, parts: BitmapParts) -> bool:
        """Hold a weight as the kernel of bitmaps reads it, if there is one."""
        bitmap, starts, values = (program.constants[n].value() for n in (parts.bitmap, parts.starts, parts.values))
        scales = None if parts.scales is None else program.constants[parts.scales].value()
        weight = pack_bitmap(bitmap, starts, values, scales, parts.bits, parts.group, parts.columns)
        if weight is not None:
            self._values[parts.bitmap] = weight
        self._forget(program, parts.names)
        return weight is not None

    def _forget(self, program: Program, constants: Iterable[str]) -> None:
        """Leave nothing behind of what a weight was packed from, where memory is limited."""
        if not self._is_placed:
            return
        for block in (block for name in constants for block in program.constants[name].blocks):
            forget_pages(block)
        give_back()

    def run(self, entry: str, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Executor.run`."""
        signature = self.entries.get(entry)
        if signature is None:
            raise OptionError(f"[torch] no entry {entry!r}: this program has {', '.join(self.entries)}.")
        if self.stream is None:
            return self._run(entry, signature, inputs, states)
        with self._one_at_a_time, self.stream.running():  # the ring holds what one of them needs next
            return self._run(entry, signature, inputs, states)

    def _run(
        self, entry: str, signature: EntrySignature, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        given = [states[name] for name in signature.states] + [inputs[name] for name in signature.inputs]
        with torch.inference_mode():
            returned = self._calls[entry](*self._constants[entry], *given)
            for name, new in zip(signature.states, returned[len(signature.outputs) :], strict=True):
                if new is not states[name] and new.data_ptr() != states[name].data_ptr():
                    states[name].copy_(new)
        return dict(zip(signature.outputs, returned, strict=False))


def read_into_memory(constant: Constant) -> Tensor:
    """The value of a constant in memory of its own, read some rows at a time from where it is mapped."""
    if not constant.shape:
        return constant.value().clone()
    value = torch.empty(constant.shape, dtype=constant.dtype)
    for start, stop in constant.row_chunks():
        value[start:stop] = constant.rows(start, stop)
        for block in constant.blocks:
            forget_pages(block)
    return value


def _cut(node: fx.Node) -> list[PackedParts]:
    """Weights of which a node reads slabs of rows."""
    return [parts for name, parts in sparse_parts_read(node).items() if name != "down"]


def _partial(program: Program, packed: Sequence[JointWeight]) -> set[PackedParts]:
    """Weights of sparse feed-forward layers of which another weight is not packed: the operator itself reads them."""
    held = {parts for joint in packed for parts in joint.parts}
    read = [set(sparse_parts_read(node).values()) for entry in program.entries.values() for node in entry.graph.nodes]
    return {parts for layer in read if not layer <= held for parts in layer}
