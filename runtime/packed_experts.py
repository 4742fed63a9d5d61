"""Quantised stacks of routed experts in the layouts of PyTorch's CPU kernels; see `packed_linear`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, fx

from jettison.ir import ops
from jettison.ir.constants import Constant
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.ops.experts import sum_over_experts
from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.ir.program import Program, constant_placeholders
from jettison.runtime.packed_linear import PackedWeight, pack_weight

_PARTS = ("codes", "scales", "zeros")


@dataclass(frozen=True)
class ExpertParts:
    """The stacks of quantised experts by the names of their constants.

    Attributes:
        gate_up: Names of codes, scales and zeros (or None).
        down: The same.
        layout: Bits and group of gate_up, then of down.
    """

    gate_up: tuple[str | None, ...]
    down: tuple[str | None, ...]
    layout: tuple[int, int, int, int]

    @property
    def name(self) -> str:
        """The name that stands for them: that of the first codes."""
        return str(self.gate_up[0])

    @property
    def names(self) -> tuple[str, ...]:
        """All their constants."""
        return tuple(name for name in (*self.gate_up, *self.down) if name is not None)


def experts_read(node: fx.Node) -> ExpertParts | None:
    """The stacks that quantised experts read; None for any other node, and where one is computed."""
    if not is_call(node, ops.quantized_experts):
        return None
    read = arguments(node)
    stacks = [[read[f"{stack}_{part}"] for part in _PARTS] for stack in ("gate_up", "down")]
    if any(operand is not None and constant_name(operand) is None for stack in stacks for operand in stack):
        return None
    gate_up, down = (tuple(constant_name(operand) for operand in stack) for stack in stacks)
    layout = (read["gate_up_bits"], read["gate_up_group"], read["down_bits"], read["down_group"])
    return ExpertParts(gate_up, down, layout)


def packable_experts(program: Program) -> list[ExpertParts]:
    """Stacks that experts read in packed form and that no operator reads otherwise, each once.

    Args:
        program: Its metadata are not needed.
    """
    readers: dict[str, set[ExpertParts | None]] = {}
    for entry in program.entries.values():
        for name, placeholder in constant_placeholders(entry).items():
            readers.setdefault(name, set()).update(experts_read(user) for user in placeholder.users)
    found = {parts for read in readers.values() for parts in read if parts is not None}
    alone = [parts for parts in found if all(readers[name] == {parts} for name in parts.names)]
    return sorted(alone, key=lambda parts: parts.name)


class PackedExperts:
    """Two matrices per expert, each as its kernel reads it; one expert of 30 B parameters is 3 MB at 4 bits.

    Args:
        gate_up: `[2 * F, E]` of each expert.
        down: `[E, F]` of each expert.
    """

    def __init__(self, gate_up: list[PackedWeight], down: list[PackedWeight]) -> None:
        self._gate_up, self._down = gate_up, down
        self.nbytes = sum(weight.nbytes for weight in (*gate_up, *down))

    def run(self, x: Tensor, indices: Tensor, weights: Tensor, activation: str) -> Tensor:
        """`jettison::quantized_experts`, up to the rounding of `PackedWeight.linear`.

        Args:
            x: `[T, E]`.
            indices: `[T, k] i64`.
            weights: `[T, k]`.
            activation: A key of `ACTIVATIONS`.

        Returns:
            `[T, E]`.
        """
        activate = ACTIVATIONS[activation]

        def expert(number: int, rows: Tensor) -> Tensor:
            gate, up = self._gate_up[number].linear(rows, None).chunk(2, dim=-1)
            return self._down[number].linear(activate(gate) * up, None)

        return sum_over_experts(x, indices, weights, expert)


def run_experts(experts: PackedExperts, x: Tensor, indices: Tensor, weights: Tensor, activation: str) -> Tensor:
    """See `PackedExperts.run`."""
    return experts.run(x, indices, weights, activation)


def pack_experts(program: Program, parts: ExpertParts) -> PackedExperts | None:
    """Copy the stacks of an operator into the layout of their kernels, an expert at a time.

    Args:
        program: Holds the constants.
        parts: Their names.

    Returns:
        The experts, or None if no kernel of this build of PyTorch on this processor reads them.
    """
    width = program.constants[str(parts.down[0])].shape[1]
    inner = program.constants[str(parts.gate_up[0])].shape[1] // 2
    packed: list[list[PackedWeight]] = []
    for names, (bits, group), columns in (
        (parts.gate_up, parts.layout[:2], width),
        (parts.down, parts.layout[2:], inner),
    ):
        stacks = [None if name is None else program.constants[name] for name in names]
        matrices: list[PackedWeight] = []
        for number in range(program.constants[str(names[0])].shape[0]):
            codes, scales, zeros = (None if stack is None else _matrix(stack, number) for stack in stacks)
            assert codes is not None, "every packed weight has codes"
            assert scales is not None, "every packed weight has scales"
            weight = pack_weight(codes, scales, zeros, bits, group, columns, is_table=False)
            if weight is None:
                return None
            matrices.append(weight)
        packed.append(matrices)
    return PackedExperts(*packed)


def _matrix(stack: Constant, number: int) -> Tensor:
    return stack.rows(number, number + 1)[0]
