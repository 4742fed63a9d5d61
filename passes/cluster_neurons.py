"""Put neurons of feed-forward layers that fire for the same tokens next to each other.

Before:
    constant @layers.0.fc1.weight: f32[64,32] #1f0c1f6e
    %3: f32[s0,s1,64] = aten.linear(%2, @layers.0.fc1.weight, @layers.0.fc1.bias)
    %4: f32[s0,s1,64] = aten.relu(%3)
    %5: f32[s0,s1,32] = aten.linear(%4, @layers.0.fc2.weight, @layers.0.fc2.bias)
After:
    constant @layers.0.fc1.weight: f32[64,32] #9aa4a3d2
    (the same graph: rows of the first matrix, of its bias and of the gate, and columns of the second, in another order)

Fires when: a feed-forward layer (linear, activation, perhaps a gate, linear) reads constants that nothing else reads,
    and another order of its neurons lets the best groups of each calibration token hold at least 1 % more of what the
    layer's activations are worth (passes/neuron_groups.py).
Declines when: the weights are quantised (groups of codes would be cut), shared or computed, or `group` does not divide
    the neurons.
Numerics: exact, up to the order of a sum.
Saves: nothing by itself; `predict-mlp-sparsity` with groups keeps more with as many reads. Without it neighbours are
    random neurons (`natural` and `quality` in `benchmarks/results/contextual_sparsity.json`).
Source: groups of neurons as units of reading are those of HiRE (arXiv 2402.09360), which trains the model for them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from jettison.ir.constants import Constant, scratch_tensor
from jettison.ir.errors import OptionError
from jettison.ir.match import Miss
from jettison.ir.program import MissRecord, Program
from jettison.ir.progress import track
from jettison.passes.base import describe_node
from jettison.passes.mlp_activity import watch
from jettison.passes.mlp_sites import MlpSite, find_mlp
from jettison.passes.neuron_groups import group_neurons
from jettison.passes.options import option
from jettison.passes.requirements import LearnsFromTokens, idle_patterns, require_pattern

# Tokens that say which neurons go together: more find the same groups on the bundled models.
_TOKENS = 4096


@dataclass(frozen=True)
class ClusterNeurons(LearnsFromTokens):
    """See the module docstring."""

    name: ClassVar[str] = "cluster-neurons"
    group: int = option(32, doc="neurons of a group", range="1 or more")
    keep: float = option(0.125, doc="share of the groups that a token will keep", range="above 0, below 1")
    skip: str | None = option(None, doc="regular expression; layers whose weights it is found in stay as they are")

    def __post_init__(self) -> None:
        if self.group < 2:
            raise OptionError(f"[cluster-neurons] group={self.group}: needs 2 or more neurons.")
        if not 0 < self.keep < 1:
            raise OptionError(f"[cluster-neurons] keep={self.keep}: needs a share above 0 and below 1.")
        require_pattern(f"[{self.name}]", "skip", self.skip)

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        """Order the neurons of each layer, in the order of the graph; an order changes nothing for later layers."""
        sites, misses = self.find(program)
        misses += idle_patterns(program, skip=self.skip)
        changed = 0
        with track(self.name, len(sites)) as advance:
            for site, activity in watch(program, sites, self.group, lambda site: site.x, most=_TOKENS):
                kept = max(1, round(self.keep * site.neurons / self.group))
                order = group_neurons((activity.hidden * activity.norms).square(), self.group, kept)
                if order is None:
                    misses.append(MissRecord(describe_node(site.up), "no other order of its neurons keeps 1 % more"))
                else:
                    changed += 1
                    reorder(program, site, order)
                advance(1)
        return changed, misses

    def match(self, node: fx.Node, program: Program) -> MlpSite | Miss | None:
        """A layer whose neurons can be ordered."""
        site = find_mlp(node, program, self.group, self.skip)
        if isinstance(site, MlpSite) and site.is_packed:
            return Miss("its weights are quantised: order neurons before quantize-weights", site.up)
        return site


def reorder(program: Program, site: MlpSite, order: Tensor) -> None:
    """Give a layer's neurons another order, in place.

    Args:
        program: Its constants are replaced.
        site: Its layer.
        order: `[F] i64`, the neurons in their new order.
    """
    for linear in site.linears:
        for operand in ("weight", "bias"):
            name = site.constant(linear, operand)
            is_by_neuron = linear is not site.down or operand == "weight"
            if name is not None and is_by_neuron:
                axis = 1 if linear is site.down else 0
                program.constants[name] = permuted(program.constants[name], order, axis)


def permuted(constant: Constant, order: Tensor, axis: int) -> Constant:
    """A constant with another order of rows or columns, stored as it was, under the same name."""
    made = scratch_tensor(constant.shape, constant.stored_dtype)
    stored = constant.blocks[0] if len(constant.blocks) == 1 else torch.cat(constant.blocks)
    torch.index_select(stored, axis, order, out=made)
    return Constant(constant.name, made, constant.dtype)
