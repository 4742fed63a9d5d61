"""Encode weights in the order in which the model computes, each from what it reads once all before it are encoded.

One run over the calibration batches serves all layers: it stops before the linears that read a value, their weights are
encoded from the statistics of that value, and it goes on with the encoded weights. What is held at a time is the values
that cross that point, the statistics of one input and the weights of one stretch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from jettison.ir.chunked_run import ChunkedRun
from jettison.ir.constants import Constant, scratch_tensor
from jettison.ir.errors import UnsupportedError
from jettison.ir.match import constant_name
from jettison.ir.ops.quantized_linear import row_chunks
from jettison.ir.program import Program
from jettison.passes.base import describe_node
from jettison.passes.formats import WeightFormat
from jettison.passes.methods import InputStatistics, Method


@dataclass(frozen=True)
class Encoded:
    """A weight in a format.

    Attributes:
        format: The format, as it was adapted to the weight.
        shape: `(N, K)` of the weight.
        parts: By name, in tensors that take no anonymous memory where they are large.
    """

    format: WeightFormat
    shape: tuple[int, int]
    parts: dict[str, Tensor]

    def dense(self) -> Tensor:
        """`[N, K]` f32."""
        return self.format.decode(self.parts, self.shape)


def encode_weight(
    weight: Constant,
    method: Method,
    weight_format: WeightFormat,
    statistics: InputStatistics | None,
    advance: Callable[[float], object],
) -> Encoded:
    """Encode a weight a few rows at a time: it may be mapped from a file larger than memory.

    Args:
        weight: `[N, K]`.
        method: Rounds.
        weight_format: Stores.
        statistics: Of what its linear reads, if the method needs them and there is one.
        advance: Told how many stored bytes have been read.
    """
    return next(iter(encode_weights([weight], method, weight_format, statistics, advance).values()))


def encode_weights(
    weights: Sequence[Constant],
    method: Method,
    weight_format: WeightFormat,
    statistics: InputStatistics | None,
    advance: Callable[[float], object],
) -> dict[str, Encoded]:
    """Encode weights that read one input; see `encode_weight`."""
    encoded: dict[str, Encoded] = {}
    encoders = {}
    for weight in weights:
        shape = (weight.shape[0], weight.shape[1])
        chosen = weight_format.adapted(weight.rows, shape, weight.name)
        encode_rows = encoders.get(chosen)
        if encode_rows is None:
            encode_rows = encoders[chosen] = method.row_encoder(chosen, statistics)
        parts = {part: scratch_tensor(size, dtype) for part, (size, dtype) in chosen.part_specs(shape).items()}
        for rows in row_chunks(*shape, at_most=method.weights_at_once):
            made = encode_rows(weight.rows(rows.start, rows.stop), weight.name, rows.start)
            for part, chunk in made.items():
                parts[part][... if part in chosen.shared_parts else rows] = chunk
            advance(weight.stored_bytes * (rows.stop - rows.start) / shape[0])
        encoded[weight.name] = Encoded(chosen, shape, parts)
    return encoded


def encode_layerwise(
    program: Program,
    linears: Sequence[fx.Node],
    method: Method,
    weight_format: WeightFormat,
    advance: Callable[[float], object],
) -> dict[str, Encoded]:
    """Encode the weights of linears from what they read in the program's calibration batches.

    Args:
        program: With `forward`; it is not changed.
        linears: Calls of `aten.linear` of its graph, whose weights are constants.
        method: Rounds.
        weight_format: Stores.
        advance: Told how many stored bytes of weights are done.

    Returns:
        By name of the weight.

    Raises:
        UnsupportedError: What a linear reads, or its weight, is not finite.
    """
    assert program.calibration is not None, "the pass requires it"
    inputs = _inputs_of_weights(program, linears)
    readers: dict[fx.Node, list[str]] = {}
    for name, read in inputs.items():
        for x in read:
            readers.setdefault(x, []).append(name)
    place = {node: index for index, node in enumerate(program.entries["forward"].graph.nodes)}
    run = ChunkedRun(program, "forward", program.calibration())
    encoded: dict[str, Encoded] = {}
    # A weight that several linears read is encoded with the last of them, from the inputs of all.
    shared: dict[str, InputStatistics] = {}
    for x in sorted(readers, key=lambda node: place[node]):
        statistics = InputStatistics(x.meta["val"].shape[-1])
        run.advance(x, statistics.add)
        _require_finite(statistics, method, readers[x][0], x)
        ready = [name for name in readers[x] if len(inputs[name]) == 1]
        made = encode_weights([program.constants[name] for name in ready], method, weight_format, statistics, advance)
        for name in readers[x]:
            if name not in ready:
                shared.setdefault(name, InputStatistics(len(statistics.magnitudes))).merge(statistics)
                if inputs[name][-1] is x:
                    weights = [program.constants[name]]
                    made |= encode_weights(weights, method, weight_format, shared.pop(name), advance)
        for name, result in made.items():
            dtype = program.constants[name].dtype
            run.weights[name] = lambda result=result, dtype=dtype: result.dense().to(dtype)
        encoded |= made
    return encoded


def _inputs_of_weights(program: Program, linears: Sequence[fx.Node]) -> dict[str, list[fx.Node]]:
    """What the linears of each weight read, in the order of the graph."""
    place = {node: index for index, node in enumerate(program.entries["forward"].graph.nodes)}
    inputs: dict[str, dict[fx.Node, None]] = {}
    for node in linears:
        x, name = node.args[0], constant_name(node.args[1])
        assert isinstance(x, fx.Node), "of a linear"
        assert name is not None, "matched"
        inputs.setdefault(name, {})[x] = None
    return {name: sorted(read, key=lambda x: place[x]) for name, read in inputs.items()}


def _require_finite(statistics: InputStatistics, method: Method, name: str, x: fx.Node) -> None:
    if not bool(statistics.products.isfinite().all()):
        raise UnsupportedError(
            f"[{method.name}] {name}: what its linear reads ({describe_node(x)}) is not finite on the calibration "
            "tokens, so nothing can be learned from it. Give another text, or leave the weight out of the pass "
            "(skip='...')."
        )
