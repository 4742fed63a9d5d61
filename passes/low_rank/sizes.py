"""Which rank the factors of a weight get, which weights share columns, and what stays dense."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from jettison.ir.constants import Constant
from jettison.ir.program import Program
from jettison.passes.formats import IntGroups
from jettison.passes.linear_sites import InputSite
from jettison.passes.low_rank.factors import LowRank, Remainder, factorized, low_rank_bytes, spectrum_of
from jettison.passes.whitening import Spectrum, Whitening

# Ranks that a share of the parameters comes to are multiples of this from `_WIDE` on: rows of factors in 16 bits then
# begin where GPUs load 16 bytes at once, and so little of the rank is lost that it costs less than 1/16 of it.
_ALIGNED, _WIDE = 8, 128


@dataclass(frozen=True)
class Ranks:
    """What becomes of weights.

    Attributes:
        chosen: Rank by the names of the weights that share columns. A weight may be there alone and among others: the
            factors decide then.
        declined: Reasons of those that stay dense.
    """

    chosen: dict[tuple[str, ...], int]
    declined: dict[str, str]


@dataclass(frozen=True)
class Sizes:
    """What factors take.

    Attributes:
        program: Has the weights.
        remainder: Format of what is added to the product of the factors, or None.
        share: Whether linears of one input share columns.
    """

    program: Program
    remainder: IntGroups | None
    share: bool | Literal["auto"]

    def weights(self, names: Sequence[str]) -> list[Constant]:
        """By name."""
        return [self.program.constants[name] for name in names]

    def joint(self, site: InputSite) -> tuple[str, ...] | None:
        """The names of the weights of a site if they may share columns."""
        names = tuple(name for _, name in site.linears)
        stored = {(weight.dtype, weight.stored_dtype) for weight in self.weights(names)}
        return names if len(names) > 1 and self.share is not False and len(stored) == 1 else None

    def units(self, site: InputSite) -> list[tuple[str, ...]]:
        """Which weights may share columns: each alone, all of them, or both."""
        alone: list[tuple[str, ...]] = [(name,) for _, name in site.linears]
        joint = self.joint(site)
        if joint is None:
            return alone
        return [joint] if self.share is True else [*alone, joint]

    def shape(self, names: Sequence[str]) -> tuple[int, int]:
        """`(N, K)` of weights one below the other."""
        shapes = [weight.shape for weight in self.weights(names)]
        return sum(shape[0] for shape in shapes), shapes[0][1]

    def bytes(self, names: Sequence[str], rank: int) -> int:
        """Of the factors, and of the remainders."""
        weights = self.weights(names)
        shapes = [(weight.shape[0], weight.shape[1]) for weight in weights]
        return low_rank_bytes(shapes, rank, weights[0].stored_dtype.itemsize, self.remainder)

    def rank_of_ratio(self, names: Sequence[str], ratio: float) -> int:
        """The largest rank whose factors have at most a share of the parameters; 1 at least, and large ones aligned."""
        rows, columns = self.shape(names)
        rank = max(1, int(ratio * rows * columns / (rows + columns)))
        return rank if rank < _WIDE else rank // _ALIGNED * _ALIGNED

    def _wanted(self, names: Sequence[str], wanted: float | int) -> int:
        """The rank that a ratio, or a rank of each of the weights, comes to."""
        if isinstance(wanted, float):
            return self.rank_of_ratio(names, wanted)
        parameters = sum(wanted * sum(self.shape([name])) for name in names)
        return max(1, min(parameters // sum(self.shape(names)), *self.shape(names)))

    def too_large(self, names: Sequence[str], rank: int) -> str | None:
        """Why factors of a rank are not worth it, or None."""
        (rows, columns), dense = self.shape(names), sum(weight.stored_bytes for weight in self.weights(names))
        if self.remainder is not None:
            taken = self.bytes(names, rank)
            if taken < dense:
                return None
            return f"the factors and the residual would take {taken:,} bytes, and the weight takes {dense:,}"
        if rank * (rows + columns) < rows * columns:
            return None
        return (
            f"factors of rank {rank} would have {rank * (rows + columns):,} parameters, and the weight has "
            f"{rows * columns:,}: below {-(-rows * columns // (rows + columns))} they are fewer"
        )

    def ranks(self, sites: Sequence[InputSite], wanted: float | int) -> Ranks:
        """The ranks that a ratio, or one rank for all, comes to.

        Args:
            sites: All of them.
            wanted: A float is a share of the parameters, an int a rank.
        """
        found = Ranks({}, {})
        for site in sites:
            units = self.units(site)
            ranks = {names: self._wanted(names, wanted) for names in units}
            reasons = {names: self.too_large(names, rank) for names, rank in ranks.items()}
            for names in units:
                reason = reasons[names]
                if reason is not None and (len(names) == 1 or self.share is True):
                    found.declined.update(dict.fromkeys(names, reason))
                elif reason is None and (len(names) == 1 or not any(reasons.values())):
                    found.chosen[names] = ranks[names]
        return found


def best_factors(
    program: Program, site: InputSite, ranks: Ranks, whitening: Whitening, remainder: Remainder | None, seed: int
) -> list[LowRank]:
    """The factors of a site, shared where that was left open and loses less.

    Args:
        program: Has the weights.
        site: Of them.
        ranks: As chosen.
        whitening: Of the input.
        remainder: What is added to the product, or None.
        seed: Of the randomised decomposition.
    """
    mine = {name for _, name in site.linears}
    chosen = {names: rank for names, rank in ranks.chosen.items() if mine.issuperset(names)}
    weights = {names: [program.constants[name] for name in names] for names in chosen}
    alone = [names for names in chosen if len(names) == 1]
    shared = [names for names in chosen if len(names) > 1]
    spectra: dict[tuple[str, ...], Spectrum] = {}
    made: dict[tuple[str, ...], LowRank] = {}
    if alone and shared:
        if remainder is None:  # values alone, without factors, are fast
            spectra = {names: spectrum_of(weights[names], whitening, rank, seed) for names, rank in chosen.items()}
            losses = {names: spectra[names].lost(rank) for names, rank in chosen.items()}
        else:
            made = {
                names: factorized(weights[names], rank, whitening, remainder, seed) for names, rank in chosen.items()
            }
            losses = {names: each.loss for names, each in made.items()}
        is_shared = losses[shared[0]] < sum(losses[names] for names in alone) / len(alone)
        alone, shared = ([], shared) if is_shared else (alone, [])
    return [
        made.get(names)
        or factorized(weights[names], chosen[names], whitening, remainder, seed, spectra.pop(names, None))
        for names in (*shared, *alone)
    ]
