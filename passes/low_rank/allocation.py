"""The rank of every weight under a budget of bytes for all: what `factorize-linear{rank=auto}` decides by.

The model runs once over the calibration batches, as it is. At each input the singular values of the whitened weights
tell what every rank would lose of their results; and a second run, over a few of the batches, goes on from there to the
end once with factors of a middle rank. What that costs the model (KL divergence of the next-token probabilities; of an
encoder, the relative squared error of its outputs), over what those factors lose, is the price of an error there. The
choice with the least sum of prices within the budget is found exactly (`knapsack.py`).

Source: ASVD (arXiv 2312.05821) replaces one layer at a time by some ranks, too, and looks for one threshold of
perplexity; losses in one unit and a knapsack are what `allocate-bits` has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from jettison.ir.allocator import give_back
from jettison.ir.chunked_run import ChunkedRun
from jettison.ir.errors import OptionError
from jettison.ir.program import Program
from jettison.passes.factorizers import Factorizer
from jettison.passes.knapsack import cheapest, least_bytes
from jettison.passes.linear_sites import InputSite
from jettison.passes.low_rank.factors import LowRank, Remainder, factorized, spectrum_of
from jettison.passes.low_rank.run import require_finite
from jettison.passes.low_rank.sizes import Ranks, Sizes
from jettison.passes.methods.base import InputStatistics
from jettison.passes.methods.sensitivity import Probe
from jettison.passes.whitening import Whitening

# Shares of the parameters that are offered; with a remainder, whose factors are to be small, other ones. The one that
# is measured is in the middle.
_LEVELS = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_REMAINDER_LEVELS = (0.01, 0.02, 0.04, 0.06, 0.08, 0.12, 0.16, 0.25)
_DENSE = "the budget has room for it as it is, and other weights lose less for the bytes"


@dataclass(frozen=True)
class RankChoice:
    """Ranks of the weights that are decided on together, or none: they stay dense.

    Attributes:
        ranks: By the names of those that share columns.
        bytes: Of all factors and remainders.
        loss: What they cost.
    """

    ranks: dict[tuple[str, ...], int]
    bytes: int
    loss: float


def price(
    program: Program,
    sites: Sequence[InputSite],
    sizes: Sizes,
    method: Factorizer,
    seed: int,
    advance: Callable[[float], object],
) -> dict[tuple[str, ...], list[RankChoice]]:
    """Every site at every level, the weights of one input together where they may share columns.

    Args:
        program: With `forward` and calibration batches; not changed.
        sites: In the order of the graph.
        sizes: What factors take.
        method: For which inputs the factors are best.
        seed: Of the randomised decomposition.
        advance: Told how many sites are done.

    Returns:
        By the names of the weights that are decided on together.
    """
    assert program.calibration is not None, "the pass requires it"
    batches = program.calibration()
    probe = Probe(program, batches)
    run, measured = (ChunkedRun(program, "forward", each, is_on_disk=True) for each in (batches, probe.batches))
    priced: dict[tuple[str, ...], list[RankChoice]] = {}
    for site in sites:
        statistics = InputStatistics(site.channels)
        run.advance(site.x, statistics.add)
        measured.advance(site.x)
        require_finite(statistics, site)
        whitening = Whitening(method.second_moment(site.channels, statistics))
        remainder = None if sizes.remainder is None else Remainder.of(sizes.remainder, statistics)
        joint = sizes.joint(site)
        for names in [joint] if joint is not None else [(name,) for _, name in site.linears]:
            curve = _curve(names, sizes, whitening, remainder, seed)
            middle = curve[len(curve) // 2]
            factors = [
                factorized(sizes.weights(each), rank, whitening, remainder, seed) for each, rank in middle.ranks.items()
            ]
            gain = _measured(measured, factors, probe) / middle.loss if middle.loss > 0 else 0.0
            dense = sum(weight.stored_bytes for weight in sizes.weights(names))
            choices = [RankChoice(each.ranks, each.bytes, each.loss * gain) for each in curve if each.bytes < dense]
            priced[names] = [RankChoice({}, dense, 0.0), *choices]
        del statistics, whitening, remainder
        give_back()
        advance(1)
    return priced


def _curve(
    names: tuple[str, ...], sizes: Sizes, whitening: Whitening, remainder: Remainder | None, seed: int
) -> list[RankChoice]:
    """Choices by level, with the share of their results that weights lose on average."""
    alone: list[tuple[str, ...]] = [(name,) for name in names]
    partitions = [alone] if len(names) == 1 else [[names]] if sizes.share is True else [alone, [names]]
    levels = _LEVELS if sizes.remainder is None else _REMAINDER_LEVELS
    spectra = {
        unit: spectrum_of(sizes.weights(unit), whitening) for units in partitions for unit in units if remainder is None
    }

    def lost(unit: tuple[str, ...], rank: int) -> float:
        if remainder is None:
            return spectra[unit].lost(rank)
        return factorized(sizes.weights(unit), rank, whitening, remainder, seed).loss

    curve = []
    for level in levels:
        choices = []
        for units in partitions:
            ranks = {unit: sizes.rank_of_ratio(unit, level) for unit in units}
            loss = sum(lost(unit, rank) * len(unit) for unit, rank in ranks.items()) / len(names)
            choices.append(RankChoice(ranks, sum(sizes.bytes(unit, rank) for unit, rank in ranks.items()), loss))
        curve.append(min(choices, key=lambda choice: choice.loss))
    return curve


def _measured(run: ChunkedRun, factors: Sequence[LowRank], probe: Probe) -> float:
    """What factors cost the model, from where a run stands."""
    changed = run.fork()
    for low_rank in factors:
        for index, name in enumerate(low_rank.names):
            changed.products[name] = low_rank.product(index)
    return probe.loss(changed)


def allocate(priced: Mapping[tuple[str, ...], Sequence[RankChoice]], budget: int, fixed: int) -> Ranks:
    """The ranks with the least sum of losses within a budget.

    Args:
        priced: All choices.
        budget: Most bytes of all weights.
        fixed: Of those that are not priced.

    Raises:
        OptionError: The smallest choices are larger than the budget.
    """
    by_text = {"|".join(names): names for names in priced}
    choices = {text: priced[names] for text, names in by_text.items()}
    taken = cheapest(choices, budget - fixed)
    if taken is None:
        least = fixed + least_bytes(choices)
        raise OptionError(
            f"[factorize-linear] budget={budget:,} bytes: the smallest ranks take {least:,}, of which {fixed:,} are of "
            "weights that stay as they are (the token table, the head, norms). Allow that, or quantise those first."
        )
    found = Ranks({}, {})
    for text, index in taken.items():
        choice = choices[text][index]
        found.chosen.update(choice.ranks)
        if not choice.ranks:
            found.declined.update(dict.fromkeys(by_text[text], _DENSE))
    return found
