"""Say which weights stay in memory and which are read from a slower tier each time they are multiplied.

Before:
    constant @up.weight: f32[72,40]
    constant @down.weight: f32[40,72]
    %1: f32[s0,s1,72] = aten.linear(%0, @up.weight, @up.bias)
    %2: f32[s0,s1,40] = aten.linear(%1, @down.weight)
After:
    stream @down.weight: disk
    the entries as before

Fires when: not everything fits the memory that the options name: `host` for the targets that compute on the processor,
    `device` for a GPU, whose weights wait in `host` as far as that goes, and on disk. The weights that save most bytes
    of a decode step are pinned; the rest passes through a ring of buffers (`Program.placement`, see `ir/placement.py`).
Declines when: a weight is read by anything but linears and embeddings (for a GPU: but linears), or no kernel holds its
    format: it is pinned.
Numerics: exact.
Saves: memory: all bytes of what is streamed but those of the ring. Costs their bytes over the bandwidth of the tier,
    for each token, unless computing takes longer.
Method: an integer program over kinds of weights (`placement/latency.py`). Taken first: the process (`reserve`, which
    `jettison plan` measures), states for `context` tokens and `batch` rows, activations at their peak, constants that
    cannot be streamed, and the ring.
Source: FlexGen (arXiv 2303.06865) for placement by a solver; TPI-LLM (arXiv 2410.00531) and AirLLM stream everything.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, NoReturn

from jettison.ir.cost import Workload
from jettison.ir.errors import OptionError
from jettison.ir.placement import READ_AHEAD_BYTES, Placement
from jettison.ir.program import MissRecord, PassRecord, Program
from jettison.ir.roofline import TYPICAL_CPU, TYPICAL_GPU
from jettison.passes.base import Pass
from jettison.passes.options import option
from jettison.passes.placement.latency import Chosen, DoesNotFitError, Room, place
from jettison.passes.placement.memory import Needs, needs_of, step_of
from jettison.passes.placement.throughput import block_note
from jettison.passes.placement.units import Unit, find_units, has_gpu

# Of ONNX Runtime beside that: its library, and a session for each segment (benchmarks/results/offload_onnx.json).
_ONNX_RUNTIME_BYTES = 80 << 20
_SIZES = ("device", "host", "disk", "reserve")


@dataclass(frozen=True)
class PlaceWeights(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "place-weights"
    device: int | None = option(None, doc="most bytes of the GPU's memory (triton)", unit="bytes")
    host: int | None = option(None, doc="most bytes of main memory, the process included", unit="bytes")
    disk: int | None = option(None, doc="most bytes of streamed weights on disk; none for no limit", unit="bytes")
    context: int | None = option(None, doc="tokens of a sequence that must fit; none for the model's context")
    prompt: int = option(512, doc="tokens of a prompt, at most the context", range="at least 1")
    batch: int = option(1, doc="sequences at once", range="at least 1")
    objective: Literal["latency", "throughput"] = option(
        "latency", doc="throughput also says which block of batches would be fastest; blocks are not executed yet"
    )
    reserve: int | None = option(None, doc="bytes of a process without a model; none for a usual size", unit="bytes")

    def __post_init__(self) -> None:
        for field in _SIZES:
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value <= 0):
                raise OptionError(f"[place-weights] {field}={value!r}: needs bytes above 0, such as 2GiB.")
        for field in ("context", "prompt", "batch"):
            value = getattr(self, field)
            if value is not None and (type(value) is not int or value < 1):
                raise OptionError(f"[place-weights] {field}={value!r}: needs at least 1.")

    def requires(self, program: Program) -> None:
        """The memory of the target, and entries as they will run."""
        if program.info.kind == "decoder" and "decode" not in program.entries:
            raise OptionError(
                "[place-weights] before cache-kv: needs the decode step, whose reads it saves, and the size of its "
                "states. Put place-weights last."
            )
        if has_gpu(program):
            if self.device is None:
                raise OptionError("[place-weights] target triton: needs device=BYTES, the GPU's memory. Add it.")
        elif self.device is not None or self.host is None:
            found = "no host" if self.host is None else f"device={self.device:,}"
            raise OptionError(
                f"[place-weights] target {program.target or 'torch'}: found {found}; needed host=BYTES alone, because "
                "products are computed in main memory. Write place-weights{host=2GiB}, for example."
            )
        if self.context is not None and self.context > program.info.context:
            raise OptionError(
                f"[place-weights] context={self.context}: needs at most {program.info.context}, the positions that "
                f"{program.info.name} has."
            )

    def workload(self, program: Program) -> Workload:
        """What must fit."""
        context = self.context or program.info.context
        return Workload(self.batch, context, min(self.prompt, context))

    def run(self, program: Program, *, strict: bool = False) -> PassRecord:
        """See `Pass`; the record also has what is where."""
        record = super().run(program, strict=strict)
        assert program.placement is not None, "transform sets it"
        units, _ = find_units(program, step_of(program, self.workload(program)))
        streamed = [unit for unit in units if unit.constants[0] in program.placement.tiers]
        record.layers = {
            unit.name: {"bytes": unit.memory_bytes, "bytes_per_step": unit.read_bytes} for unit in streamed
        }
        needs = needs_of(program, self.workload(program), units, self.process_bytes(program))
        record.notes = self._say(program, units, streamed, needs)
        return record

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        """Solve, and annotate."""
        work = self.workload(program)
        units, misses = find_units(program, step_of(program, work))
        needs = needs_of(program, work, units, self.process_bytes(program))
        try:
            chosen = place(units, needs, self._room(program))
        except DoesNotFitError as error:
            self._refuse(program, error, needs, units)
        before = {} if program.placement is None else program.placement.tiers
        program.placement = self._placement(program, units, chosen)
        after = program.placement.tiers
        return sum(before.get(name) != after.get(name) for name in {**before, **after}), misses

    def process_bytes(self, program: Program) -> int:
        """Of a process without a model."""
        usual = TYPICAL_GPU if has_gpu(program) else TYPICAL_CPU
        own = _ONNX_RUNTIME_BYTES if program.target == "onnx" else 0
        return own + (usual.process_bytes if self.reserve is None else self.reserve)

    def _room(self, program: Program) -> Room:
        if not has_gpu(program):
            assert self.host is not None, "required"
            return Room(self.host, 0, self.disk)
        assert self.device is not None, "required"
        return Room(self.device, host_room(self.host), self.disk)

    def _placement(self, program: Program, units: list[Unit], chosen: Chosen) -> Placement:
        tiers = {
            name: chosen.tiers[unit.name] for unit in units if unit.name in chosen.tiers for name in unit.constants
        }
        limits = {name: size for name in ("device", "host", "disk") if (size := getattr(self, name)) is not None}
        work = self.workload(program)
        return Placement(tiers, limits, chosen.ring_bytes, batch=work.batch, context=work.context, prompt=work.prompt)

    def _say(self, program: Program, units: list[Unit], streamed: list[Unit], needs: Needs) -> list[str]:
        placement = program.placement
        assert placement is not None, "just set"
        memory = "device" if has_gpu(program) else "host"
        pinned = [unit for unit in units if unit not in streamed]
        held = sum(unit.memory_bytes for unit in pinned)
        taken = held + needs.total + placement.ring_bytes
        notes = [
            f"{len(pinned)} weights ({held:,} bytes) are pinned; with process {needs.process:,}, states "
            f"{needs.states:,}, activations {needs.activations:,}, other weights {needs.weights:,} and buffers "
            f"{placement.ring_bytes:,} they take {taken:,} of {placement.limits[memory]:,} bytes."
        ]
        for tier in ("host", "disk"):
            there = [unit for unit in streamed if placement.of(unit.constants[0]) == tier]
            if there:
                notes.append(
                    f"{len(there)} weights ({sum(unit.memory_bytes for unit in there):,} bytes) are on the {tier}, and "
                    f"a step reads {sum(unit.read_bytes for unit in there):,} bytes of them."
                )
        if self.objective == "throughput":
            notes.append(block_note(program, self.workload(program), units, needs, self._room(program)))
        return notes

    def _refuse(self, program: Program, error: DoesNotFitError, needs: Needs, units: list[Unit]) -> NoReturn:
        if error.tier == "disk":
            # Weights go as wholes, and on a GPU they are large: gaps are left in the faster tiers.
            needed = error.needed + (max(unit.memory_bytes for unit in units) if has_gpu(program) else 0)
            raise OptionError(
                f"[place-weights] disk={self.disk:,}: weights that do not fit memory take {needed:,} bytes, "
                f"{needed - (self.disk or 0):,} more. Give disk={needed}, more memory, or put "
                "quantize-weights{bits=4} in front."
            ) from error
        field = "device" if has_gpu(program) else "host"
        limit = int(getattr(self, field))
        raise OptionError(
            f"[place-weights] {field}={limit:,}: {error.needed - limit:,} bytes are missing. At "
            f"least {error.needed:,} are taken: process {needs.process:,}, states {needs.states:,}, activations "
            f"{needs.activations:,}, weights that cannot be streamed {needs.weights:,}, buffers {error.ring_bytes:,}"
            f"{f', weights pinned for want of larger ones {error.held:,}' if error.held else ''}. "
            f"{' '.join(self._remedies(program, error, needs, units, field, limit))}"
        ) from error

    def _remedies(
        self, program: Program, error: DoesNotFitError, needs: Needs, units: list[Unit], field: str, limit: int
    ) -> list[str]:
        """What would make it fit, for each what it comes to."""
        remedies = [f"Give {field}={error.needed} at least."]
        work = self.workload(program)

        def fits(changed: Workload) -> bool:
            return needs_of(program, changed, units, needs.process).total + error.ring_bytes + error.held <= limit

        shorter = _largest(work.context, lambda n: fits(replace(work, context=n, prompt=min(work.prompt, n))))
        if shorter > work.context // 16:  # so few that nobody would take them
            remedies.append(f"Or take context={shorter}.")
        fewer = _largest(work.batch, lambda n: fits(replace(work, batch=n)))
        if fewer:
            remedies.append(f"Or take batch={fewer}.")
        if not program.storages and 2 * needs.states > limit - needs.process:
            remedies.append("Or store keys and values in few bits: cache-kv{policy=kivi{bits=2}}.")
        if not program.packed:
            remedies.append("Smaller buffers and weights: quantize-weights{bits=4} in front.")
        return remedies


def host_room(host: int | None) -> int | None:
    """Bytes of main memory for weights of a GPU, of `host` altogether; None for no limit.

    The process that drives the GPU lives there, and what comes from disk passes through.
    """
    return None if host is None else max(0, host - TYPICAL_CPU.process_bytes - READ_AHEAD_BYTES)


def _largest(below: int, holds: Callable[[int], bool]) -> int:
    """The largest number from 1 to `below` - 1 for which something holds that holds for smaller ones; 0 for none."""
    low, high = 0, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
