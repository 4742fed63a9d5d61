"""Give each weight the format in which the bytes of a budget do least harm.

Before:
    %1: f32[s0,s1,72] = aten.linear(%0, @up.weight, @up.bias)
    %2: f32[s0,s1,40] = aten.linear(%1, @down.weight)
After:
    packed @up.weight: int2{group=32,symmetric=false}[72,40]
    packed @down.weight: int8{group=128,symmetric=false}[40,72]
    %1: f32[s0,s1,72] = jettison.quantized_linear(%0, @up.weight.codes, ..., @up.bias, 2, 32, 40)
    %2: f32[s0,s1,40] = jettison.quantized_linear(%1, @down.weight.codes, ..., None, 8, 128, 72)

Every weight that `quantize-weights` would take is priced in every format of the menu: its bytes, and its loss as
`sensitivity.py` measures it. The choice with the least sum of losses within the budget is found exactly (a
multiple-choice knapsack, as a mixed-integer linear program), and carried out by one `quantize-weights` per format,
which take the place of this pass in the pipeline: they can be read, edited and run again.

Fires when: as `quantize-weights`.
Declines when: as `quantize-weights`; a weight that it leaves alone counts in the budget as it is.
Numerics: changes precision. The report shows the KL that was predicted, the sum of the losses, beside the KL of the
    result on the same tokens.
Saves: the bytes of the program are at most the budget.
Source: HAWQ-V3 (arXiv 2011.10680) for the integer program; ZeroQ and CLADO for the losses, see `sensitivity.py`.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from jettison.ir.errors import OptionError
from jettison.ir.match import is_call
from jettison.ir.program import MissRecord, PassRecord, Program
from jettison.ir.progress import track
from jettison.passes.base import Pass, describe_node
from jettison.passes.formats import IntGroups, WeightFormat
from jettison.passes.grammar import format_pipeline
from jettison.passes.knapsack import cheapest, least_bytes
from jettison.passes.methods import RTN, Method
from jettison.passes.methods.sensitivity import Choice, Meter, Probe
from jettison.passes.options import option, to_spec
from jettison.passes.quantize_weights import QuantizeWeights, WeightRead
from jettison.passes.requirements import require_decoder_text

aten = torch.ops.aten


@dataclass(frozen=True)
class AllocateBits(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "allocate-bits"
    is_exact: ClassVar[bool] = False
    budget: int | None = option(
        None, doc="most bytes of all weights together; none for what int4{group=128} would take", unit="bytes"
    )
    formats: tuple[WeightFormat, ...] = option(
        (IntGroups(8, 128), IntGroups(4, 32), IntGroups(4, 128), IntGroups(2, 32)), doc="the menu"
    )
    metric: Literal["kl", "hessian"] = option("kl", doc="losses by weight, or shared out in each layer")
    method: Method = option(RTN(), doc="how weights are rounded", flat=True)
    skip: str | None = option(None, doc="regular expression; weights in whose name it is found stay as they are")

    def __post_init__(self) -> None:
        if self.budget is not None and (type(self.budget) is not int or self.budget <= 0):
            raise OptionError(f"[allocate-bits] budget={self.budget!r}: needs bytes above 0, such as 3MB.")
        if not self.formats:
            raise OptionError("[allocate-bits] formats=none: needs at least one, such as int{bits=4}+int{bits=8}.")
        self._everything()

    @property
    def needs_calibration(self) -> bool:
        """See `Pass`: losses are measured on text."""
        return True

    def unsupported_on(self, target: str) -> str | None:
        """See `Pass`: every format of the menu may be taken."""
        reasons = (each.unsupported_on(target) for each in self.formats)
        return next((f"{reason} (formats)" for reason in reasons if reason is not None), None)

    def requires(self, program: Program) -> None:
        """It runs the captured graph on text, and compares next-token probabilities."""
        why = "losses are KL divergences of next-token probabilities"
        by_hand = "Choose the formats by hand: quantize-weights{only='...'}."
        require_decoder_text(program, f"[{self.name}]", why, by_hand)

    def run(self, program: Program, *, strict: bool = False) -> PassRecord:
        """See `Pass`; the record also has the plan, and its loss as predicted and as measured."""
        self.requires(program)
        assert program.calibration is not None, "required"
        started = time.perf_counter()
        probe = Probe(program, program.calibration())
        plan, predicted = self._plan(program, self.price(program, probe))
        record = _Planned(tuple(plan), self._everything()).run(program, strict=strict)
        record.plan = format_pipeline([to_spec(step, step.name) for step in plan])
        record.predicted_kl, record.measured_kl = predicted, probe.loss_of(program)
        record.seconds = time.perf_counter() - started
        return record

    def price(self, program: Program, probe: Probe) -> dict[str, list[Choice]]:
        """Every weight in every format, whatever the budget.

        Args:
            program: Not changed.
            probe: Measures.

        Returns:
            By name of the weight, in the order of `formats`.
        """
        reads, _ = self._everything().find_all(program)
        priced = [read for read in reads.get("forward", ()) if isinstance(read, WeightRead)]
        names = {read.weight for read in priced}
        linears = [read.node for read in priced if is_call(read.node, aten.linear.default)]
        heads = {read.weight for read in priced if is_call(read.node, aten.linear.default)}
        tables = {read.weight for read in priced if is_call(read.node, aten.embedding.default)}
        meter = Meter(program, linears, tables, self.formats, self.method, probe)
        with track(self.name, len(names)) as advance:
            choices = meter.by_hessian(advance) if self.metric == "hessian" else meter.by_kl(advance)
            for name in sorted(names - heads):
                choices[name] = meter.table(program.constants[name])
                advance(1)
        return choices

    def _everything(self) -> QuantizeWeights:
        """What takes the weights that this pass allocates."""
        return QuantizeWeights(format=self.formats[0], method=self.method, skip=self.skip)

    def _plan(self, program: Program, choices: Mapping[str, Sequence[Choice]]) -> tuple[list[QuantizeWeights], float]:
        """The steps, and the sum of their losses."""
        used = program.used_constants()
        fixed = sum(constant.stored_bytes for name, constant in used.items() if name not in choices)
        shapes = [(shape[0], shape[1]) for shape in (program.constants[name].shape for name in choices)]
        uniform = fixed + sum(IntGroups(4, 128).bytes(shape) for shape in shapes)
        budget = self.budget or uniform
        taken = cheapest(choices, budget - fixed)
        if taken is None:
            least = fixed + least_bytes(choices)
            raise OptionError(
                f"[allocate-bits] budget={budget:,} bytes: the smallest formats of the menu take {least:,}, of which "
                f"{fixed:,} are not quantised. Allow that, or add a format with fewer bits."
            )
        chosen = {name: choices[name][index] for name, index in taken.items()}
        return self._steps_of(chosen), sum(choice.loss for choice in chosen.values())

    def _steps_of(self, chosen: Mapping[str, Choice]) -> list[QuantizeWeights]:
        """One pass per format, in the order of the menu."""
        steps = []
        for each in self.formats:
            names = [name for name, choice in chosen.items() if choice.format == self.method.adapted(each)]
            if names:
                options: dict[str, Any] = {"format": each}
                if isinstance(each, IntGroups) and not each.float_zeros:
                    options = {"bits": each.bits, "group": each.group, "symmetric": each.symmetric}
                steps.append(QuantizeWeights(**options, method=self.method, only=names_pattern(names)))
        return steps


@dataclass(frozen=True)
class _Planned(Pass):
    """Carries a plan out.

    Attributes:
        steps: One per format.
        everything: What takes all weights that were allocated; its misses are those of the pass.
    """

    name: ClassVar[str] = AllocateBits.name
    is_exact: ClassVar[bool] = False
    steps: tuple[QuantizeWeights, ...]
    everything: QuantizeWeights

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        """Rewrite with each step."""
        found, misses = self.everything.find_all(program)
        for read in found.get("forward", ()):
            if not isinstance(read, WeightRead):
                reason = "routed experts are not priced; quantize-weights{only='...'} before this pass takes them"
                misses.append(MissRecord(describe_node(read.node), reason))
        return sum(step.transform(program)[0] for step in self.steps), misses


def names_pattern(names: Sequence[str]) -> str:
    """A regular expression that is found in these names of weights and no others, layers listed together.

    Args:
        names: Such as `model.layers.3.mlp.up_proj.weight`.
    """
    layers: dict[tuple[str, str], list[str]] = {}
    for name in names:
        found = re.fullmatch(r"(.*?\.)(\d+)(\..*)", name)
        key = (found[1], found[3]) if found is not None else (name, "")
        layers.setdefault(key, []).append(found[2] if found is not None else "")
    each = []
    for (before, after), numbers in layers.items():
        middle = numbers[0] if len(numbers) == 1 else f"({'|'.join(numbers)})"
        each.append(f"{re.escape(before)}{middle}{re.escape(after)}")
    return f"^({'|'.join(each)})$"
