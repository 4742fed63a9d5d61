"""Make weights of linears zero that matter least, so that a sparse weight format stores fewer bytes.

Before:
    constant @up.weight: f32[768,256] #1d0c7a52
    %1: f32[s0,s1,768] = aten.linear(%0, @up.weight)
After:
    constant @up.weight: f32[768,256] #93be02f1
    %1: f32[s0,s1,768] = aten.linear(%0, @up.weight)

Fires when: a linear of a layer reads a weight that nothing else reads. `pattern=n:m` keeps n of every m consecutive
    input columns; else `sparsity` is the share that becomes zero, of the whole matrix, of each row or of each block of
    columns as the method says.
Declines when: the weight is quantised, shared, computed or no matrix, or its columns are no whole groups of the
    pattern; routed experts, whose weights are stacks. Embeddings, language-model heads and the routers of experts stay
    as they are, without a miss.
Numerics: changes precision. `sparsity` in the report is the share of zeros that a weight came to.
Saves: nothing by itself. Behind it, `quantize-weights{format=bitmap{of=int4}}` stores N * K * (1 + 4 * (1 - sparsity) +
    16 / 128) / 8 bytes per weight, and as many are read per token.
Method: `method` says which weights go and what becomes of the others (passes/pruners/). Layers are done in the order of
    the graph, from what they read once those before them are pruned.
Source: SparseGPT (arXiv 2301.00774), Wanda (arXiv 2306.11695).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from jettison.ir.constants import Constant
from jettison.ir.edit import Edit
from jettison.ir.match import Miss, is_call
from jettison.ir.ops import experts
from jettison.ir.program import CACHE, MissRecord, PassRecord, Program
from jettison.ir.progress import track
from jettison.passes.base import Pass
from jettison.passes.grammar import format_pipeline
from jettison.passes.linear_sites import by_input, find_linear
from jettison.passes.options import option, to_spec
from jettison.passes.pruners import Magnitude, Pattern, Pruner
from jettison.passes.pruners.base import UNSTRUCTURED
from jettison.passes.pruners.run import PruningRun
from jettison.passes.requirements import idle_patterns, require_forward, require_pattern, require_text

aten = torch.ops.aten
_PACKED = "it is quantised already: put prune-weights before quantize-weights"


@dataclass(frozen=True)
class PruneWeights(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "prune-weights"
    is_exact: ClassVar[bool] = False
    method: Pruner = option(Magnitude(), doc="which weights become zero", flat=True)
    sparsity: float | None = option(
        None, doc="share of the weights that become zero; 0.5 unless the pattern says", range="from 0, below 1"
    )
    pattern: str = option(UNSTRUCTURED, doc="unstructured, or n:m to keep n of every m columns, such as 2:4")
    skip: str | None = option(None, doc="regular expression; weights in whose name it is found stay as they are")
    only: str | None = option(None, doc="regular expression; weights in whose name it is not found stay as they are")

    def __post_init__(self) -> None:
        Pattern.of(self.pattern, self.sparsity)
        for name in ("skip", "only"):
            require_pattern(f"[{self.name}]", name, getattr(self, name))

    @property
    def wanted(self) -> Pattern:
        """How many weights become zero, and where."""
        return Pattern.of(self.pattern, self.sparsity)

    @property
    def needs_calibration(self) -> bool:
        """See `Pass`: it is up to the method."""
        return self.method.needs_inputs

    def requires(self, program: Program) -> None:
        """Whole sequences, and text where inputs count."""
        if self.needs_calibration:
            require_text(program, f"[{self.name}] method={self.method.name}", "method=magnitude")
        else:
            require_forward(program, f"[{self.name}]", "because a prompt and single tokens read the same weights")

    def match(self, node: fx.Node, program: Program) -> tuple[fx.Node, str] | Miss | None:
        """A linear whose weight may be pruned, and the name of its weight."""
        if is_call(node, experts):
            return Miss("weights of routed experts are stacks, which no sparse format stores", node)
        found = find_linear(node, program, self._is_skipped, _PACKED)
        if isinstance(found, tuple):
            group, columns = self.wanted.group, program.constants[found[1]].shape[1]
            if group and columns % group:
                return Miss(f"its {columns} columns are no whole groups of {group}", node)
        return found

    def _is_skipped(self, name: str) -> bool:
        return (
            name.startswith(CACHE)
            or (self.skip is not None and re.search(self.skip, name) is not None)
            or (self.only is not None and re.search(self.only, name) is None)
        )

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        """Prune layer by layer, then put the weights that changed in the place of what they were."""
        linears, misses = self.find(program)
        misses += idle_patterns(program, skip=self.skip, only=self.only)
        if self.wanted.sparsity == 0:
            return 0, misses
        sites = by_input(linears)
        made: dict[str, Constant] = {}
        with track(self.name, len(sites)) as advance:
            step = format_pipeline([to_spec(self, self.name)])
            for _, pruned in PruningRun(program, sites, self.method, self.wanted, step):
                made |= pruned
                advance(1)
        edit = Edit(program, "forward", self.name)
        changed = [(linear, name) for linear, name in linears if _differs(program.constants[name], made[name])]
        for linear, name in changed:
            program.constants[name] = made[name]
            self.rewrite((linear, name), edit)
        return len(changed), misses

    def rewrite(self, match: tuple[fx.Node, str], edit: Edit) -> None:
        """The same linear once more, with what there is to say about its weight."""
        linear, name = match
        weight = edit.program.constants[name]
        with edit.before(linear):
            new = edit.call(aten.linear.default, *linear.args, **linear.kwargs)
        new.meta["figures"] = {"sparsity": round(weight.zeros, 4)}
        edit.replace(linear, new)

    def notes(self, record: PassRecord) -> list[str]:
        """Say that zeros take as many bytes as other weights."""
        if not record.rewrites:
            return []
        return [
            "Zeros take as many bytes as other weights until they are left out: add "
            "quantize-weights{format=bitmap{of=int4}}, or of=int8 or of=float, behind prune-weights."
        ]


def _differs(before: Constant, after: Constant) -> bool:
    return any(
        not torch.equal(before.rows(start, stop), after.rows(start, stop)) for start, stop in before.row_chunks()
    )
