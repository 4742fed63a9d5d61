"""Runs a program with PyTorch: the graph as generated Python code, states updated in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, fx, nn

from jettison.ir import ops
from jettison.ir.errors import OptionError
from jettison.ir.match import is_call
from jettison.ir.ops.write_slots import write_slots_
from jettison.ir.program import Program, input_placeholders, placeholders, state_placeholders
from jettison.runtime.executor import EntrySignature


class TorchExecutor:
    """See `Executor`. Weights are held once, in the dtype the graph computes in.

    Args:
        program: What to run; its metadata are not needed.
    """

    def __init__(self, program: Program) -> None:
        self.info = program.info
        self.states = dict(program.states)
        self._values: dict[str, Tensor] = {}
        self._calls: dict[str, Callable[..., tuple[Tensor, ...]]] = {}
        self._constants: dict[str, list[Tensor]] = {}
        self.entries: dict[str, EntrySignature] = {}
        for name, entry in program.entries.items():
            taken = [node.meta["constant"] for node in placeholders(entry) if "constant" in node.meta]
            for constant in taken:
                if constant not in self._values:
                    self._values[constant] = program.constants[constant].value()
            self._constants[name] = [self._values[constant] for constant in taken]
            self._calls[name] = _in_place(entry)
            self.entries[name] = EntrySignature(
                tuple(input_placeholders(entry)), tuple(state_placeholders(entry)), program.outputs
            )
        self.weight_bytes = sum(value.numel() * value.element_size() for value in self._values.values())

    def run(self, entry: str, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Executor.run`."""
        signature = self.entries.get(entry)
        if signature is None:
            raise OptionError(f"[torch] no entry {entry!r}: this program has {', '.join(self.entries)}.")
        given = [states[name] for name in signature.states] + [inputs[name] for name in signature.inputs]
        with torch.inference_mode():
            returned = self._calls[entry](*self._constants[entry], *given)
            for name, new in zip(signature.states, returned[len(signature.outputs) :], strict=True):
                if new.data_ptr() != states[name].data_ptr():
                    states[name].copy_(new)
        return dict(zip(signature.outputs, returned, strict=False))


def _in_place(entry: fx.GraphModule) -> Callable[..., tuple[Tensor, ...]]:
    """Generated code of a graph in which slot writes go into the state itself."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in entry.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda old: mapping[old])
        # Safe only where the old value of the state has no other reader.
        if is_call(node, ops.write_slots) and "state" in node.args[0].meta and len(node.args[0].users) == 1:
            mapping[node].target = write_slots_
    return fx.GraphModule(nn.Module(), graph)
