"""Prune the weights of a model in the order in which it computes, each from what it reads once all before it are.

One run over the calibration batches serves all, as for `quantize-weights` (methods/layerwise.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from jettison.ir.allocator import give_back
from jettison.ir.chunked_run import ChunkedRun
from jettison.ir.constants import Constant, scratch_tensor
from jettison.ir.errors import UnsupportedError
from jettison.ir.program import Program
from jettison.passes.base import describe_node
from jettison.passes.linear_sites import InputSite
from jettison.passes.pruners.base import Pattern, Pruner, Statistics


class PruningRun:
    """The pruned weights of all sites, one after the other.

    Args:
        program: With `forward`, and calibration batches where the pruner looks at inputs; it is not changed.
        sites: In the order of the graph.
        pruner: Chooses.
        pattern: How many, and where.
        step: Text of the pass, by which the program's finished layers are known.
    """

    def __init__(
        self, program: Program, sites: Sequence[InputSite], pruner: Pruner, pattern: Pattern, step: str
    ) -> None:
        self._program, self._sites, self._pruner, self._pattern = program, sites, pruner, pattern
        self._step = step
        self._done: dict[str, Constant] = {}

    def __iter__(self) -> Iterator[tuple[InputSite, dict[str, Constant]]]:
        """Yields each site and its weights, by name.

        Raises:
            UnsupportedError: What a linear reads, or its weight, is not finite.
        """
        run: ChunkedRun | None = None
        for site in self._sites:
            found = self._finished(site)
            if found is None:
                statistics = self._pruner.statistics(site.channels)
                if statistics is not None:
                    # Not before: an interrupted run may have finished all.
                    run = run or self._start()
                    run.advance(site.x, statistics.add)
                    give_back()
                    _require_finite(statistics, site)
                found = {name: self._pruned(self._program.constants[name], statistics) for _, name in site.linears}
                del statistics
                self._store(found)
                give_back()
            self._done |= found
            if run is not None:
                run.weights.update({name: constant.value for name, constant in found.items()})
            yield site, found

    def _start(self) -> ChunkedRun:
        assert self._program.calibration is not None, "the pass requires it"
        run = ChunkedRun(self._program, "forward", self._program.calibration(), is_on_disk=True)
        run.weights.update({name: constant.value for name, constant in self._done.items()})
        return run

    def _pruned(self, weight: Constant, statistics: Statistics | None) -> Constant:
        """A weight with zeros under its name, stored in the dtype it was."""
        # A copy, which the pruner may write to.
        wide = weight.value().clone().float()
        if not bool(wide.isfinite().all()):
            raise UnsupportedError(
                f"[prune-weights] {weight.name}: it holds numbers that are not finite, so they have no order. Repair "
                "the checkpoint, or leave it out of the pass (skip='...')."
            )
        made = scratch_tensor(weight.shape, weight.stored_dtype)
        made.copy_(self._pruner.prune(wide, self._pattern, statistics))
        return Constant(weight.name, made, weight.dtype)

    def _finished(self, site: InputSite) -> dict[str, Constant] | None:
        """What an interrupted run left."""
        names = [name for _, name in site.linears]
        if self._program.finished is None:
            return None
        found = self._program.finished.load_tensors(self._step, names)
        if found is None:
            return None
        return {name: Constant(name, found[0][name], self._program.constants[name].dtype) for name in names}

    def _store(self, found: dict[str, Constant]) -> None:
        """Keep the weights of a site, in case that the run is interrupted."""
        if self._program.finished is not None:
            tensors: dict[str, Tensor] = {name: constant.blocks[0] for name, constant in found.items()}
            self._program.finished.store_tensors(self._step, list(found), tensors, {})


def _require_finite(statistics: Statistics, site: InputSite) -> None:
    if not statistics.is_finite():
        raise UnsupportedError(
            f"[prune-weights] {site.linears[0][1]}: what its linear reads ({describe_node(site.x)}) is not finite on "
            "the calibration tokens, so nothing can be learned from it. Give another text, or leave the weight out of "
            "the pass (skip='...')."
        )
