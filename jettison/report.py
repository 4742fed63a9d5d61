"""The report of an optimisation: what each pass did, and what it saved."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from jettison.ir.program import MissRecord, PassRecord


@dataclass
class Report:
    """What happened to a model.

    Attributes:
        model: Class name of the model.
        source: Where it came from, a folder name or `module`.
        pipeline: Canonical text of the passes.
        target: `onnx` or `torch`.
        passes: One record per pass of the pipeline.
        raised: Misses of the raising passes that always run: what was not recognised, and why.
        source_bytes: Bytes of the weights as the model stores them.
        weight_bytes: Bytes of the weights as the artifact stores them; tables and padding beside them are not counted.
        state_bytes: Bytes of the states of one sequence at the model's context.
        context: Most positions of a sequence.
        seconds: Wall time of capture and of the passes.
        prefill: `exact` or `fast`; see `optimize`.
        prefill_bytes: Bytes of the 8-bit copy that the fast form reads, beside `weight_bytes`.
        prefill_kl: KL(captured || artifact) in nats per token of prompts that run through the fast form; None without
            a check, or where this CPU does not run it.
        calibration: Where the tokens that passes were calibrated on came from; None if none was.
    """

    model: str
    source: str
    pipeline: str
    target: str
    passes: list[PassRecord] = field(default_factory=list)
    raised: list[MissRecord] = field(default_factory=list)
    source_bytes: int = 0
    weight_bytes: int = 0
    state_bytes: int = 0
    context: int = 0
    seconds: float = 0.0
    prefill: str = "exact"
    prefill_bytes: int = 0
    prefill_kl: float | None = None
    calibration: dict[str, Any] | None = None

    def as_dict(self) -> dict[str, Any]:
        """The report as JSON-ready values; the keys are stable."""
        return {
            "model": self.model,
            "source": self.source,
            "pipeline": self.pipeline,
            "target": self.target,
            "passes": [record.as_dict() for record in self.passes],
            "not_recognised": [{"node": miss.node, "reason": miss.reason} for miss in self.raised],
            "source_bytes": self.source_bytes,
            "weight_bytes": self.weight_bytes,
            "state_bytes": self.state_bytes,
            "context": self.context,
            "seconds": round(self.seconds, 3),
            "prefill": self.prefill,
            "prefill_bytes": self.prefill_bytes,
            "prefill_kl": self.prefill_kl,
            "calibration": self.calibration,
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Report:
        """The inverse of `as_dict`."""
        passes = [
            PassRecord(**{**record, "misses": [MissRecord(**miss) for miss in record["misses"]]})
            for record in values["passes"]
        ]
        raised = [MissRecord(**miss) for miss in values["not_recognised"]]
        plain = {key: values[key] for key in values if key not in ("passes", "not_recognised")}
        return cls(passes=passes, raised=raised, **plain)

    def table(self) -> Table:
        """Passes as a table."""
        table = Table(title=Text(f"{self.model} -> {self.target}: {self.pipeline}"), title_justify="left")
        table.add_column("pass")
        for column in ("rewrites", "misses", "seconds", "weight bytes before", "after", "KL (nats/token)"):
            table.add_column(column, justify="right")
        for record in self.passes:
            table.add_row(
                record.name, str(record.rewrites), str(len(record.misses)), f"{record.seconds:.2f}",
                f"{record.bytes_before:,}", f"{record.bytes_after:,}",
                "-" if record.kl is None else f"{record.kl:.2e}",
            )  # fmt: skip
        return table

    def __str__(self) -> str:
        lines = io.StringIO()
        console = Console(file=lines, width=120, color_system=None)
        console.print(self.table())
        console.print(
            f"weights {self.source_bytes:,} -> {self.weight_bytes:,} bytes; states of one sequence of {self.context} "
            f"tokens {self.state_bytes:,} bytes; {self.seconds:.1f} s"
        )
        if self.prefill == "fast":
            cost = (
                "rounds activations, which --check measures"
                if self.prefill_kl is None
                else f"its prompts are {self.prefill_kl:.2e} nats per token from the captured model"
            )
            console.print(f"prefill=fast reads an 8-bit copy of the weights, {self.prefill_bytes:,} bytes more; {cost}")
        if self.calibration is not None:
            origin = self.calibration.get("text") or f"written by the model (seed {self.calibration['seed']})"
            size = f"{self.calibration['windows']} windows of {self.calibration['length']} tokens"
            console.print(f"calibrated on {size}, {origin}", markup=False, highlight=False)
        for record in self.passes:
            if record.plan is not None:
                console.print(
                    f"{record.name}: predicted {record.predicted_kl:.2e} nats per token, measured "
                    f"{record.measured_kl:.2e} on the calibration text",
                    highlight=False,
                )
            for layer, figures in record.layers.items():
                told = ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in figures.items())
                console.print(f"{record.name}: {layer}: {told}", markup=False, highlight=False)
            for note in record.notes:
                console.print(f"{record.name}: {note}", markup=False, highlight=False)
            for miss in record.misses:
                console.print(
                    f"{record.name} did not fire at {miss.node}: {miss.reason}", markup=False, highlight=False
                )
        for miss in self.raised:
            console.print(f"not recognised: {miss.node}: {miss.reason}", markup=False, highlight=False)
        return lines.getvalue()
