"""Runs a program with the kernels of `codegen/triton`: on a GPU, or on a CPU in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from jettison.codegen.triton.emit import EmittedProgram, emit
from jettison.codegen.triton.kernels.base import Tuning
from jettison.codegen.triton.kernels.top_k import MOST, TopK
from jettison.codegen.triton.launch import Launchers, Stopwatch, choose_device
from jettison.ir.errors import OptionError
from jettison.ir.match import is_call
from jettison.ir.program import Program, input_placeholders, state_placeholders
from jettison.runtime.device_store import DeviceStore, temporary_device_store
from jettison.runtime.device_stream import Held
from jettison.runtime.device_weights import DeviceWeights
from jettison.runtime.executor import EntrySignature
from jettison.runtime.recorded_step import Record, RecordedSteps, record_cuda_graph
from jettison.runtime.streamed_reads import constants_on_disk
from jettison.runtime.triton_entry import Counters, Parts, build_entry

aten = torch.ops.aten
MASK = "attention_mask"
# Masks are as long as the next multiple: this many steps look the same.
_MASK_GRANULE = 1024


class TritonExecutor:
    """See `SelectingExecutor`. Inputs may come from the CPU; outputs return there.

    Args:
        program: What to run, with metadata.
        emitted: What `emit` made of it; default made anew.
        device: Where; default the GPU, or the CPU with the interpreter.
        tunings: Of kernels, by name; default those that the kernels name first.
        record: How decode steps are recorded; default as CUDA graphs on a GPU and not at all elsewhere. With weights on
            disk they are not.
        store: With the weights that are placed on disk; None to write them to a temporary file first.

    Raises:
        UnsupportedError: See `choose_device`; also where a constant is on disk that cannot be streamed.
        ArtifactError: The store cannot be opened, or belongs to another program.
        OptionError: The ring of streamed weights is smaller than a weight.
    """

    most_best = MOST

    def __init__(
        self,
        program: Program,
        *,
        emitted: EmittedProgram | None = None,
        device: torch.device | None = None,
        tunings: Mapping[str, Tuning] | None = None,
        record: Record | None = None,
        store: DeviceStore | None = None,
    ) -> None:
        self.device = device or choose_device()
        self.info = program.info
        self.states = dict(program.states)
        self.retentions, self.storages = dict(program.retentions), dict(program.storages)
        self.placement = program.placement
        self.emitted = emitted or emit(program)
        if store is None and constants_on_disk(program):
            store = temporary_device_store(program, self.emitted)
        self._weights = weights = DeviceWeights(program, self.device, store)
        self._parts = Parts(weights, Counters(self.device), Launchers(tunings))
        self._calls = {
            name: build_entry(program, name, steps, self._parts) for name, steps in self.emitted.steps.items()
        }
        self.entries = {
            name: EntrySignature(
                tuple(input_placeholders(entry)), tuple(state_placeholders(entry)), program.outputs_of(name)
            )
            for name, entry in program.entries.items()
        }
        self.weight_bytes = weights.nbytes + (0 if weights.stream is None else weights.stream.step_bytes)
        self.stream = weights.stream
        # What decode steps leave in the ring of streamed weights, by what they found there.
        self._held_after: dict[Held, Held] = {}
        if record is None and self.device.type == "cuda":
            record = record_cuda_graph
        if store is not None:
            record = None  # what is read from disk is waited for
        self.recorded = None if record is None else RecordedSteps(self.device, record)
        self._counts_tokens = "decode" in program.entries and _only_counts_tokens(program.entries["decode"])

    def run(self, entry: str, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Executor.run`."""
        return dict(zip(self._signature(entry).outputs, self._run(entry, inputs, states, 0), strict=True))

    def run_best(
        self, entry: str, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor], count: int
    ) -> tuple[Tensor, Tensor]:
        """See `SelectingExecutor.run_best`."""
        values, tokens = self._run(entry, inputs, states, count)
        return values, tokens

    def _signature(self, entry: str) -> EntrySignature:
        if entry not in self.entries:
            raise OptionError(f"[triton] no entry {entry!r}: this program has {', '.join(self.entries)}.")
        return self.entries[entry]

    def _run(
        self, entry: str, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor], best: int
    ) -> Sequence[Tensor]:
        signature = self._signature(entry)

        def compute(on_device: Mapping[str, Tensor]) -> Sequence[Tensor]:
            return self._outputs(entry, on_device, states, best)

        given = {name: inputs[name] for name in signature.inputs}
        with torch.inference_mode():
            if entry == "decode" and self.recorded is not None:
                if self._counts_tokens:
                    given[MASK] = F.pad(given[MASK], (0, -given[MASK].shape[1] % _MASK_GRANULE))
                places = tuple((name, states[name].shape, states[name].data_ptr()) for name in signature.states)
                held = None if self.stream is None else self.stream.held
                outputs = self.recorded.run((places, best, held), given, compute)
                if self.stream is not None and held is not None:
                    # A step that ran, or was recorded, left this; one that was replayed leaves the same.
                    self.stream.held = self._held_after.setdefault(held, self.stream.held)
            else:
                outputs = compute({name: value.to(self.device) for name, value in given.items()})
            return [value.cpu() for value in outputs]

    def _outputs(
        self, entry: str, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor], best: int
    ) -> Sequence[Tensor]:
        """Everything of a call that happens on the device."""
        signature = self.entries[entry]
        given = [states[name] for name in signature.states] + [inputs[name] for name in signature.inputs]
        with self._weights.step():
            returned = self._calls[entry](*given)
        for name, new in zip(signature.states, returned[len(signature.outputs) :], strict=True):
            if new is not states[name] and new.data_ptr() != states[name].data_ptr():
                states[name].copy_(new)
        outputs = returned[: len(signature.outputs)]
        return self._best(outputs[signature.outputs.index("logits")], best) if best else outputs

    def _best(self, logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The largest logits `[..., V]`, in descending order, and their tokens."""
        columns = logits.shape[-1]
        kernel = TopK(count, columns, logits.dtype)
        launcher = self._parts.launchers(kernel)
        rows = logits.numel() // columns
        blocks = launcher.largest(kernel.blocks)
        found = logits.new_empty(rows, blocks, kernel.padded, dtype=torch.int64)
        values = logits.new_empty(*logits.shape[:-1], count, dtype=torch.float32)
        tokens = torch.empty_like(values, dtype=torch.int64)
        launcher(logits.contiguous(), found, self._parts.counters(rows), values, tokens, sizes={"B": rows})
        return values, tokens

    def measure(self, stopwatch: Stopwatch | None) -> None:
        """See `Launchers.measure`."""
        self._parts.launchers.measure(stopwatch)

    @property
    def measured(self) -> dict[str, dict[Tuning, float]]:
        """See `Launchers.measured`."""
        return self._parts.launchers.measured


def _only_counts_tokens(decode: fx.GraphModule) -> bool:
    """Whether the mask is only ever summed along the tokens: zeros behind it change nothing then."""
    mask = input_placeholders(decode).get(MASK)
    return mask is not None and all(
        is_call(user, aten.sum.dim_IntList) and list(user.args[1]) in ([1], [-1]) for user in mask.users
    )
