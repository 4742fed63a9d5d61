"""Read only the neurons of a feed-forward layer that a token needs, as a predictor says.

Before:
    %3: f32[s0,s1,64] = aten.linear(%2, @fc1.weight, @fc1.bias)
    %4: f32[s0,s1,64] = aten.relu(%3)
    %5: f32[s0,s1,32] = aten.linear(%4, @fc2.weight, @fc2.bias)
After:
    %3: f32[s0,s1,16] = aten.linear(%2, @fc1.predictor.first, @fc1.predictor.first_bias)
    %4: f32[s0,s1,16] = aten.relu(%3)
    %5: f32[s0,s1,8] = aten.linear(%4, @fc1.predictor.second, @fc1.predictor.second_bias)
    %6, %7 = aten.topk(%5, 2)
    %8: f32[s0,s1,32] = jettison.sparse_mlp(%2, %7, None, @fc1.weight, @fc1.bias, @fc2.weight.transposed, @fc2.bias,
        @fc1.absent, 'relu', 8)

Fires when: a feed-forward layer (linear, activation, perhaps a gate, linear) reads constants that nothing else reads,
    keeping `keep` of its groups loses little (`error`), and reading them is faster than reading all. A group is `group`
    neurons that follow each other; `cluster-neurons` before it makes neighbours of those that fire together.
    `keep=auto` keeps as few groups as `error` allows, layer by layer. Quantised weights stay as they are; others are
    stored with a row per neuron in both matrices, so that a group is contiguous.
Declines when: the layer is not sparse enough, or dense is faster: a gather takes longer per byte, and the predictor is
    read too (`force=true` rewrites all the same); `group` does not divide the neurons, or cuts groups of codes; weights
    are codes into a table.
Numerics: changes precision, but only of tokens that are decoded: `cache-kv` makes prompts dense again. What a group
    adds on average where it is left out (`@fc1.absent`) is added in its place. `error` is the mean square of what is
    lost, over that of the residual stream behind the layer, with the best choice of groups; the predictor comes on top.
Saves: (1 - keep) * bytes of the layer - bytes of the predictor, read per token. Batches read the union of their tokens'
    groups, and everything once that is half of them.
Method: `method` chooses the groups (passes/predictors/).
Source: Deja Vu (arXiv 2310.17157), HiRE (arXiv 2402.09360); the stand-in for what is left out is ours.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, fx

from jettison.ir.constants import Constant, transposed_constant
from jettison.ir.edit import Edit
from jettison.ir.errors import OptionError
from jettison.ir.match import Miss, arguments
from jettison.ir.ops import quantized_sparse_mlp, sparse_mlp
from jettison.ir.program import MissRecord, Program
from jettison.ir.progress import track
from jettison.passes.base import describe_node
from jettison.passes.gather_costs import group_cost
from jettison.passes.grammar import format_pipeline
from jettison.passes.mlp_activity import MlpActivity, dense_weight, dropped, watch
from jettison.passes.mlp_sites import (
    MlpSite,
    find_mlp,
)
from jettison.passes.options import option, to_spec
from jettison.passes.predictors import DejaVu, Predictor, Samples
from jettison.passes.predictors.base import held_out, recall
from jettison.passes.requirements import LearnsFromTokens, idle_patterns, require_pattern
from jettison.passes.residual_stream import ancestors, residual_before_attention

aten = torch.ops.aten
_TOKENS = 1 << 15
# Most energy that may be lost where the share is given, and what `keep=auto` aims at.
_MOST_ERROR, _AIM = 0.05, 0.001


@dataclass(frozen=True)
class SparseMlp:
    """What becomes of a layer.

    Attributes:
        site: The layer.
        kept: Groups that each token keeps.
        predictor: Constants of its predictor.
        absent: Stand-ins for what is left out, or None.
        figures: For the report.
    """

    site: MlpSite
    kept: int
    predictor: dict[str, Tensor]
    absent: Tensor | None
    figures: dict[str, float]


@dataclass(frozen=True)
class PredictMlpSparsity(LearnsFromTokens):
    """See the module docstring."""

    name: ClassVar[str] = "predict-mlp-sparsity"
    is_exact: ClassVar[bool] = False
    method: Predictor = option(DejaVu(), doc="how groups are chosen", flat=True)
    keep: float | Literal["auto"] = option("auto", doc="share of the groups that a token keeps", range="above 0, to 1")
    group: int = option(32, doc="neurons of a group; divides those of a layer", range="1 or more")
    error: float | None = option(
        None, doc="most energy that a layer may lose; 0.05 unless given, and 0.001 for keep=auto", range="0 or more"
    )
    stand_in: bool = option(True, doc="add what groups contribute on average where they are left out")
    skip: str | None = option(None, doc="regular expression; layers whose weights it is found in stay as they are")
    force: bool = option(False, doc="rewrite layers that are faster, or much better, dense")
    seed: int = option(0, doc="of what a predictor draws")

    def __post_init__(self) -> None:
        if self.group < 1:
            raise OptionError(f"[predict-mlp-sparsity] group={self.group}: needs 1 or more neurons.")
        if self.keep != "auto" and not 0 < float(self.keep) <= 1:
            raise OptionError(f"[predict-mlp-sparsity] keep={self.keep}: needs a share above 0, at most 1, or auto.")
        if self.error is not None and not self.error >= 0:
            raise OptionError(f"[predict-mlp-sparsity] error={self.error}: needs a share of energy, 0 or more.")
        require_pattern(f"[{self.name}]", "skip", self.skip)

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        """Learn layer by layer, in the order of the graph; then rewrite."""
        sites, misses = self.find(program)
        misses += idle_patterns(program, skip=self.skip)
        planned = {site: found for site in sites if (found := self._finished(program, site)) is not None}
        left = [site for site in sites if site not in planned]
        with track(self.name, len(sites)) as advance:
            advance(len(planned))
            for site, activity in watch(program, left, self.group, self._source, most=_TOKENS) if left else ():
                planned[site] = self._plan(program, site, activity)
                self._finish(program, site, planned[site])
                advance(1)
        edit = Edit(program, "forward", self.name)
        plans = [found for site in sites if isinstance(found := planned[site], SparseMlp)]
        misses += [
            MissRecord(describe_node(found.node), found.reason) for found in planned.values() if isinstance(found, Miss)
        ]
        replaced = [plan.site.constant(plan.site.down, "weight") for plan in plans if not plan.site.is_packed]
        for plan in plans:
            self.rewrite(plan, edit)
        if plans:
            edit.eliminate_dead_code()
        for name in replaced:  # it is stored transposed now
            program.constants.pop(str(name), None)
        return len(plans), misses

    def _finished(self, program: Program, site: MlpSite) -> SparseMlp | Miss | None:
        """What an interrupted run had learned of a layer."""
        found = None
        if program.finished is not None:
            found = program.finished.load_tensors(self._step, [describe_node(site.up)])
        if found is None:
            return None
        tensors, told = found
        if "reason" in told:
            return Miss(told["reason"], site.up)
        absent = tensors.pop("absent", None)
        return SparseMlp(site, told["kept"], tensors, absent, told["figures"])

    def _finish(self, program: Program, site: MlpSite, planned: SparseMlp | Miss) -> None:
        """Keep what was learned of a layer, in case that the run is interrupted."""
        if program.finished is None:
            return
        tensors: dict[str, Tensor] = {}
        if isinstance(planned, Miss):
            told: dict[str, Any] = {"reason": planned.reason}
        else:
            told = {"kept": planned.kept, "figures": planned.figures}
            tensors = dict(planned.predictor) | ({} if planned.absent is None else {"absent": planned.absent})
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        program.finished.store_tensors(self._step, [describe_node(site.up)], tensors, told)

    @property
    def _step(self) -> str:
        """The pass by which finished layers are known."""
        return format_pipeline([to_spec(self, self.name)])

    def match(self, node: fx.Node, program: Program) -> MlpSite | Miss | None:
        """A layer whose weights can be read by groups."""
        site = find_mlp(node, program, self.group, self.skip)
        if not isinstance(site, MlpSite):
            return site
        if site.is_packed:
            columns = arguments(site.down)["group"]
            if self.group % columns:
                reason = f"groups of {self.group} neurons cut the groups of {columns} columns of its second matrix"
                return Miss(reason, site.down)
        if self._source(site) is None:
            return Miss("there is no residual before an attention that lookahead=previous could read", site.up)
        return site

    def rewrite(self, match: SparseMlp, edit: Edit) -> None:
        """Insert the predictor behind what it reads, and the operator in the place of the layer."""
        site = match.site
        source = self._source(site)
        assert source is not None, "matched"
        stem = (site.constant(site.up, "codes" if site.is_packed else "weight") or "").removesuffix(".codes")
        stem = stem.removesuffix(".weight")
        dtype = site.x.meta["val"].dtype
        names = list(match.predictor)
        placed = [
            edit.constant(Constant(f"{stem}.predictor.{name}", _stored(match.predictor[name], dtype))) for name in names
        ]
        absent = None
        if match.absent is not None:
            absent = edit.constant(Constant(f"{stem}.absent", match.absent.to(dtype)))

        def choose(x: Tensor, *constants: Tensor) -> Tensor:
            rows = x.reshape(-1, x.shape[-1]) if x.dim() > site.x.meta["val"].dim() else x
            given = dict(zip(names, constants, strict=True))
            return self.method.scores(rows, given, site.activation)

        with edit.before(source.next):
            scores = edit.inline(choose, source, *placed)
            best = edit.call(aten.topk.default, scores, match.kept)
            indices = edit.call(operator.getitem, best, 1)
        with edit.before(site.down):
            call = _packed_call if site.is_packed else _dense_call
            new = call(site, indices, absent, self.group, edit)
        new.meta["figures"] = {name: round(value, 4) for name, value in match.figures.items()}
        edit.replace(site.down, new)

    def ensures(self, program: Program) -> str | None:
        """A predictor reads nothing that comes after its source."""
        for node in program.entries["forward"].graph.nodes:
            if node.target not in (sparse_mlp, quantized_sparse_mlp) or node.meta.get("made_by") != self.name:
                continue
            indices = arguments(node)["indices"]
            if self.method.lookahead == "previous" and arguments(node)["x"] in ancestors(indices):
                return f"the predictor of {describe_node(node)} reads what comes after its source"
        return None

    def _source(self, site: MlpSite) -> fx.Node | None:
        """What the predictor of a layer reads."""
        return site.x if self.method.lookahead == "same" else residual_before_attention(site.x)

    def _plan(self, program: Program, site: MlpSite, activity: MlpActivity) -> SparseMlp | Miss:
        """Choose the groups to keep and learn the predictor, or say why the layer stays dense."""
        down = dense_weight(program, site, site.down)
        groups = site.neurons // self.group
        is_auto = self.keep == "auto"
        kept = self._fewest(activity, down, groups) if is_auto else max(1, round(float(self.keep) * groups))
        without = dropped(activity, self.group, kept, down, self.stand_in)
        lost = without.energy
        most = _MOST_ERROR if self.error is None else self.error
        if not is_auto and lost > most and not self.force:
            reason = (
                f"its activations are not sparse: {kept} of {groups} groups lose {lost:.1%} of the energy behind it"
            )
            return Miss(f"{reason}, more than {most:.1%} (error)", site.up)
        samples = Samples(
            activity.inputs, activity.scores, dense_weight(program, site, site.up), _vector(program, site, "bias"),
            None if site.gate is None else dense_weight(program, site, site.gate), activity.norms, site.activation,
        )  # fmt: skip
        predictor = self.method.fit(samples, kept, self.seed)
        share = kept / groups
        extra = sum(_bytes_of(tensor, site) for tensor in predictor.values())
        read = share + extra / _stored_bytes(program, site)
        cost = group_cost(program, is_packed=site.is_packed)
        if read * cost >= 1 and not self.force:
            reason = f"dense is faster: {kept} of {groups} groups and the predictor are {read:.0%} of its bytes, and"
            return Miss(f"{reason} a gathered byte takes {cost} times as long", site.up)
        found = self.method.scores(held_out(samples.inputs), predictor, site.activation)
        figures = {
            "groups": groups, "kept": kept, "recall": recall(found, held_out(samples.scores), kept),
            "energy_lost": lost, "bytes_read": read, "sparse_up_to_batch": max(1, groups // (2 * kept)),
        }  # fmt: skip
        return SparseMlp(site, kept, predictor, without.absent, figures)

    def _fewest(self, activity: MlpActivity, down: Tensor, groups: int) -> int:
        """The fewest groups that lose no more than is allowed, by bisection."""
        most = _AIM if self.error is None else self.error
        low, high = 0, groups
        while high - low > 1:
            middle = (low + high) // 2
            loses = dropped(activity, self.group, middle, down, self.stand_in).energy
            low, high = (low, middle) if loses <= most else (middle, high)
        return high


def _stored(constant: Tensor, dtype: torch.dtype) -> Tensor:
    """A constant of a predictor in the dtype of the graph; codes stay what they are."""
    return constant.to(dtype) if constant.is_floating_point() else constant


def _vector(program: Program, site: MlpSite, operand: str) -> Tensor | None:
    name = site.constant(site.up, operand)
    return None if name is None else program.constants[name].value().to(torch.float32)


def _stored_bytes(program: Program, site: MlpSite) -> int:
    names = {site.constant(linear, o) for linear in site.linears for o in arguments(linear) if o not in ("x", "input")}
    return sum(program.constants[name].stored_bytes for name in names if name is not None)


def _bytes_of(constant: Tensor, site: MlpSite) -> int:
    """Of a predictor's constant, as it would be stored beside the layer: quantised to 8 bits where the layer is."""
    if not constant.is_floating_point() or site.is_packed:
        return constant.numel()
    return constant.numel() * int(site.x.meta["val"].dtype.itemsize)


