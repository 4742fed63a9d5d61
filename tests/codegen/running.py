"""What the tests of the ONNX emitter share: programs with a cache, their ONNX files, and a run of both side by side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from jettison.codegen.onnx.emit import EmittedGraph, emit_program
from jettison.ir.compare import assert_close
from jettison.ir.interpret import run_entry
from jettison.ir.program import Program, state_placeholders
from jettison.passes.base import Pass
from jettison.passes.cache_kv import CacheKV
from jettison.passes.pipeline import apply, prepare
from jettison.passes.policies import Policy
from jettison.runtime.executor import allocate_states
from jettison.runtime.onnx_executor import OnnxExecutor, OnnxGraph
from jettison.source import open_source

# Of the largest logit; both sides compute in fp32, in another order.
TOLERANCE = 1e-4
REASON = "fp32 in another order of operations"


def cached_program(model: Any, policy: Policy | None = None, *passes: Pass, context: int | None = None) -> Program:
    """Capture a model, apply passes, and for a decoder give it a cache."""
    program = open_source(model, context=context).program
    prepare(program)
    apply(program, [*passes, *([] if policy is None else [CacheKV(policy)])])
    return program


@dataclass
class Emitted:
    """A program and what was emitted from it."""

    program: Program
    graphs: list[EmittedGraph]
    executor: OnnxExecutor

    @property
    def folder(self) -> Path:
        return self.graphs[0].path.parent

    @property
    def model(self) -> onnx.ModelProto:
        """The first file, without its weights."""
        return onnx.load(str(self.graphs[0].path), load_external_data=False)

    def operators(self) -> Counter[str]:
        """How often each operator occurs in the first file; those of ONNX Runtime carry their domain."""
        return Counter(f"{node.domain}::{node.op_type}".removeprefix("::") for node in self.model.graph.node)

    def nodes(self, operator: str) -> list[onnx.NodeProto]:
        return [node for node in self.model.graph.node if node.op_type == operator]


def emit(program: Program, folder: Path, *, accuracy_level: int = 0) -> Emitted:
    """Emit a program into a folder, and open it on one thread that does not spin."""
    folder.mkdir(parents=True, exist_ok=True)
    graphs = emit_program(program, folder, accuracy_level=accuracy_level)
    return Emitted(program, graphs, open_graphs(program, graphs))


def open_graphs(program: Program, graphs: Sequence[EmittedGraph], **settings: Any) -> OnnxExecutor:
    described = [
        OnnxGraph(
            graph.path,
            graph.entries,
            tuple(name for name in graph.inputs if name not in graph.states),
            tuple(name for name in graph.outputs if name not in {new for _, new in graph.states.values()}),
            graph.states,
        )
        for graph in graphs
    ]
    moved = {"retentions": [*program.retentions.values()], "storages": [*program.storages.values()]}
    settings = {"threads": 1, "allow_spinning": False, **moved, **settings}
    return OnnxExecutor(described, program.info, program.states, 0, **settings)


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}


class SideBySide:
    """The same calls on a program and on its ONNX file, each with states of its own.

    Args:
        emitted: Both.
        rows: Batch.
        capacity: Slots.
    """

    def __init__(self, emitted: Emitted, rows: int, capacity: int) -> None:
        self.emitted = emitted
        self.lengths = torch.zeros(rows, dtype=torch.int64)
        self.expected_states = allocate_states(emitted.program.states, rows, capacity)
        self.states = allocate_states(emitted.program.states, rows, capacity)
        self._generator = torch.Generator().manual_seed(rows)

    def append(self, lengths: Sequence[int], entry: str = "prefill") -> tuple[Tensor, Tensor]:
        """Append random tokens, `lengths` many to each row (rows shorter than the longest are padded behind).

        Returns:
            Logits of the program and of the ONNX file at every position, `[B, S, V]`.
        """
        rows, steps = len(lengths), max(lengths)
        vocab_size = self.emitted.program.info.vocab_size
        columns = torch.arange(steps)[None].repeat(rows, 1)
        positions = self.lengths[:, None] + columns
        self.lengths = self.lengths + torch.tensor(lengths)
        total = int(self.lengths.max())
        inputs = {
            "input_ids": torch.randint(0, vocab_size, (rows, steps), generator=self._generator),
            "position_ids": positions,
            "attention_mask": (torch.arange(total)[None] < self.lengths[:, None]).long(),
            "logits_positions": columns,
        }
        program, executor = self.emitted.program, self.emitted.executor
        returned = run_entry(program, entry, {**inputs, **self.expected_states})
        names = state_placeholders(program.entries[entry])
        self.expected_states = dict(zip(names, returned[1:], strict=True))
        return returned[0], executor.run(entry, inputs, self.states)["logits"]

    def check(self, lengths: Sequence[int], entry: str = "prefill", tolerance: float = TOLERANCE) -> None:
        """`append`, and compare the logits of real tokens."""
        expected, actual = self.append(lengths, entry)
        for row, length in enumerate(lengths):
            what = f"row {row} of {entry} up to {self.lengths.tolist()}"
            assert_close(actual[row, :length], expected[row, :length], tolerance=tolerance, reason=REASON, what=what)

    def check_steps(self, steps: int, tolerance: float = TOLERANCE) -> None:
        """Decode so many tokens, comparing each."""
        for _ in range(steps):
            self.check([1] * len(self.lengths), "decode", tolerance)
