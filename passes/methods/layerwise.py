"""Encode weights in the order in which the model computes, each from what it reads once all before it are encoded.

One run over the calibration batches serves all layers: it stops before the linears that read a value, their weights are
encoded from the statistics of that value, and it goes on with the encoded weights. What is held at a time is the values
that cross that point, the statistics of one input and the weights of one stretch.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from jettison.ir.chunked_run import ChunkedRun
from jettison.ir.constants import Constant, scratch_tensor
from jettison.ir.errors import UnsupportedError
from jettison.ir.match import constant_name, is_call, only_user
from jettison.ir.ops.quantized_linear import row_chunks
from jettison.ir.program import Program
from jettison.passes.base import describe_node
from jettison.passes.formats import WeightFormat
from jettison.passes.methods.base import InputStatistics, Method, RowEncoder
from jettison.passes.methods.input_scaling import Divider, divide_vectors, divided_rows, find_divider

aten = torch.ops.aten


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


def encode_weights(
    weights: Sequence[Constant],
    method: Method,
    weight_format: WeightFormat,
    statistics: InputStatistics | None,
    advance: Callable[[float], object],
    scales: Tensor | None = None,
) -> dict[str, Encoded]:
    """Encode weights that read one input, a few rows at a time: they may be mapped from a file larger than memory.

    Args:
        weights: Each `[N, K]`.
        method: Rounds.
        weight_format: Stores.
        statistics: Of what their linears read, if the method needs them and there is one.
        advance: Told how many stored bytes have been read.
        scales: `[K] f32`, factors of the columns.

    Returns:
        By name.
    """
    encoded: dict[str, Encoded] = {}
    encoders: dict[WeightFormat, RowEncoder] = {}
    for weight in weights:
        shape = (weight.shape[0], weight.shape[1])
        chosen = weight_format.adapted(weight.rows, shape, weight.name)
        encode_rows = encoders.get(chosen)
        if encode_rows is None:
            encode_rows = encoders[chosen] = method.row_encoder(chosen, statistics)
        parts = {part: scratch_tensor(size, dtype) for part, (size, dtype) in chosen.part_specs(shape).items()}
        for rows in row_chunks(*shape, at_most=method.weights_at_once):
            chunk = weight.rows(rows.start, rows.stop)
            made = encode_rows(chunk if scales is None else chunk * scales, weight.name, rows.start)
            for part, values in made.items():
                parts[part][... if part in chosen.shared_parts else rows] = values
            advance(weight.stored_bytes * (rows.stop - rows.start) / shape[0])
        encoded[weight.name] = Encoded(chosen, shape, parts)
    return encoded


@dataclass(frozen=True)
class Layerwise:
    """What came of a run over all layers.

    Attributes:
        encoded: Weights, by name.
        scaled: What divides inputs whose weights were multiplied, and by what; `apply` does it.
    """

    encoded: dict[str, Encoded]
    scaled: list[tuple[Divider, Tensor]]

    def apply(self, program: Program) -> dict[str, Encoded]:
        """Divide what makes the scaled inputs, in place; returns the weights as they are then."""
        encoded = dict(self.encoded)
        for divider, scales in self.scaled:
            divide_vectors(program, divider, scales)
            if divider.rows is not None:
                before = encoded[divider.rows]
                encoded[divider.rows] = replace(before, parts=divided_rows(before.parts, scales))
        return encoded


def encode_layerwise(
    program: Program,
    linears: Sequence[fx.Node],
    method: Method,
    weight_format: WeightFormat,
    advance: Callable[[float], object],
) -> Layerwise:
    """Encode the weights of linears from what they read in the program's calibration batches.

    Args:
        program: With `forward`; it is not changed.
        linears: Calls of `aten.linear` of its graph, whose weights are constants.
        method: Rounds.
        weight_format: Stores.
        advance: Told how many stored bytes of weights are done.

    Raises:
        UnsupportedError: What a linear reads, or its weight, is not finite.
    """
    assert program.calibration is not None, "the pass requires it"
    inputs = inputs_of_weights(program, linears)
    readers: dict[fx.Node, list[str]] = {}
    for name, read in inputs.items():
        for x in read:
            readers.setdefault(x, []).append(name)
    place = {node: index for index, node in enumerate(program.entries["forward"].graph.nodes)}
    run = ChunkedRun(program, "forward", program.calibration())
    found = Layerwise({}, [])
    # A weight that several linears read is encoded with the last of them, from the inputs of all.
    shared: dict[str, InputStatistics] = {}
    for x in sorted(readers, key=lambda node: place[node]):
        statistics = InputStatistics(x.meta["val"].shape[-1])
        run.advance(x, statistics.add)
        _require_finite(statistics, method, readers[x][0], x)
        ready = [program.constants[name] for name in readers[x] if len(inputs[name]) == 1]
        divider = _divider(x, ready, set(linears), found.encoded)
        scales = None
        if divider is not None:
            scales = method.input_scales([weight.value().float() for weight in ready], weight_format, statistics)
        if divider is not None and scales is not None:
            found.scaled.append((divider, scales))
            statistics = statistics.divided(scales)
        made = encode_weights(ready, method, weight_format, statistics, advance, scales)
        for name in readers[x]:
            if name not in made:
                shared.setdefault(name, InputStatistics(len(statistics.magnitudes))).merge(statistics)
                if inputs[name][-1] is x:
                    last = [program.constants[name]]
                    made |= encode_weights(last, method, weight_format, shared.pop(name), advance)
        for name, result in made.items():
            run.weights[name] = partial(_dense, result, program.constants[name].dtype, scales)
        found.encoded.update(made)
    return found


def _dense(encoded: Encoded, dtype: torch.dtype, scales: Tensor | None) -> Tensor:
    """An encoded weight for inputs that are not divided yet."""
    dense = encoded.dense()
    return (dense if scales is None else dense.div_(scales)).to(dtype)


def _divider(
    x: fx.Node, ready: Sequence[Constant], linears: Container[fx.Node], encoded: Mapping[str, Encoded]
) -> Divider | None:
    """What can divide an input whose linears' weights can all be multiplied."""
    names = {weight.name for weight in ready}
    weights = [user.args[1] for user in x.users if is_call(user, aten.linear.default)]
    is_free = all(
        isinstance(weight, fx.Node) and constant_name(weight) in names and only_user(weight) is not None
        for weight in weights
    )
    divider = find_divider(x, linears) if is_free else None
    if divider is None or divider.rows is None:
        return divider
    rows = encoded.get(divider.rows)
    has_scales = rows is not None and rows.parts.get("scales", torch.empty(0)).shape[:1] == rows.shape[:1]
    return divider if has_scales else None


def inputs_of_weights(program: Program, linears: Sequence[fx.Node]) -> dict[str, list[fx.Node]]:
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
