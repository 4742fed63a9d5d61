"""Decode steps that were recorded once and are replayed: one launch for the CPU instead of one per kernel.

A recording belongs to the addresses and sizes that it saw. Inputs are copied into buffers of its own, states stay where
they are, so a step that looks the same may replay it. Steps of a session do look the same, once the mask of its tokens
is as long as the cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Compute = Callable[[Mapping[str, Tensor]], Sequence[Tensor]]
"""From inputs on the device to outputs there."""
Record = Callable[[Callable[[], Sequence[Tensor]]], tuple[Sequence[Tensor], Callable[[], None]]]
"""From a computation to its outputs, and what computes them anew in the same place. It may run the computation."""

# Sessions that take turns; each recording holds the buffers of its step.
MOST_RECORDINGS = 4


def record_cuda_graph(compute: Callable[[], Sequence[Tensor]]) -> tuple[Sequence[Tensor], Callable[[], None]]:
    """Record without running. What is recorded must have run before: a compilation cannot be recorded.

    Raises:
        RuntimeError: Something in it waits for the device.
    """
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        outputs = compute()
    return outputs, graph.replay


@dataclass
class _Recording:
    staged: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: Sequence[Tensor]
    replay: Callable[[], None]

    def run(self, inputs: Mapping[str, Tensor]) -> Sequence[Tensor]:
        for name, buffer in self.inputs.items():
            # From pinned memory the copy does not wait; the last step's have ended, since its token was read.
            self.staged[name].copy_(inputs[name])
            buffer.copy_(self.staged[name], non_blocking=True)
        self.replay()
        return self.outputs


class RecordedSteps:
    """Runs steps, replaying those that were recorded.

    The first step of a kind runs as it is (that compiles the kernels), the second is recorded. One that cannot be
    recorded is the last that is tried.

    Args:
        device: Where steps run.
        record: How; default as a CUDA graph.

    Attributes:
        refusal: Why nothing is recorded any more, or None.
    """

    def __init__(self, device: torch.device, record: Record = record_cuda_graph) -> None:
        self.refusal: str | None = None
        self._device, self._record = device, record
        self._recordings: OrderedDict[Hashable, _Recording | None] = OrderedDict()

    def run(self, key: Hashable, inputs: Mapping[str, Tensor], compute: Compute) -> Sequence[Tensor]:
        """Run a step.

        Args:
            key: What it has in common with those that may replay its recording, but for the inputs' sizes.
            inputs: On the CPU.
            compute: The step. It may change states, and nothing else.

        Returns:
            Outputs, valid until the next step.
        """
        key = (key, *((name, value.shape, value.dtype) for name, value in inputs.items()))
        recording = None
        if key in self._recordings:
            self._recordings.move_to_end(key)
            recording = self._recordings[key] or self._recorded(key, inputs, compute)
        elif self.refusal is None:
            self._recordings[key] = None
            self._forget_the_oldest()
        if recording is None:
            return compute({name: value.to(self._device) for name, value in inputs.items()})
        return recording.run(inputs)

    def _recorded(self, key: Hashable, inputs: Mapping[str, Tensor], compute: Compute) -> _Recording | None:
        pinned = self._device.type == "cuda"
        buffers = {name: value.to(self._device, copy=True) for name, value in inputs.items()}
        try:
            outputs, replay = self._record(lambda: compute(buffers))
        except RuntimeError as error:
            self.refusal = str(error).splitlines()[0]
            self._recordings.clear()
            return None
        staged = {name: torch.empty_like(value, pin_memory=pinned) for name, value in inputs.items()}
        recording = self._recordings[key] = _Recording(staged, buffers, outputs, replay)
        return recording

    def _forget_the_oldest(self) -> None:
        while len(self._recordings) > MOST_RECORDINGS:
            self._recordings.popitem(last=False)
