"""Runs a program with PyTorch: each entry as generated Python code, states updated in place, weights held once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, fx

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
from jettison.runtime.packed_experts import PackedExperts, pack_experts, packable_experts
from jettison.runtime.packed_linear import PackedWeight, pack_weight

KERNELS = ("packed", "reference")
SMALL_BYTES = 1 << 20


class TorchExecutor:
    """See `Executor`. Weights are held once: packed ones as their kernel reads them, others in the graph's dtype.

    Args:
        program: What to run; its metadata are not needed.
        kernels: `packed` reads quantised weights with the fastest kernel there is; with 4 bits it rounds to bf16 on
            the way (`Int4Weight`). `reference` decodes them for every call and multiplies in fp32: the numbers that the
            program defines, thirty times slower.

    Raises:
        OptionError: `kernels` is neither.
    """

    def __init__(self, program: Program, *, kernels: Literal["packed", "reference"] = "packed") -> None:
        if kernels not in KERNELS:
            raise OptionError(f"[torch] kernels={kernels!r}: needed one of {', '.join(KERNELS)}.")
        self.info, self.device = program.info, CPU
        self.states = dict(program.states)
        self.retentions, self.storages = dict(program.retentions), dict(program.storages)
        self._values: dict[str, Tensor | PackedWeight | PackedExperts | BitmapWeight] = {}
        wanted = joint_weights(program) if kernels == "packed" else []
        cut = {parts for entry in program.entries.values() for node in entry.graph.nodes for parts in _cut(node)}
        packed = [joint for joint in wanted if self._pack(program, joint, is_cut=not cut.isdisjoint(joint.parts))]
        partial = _partial(program, packed)
        for joint in [joint for joint in packed if not partial.isdisjoint(joint.parts)]:
            packed.remove(joint)
            del self._values[joint.name]
        experts = []
        for parts in packable_experts(program) if kernels == "packed" else []:
            with torch.no_grad():
                stacks = pack_experts(program, parts)
            if stacks is not None:
                self._values[parts.name] = stacks
                experts.append(parts)
        wanted_bitmaps = bitmap_weights(program) if kernels == "packed" else []
        bitmaps = [parts for parts in wanted_bitmaps if self._pack_bitmap(program, parts)]
        lowered = {name: lower_entry(entry, packed, experts, bitmaps) for name, entry in program.entries.items()}
        for constant in {name: None for entry in lowered.values() for name in entry.constants}:
            if constant not in self._values:
                value = program.constants[constant].value()
                # One small tensor mapped from a file would keep all of it mapped, packed weights' codes included.
                self._values[constant] = (
                    value.clone() if (packed or experts or bitmaps) and value.nbytes < SMALL_BYTES else value
                )
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
                is_cut=is_cut,
            )  # fmt: skip
        if weight is not None:
            self._values[joint.name] = weight
        return weight is not None

    def _pack_bitmap(self, program: Program, parts: BitmapParts) -> bool:
        """Hold a weight as the kernel of bitmaps reads it, if there is one."""
        bitmap, starts, values = (program.constants[n].value() for n in (parts.bitmap, parts.starts, parts.values))
        scales = None if parts.scales is None else program.constants[parts.scales].value()
        weight = pack_bitmap(bitmap, starts, values, scales, parts.bits, parts.group, parts.columns)
        if weight is not None:
            self._values[parts.bitmap] = weight
        return weight is not None

    def run(self, entry: str, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Executor.run`."""
        signature = self.entries.get(entry)
        if signature is None:
            raise OptionError(f"[torch] no entry {entry!r}: this program has {', '.join(self.entries)}.")
        given = [states[name] for name in signature.states] + [inputs[name] for name in signature.inputs]
        with torch.inference_mode():
            returned = self._calls[entry](*self._constants[entry], *given)
            for name, new in zip(signature.states, returned[len(signature.outputs) :], strict=True):
                if new is not states[name] and new.data_ptr() != states[name].data_ptr():
                    states[name].copy_(new)
        return dict(zip(signature.outputs, returned, strict=False))


def _cut(node: fx.Node) -> list[PackedParts]:
    """Weights of which a node reads slabs of rows."""
    return [parts for name, parts in sparse_parts_read(node).items() if name != "down"]


def _partial(program: Program, packed: Sequence[JointWeight]) -> set[PackedParts]:
    """Weights of sparse feed-forward layers of which another weight is not packed: the operator itself reads them."""
    held = {parts for joint in packed for parts in joint.parts}
    read = [set(sparse_parts_read(node).values()) for entry in program.entries.values() for node in entry.graph.nodes]
    return {parts for layer in read if not layer <= held for parts in layer}
