"""Runs a program with the kernels of `codegen/triton`: on a GPU, or on a CPU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from jettison.codegen.triton.emit import EmittedProgram, emit
from jettison.codegen.triton.launch import choose_device
from jettison.ir.errors import OptionError
from jettison.ir.program import Program, input_placeholders, state_placeholders
from jettison.runtime.executor import EntrySignature
from jettison.runtime.triton_entry import DeviceWeights, build_entry


class TritonExecutor:
    """See `Executor`. Inputs may come from the CPU; outputs return there.

    Args:
        program: What to run, with metadata.
        emitted: What `emit` made of it; default made anew.
        device: Where; default the GPU, or the CPU with the interpreter.

    Raises:
        UnsupportedError: See `choose_device`.
    """

    def __init__(
        self, program: Program, *, emitted: EmittedProgram | None = None, device: torch.device | None = None
    ) -> None:
        self.device = device or choose_device()
        self.info = program.info
        self.states = dict(program.states)
        self.retentions, self.storages = dict(program.retentions), dict(program.storages)
        weights = DeviceWeights(program, self.device)
        self.emitted = emitted or emit(program)
        self._calls = {name: build_entry(program, name, steps, weights) for name, steps in self.emitted.steps.items()}
        self.entries = {
            name: EntrySignature(
                tuple(input_placeholders(entry)), tuple(state_placeholders(entry)), program.outputs_of(name)
            )
            for name, entry in program.entries.items()
        }
        self.weight_bytes = weights.nbytes

    def run(self, entry: str, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Executor.run`."""
        signature = self.entries.get(entry)
        if signature is None:
            raise OptionError(f"[triton] no entry {entry!r}: this program has {', '.join(self.entries)}.")
        given = [states[name] for name in signature.states]
        given += [inputs[name].to(self.device) for name in signature.inputs]
        with torch.inference_mode():
            returned = self._calls[entry](*given)
            for name, new in zip(signature.states, returned[len(signature.outputs) :], strict=True):
                if new is not states[name] and new.data_ptr() != states[name].data_ptr():
                    states[name].copy_(new)
        return {name: value.cpu() for name, value in zip(signature.outputs, returned, strict=False)}
