"""Factor the weights of a model in the order in which it computes, each from what it reads once all before it are.

One run over the calibration batches serves all, as for `quantize-weights` (methods/layerwise.py). What it holds at a
time is one input's statistics and the weights of one stretch; values that wait for the next stretch lie in files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from jettison.ir.allocator import give_back
from jettison.ir.chunked_run import ChunkedRun
from jettison.ir.errors import UnsupportedError
from jettison.ir.program import Program
from jettison.passes.base import describe_node
from jettison.passes.linear_sites import InputSite
from jettison.passes.low_rank.factors import LowRank
from jettison.passes.methods.base import InputStatistics


class LowRankRun:
    """The factors of all sites, one after the other.

    Args:
        program: With `forward`, and calibration batches where there are to be statistics; it is not changed.
        sites: In the order of the graph.
        factors: Makes those of a site from the statistics of its input.
        step: Text of the pass, by which the program's finished layers are known.
        has_statistics: Whether inputs are looked at.
    """

    def __init__(
        self,
        program: Program,
        sites: Sequence[InputSite],
        factors: Callable[[InputSite, InputStatistics | None], list[LowRank]],
        step: str,
        *,
        has_statistics: bool,
    ) -> None:
        self._program, self._sites, self._factors, self._step = program, sites, factors, step
        self._has_statistics = has_statistics
        self._done: list[LowRank] = []

    def __iter__(self) -> Iterator[list[LowRank]]:
        """Yields the factors of each site.

        Raises:
            UnsupportedError: What a linear reads is not finite.
        """
        run: ChunkedRun | None = None
        for site in self._sites:
            found = self._finished(site)
            if found is None:
                statistics = None
                if self._has_statistics:
                    # Not before: an interrupted run may have finished all.
                    run = run or self._start()
                    statistics = InputStatistics(site.channels)
                    run.advance(site.x, statistics.add)
                    give_back()
                    require_finite(statistics, site)
                found = self._factors(site, statistics)
                del statistics
                self._store(site, found)
                give_back()
            self._done += found
            if run is not None:
                _replace(run, found)
            yield found

    def _start(self) -> ChunkedRun:
        assert self._program.calibration is not None, "the pass requires it"
        run = ChunkedRun(self._program, "forward", self._program.calibration(), is_on_disk=True)
        _replace(run, self._done)
        return run

    def _finished(self, site: InputSite) -> list[LowRank] | None:
        """What an interrupted run left."""
        if self._program.finished is None:
            return None
        found = self._program.finished.load_tensors(self._step, [name for _, name in site.linears])
        if found is None:
            return None
        tensors, told = found
        made = []
        for index, each in enumerate(told["factors"]):
            start = f"{index}."
            own = {name.removeprefix(start): values for name, values in tensors.items() if name.startswith(start)}
            made.append(LowRank.of(own, each))
        return made

    def _store(self, site: InputSite, made: Sequence[LowRank]) -> None:
        """Keep the factors of a site, in case that the run is interrupted."""
        if self._program.finished is None:
            return
        tensors = {
            f"{index}.{name}": values for index, each in enumerate(made) for name, values in each.tensors().items()
        }
        told = {"factors": [each.described() for each in made]}
        self._program.finished.store_tensors(self._step, [name for _, name in site.linears], tensors, told)


def _replace(run: ChunkedRun, made: Sequence[LowRank]) -> None:
    """Let a run go on with factors."""
    for low_rank in made:
        for index, name in enumerate(low_rank.names):
            run.products[name] = low_rank.product(index)


def require_finite(statistics: InputStatistics, site: InputSite) -> None:
    """Refuse inputs that nothing can be learned from.

    Args:
        statistics: Of the input.
        site: Whose it is.

    Raises:
        UnsupportedError: Some are not finite.
    """
    if not bool(statistics.products.isfinite().all()):
        raise UnsupportedError(
            f"[factorize-linear] {site.linears[0][1]}: what its linear reads ({describe_node(site.x)}) is not finite "
            "on the calibration tokens, so nothing can be learned from it. Give another text, or leave the weight out "
            "of the pass (skip='...')."
        )
