"""Read only the weights of a linear that meet large inputs, token by token.

Before:
    %3: f32[s0,s1,64] = aten.linear(%2, @gate.weight)
    %4: f32[s0,s1,64] = aten.linear(%2, @up.weight, @up.bias)
After:
    %3: f32[s0,s1,32] = aten.abs(%2)
    %4, %5 = aten.topk(%3, 20, -1, True, False)
    %6: f32[s0,s1,64] = jettison.sparse_linear(%2, %5, @gate.weight.transposed, None)
    %7: f32[s0,s1,64] = jettison.sparse_linear(%2, %5, @up.weight.transposed, @up.bias)

Fires when: linears read an input of their token and weights that nothing else reads, and the input is among those whose
    smallest channels cost least (see Method). Weights are stored with a row per channel.
Declines when: the weight is quantised, shared or computed; the input is not one row per token; leaving channels out of
    other inputs loses less; so few would be left out that dense is faster, because a row that is read by itself takes
    longer (`force=true` rewrites all the same). The language-model head, whose results nothing averages out, and the
    routers of experts stay as they are, without a miss.
Numerics: changes precision, but only of tokens that are decoded: `cache-kv` makes prompts dense again, so that their
    first tokens, whose inputs are like no others', stay as they were. `error` is the mean over calibration tokens of
    the square of what a linear loses, over that of its result, times the share of the residual stream that comes from
    it: what is added behind it, over the sum.
Saves: `sparsity` * bytes of these linears, read per token. Batches read the union of their tokens' channels.
Method: every token keeps the same number of channels, those of the largest values, because shapes are static; TEAL has
    a threshold instead, and then as many as are above it. One number per input, which all its linears share, is raised
    in steps of 0.05, always where it costs least error per weight, until `sparsity` of all weights is left out.
Source: TEAL (arXiv 2408.14690). Sizes come from shapes here (its tables have wrong ones for some models), and no
    distribution is assumed: its thresholds are those of a symmetric one, as inputs behind an activation do not have.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from torch import fx

from jettison.ir.constants import transposed_constant
from jettison.ir.edit import Edit
from jettison.ir.errors import OptionError
from jettison.ir.match import Miss, arguments
from jettison.ir.ops import sparse_linear
from jettison.ir.program import MissRecord, Program, input_placeholders
from jettison.ir.progress import track
from jettison.passes.base import describe_node
from jettison.passes.gather_costs import row_cost
from jettison.passes.input_errors import ErrorCurve, error_curves
from jettison.passes.linear_sites import by_input, find_linear
from jettison.passes.options import option
from jettison.passes.requirements import LearnsFromTokens, idle_patterns, require_pattern

aten = torch.ops.aten
_STEP, _MOST = 0.05, 0.9


@dataclass(frozen=True)
class SparsifyInputs(LearnsFromTokens):
    """See the module docstring."""

    name: ClassVar[str] = "sparsify-inputs"
    is_exact: ClassVar[bool] = False
    sparsity: float = option(0.25, doc="share of the weights that a token does not read", range="above 0, to 0.9")
    skip: str | None = option(None, doc="regular expression; linears whose weights it is found in stay as they are")
    force: bool = option(False, doc="rewrite linears that are faster dense")

    def __post_init__(self) -> None:
        if not 0 < self.sparsity <= _MOST:
            raise OptionError(
                f"[sparsify-inputs] sparsity={self.sparsity}: needs a share above 0, at most {_MOST}. Leave the pass "
                "out to read everything."
            )
        require_pattern(f"[{self.name}]", "skip", self.skip)

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        """Look at every input, share out what is left out, then rewrite."""
        linears, misses = self.find(program)
        misses += idle_patterns(program, skip=self.skip)
        sites = by_input(linears)
        total, saved = self._read_sparsely(program)
        total += sum(site.channels * site.row_weights for site in sites)
        curves = []
        # A second run has nothing left to do.
        if saved < self.sparsity * total:
            with track(self.name, len(sites)) as advance:
                for curve in error_curves(program, sites, partial(self._numbers, row_cost(program))):
                    curves.append(curve)
                    advance(1)
        chosen = allocate(curves, self.sparsity * total - saved)
        edit = Edit(program, "forward", self.name)
        rewrites = 0
        for curve, level in zip(curves, chosen, strict=True):
            if level:
                self.rewrite((curve, level), edit)
                rewrites += len(curve.site.linears)
            else:
                misses.append(MissRecord(describe_node(curve.site.linears[0][0]), self._why_dense(row_cost(program))))
        if rewrites:
            edit.eliminate_dead_code()
        return rewrites, misses

    def _why_dense(self, cost: float) -> str:
        reason = "leaving channels out of other inputs loses less"
        if self.force:
            return reason
        return f"{reason}, and dense is faster than leaving out less than {1 - 1 / cost:.0%} of them"

    def _read_sparsely(self, program: Program) -> tuple[int, int]:
        """Weights of the linears that a run of this pass rewrote before, and how many of them a token leaves out."""
        total, saved = 0, 0
        for node in program.entries["forward"].graph.find_nodes(op="call_function", target=sparse_linear):
            read = arguments(node)
            channels, outputs = (int(size) for size in read["weight"].meta["val"].shape)
            kept = int(read["indices"].meta["val"].shape[-1])
            total, saved = total + channels * outputs, saved + (channels - kept) * outputs
        return total, saved

    def _numbers(self, cost: float, channels: int) -> tuple[int, ...]:
        """Numbers of channels that a token may keep, from all downwards."""
        steps = range(1, round(_MOST / _STEP) + 1)
        numbers = dict.fromkeys(max(1, channels - round(channels * _STEP * step)) for step in steps)
        worth_it = [kept for kept in numbers if kept < channels and (self.force or kept * cost < channels)]
        return (channels, *worth_it)

    def match(self, node: fx.Node, program: Program) -> tuple[fx.Node, str] | Miss | None:
        """A linear that can be read by channels, and the name of its weight."""
        packed = "it is quantised, and groups of codes run along the inputs"
        found = find_linear(node, program, self._is_skipped, packed)
        if not isinstance(found, tuple):
            return found
        x = arguments(node)["input"].meta["val"]
        ids = input_placeholders(program.entries["forward"])["input_ids"].meta["val"]
        # Comparing symbolic sizes compares the sizes they were traced with; their texts say what they stand for.
        if str([*x.shape[:-1]]) not in (str([*ids.shape]), str([ids.shape[0] * ids.shape[1]])):
            return Miss("its inputs are not one row for each token", node)
        return found

    def _is_skipped(self, name: str) -> bool:
        return self.skip is not None and re.search(self.skip, name) is not None

    def rewrite(self, match: tuple[ErrorCurve, int], edit: Edit) -> None:
        """Choose channels behind the input, and put the operator in the place of each linear."""
        curve, level = match
        site, kept = curve.site, curve.kept[level]
        # Not `site.x`: what computed it may have been rewritten, too.
        x = arguments(site.linears[0][0])["input"]
        with edit.before(site.linears[0][0]):
            sizes = edit.call(aten.abs.default, x)
            largest = edit.call(aten.topk.default, sizes, kept, -1, True, False)
            indices = edit.call(operator.getitem, largest, 1)
        for number, (linear, name) in enumerate(site.linears):
            weight = edit.constant(transposed_constant(edit.program.constants[name], f"{name}.transposed"))
            with edit.before(linear):
                new = edit.call(sparse_linear, x, indices, weight, arguments(linear)["bias"])
            error = float(curve.errors[level, number])
            new.meta["figures"] = {"channels": site.channels, "kept": kept, "error": round(error, 4)}
            edit.replace(linear, new)


def allocate(curves: Sequence[ErrorCurve], wanted: float) -> list[int]:
    """Which number of channels each input keeps.

    Args:
        curves: Of all inputs.
        wanted: Weights to leave out.

    Returns:
        For each input, an index into the numbers of its curve: always the next smaller number of the input where it
        costs least error per weight, until enough is left out.
    """
    chosen = [0] * len(curves)
    errors = [curve.errors.sum(-1).tolist() for curve in curves]
    saved = 0

    def saving(number: int) -> int:
        curve, level = curves[number], chosen[number]
        return (curve.kept[level] - curve.kept[level + 1]) * curve.site.row_weights

    while saved < wanted:
        open_ = [number for number, curve in enumerate(curves) if chosen[number] + 1 < len(curve.kept)]
        if not open_:
            break
        best = min(open_, key=lambda n: (errors[n][chosen[n] + 1] - errors[n][chosen[n]]) / saving(n))
        saved += saving(best)
        chosen[best] += 1
    return chosen
