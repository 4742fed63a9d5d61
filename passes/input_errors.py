"""What linears lose that read only the largest channels of their inputs, on the calibration tokens.

Errors of all linears are told as shares of the residual stream, so that they can be compared: what a linear loses of
its result, times the share of the stream that comes from it. Without that, inputs of linears that end a layer look
cheap beside those that begin one (DESIGN.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jettison.ir.allocator import give_back
from jettison.ir.chunked_run import ChunkedRun
from jettison.ir.constants import Constant
from jettison.ir.errors import UnsupportedError
from jettison.ir.program import Program
from jettison.passes.base import describe_node
from jettison.passes.linear_sites import InputSite
from jettison.passes.residual_stream import residual_after

aten = torch.ops.aten
_TOKENS = 512


@dataclass(frozen=True)
class ErrorCurve:
    """What leaving channels of an input out costs.

    Attributes:
        site: The input.
        kept: Numbers of channels, from all of them downwards.
        errors: `[numbers, linears] f32`.
    """

    site: InputSite
    kept: tuple[int, ...]
    errors: Tensor


def error_curves(
    program: Program, sites: Sequence[InputSite], numbers: Callable[[int], tuple[int, ...]]
) -> Iterator[ErrorCurve]:
    """Run the calibration tokens through `forward` and look at each input when they come to it.

    Args:
        program: With `forward` and calibration batches; it is not changed.
        sites: In the order of the graph.
        numbers: Of channels to try, given how many there are.

    Yields:
        A curve for each input. At a time there are the sampled inputs of one, or of those that other ones lie between.

    Raises:
        UnsupportedError: A value is not finite.
    """
    assert program.calibration is not None, "the pass requires it"
    batches = program.calibration()
    sampled = _sampler([tuple(batch["input_ids"].shape) for batch in batches])
    run = ChunkedRun(program, "forward", batches)
    after = {linear: residual_after(linear) for site in sites for linear, _ in site.linears}
    inputs = {site.x: torch.empty(0) for site in sites}
    energies = {node: torch.empty(0) for linear, residual in after.items() for node in (linear, *residual)}
    waiting = {site: {site.x, *(n for linear, _ in site.linears for n in (linear, *after[linear]))} for site in sites}
    for node in [node for node in program.entries["forward"].graph.nodes if node in inputs or node in energies]:
        rows: list[Tensor] = []
        run.advance(node, lambda values, rows=rows: rows.append(sampled(len(rows), values)))
        if node in inputs:
            inputs[node] = torch.cat(rows)
        if node in energies:
            energies[node] = torch.cat([each.square().sum(-1) for each in rows])
        for site in [site for site, needed in waiting.items() if node in needed]:
            waiting[site].discard(node)
            if not waiting[site]:
                del waiting[site]
                kept, errors = numbers(site.channels), []
                for linear, name in site.linears:
                    own, (part, whole) = energies[linear], (energies[each] for each in after[linear])
                    share = (part / whole.clamp_min(1e-30)).clamp_max(1.0)
                    errors.append(_lost(inputs[site.x], kept, program.constants[name], own, share))
                yield ErrorCurve(site, kept, _finite(torch.stack(errors, -1), site))
                del inputs[site.x]
                give_back()


def _finite(errors: Tensor, site: InputSite) -> Tensor:
    if not bool(errors.isfinite().all()):
        raise UnsupportedError(
            f"[{describe_node(site.linears[0][0])}] what it reads is not finite on the calibration tokens, so nothing "
            "can be learned from it. Give another text, or leave it out (skip='...')."
        )
    return errors


def _sampler(shapes: Sequence[tuple[int, ...]]) -> Callable[[int, Tensor], Tensor]:
    """Picks about `_TOKENS` rows of values `[B, S, K]` or `[B * S, K]` that come in batches, evenly spread, as f32.

    The first token of a window is left out: its values are like no others', and prompts begin with it.
    """
    step = max(1, sum(rows * max(1, length - 1) for rows, length in shapes) // _TOKENS)

    def pick(batch: int, values: Tensor) -> Tensor:
        by_window = values.reshape(*shapes[batch], -1)
        later = by_window[:, 1:] if by_window.shape[1] > 1 else by_window
        return later.flatten(0, 1)[::step].to(torch.float32)

    return pick


def _lost(x: Tensor, kept: Sequence[int], weight: Constant, energy: Tensor, share: Tensor) -> Tensor:
    """What the residual stream loses if a linear reads so many channels.

    Args:
        x: `[T, K] f32`.
        kept: Numbers of channels.
        weight: `[N, K]`.
        energy: `[T] f32`, the squares of its results.
        share: `[T] f32`, of the squares of the residual stream, those of what comes from it.

    Returns:
        `[numbers] f32`, the mean over tokens. A token loses no more than all, as one would whose result is nearly zero.
    """
    matrix, order = weight.value().to(torch.float32), x.abs().argsort(-1, descending=True)
    errors = []
    for number in kept:
        dropped = x.scatter(-1, order[:, :number], 0.0)
        lost = ((dropped @ matrix.T).square().sum(-1) / energy.clamp_min(1e-30)).clamp_max(1.0)
        errors.append((lost * share).mean())
    return torch.stack(errors)
