"""Encode weights in the order in which the model computes, each from what it reads once all before it are encoded.

One run over the calibration batches serves all layers: it stops before the linears that read a value, their weights are
encoded from the statistics of that value, and it goes on with the encoded weights. What is held at a time is the values
that cross that point, the statistics of one input and the weights of one stretch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, fx

from jettison.ir.allocator import give_back
from jettison.ir.chunked_run import ChunkedRun
from jettison.ir.constants import Constant, scratch_tensor
from jettison.ir.errors import UnsupportedError
from jettison.ir.match import constant_name, is_call, only_user
from jettison.ir.ops.quantized_linear import row_chunks
from jettison.ir.program import Program
from jettison.passes.base import describe_node
from jettison.passes.formats import WeightFormat
from jettison.passes.methods.base import InputStatistics, Method, RowEncoder
from jettison.passes.methods.finished_layers import Encoded
from jettison.passes.methods.input_scaling import Divider, divide_vectors, divided_rows, find_divider

aten = torch.ops.aten


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
    encoders: dict[int, RowEncoder] = {}
    for weight in weights:
        shape = (weight.shape[0], weight.shape[1])
        chosen = weight_format.adapted(weight.rows, shape, weight.name)
        # By identity: a format that was adapted to a weight holds more than it compares by.
        encode_rows = encoders.get(id(chosen))
        if encode_rows is None:
            encode_rows = encoders[id(chosen)] = method.row_encoder(chosen, statistics)
        parts = {part: scratch_tensor(size, dtype) for part, (size, dtype) in chosen.part_specs(shape).items()}
        for rows in row_chunks(*shape, at_most=method.weights_at_once):
            chunk = weight.rows(rows.start, rows.stop)
            made = encode_rows(chunk if scales is None else chunk * scales, weight.name, rows.start)
            chosen.put(parts, made, rows)
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


class LayerwiseRun:
    """Encodes the weights of linears from what they read in the program's calibration batches.

    Args:
        program: With `forward` and calibration batches; it is not changed.
        linears: Calls of `aten.linear` of its graph, whose weights are constants.
        method: Rounds.
        weight_format: Stores.
        step: Text of the pass, by which the program's finished layers are known.
        advance: Told how many stored bytes of weights are done.
    """

    def __init__(
        self,
        program: Program,
        linears: Sequence[fx.Node],
        method: Method,
        weight_format: WeightFormat,
        step: str,
        advance: Callable[[float], object],
    ) -> None:
        assert program.calibration is not None, "the pass requires it"
        self._program, self._linears, self._method, self._format = program, set(linears), method, weight_format
        self._step, self._advance = step, advance
        self._inputs = inputs_of_weights(program, linears)
        self._readers: dict[fx.Node, list[str]] = {}
        for name, read in self._inputs.items():
            for x in read:
                self._readers.setdefault(x, []).append(name)
        # A weight that several linears read is encoded with the last of them, from the inputs of all.
        self._shared: dict[str, InputStatistics] = {}
        self._found = Layerwise({}, [])

    def run(self) -> Layerwise:
        """Encode all.

        Raises:
            UnsupportedError: What a linear reads, or its weight, is not finite.
        """
        assert self._program.calibration is not None, "as above"
        place = {node: index for index, node in enumerate(self._program.entries["forward"].graph.nodes)}
        run = ChunkedRun(self._program, "forward", self._program.calibration())
        for x in sorted(self._readers, key=lambda node: place[node]):
            made, scales = self._finished(x) or self._encode(x, run)
            if scales is not None:
                divider = self._divider(x)
                assert divider is not None, "it was there when the scales were chosen"
                self._found.scaled.append((divider, scales))
            for name, result in made.items():
                run.weights[name] = partial(_dense, result, self._program.constants[name].dtype, scales)
            self._found.encoded.update(made)
        return self._found

    def _alone(self, x: fx.Node) -> list[Constant]:
        """Weights that only linears of this input read."""
        return [self._program.constants[name] for name in self._readers[x] if len(self._inputs[name]) == 1]

    def _finished(self, x: fx.Node) -> tuple[dict[str, Encoded], Tensor | None] | None:
        """What an interrupted run left for this input."""
        alone = self._alone(x)
        if self._program.finished is None or len(alone) != len(self._readers[x]):
            return None
        found = self._program.finished.load(self._step, [weight.name for weight in alone])
        if found is not None:
            self._advance(sum(weight.stored_bytes for weight in alone))
        return found

    def _encode(self, x: fx.Node, run: ChunkedRun) -> tuple[dict[str, Encoded], Tensor | None]:
        """Encode what is complete with this input; also returns the factors of the columns, if there are any."""
        statistics = InputStatistics(x.meta["val"].shape[-1])
        run.advance(x, statistics.add)
        give_back()
        _require_finite(statistics, self._method, self._readers[x][0], x)
        alone, scales = self._alone(x), None
        if self._method.scales_inputs and self._divider(x) is not None:
            dense = [weight.value().to(torch.float32) for weight in alone]
            scales = self._method.input_scales(dense, self._format, statistics)
        own = statistics if scales is None else statistics.divided(scales)
        made = encode_weights(alone, self._method, self._format, own, self._advance, scales)
        for name in self._readers[x]:
            if name in made:
                continue
            self._shared.setdefault(name, InputStatistics(len(statistics.magnitudes))).merge(statistics)
            if self._inputs[name][-1] is x:
                last = [self._program.constants[name]]
                made |= encode_weights(last, self._method, self._format, self._shared.pop(name), self._advance)
        if self._program.finished is not None and len(alone) == len(self._readers[x]):
            self._program.finished.store(self._step, made, scales)
        give_back()
        return made, scales

    def _divider(self, x: fx.Node) -> Divider | None:
        """What can divide an input whose linears' weights can all be multiplied."""
        names = {weight.name for weight in self._alone(x)}
        weights = [user.args[1] for user in x.users if is_call(user, aten.linear.default)]
        is_free = all(
            isinstance(weight, fx.Node) and constant_name(weight) in names and only_user(weight) is not None
            for weight in weights
        )
        divider = find_divider(x, self._linears) if is_free else None
        if divider is None or divider.rows is None:
            return divider
        rows = self._found.encoded.get(divider.rows)
        has_scales = rows is not None and rows.parts.get("scales", torch.empty(0)).shape[:1] == rows.shape[:1]
        return divider if has_scales else None


def _dense(encoded: Encoded, dtype: torch.dtype, scales: Tensor | None) -> Tensor:
    """An encoded weight for inputs that are not divided yet."""
    dense = encoded.dense()
    return (dense if scales is None else dense.div_(scales)).to(dtype)


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
