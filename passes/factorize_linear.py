"""Replace linears by two thin ones that lose least on the inputs seen.

Before:
    %1: f32[s0,s1,768] = aten.linear(%0, @gate.weight)
    %2: f32[s0,s1,768] = aten.linear(%0, @up.weight, @up.bias)
    %4: f32[s0,s1,256] = aten.linear(%3, @down.weight)
After:
    %1: f32[s0,s1,109] = aten.linear(%0, @shared.columns)
    %2: f32[s0,s1,768] = aten.linear(%1, @gate.weight.rows)
    %3: f32[s0,s1,768] = aten.linear(%1, @up.weight.rows, @up.bias)
    %5: f32[s0,s1,96] = aten.linear(%4, @down.weight.columns)
    %6: f32[s0,s1,256] = aten.linear(%5, @down.weight.rows)
    and with residual=int3:
    %5: f32[s0,s1,256] = jettison.quantized_linear(%4, @down.weight.residual.codes, ..., None, 3, 128, 768)
    %6: f32[s0,s1,16] = aten.linear(%4, @down.weight.columns)
    %7: f32[s0,s1,256] = aten.linear(%6, @down.weight.rows)
    %8: f32[s0,s1,256] = aten.add(%5, %7)

Fires when: a linear of a layer reads a weight that nothing else reads and the rank is below break-even. Linears of one
    input (queries, keys and values; gate and up) share the first matrix where that loses less at equal bytes
    (`share=auto`), each counting by the share of its own results that is lost.
Declines when: `rank * (N + K) >= N * K`, or with a residual when the bytes would not be fewer; the weight is quantised,
    shared, computed or no matrix; `rank=auto` spends the bytes elsewhere. Language-model heads and the routers of
    experts stay as they are, without a miss.
Numerics: changes precision. `loss` in the report is the share of the energy of the results that is lost on the
    calibration tokens (of the weight's own energy for method=svd, of scaled inputs' for asvd).
Saves: `(N * K - rank * (N + K)) * itemsize` bytes per weight, and as many read per token; with a residual, less those
    of its codes. `ratio` is the share of the parameters that is kept: `rank = floor(ratio * N * K / (N + K))`,
    and from 128 on the multiple of 8 below it.
Method: `method` says for which inputs the factors are best (passes/factorizers/). Layers are done in the order of the
    graph, from what they read once those before them are factored. `rank=auto` gives each input the rank with which a
    budget of bytes for all weights does least harm (passes/low_rank/allocation.py). `residual=` rounds the weight to
    few bits and lets the factors, in the stored dtype, make up for what that loses; both in turns.
Source: SVD-LLM (arXiv 2403.07378), ASVD (arXiv 2312.05821); the low rank beside few bits as in LQER (arXiv 2402.02446)
    and LQ-LoRA (arXiv 2311.12023).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import fx

from jettison.ir.constants import Constant, Packed, joined_constant
from jettison.ir.edit import Edit
from jettison.ir.errors import OptionError
from jettison.ir.match import Miss, arguments
from jettison.ir.program import CACHE, MissRecord, PassRecord, Program
from jettison.ir.progress import track
from jettison.passes.base import Pass
from jettison.passes.factorizers import SVDLLM, Factorizer
from jettison.passes.formats import IntGroups
from jettison.passes.grammar import format_pipeline
from jettison.passes.linear_sites import InputSite, by_input, find_linear
from jettison.passes.low_rank.allocation import allocate, price
from jettison.passes.low_rank.factors import LowRank, Remainder
from jettison.passes.low_rank.forms import LowRankForm, is_remainder
from jettison.passes.low_rank.run import LowRankRun
from jettison.passes.low_rank.sizes import Ranks, Sizes, best_factors
from jettison.passes.methods.base import InputStatistics
from jettison.passes.options import option, to_spec
from jettison.passes.requirements import idle_patterns, require_forward, require_pattern, require_text
from jettison.passes.whitening import Whitening

aten = torch.ops.aten
_RATIO, _GROUP = 0.5, 128
_INT8 = IntGroups(8, 128)
_BITS: dict[str, Literal[4, 3, 2]] = {"int4": 4, "int3": 3, "int2": 2}
_PACKED = "it is quantised already, and factors are made of whole weights: put factorize-linear before quantize-weights"


@dataclass(frozen=True)
class FactorizeLinear(Pass):
    """See the module docstring."""

    name: ClassVar[str] = "factorize-linear"
    is_exact: ClassVar[bool] = False
    method: Factorizer = option(SVDLLM(), doc="for which inputs the factors are best", flat=True)
    ratio: float | None = option(
        None,
        doc="share of the parameters of a weight that is kept; 0.5 unless there is a rank",
        range="above 0, below 1",
    )
    rank: int | Literal["auto"] | None = option(
        None, doc="of every weight, or auto; those that share columns get what the same bytes allow", range="1 or more"
    )
    budget: int | None = option(None, doc="most bytes of all weights together, for rank=auto", unit="bytes")
    residual: Literal["int4", "int3", "int2"] | None = option(None, doc="format of what is added to the product")
    group: Literal[32, 64, 128] | None = option(
        None, doc="columns of the residual that share a scale; 128 unless given"
    )
    share: bool | Literal["auto"] = option("auto", doc="one matrix of columns for linears that read the same input")
    skip: str | None = option(None, doc="regular expression; weights in whose name it is found stay as they are")
    only: str | None = option(None, doc="regular expression; weights in whose name it is not found stay as they are")
    seed: int = option(0, doc="of the randomised decomposition of large weights")

    def __post_init__(self) -> None:
        told = f"[{self.name}]"
        if self.ratio is not None and self.rank is not None:
            raise OptionError(f"{told} ratio={self.ratio} with rank={self.rank}: leave one of them out.")
        if self.ratio is None and self.rank is None:
            object.__setattr__(self, "ratio", _RATIO)
        if self.ratio is not None and not 0 < self.ratio < 1:
            raise OptionError(f"{told} ratio={self.ratio}: needs a share above 0 and below 1.")
        if isinstance(self.rank, int) and self.rank < 1:
            raise OptionError(f"{told} rank={self.rank}: needs 1 or more, or auto.")
        if (self.rank == "auto") != (self.budget is not None):
            raise OptionError(
                f"{told} rank={self.rank} with budget={self.budget}: rank=auto and a budget belong together, because "
                "ranks are chosen so that all weights fit it. Give both, such as rank=auto,budget=3MB, or neither."
            )
        if self.budget is not None and self.budget <= 0:
            raise OptionError(f"{told} budget={self.budget}: needs bytes above 0, such as 3MB.")
        if self.residual is None and self.group is not None:
            raise OptionError(f"{told} group={self.group} without a residual: groups are those of its codes.")
        if self.residual is not None and self.group is None:
            object.__setattr__(self, "group", _GROUP)
        for name in ("skip", "only"):
            require_pattern(told, name, getattr(self, name))

    @property
    def remainder(self) -> IntGroups | None:
        """Format of the residual."""
        if self.residual is None or self.group is None:
            return None
        return IntGroups(_BITS[self.residual], self.group)

    @property
    def needs_calibration(self) -> bool:
        """See `Pass`: it is up to the method, and ranks are chosen by what they cost."""
        return self.method.needs_inputs or self.rank == "auto"

    def unsupported_on(self, target: str) -> str | None:
        """See `Pass`: it is the format of the residual that a target can run or not."""
        return None if self.remainder is None else self.remainder.unsupported_on(target)

    def requires(self, program: Program) -> None:
        """Whole sequences, and text where inputs count."""
        if self.needs_calibration:
            what = "rank=auto" if self.rank == "auto" else f"method={self.method.name}"
            require_text(program, f"[{self.name}] {what}", "method=svd with a ratio or a rank")
        else:
            require_forward(program, f"[{self.name}]", "because factors of a prompt and of single tokens are the same")

    def match(self, node: fx.Node, program: Program) -> tuple[fx.Node, str] | Miss | None:
        """A linear that may be factored, and the name of its weight; nothing where it is."""
        if LowRankForm.of(node) is not None or is_remainder(node):
            return None
        return find_linear(node, program, self._is_skipped, _PACKED)

    def _is_skipped(self, name: str) -> bool:
        return (
            name.startswith(CACHE)
            or (self.skip is not None and re.search(self.skip, name) is not None)
            or (self.only is not None and re.search(self.only, name) is None)
        )

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        """Settle the ranks, make the factors layer by layer, then rewrite."""
        linears, misses = self.find(program)
        misses += idle_patterns(program, skip=self.skip, only=self.only)
        sizes = Sizes(program, self.remainder, self.share)
        sites, ranks = by_input(linears), Ranks({}, {})
        if self.rank == "auto" and sites:
            ranks = self._allocated(program, sites, sizes)
        elif sites:
            wanted = self.rank if isinstance(self.rank, int) else self.ratio
            assert wanted is not None, "filled in"
            ranks = sizes.ranks(sites, wanted)
        misses += [MissRecord(name, reason) for name, reason in ranks.declined.items()]
        sites = [site for site in sites if any(name not in ranks.declined for _, name in site.linears)]
        made = self._made(program, sites, ranks)
        edit = Edit(program, "forward", self.name)
        nodes = {name: node for site in sites for node, name in site.linears}
        for low_rank in made:
            self.rewrite((low_rank, tuple(nodes[name] for name in low_rank.names)), edit)
        if made:
            edit.eliminate_dead_code()
        for low_rank in made:
            for name in low_rank.names:
                program.constants.pop(name, None)
        return sum(len(each.names) for each in made), misses

    def _allocated(self, program: Program, sites: Sequence[InputSite], sizes: Sizes) -> Ranks:
        """The ranks with which the budget does least harm."""
        assert self.budget is not None, "given with rank=auto"
        with track(f"{self.name}: prices", len(sites)) as advance:
            priced = price(program, sites, sizes, self.method, self.seed, advance)
        used = program.used_constants()
        weights = {name for site in sites for _, name in site.linears}
        fixed = sum(constant.stored_bytes for name, constant in used.items() if name not in weights)
        return allocate(priced, self.budget, fixed)

    def _made(self, program: Program, sites: Sequence[InputSite], ranks: Ranks) -> list[LowRank]:
        """The factors of all sites."""

        def factors(site: InputSite, statistics: InputStatistics | None) -> list[LowRank]:
            whitening = Whitening(self.method.second_moment(site.channels, statistics))
            remainder = None if self.remainder is None else Remainder.of(self.remainder, statistics)
            return best_factors(program, site, ranks, whitening, remainder, self.seed)

        step = format_pipeline([to_spec(self, self.name)])
        with track(self.name, len(sites)) as advance:
            run = LowRankRun(program, sites, factors, step, has_statistics=self.method.needs_inputs)
            made = []
            for found in run:
                made += found
                advance(1)
        return made

    def rewrite(self, match: tuple[LowRank, tuple[fx.Node, ...]], edit: Edit) -> None:
        """Two linears in the place of each, and a sum where there is a residual."""
        made, linears = match
        constants = edit.program.constants
        stem = made.names[0] if len(made.names) == 1 else _shared_name(made.names, constants)
        dtype = constants[made.names[0]].dtype
        columns = edit.constant(Constant(f"{stem}.columns", made.columns, dtype))
        first = min(linears, key=list(edit.graph.nodes).index)
        with edit.before(first):
            narrow = edit.call(aten.linear.default, arguments(first)["input"], columns)
        for index, (name, linear) in enumerate(zip(made.names, linears, strict=True)):
            rows = edit.constant(Constant(f"{name}.rows", made.rows[index], dtype))
            bias = arguments(linear)["bias"]
            with edit.before(linear):
                new = edit.call(aten.linear.default, narrow, rows, *([] if bias is None else [bias]))
                new.meta["figures"] = self._figures(made, index, constants[name])
                if made.remainders:
                    new = edit.call(aten.add.Tensor, self._remainder(made, index, linear, edit), new)
            new.meta["where"] = linear.meta.get("where", new.meta.get("where", ""))
            edit.replace(linear, new)

    def _remainder(self, made: LowRank, index: int, linear: fx.Node, edit: Edit) -> fx.Node:
        """A quantised linear that reads what the factored one reads."""
        name, encoded = f"{made.names[index]}.residual", made.remainders[index]
        constants = {part: Constant(f"{name}.{part}", values) for part, values in encoded.parts.items()}
        parts = {part: edit.constant(constant) for part, constant in constants.items()}
        names = {part: constant.name for part, constant in constants.items()}
        edit.program.packed[name] = Packed(encoded.format.name, encoded.shape, names)
        return encoded.format.call_linear(edit, arguments(linear)["input"], parts, None, encoded.shape)

    def _figures(self, made: LowRank, index: int, weight: Constant) -> dict[str, float]:
        """For the report: the rank, shares of the bytes of the weight that this and 8 bits take, and what is lost."""
        shape, itemsize = (weight.shape[0], weight.shape[1]), weight.stored_dtype.itemsize
        outputs = sum(len(rows) for rows in made.rows)
        columns = made.columns.numel() * itemsize * shape[0] / outputs  # of shared ones, as many as its rows
        own = made.rows[index].numel() * itemsize + columns
        own += sum(remainder.format.bytes(shape) for remainder in made.remainders[index : index + 1])
        return {
            "rank": made.rank,
            "bytes_kept": round(own / weight.stored_bytes, 4),
            "int8_bytes": round(_INT8.bytes(shape) / weight.stored_bytes, 4),
            "loss": round(made.loss, 5),
        }

    def notes(self, record: PassRecord) -> list[str]:
        """Say where 8 bits would take fewer bytes: factors that are not small lose more than rounding does."""
        wins = [name for name, figures in record.layers.items() if figures["int8_bytes"] < figures["bytes_kept"]]
        if not wins:
            return []
        return [
            f"{len(wins)} of {len(record.layers)} factored weights take more bytes than quantize-weights{{bits=8}} "
            "would, which mostly loses less: quantise them instead, or the factors behind this pass."
        ]

    def ensures(self, program: Program) -> str | None:
        """No linear is read both ways."""
        names = set(program.used_constants())
        both = next((name for name in names if f"{name}.rows" in names), None)
        return None if both is None else f"{both} is read beside its factors"


def _shared_name(names: Sequence[str], constants: Mapping[str, Constant]) -> str:
    """A name within the path that several names have in common."""
    return joined_constant(names, "shared.columns", constants).name.removesuffix(".columns")
