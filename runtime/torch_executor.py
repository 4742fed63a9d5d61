"""Runs a program with PyTorch: each entry as generated Python code, states updated in place, weights held once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.ir.program import Program, input_placeholders, state_placeholders
from jettison.runtime.executor import EntrySignature
from jettison.runtime.lowered_entry import PackedParts, lower_entry, packed_parts
from jettison.runtime.packed_linear import PackedWeight, pack_weight

KERNELS = ("packed", "reference")


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
        self.info = program.info
        self.states = dict(program.states)
        self._values: dict[str, Tensor | PackedWeight] = {}
        packed = packed_parts(program) if kernels == "packed" else {}
        in_kernels = {parts for parts, is_table in packed.items() if self._pack(program, parts, is_table)}
        lowered = {name: lower_entry(entry, in_kernels) for name, entry in program.entries.items()}
        for constant in {name: None for entry in lowered.values() for name in entry.constants}:
            if constant not in self._values:
                self._values[constant] = program.constants[constant].value()
        self._calls = {name: entry.call for name, entry in lowered.items()}
        self._constants = {
            name: [self._values[constant] for constant in entry.constants] for name, entry in lowered.items()
        }
        self.entries = {
            name: EntrySignature(tuple(input_placeholders(entry)), tuple(state_placeholders(entry)), program.outputs)
            for name, entry in program.entries.items()
        }
        self.weight_bytes = sum(value.nbytes for value in self._values.values())

    def _pack(self, program: Program, parts: PackedParts, is_table: bool) -> bool:
        """Hold a weight as its kernel reads it, if there is one."""
        codes, scales = (program.constants[name].value() for name in (parts.codes, parts.scales))
        zeros = None if parts.zeros is None else program.constants[parts.zeros].value()
        with torch.no_grad():
            weight = pack_weight(codes, scales, zeros, parts.bits, parts.group, parts.columns, is_table=is_table)
        if weight is not None:
            self._values[parts.codes] = weight
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