def _dense_call(site: MlpSite, indices: fx.Node, absent: fx.Node | None, group: int, edit: Edit) -> fx.Node:
    """The operator over matrices with a row per neuron: the second one is stored transposed from now on."""
    read = arguments(site.down)
    name = str(site.constant(site.down, "weight"))
    down = edit.constant(transposed_constant(edit.program.constants[name], f"{name}.transposed"))
    gate = None if site.gate is None else arguments(site.gate)["weight"]
    up = arguments(site.up)
    return edit.call(
        sparse_mlp, site.x, indices, gate, up["weight"], up["bias"], down, read["bias"], absent, site.activation, group
    )


def _packed_call(site: MlpSite, indices: fx.Node, absent: fx.Node | None, group: int, edit: Edit) -> fx.Node:
    """The operator over the parts of quantised matrices, which stay where they are."""
    up, down = arguments(site.up), arguments(site.down)
    gate: Mapping[str, fx.Node | None] = {} if site.gate is None else arguments(site.gate)
    parts = ("codes", "scales", "zeros")
    return edit.call(
        quantized_sparse_mlp, site.x, indices, *(gate.get(part) for part in parts), *(up[part] for part in parts),
        up["bias"], *(down[part] for part in parts), down["bias"], absent, site.activation, group, up["bits"],
        up["group"], down["bits"], down["group"], site.width, site.neurons,
    )  # fmt: skip
