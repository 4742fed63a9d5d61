"""Program to Triton: the steps of each entry, and the source of every kernel that they launch."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from jettison.codegen.triton.fuse import fuse
from jettison.codegen.triton.kernels.base import Kernel
from jettison.codegen.triton.kernels.top_k import TopK
from jettison.codegen.triton.source import comment, source_hash
from jettison.codegen.triton.steps import Step, TorchStep
from jettison.ir.program import Program, output_node
from jettison.ir.text import target_text, value_names

FOLDER = "kernels"
LOGITS = "logits"


@dataclass
class EmittedKernel:
    """A kernel, and what it is for.

    Attributes:
        kernel: What.
        uses: By entry, the nodes of each step that launches it, as the text of the program names them.
    """

    kernel: Kernel
    uses: dict[str, list[str]] = field(default_factory=dict)

    @property
    def file(self) -> str:
        """Where its source is in an artifact."""
        return f"{FOLDER}/{self.kernel.name}.py"

    def source(self) -> str:
        """The source, below a comment with the nodes that it implements."""
        lines = []
        for entry, uses in self.uses.items():
            lines += comment(f"{entry}: {uses[0]}")
            if len(uses) > 1:
                lines += comment(f"and so on, {len(uses)} times")
        return "\n".join(lines) + "\n" + self.kernel.source()


@dataclass
class EmittedProgram:
    """Everything that a runtime needs beside the weights.

    Attributes:
        steps: Of each entry.
        kernels: By name, in the order of their first use.
    """

    steps: dict[str, list[Step]]
    kernels: dict[str, EmittedKernel]

    def sources(self) -> dict[str, str]:
        """Text by file."""
        return {each.file: each.source() for each in self.kernels.values()}

    def hashes(self) -> dict[str, str]:
        """SHA-256 of each source, by file."""
        return {file: source_hash(text) for file, text in self.sources().items()}


def emit(program: Program) -> EmittedProgram:
    """Cut the entries of a program into steps and collect their kernels.

    Args:
        program: With metadata.
    """
    steps = {name: fuse(program, name) for name in program.entries}
    kernels: dict[str, EmittedKernel] = {}
    for entry, own in steps.items():
        names = value_names(program, entry)
        for step in own:
            for kernel in step.kernels():
                emitted = kernels.setdefault(kernel.name, EmittedKernel(kernel))
                emitted.uses.setdefault(entry, []).append(_nodes_text(step, names))
        if entry == "decode":
            kernels |= _best_token(program, names)
    return EmittedProgram(steps, kernels)


def _best_token(program: Program, names: dict[fx.Node, str]) -> dict[str, EmittedKernel]:
    """What a greedy step ends with, outside of the graph; of more tokens it is made when they are asked for."""
    outputs = program.outputs_of("decode")
    if LOGITS not in outputs:
        return {}
    logits = output_node(program.entries["decode"]).args[0][outputs.index(LOGITS)]
    value = logits.meta["val"]
    kernel = TopK(1, int(value.shape[-1]), value.dtype)
    return {kernel.name: EmittedKernel(kernel, {"decode": [f"the best token of {names[logits]}"]})}


def _nodes_text(step: Step, names: dict[fx.Node, str]) -> str:
    return ", ".join(f"{names[node]} = {target_text(node.target)}" for node in step.nodes)


def plan_text(program: Program, emitted: EmittedProgram) -> str:
    """What runs, step by step, for people: `graph/launches.txt`.

    Args:
        program: Whose.
        emitted: What `emit` made of it.
    """
    lines = []
    for entry, steps in emitted.steps.items():
        names = value_names(program, entry)
        launches = sum(not isinstance(step, TorchStep) for step in steps)
        lines.append(f"entry {entry}: {launches} steps with kernels, {len(steps) - launches} operators of PyTorch")
        lines += [_step_text(step, names) for step in steps]
    return "\n".join(lines) + "\n"


def _step_text(step: Step, names: dict[fx.Node, str]) -> str:
    outputs = ", ".join(names[node] for node in step.outputs)
    why = f"  # {step.reason}" if step.reason else ""
    if isinstance(step, TorchStep):
        return f"  {outputs}: torch {target_text(step.nodes[0].target)}{why}"
    kernels = " | ".join(kernel.name for kernel in step.kernels())
    return f"  {outputs}: {kernels} <- {_nodes_text(step, names)}{why}"


def fallbacks(emitted: EmittedProgram, entry: str) -> list[dict[str, object]]:
    """Operators of an entry that PyTorch runs, with how often and why.

    Args:
        emitted: What `emit` made of a program.
        entry: Of which entry.
    """
    counted: dict[tuple[str, str], int] = {}
    for step in emitted.steps[entry]:
        if isinstance(step, TorchStep):
            key = (target_text(step.nodes[0].target), step.reason)
            counted[key] = counted.get(key, 0) + 1
    return [{"operator": name, "count": count, "reason": reason or None} for (name, reason), count in counted.items()]
