"""What a session takes beside the weights that can be streamed, so that what is left can be given to them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from jettison.ir.cost import CallCost, Workload, call_costs, phases, state_bytes
from jettison.ir.program import Program
from jettison.passes.placement.units import Unit

# Of the ring of buffers, where memory allows: enough for several readers to run ahead.
USUAL_RING_BYTES = 64 << 20
MOST_RING_BYTES = 256 << 20


@dataclass(frozen=True)
class Needs:
    """Bytes that are taken whatever is pinned, on the tier where products are computed.

    Attributes:
        process: Of the process itself.
        states: Of keys and values.
        activations: At their peak.
        weights: Of constants that cannot be streamed.
    """

    process: int
    states: int
    activations: int
    weights: int

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())


def needs_of(program: Program, work: Workload, units: Sequence[Unit], process_bytes: int) -> Needs:
    """What a session needs first.

    Args:
        program: With metadata.
        work: What is asked for.
        units: What can be streamed.
        process_bytes: Of a process that holds no model.
    """
    streamable = {name for unit in units for name in unit.constants}
    fixed = sum(each.nbytes for name, each in program.used_constants().items() if name not in streamable)
    return Needs(process_bytes, state_bytes(program, work), peak_activations(program, work), fixed)


def peak_activations(program: Program, work: Workload) -> int:
    """Of all calls of a session."""
    return max(call.peak_activation_bytes for phase in phases(program) for call in call_costs(program, phase, work))


def step_of(program: Program, work: Workload) -> CallCost:
    """The call that is repeated: a decode step, or a forward pass of an encoder."""
    return call_costs(program, phases(program)[-1], work)[-1]


def usual_ring(units: Sequence[Unit]) -> int:
    """Bytes of a ring that is worth having: of a small model no more than an eighth."""
    total = sum(unit.memory_bytes for unit in units if not unit.is_table)
    return min(USUAL_RING_BYTES, total // 8)
