"""What feed-forward layers do on the calibration tokens, one layer after the other in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from jettison.ir.allocator import give_back
from jettison.ir.chunked_run import ChunkedRun
from jettison.ir.errors import UnsupportedError
from jettison.ir.match import is_call
from jettison.ir.ops import quantized_linear
from jettison.ir.program import Program
from jettison.passes.base import describe_node
from jettison.passes.formats import format_from_text
from jettison.passes.mlp_sites import MlpSite
from jettison.passes.residual_stream import residual_after

aten = torch.ops.aten
# Most bytes of each kind of values that are kept of a layer.
_KEPT_BYTES = 256 << 20


@dataclass(frozen=True)
class MlpActivity:
    """A layer on some tokens.

    Attributes:
        inputs: `[T, E] f32`, what a predictor is to read.
        scores: `[T, G] f32`, what leaving a group out costs each of these tokens; see `Samples`.
        hidden: `[T', F] f32`, the activations of the first T' <= T tokens.
        energy: Mean square of what the layer's result is added to, with it: of a token, summed over E.
        norms: `[F] f32`, of the neurons' rows of the second matrix.
    """

    inputs: Tensor
    scores: Tensor
    hidden: Tensor
    energy: float
    norms: Tensor


def watch(
    program: Program, sites: Sequence[MlpSite], group: int, source: Callable[[MlpSite], fx.Node], *, most: int
) -> Iterator[tuple[MlpSite, MlpActivity]]:
    """Run the calibration tokens through `forward` and look at each layer when they come to it.

    Args:
        program: With `forward` and calibration batches; it is not changed.
        sites: In the order of the graph.
        group: Neurons of a group.
        source: What a predictor of a layer is to read.
        most: Tokens that are kept, at most.

    Yields:
        Each layer with what it did. What the one before did can go then.

    Raises:
        UnsupportedError: A value is not finite.
    """
    assert program.calibration is not None, "the pass requires it"
    batches = program.calibration()
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    run = ChunkedRun(program, "forward", batches)
    for site in sites:
        norms = row_norms(program, site)
        read = _Rows(min(most, _KEPT_BYTES // (4 * site.width)), tokens)
        neurons = _Rows(min(read.count, _KEPT_BYTES // (4 * site.neurons)), tokens)
        worth = _Rows(read.count, tokens)
        total = _Energy()
        run.advance(source(site), read.add)

        def look(hidden: Tensor, neurons: _Rows = neurons, worth: _Rows = worth, norms: Tensor = norms) -> None:
            neurons.add(hidden)
            worth.add(hidden, lambda rows: (rows * norms).square().unflatten(-1, (-1, group)).sum(-1))

        run.advance(site.hidden, look)
        run.advance(residual_after(site.down)[1], total.add)
        if not bool(worth.rows().isfinite().all()):
            raise UnsupportedError(
                f"[{describe_node(site.up)}] what its neurons compute is not finite on the calibration tokens, so "
                "nothing can be learned from it. Give another text, or leave the layer out (skip='...')."
            )
        yield site, MlpActivity(read.rows(), worth.rows(), neurons.rows(), total.mean, norms)
        del read, neurons, worth
        give_back()


class _Rows:
    """Some rows of values that come in batches, evenly spread.

    Args:
        count: How many are kept, at most.
        total: How many come.
    """

    def __init__(self, count: int, total: int) -> None:
        self.count = max(1, min(count, total))
        self._step = -(-total // self.count)
        self._seen = 0
        self._kept: list[Tensor] = []

    def add(self, values: Tensor, reduced: Callable[[Tensor], Tensor] | None = None) -> None:
        """Keep rows of `[..., N]`, of what a function makes of them."""
        flat = values.reshape(-1, values.shape[-1])
        chosen = flat[-self._seen % self._step :: self._step].to(torch.float32)
        self._seen += len(flat)
        self._kept.append(chosen.clone() if reduced is None else reduced(chosen))

    def rows(self) -> Tensor:
        """`[count, N] f32`."""
        return torch.cat(self._kept)


class _Energy:
    """The mean over tokens of the sum of squares."""

    def __init__(self) -> None:
        self._sum, self._tokens = 0.0, 0

    def add(self, values: Tensor) -> None:
        """Count `[..., E]`."""
        self._sum += float(values.to(torch.float32).square().sum())
        self._tokens += values.numel() // values.shape[-1]

    @property
    def mean(self) -> float:
        """Over all that was counted."""
        return self._sum / max(1, self._tokens)


def row_norms(program: Program, site: MlpSite) -> Tensor:
    """`[F] f32`: the norm of what each neuron of activation one adds to the result."""
    weight = dense_weight(program, site, site.down)
    return weight.norm(dim=0)


def dense_weight(program: Program, site: MlpSite, linear: fx.Node) -> Tensor:
    """The weight `[N, K] f32` of one of a layer's linears, decoded."""
    if not is_call(linear, quantized_linear):
        name = site.constant(linear, "weight")
        assert name is not None, "found"
        return program.constants[name].value().to(torch.float32)
    codes = site.constant(linear, "codes")
    packed = next(each for each in program.packed.values() if each.parts.get("codes") == codes)
    parts = {part: program.constants[name].value() for part, name in packed.parts.items()}
    return format_from_text(packed.format).decode(parts, (packed.shape[0], packed.shape[1]))


@dataclass(frozen=True)
class Dropped:
    """What a layer loses if every token keeps its best groups alone.

    Attributes:
        energy: Mean square of what is lost, over that of the residual stream behind the layer.
        absent: `[G + 1, E] f32`, what each group contributes on average to tokens that leave it out, which is added in
            its place, and the sum of it; None where nothing is.
    """

    energy: float
    absent: Tensor | None


def dropped(activity: MlpActivity, group: int, kept: int, down: Tensor, stand_in: bool) -> Dropped:
    """Leave groups out on the calibration tokens.

    Args:
        activity: Of the layer.
        group: Neurons of a group.
        kept: Groups that each token keeps.
        down: `[E, F] f32`.
        stand_in: Whether something is added in the place of a group.
    """
    worth = (activity.hidden * activity.norms).square().unflatten(-1, (-1, group)).sum(-1)
    left_out = torch.ones_like(worth).scatter_(-1, worth.topk(kept, -1).indices, 0.0)
    lost = (activity.hidden * left_out.repeat_interleave(group, -1)) @ down.T
    absent = None
    if stand_in:
        by_group = activity.hidden.unflatten(-1, (-1, group))
        mean = torch.einsum("tg,tgn->gn", left_out, by_group) / left_out.sum(0).clamp_min(1.0)[:, None]
        means = torch.einsum("gn,egn->ge", mean, down.unflatten(-1, (-1, group)))
        lost -= left_out @ means
        absent = torch.cat([means, means.sum(0, keepdim=True)])
    return Dropped(float(lost.square().sum(-1).mean()) / max(activity.energy, 1e-30), absent)
