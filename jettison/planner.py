"""What a model would take and how fast it would be on this machine, with as little of it in memory as must be."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jettison.api import TARGETS, parse_passes, pipeline_text, with_cache
from jettison.artifact_files import PROGRAM_FILE, WEIGHTS_FILE
from jettison.calibration import LENGTH, WINDOWS, Calibration
from jettison.ir.cost import CallCost, Workload, call_costs, phases
from jettison.ir.errors import OptionError, UnsupportedError
from jettison.ir.placement import Placement
from jettison.ir.program import Program
from jettison.ir.roofline import Rates, predict, streamed_bytes
from jettison.ir.serialize import load_program
from jettison.passes.pipeline import apply, prepare
from jettison.passes.place_weights import PlaceWeights, host_room
from jettison.passes.placement.latency import Room
from jettison.passes.placement.memory import needs_of, step_of
from jettison.passes.placement.throughput import best_block, block_text
from jettison.passes.placement.units import find_units
from jettison.runtime.artifact import MANIFEST_NAME, Artifact
from jettison.runtime.machine import gpu_rates, machine_rates
from jettison.source import open_source


@dataclass(frozen=True)
class Wanted:
    """What a plan is for.

    Attributes:
        device: Most bytes of the GPU's memory, or of main memory for the targets that compute there; None for no limit.
        host: Most bytes of main memory; None for no limit.
        disk: Most bytes of streamed weights on disk; None for no limit.
        context: Tokens of a sequence; None for the model's context.
        prompt: Tokens that come at once.
        batch: Sequences at once.
        objective: `latency`, or `throughput` to plan a block of batches, too.
    """

    device: int | None = None
    host: int | None = None
    disk: int | None = None
    context: int | None = None
    prompt: int = 512
    batch: int = 1
    objective: str = "latency"

    def placing(self, target: str, rates: Rates) -> PlaceWeights | None:
        """The pass that carries a plan out; None where nothing is limited."""
        if target == "triton":
            device, host = self.device, self.host
        else:
            # Products are computed in main memory: it is both.
            given = [limit for limit in (self.device, self.host) if limit is not None]
            device, host = None, min(given, default=None)
        if (device if target == "triton" else host) is None:
            return None
        return PlaceWeights(
            device=device, host=host, disk=self.disk, context=self.context, prompt=self.prompt, batch=self.batch,
            reserve=rates.process_bytes,
        )  # fmt: skip


def open_program(
    model: str | Path, passes: str, target: str | None, dtype: str, calibration: str | Path | None = None
) -> tuple[Program, str]:
    """The program that would run, and its target.

    Args:
        model: A Hugging Face folder or an artifact.
        passes: Text of a pipeline, for a model.
        target: See `optimize`; None for that of the artifact, or `torch`.
        dtype: What the graph computes in, for a model.
        calibration: A text file for passes that are calibrated.

    Raises:
        OptionError: The settings do not fit each other.
        UnsupportedError: An artifact whose graphs are ONNX files: what they cost is not in them.
    """
    if target is not None and target not in TARGETS:
        raise OptionError(f"[plan] target={target!r}: needed one of {', '.join(TARGETS)}.")
    if (Path(model) / MANIFEST_NAME).is_file():
        artifact = Artifact.open(model)
        own = str(artifact.manifest["target"])
        if passes or target not in (None, own):
            raise OptionError(
                f"[plan] {model}: an artifact has its passes and its target ({own}) already. Leave --passes and "
                "--target out, or plan the model that it was made from."
            )
        if own == "onnx":
            raise UnsupportedError(
                f"[plan] {model}: the graphs of an ONNX artifact hold no program to plan. Plan the model that it was "
                f"made from, with --passes '{artifact.manifest['pipeline']}' --target onnx."
            )
        return load_program(artifact.path(PROGRAM_FILE), artifact.path(WEIGHTS_FILE)), own
    chosen = parse_passes(passes)
    if any(isinstance(pass_, PlaceWeights) for pass_ in chosen):
        raise OptionError(
            "[plan] --passes: found place-weights, which a plan writes itself. Leave it out, and say the memory with "
            "--host-memory and --device-memory."
        )
    source = open_source(model, dtype=dtype)
    program = source.program
    program.target = target or "torch"
    prepare(program)
    Calibration.of(source, calibration, (WINDOWS, LENGTH), 0)
    program.history.clear()
    chosen = with_cache(chosen, program)
    apply(program, chosen)
    program.pipeline = pipeline_text(chosen)
    return program, program.target


def plan(program: Program, target: str, wanted: Wanted, rates: Rates | None = None, **measuring: Any) -> dict[str, Any]:
    """Place weights and predict.

    Args:
        program: As it would run. Gets the placement, where memory is limited; one that it has counts where it is not.
        target: What would run it.
        wanted: What for.
        rates: Of the machine; None to measure it.
        measuring: See `machine_rates`.

    Returns:
        `fits`; `bound_by`, what most of a decode step waits for (of an encoder, of a forward pass);
        `predicted_ms_per_token`, of that step, shared among the rows; `placement`, with the tensors and bytes on each
        tier, the bytes of buffers and the text of the `pass`; `memory`, bytes by what they are for, and the limit;
        `phases`, a table of bytes, operations and times of each; `rates` and whether they were measured; and what was
        asked for.

    Raises:
        OptionError: It does not fit, or a size is out of range.
    """
    is_measured = True
    if rates is None:
        rates = machine_rates(**measuring)
        if target == "triton":
            rates, is_measured = gpu_rates(rates)
    if wanted.context is not None and wanted.context > program.info.context:
        raise OptionError(
            f"[plan] context={wanted.context}: needs at most {program.info.context}, the positions that "
            f"{program.info.name} has."
        )
    placing = wanted.placing(target, rates)
    program.target = target
    notes: list[str] = []
    if placing is not None:
        record = placing.run(program)
        notes = [*record.notes, *(f"{miss.node} stays: {miss.reason}" for miss in record.misses)]
    work = (placing or PlaceWeights(context=wanted.context, prompt=wanted.prompt, batch=wanted.batch)).workload(program)
    tables = [
        _phase(phase, call_costs(program, phase, work), rates, program.placement, work) for phase in phases(program)
    ]
    document = {
        "fits": True,
        "bound_by": tables[-1]["bound_by"],
        "predicted_ms_per_token": tables[-1]["ms_per_token"],
        "placement": _placement(program, work, placing),
        "memory": _memory(program, work, rates, placing),
        "phases": tables,
        "target": target,
        "pipeline": program.pipeline,
        "batch": work.batch,
        "context": work.context,
        "prompt": work.prompt,
        "rates": {**rates.as_dict(), "is_measured": is_measured},
        "notes": notes,
    }
    if wanted.objective == "throughput" and "decode" in program.entries:
        document["throughput"] = _throughput(program, target, work, rates, wanted)
    return document


def _phase(
    phase: str, calls: Sequence[CallCost], rates: Rates, placement: Placement | None, work: Workload
) -> dict[str, Any]:
    time = predict(calls, rates, placement)
    # Rows of a batch share a step.
    tokens = sum(call.tokens for call in calls)
    tiers = [streamed_bytes(call, placement) for call in calls]
    return {
        "phase": phase,
        "tokens": tokens,
        "weight_bytes_pinned": sum(each["device"] for each in tiers),
        "weight_bytes_streamed": sum(each["host"] + each["disk"] for each in tiers),
        "state_bytes_read": sum(call.state_read for call in calls),
        "state_bytes_written": sum(call.state_written for call in calls),
        "activation_bytes": sum(node.activation_bytes for call in calls for node in call.nodes),
        "operations": sum(call.operations for call in calls),
        "ms": 1e3 * time.seconds,
        "ms_per_token": 1e3 * time.seconds / tokens,
        "ms_computing": 1e3 * time.compute,
        "ms_reading_disk": 1e3 * time.disk,
        "ms_copying": 1e3 * time.copy,
        "ms_by_kind": {kind: 1e3 * seconds for kind, seconds in time.kinds.items()},
        "bound_by": time.bound_by,
    }


def _placement(program: Program, work: Workload, placing: PlaceWeights | None) -> dict[str, Any]:
    units, _ = find_units(program, step_of(program, work))
    placement = program.placement or Placement()
    used = program.used_constants()
    named = {name for unit in units for name in unit.constants}
    tiers: dict[str, dict[str, int]] = {}
    for tier, key in (("device", "pinned"), ("host", "host"), ("disk", "disk")):
        there = [unit for unit in units if placement.of(unit.constants[0]) == tier]
        fixed = [name for name in used if name not in named and tier == "device"]
        tiers[key] = {
            "tensors": sum(len(unit.constants) for unit in there) + len(fixed),
            "bytes": sum(used[name].nbytes for name in [*(n for unit in there for n in unit.constants), *fixed]),
        }
    text = pipeline_text([placing]) if placing is not None and placement.tiers else None
    return {**tiers, "ring_bytes": placement.ring_bytes, "pass": text}


def _memory(program: Program, work: Workload, rates: Rates, placing: PlaceWeights | None) -> dict[str, int | None]:
    units, _ = find_units(program, step_of(program, work))
    placement = program.placement or Placement()
    needs = needs_of(program, work, units, _process_bytes(program, rates))
    pinned = sum(unit.memory_bytes for unit in units if placement.of(unit.constants[0]) == "device")
    kinds = {
        "process": needs.process, "weights": needs.weights + pinned, "buffers": placement.ring_bytes,
        "states": needs.states, "activations": needs.activations,
    }  # fmt: skip
    limit = None if placing is None else placing.device or placing.host
    return {**kinds, "total": sum(kinds.values()), "limit": limit}


def _process_bytes(program: Program, rates: Rates) -> int:
    return PlaceWeights(reserve=rates.process_bytes).process_bytes(program)


def _throughput(program: Program, target: str, work: Workload, rates: Rates, wanted: Wanted) -> dict[str, Any] | None:
    units, _ = find_units(program, step_of(program, work))
    needs = needs_of(program, work, units, _process_bytes(program, rates))
    placing = wanted.placing(target, rates)
    everything = 1 << 50
    if placing is None:
        room = Room(everything, None if target == "triton" else 0, wanted.disk)
    else:
        host = host_room(wanted.host) if target == "triton" else 0
        room = Room(placing.device or placing.host or everything, host, wanted.disk)
    best = best_block(program, work, units, needs, room, rates)
    if best is None:
        return None
    return {
        "rows": best.block.rows, "batches": best.block.batches, "tokens_per_second": best.tokens_per_second,
        "weights": best.weights, "states": best.states, "hidden": best.hidden, "text": block_text(best),
    }  # fmt: skip


def folder_of(model: str | Path) -> Path:
    """The folder whose disk streamed weights would be read from: that of an artifact, else of temporary files."""
    return Path(model) if (Path(model) / MANIFEST_NAME).is_file() else Path(tempfile.gettempdir())
