"""How much a model loses when one weight is stored in one format: what allocation decides by.

The model runs once over the calibration batches; it stops before the linears that read a value, encodes their weights
in every format from the statistics of that value, and asks what each would cost.

`kl`: KL divergence of the next-token probabilities from those of the model as it stands, with this weight alone in the
format, in nats per token, over a few of the batches: a second run stands at the same place and goes on to the end once
for each weight and format. Nothing is assumed but that losses add up.

`hessian`: the squared error of the linear's outputs, `Tr(E H ET)` with `H = sum x xT`, over that of the outputs
themselves, times the gain of its block. The gain is measured once per block, with all weights of the block in one
format at a time: KL over the sum of those errors, so that it has the terms between the linears of a block. (A trace of
the loss's Hessian times `||E||^2`, as HAWQ-V2 has it, would be wrong where inputs have outliers: the error is not the
same in all directions.) One run to the end per block and format instead of one per weight and format.

Source: KL per layer ZeroQ (arXiv 2001.00281); inter-layer terms CLADO (arXiv 2307.05657), there for pairs of layers.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, fx

from jettison.ir.chunked_run import ChunkedRun
from jettison.ir.compare import logits_drift
from jettison.ir.constants import Constant
from jettison.ir.match import layer_index
from jettison.ir.program import Program
from jettison.passes.formats import WeightFormat
from jettison.passes.methods.base import InputStatistics, Method
from jettison.passes.methods.finished_layers import Encoded
from jettison.passes.methods.layerwise import encode_weights, inputs_of_weights

# Tokens that losses are measured on, and bytes of their logits, which are kept.
PROBE_TOKENS = 4096
_LOGITS_BYTES = 256 << 20


@dataclass(frozen=True)
class Choice:
    """A weight in a format.

    Attributes:
        format: The format.
        bytes: Of all its parts.
        loss: What it costs, in nats per token.
    """

    format: WeightFormat
    bytes: int
    loss: float


class Probe:
    """A few batches, and what the program as it stands makes of them.

    Args:
        program: With `forward`.
        batches: Inputs by name; as many of the first ones are taken as are needed.
    """

    def __init__(self, program: Program, batches: Sequence[Mapping[str, Tensor]]) -> None:
        tokens = min(PROBE_TOKENS, _LOGITS_BYTES // (4 * program.info.vocab_size))
        taken: list[Mapping[str, Tensor]] = []
        for batch in batches:
            left = tokens - sum(given["input_ids"].numel() for given in taken)
            rows = min(len(batch["input_ids"]), left // batch["input_ids"].shape[1])
            if rows < 1 and taken:
                break
            taken.append({name: value[: max(1, rows)] for name, value in batch.items()})
        self.batches = taken
        self._has_logits = program.info.kind == "decoder"
        self._expected = list(ChunkedRun(program, "forward", taken).outputs())

    def loss(self, run: ChunkedRun) -> float:
        """KL(program || run) in nats per token of a run over these batches, which may stand anywhere.

        Of an encoder, the relative squared error of its first output.
        """
        total, tokens = 0.0, 0.0
        for expected, found in zip(self._expected, run.outputs(), strict=True):
            if not self._has_logits:
                total += float((found - expected).square().sum(dtype=torch.float64))
                tokens += float(expected.square().sum(dtype=torch.float64))
                continue
            drift = logits_drift(expected, found)
            assert drift.kl is not None, "of logits"
            total, tokens = total + drift.kl * drift.tokens, tokens + drift.tokens
        return total / tokens if tokens else 0.0

    def loss_of(self, program: Program) -> float:
        """KL(program then || program now)."""
        return self.loss(ChunkedRun(program, "forward", self.batches))


class Meter:
    """Prices every weight in every format.

    Args:
        program: With `forward` and calibration batches; not changed.
        linears: Calls of `aten.linear`, whose weights are constants.
        tables: Names of weights that embeddings read; of a tied one `linears` has the head.
        formats: What to store in.
        method: Rounds.
        probe: Measures.
    """

    def __init__(
        self,
        program: Program,
        linears: Sequence[fx.Node],
        tables: Container[str],
        formats: Sequence[WeightFormat],
        method: Method,
        probe: Probe,
    ) -> None:
        self._program, self._tables, self._method, self._probe = program, tables, method, probe
        self._formats = [method.adapted(each) for each in formats]
        self._place = {node: index for index, node in enumerate(program.entries["forward"].graph.nodes)}
        self._readers: dict[fx.Node, list[str]] = {}
        for name, read in inputs_of_weights(program, linears).items():
            self._readers.setdefault(read[-1], []).append(name)

    def by_kl(self, advance: Callable[[float], object]) -> dict[str, list[Choice]]:
        """Each weight alone; see the module docstring. `advance` is told how many weights are done."""
        choices: dict[str, list[Choice]] = {}
        run = ChunkedRun(self._program, "forward", self._probe.batches)
        for x, names, statistics in self._sites(has_statistics=self._method.needs_inputs):
            run.advance(x)
            for name, encoded in self._encoded(names, statistics).items():
                losses = [self._loss_with({name: each}, run) for each in encoded]
                choices[name] = _choices(encoded, losses)
                advance(1)
        return choices

    def by_hessian(self, advance: Callable[[float], object]) -> dict[str, list[Choice]]:
        """Errors of outputs, scaled to the loss of their block; see the module docstring."""
        choices: dict[str, list[Choice]] = {}
        run = ChunkedRun(self._program, "forward", self._probe.batches)
        block: _Block | None = None
        for x, names, statistics in self._sites(has_statistics=True):
            index = layer_index(names[0])
            if block is None or index is None or block.index != index:
                choices |= self._close(block)
                run.advance(x)
                block = _Block(index, run.fork())
            for name, encoded in self._encoded(names, statistics).items():
                weight = self._program.constants[name].value().to(torch.float32)
                scale = _squared(weight, statistics)
                block.encoded[name] = encoded
                block.errors[name] = [_squared(each.dense() - weight, statistics) / scale for each in encoded]
                advance(1)
        return choices | self._close(block)

    def table(self, weight: Constant) -> list[Choice]:
        """A table that no linear reads, alone."""
        encoded = self._encoded([weight.name], None)[weight.name]
        return _choices(encoded, [self._loss_with({weight.name: each}, None) for each in encoded])

    def _sites(self, *, has_statistics: bool) -> Iterator[tuple[fx.Node, list[str], InputStatistics]]:
        """What linears read, in the order of the graph, their weights, and the statistics, which may be left empty."""
        assert self._program.calibration is not None, "the pass requires it"
        run = ChunkedRun(self._program, "forward", self._program.calibration())
        for x in sorted(self._readers, key=lambda node: self._place[node]):
            statistics = InputStatistics(x.meta["val"].shape[-1])
            if has_statistics:
                run.advance(x, statistics.add)
            yield x, self._readers[x], statistics

    def _encoded(self, names: Sequence[str], statistics: InputStatistics | None) -> dict[str, list[Encoded]]:
        weights = [self._program.constants[name] for name in names]
        seen = statistics if self._method.needs_inputs else None
        made = [encode_weights(weights, self._method, each, seen, lambda _: None) for each in self._formats]
        return {name: [each[name] for each in made] for name in names}

    def _loss_with(self, encoded: Mapping[str, Encoded], run: ChunkedRun | None) -> float:
        """Loss with some weights replaced, from where a run stands; from the beginning where one is a table."""
        if run is None or any(name in self._tables for name in encoded):
            run = ChunkedRun(self._program, "forward", self._probe.batches)
        changed = run.fork()
        for name, each in encoded.items():
            changed.weights[name] = partial(each.dense, self._program.constants[name].dtype)
        return self._probe.loss(changed)

    def _close(self, block: _Block | None) -> dict[str, list[Choice]]:
        """Share the loss of a block among its weights, in each format by their errors."""
        if block is None:
            return {}
        losses: dict[str, list[float]] = {name: [] for name in block.encoded}
        for index in range(len(self._formats)):
            joint = self._loss_with({name: each[index] for name, each in block.encoded.items()}, block.run)
            total = sum(errors[index] for errors in block.errors.values())
            for name, errors in block.errors.items():
                losses[name].append(joint * errors[index] / total if total else 0.0)
        return {name: _choices(block.encoded[name], losses[name]) for name in losses}


@dataclass
class _Block:
    """Weights of one layer of the model, and a run that stands before it."""

    index: int | None
    run: ChunkedRun
    encoded: dict[str, list[Encoded]] = field(default_factory=dict)
    errors: dict[str, list[float]] = field(default_factory=dict)


def _choices(encoded: Sequence[Encoded], losses: Sequence[float]) -> list[Choice]:
    return [
        Choice(each.format, each.format.bytes(each.shape), loss) for each, loss in zip(encoded, losses, strict=True)
    ]


def _squared(error: Tensor, statistics: InputStatistics) -> float:
    """`Tr(E H ET)`: the squared error of the outputs, summed over the tokens."""
    return float(((error @ statistics.products) * error).sum(dtype=torch.float64))
