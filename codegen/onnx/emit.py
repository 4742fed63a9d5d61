"""Program to ONNX: our operators become contrib operators, `torch.onnx` does the rest, weights are streamed to disk."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch import Tensor, fx, nn

from jettison.codegen.onnx.cached_attention import (
    Rotation,
    RowLengths,
    group_query_attention,
    heads_last,
    is_cached,
    rotated_operands,
)
from jettison.codegen.onnx.external_data import ExternalDataWriter
from jettison.codegen.onnx.lowerings import LOWERINGS, quantized_linear
from jettison.codegen.onnx.rotary_table import angle_table
from jettison.ir import ops
from jettison.ir.constants import Constant
from jettison.ir.errors import CodegenError, JettisonError
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.program import (
    Program,
    constant_placeholders,
    input_placeholders,
    output_node,
    placeholders,
    state_placeholders,
)

aten = torch.ops.aten
OPSET = 23
# Constants below this many bytes are given to the exporter, so that it can fold them; larger ones are only placed.
LARGEST_FOLDED_BYTES = 4096
# GroupQueryAttention with sliding_window_cache and MatMulNBits with a bias input.
MINIMUM_ORT = {"default": "1.24", "windowed_cache": "1.31"}
AXES = {
    "input_ids": ("batch_size", "sequence_length"),
    "position_ids": ("batch_size", "sequence_length"),
    "token_type_ids": ("batch_size", "sequence_length"),
    "attention_mask": ("batch_size", "total_sequence_length"),
    "logits_positions": ("batch_size", "logits_length"),
}


@dataclass
class EmittedGraph:
    """One ONNX file.

    Attributes:
        path: Where it was written.
        entries: Entries of the program that it serves.
        inputs: Names of its inputs, states included.
        outputs: Names of its outputs, new states included.
        states: State name to (input, output).
        minimum_ort: Oldest ONNX Runtime that has every operator.
    """

    path: Path
    entries: tuple[str, ...]
    inputs: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    states: dict[str, tuple[str, str]] = field(default_factory=dict)
    minimum_ort: str = MINIMUM_ORT["default"]


class _Lowered(nn.Module):
    """A graph as a module whose forward calls the lowering of each node; the exporter traces it."""

    def __init__(self, program: Program, entry: fx.GraphModule, accuracy_level: int) -> None:
        super().__init__()
        self.program, self.entry, self.accuracy_level = program, entry, accuracy_level
        self.layouts: dict[str, tuple[str, tuple[int, ...], Constant]] = {}
        self._buffers_of: dict[tuple[str, str], str] = {}
        self._tables: dict[Any, tuple[str, str] | None] = {}
        self._plan()

    def _plan(self) -> None:
        """Register a buffer for every constant in every layout that some node wants, and for rotation tables."""
        for node in self.entry.graph.nodes:
            if is_call(node, ops.attention) and is_cached(node):
                found = rotated_operands(node.args[0], node.args[1].args[1])
                if found is not None:
                    self._plan_tables(found[2], found[3])
            for operand in node.all_input_nodes:
                name = constant_name(operand)
                if name is not None:
                    self._buffer(name, self._layout(node, operand))

    def _plan_tables(self, cos: fx.Node, sin: fx.Node) -> None:
        key = (cos, sin)
        if key in self._tables:
            return
        names = []
        for kind, node in (("cos_cache", cos), ("sin_cache", sin)):
            table = angle_table(self.program, node, self.program.info.context)
            if table is None:
                self._tables[key] = None
                return
            names.append(f"{kind}.{len(self._tables)}")
            self._register(names[-1], tuple(table.shape), Constant(names[-1], table))
        self._tables[key] = (names[0], names[1])

    def _layout(self, node: fx.Node, operand: fx.Node) -> str:
        if is_call(node, ops.quantized_embedding) and node.args[1] is operand:
            return "rows"
        if is_call(node, aten.linear.default) and node.args[1] is operand and len(operand.users) == 1:
            return "transposed"
        return "plain"

    def _buffer(self, name: str, layout: str) -> str:
        key = (name, layout)
        if key not in self._buffers_of:
            constant = self.program.constants[name]
            shape, onnx_name = constant.shape, name
            if layout == "rows":
                shape, onnx_name = (constant.shape[0], constant.shape[1] * constant.shape[2]), f"{name}.rows"
            elif layout == "transposed":
                stored = constant.blocks[0] if len(constant.blocks) == 1 else torch.cat(constant.blocks)
                constant = Constant(f"{name}.T", stored.t(), constant.dtype)
                shape, onnx_name = constant.shape, f"{name}.T"
            self._register(onnx_name, shape, constant)
            self._buffers_of[key] = onnx_name
        return self._buffers_of[key]

    def _register(self, onnx_name: str, shape: tuple[int, ...], constant: Constant) -> None:
        is_small = constant.nbytes <= LARGEST_FOLDED_BYTES
        # A large buffer is never read, so its pages are never allocated.
        value = constant.value().reshape(shape).contiguous() if is_small else torch.empty(shape, dtype=constant.dtype)
        attribute = f"constant_{len(self.layouts)}"
        self.register_buffer(attribute, value)
        self.layouts[attribute] = (onnx_name, shape, constant)

    def _table(self, onnx_name: str) -> Tensor:
        attribute = next(key for key, (name, _, _) in self.layouts.items() if name == onnx_name)
        return getattr(self, attribute)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        environment: dict[fx.Node, Any] = {}
        given = iter(inputs)
        for node in placeholders(self.entry):
            if "constant" not in node.meta:
                environment[node] = next(given)
        self._lengths: RowLengths | None = None
        for node in self.entry.graph.nodes:
            if node.op == "call_function":
                self._lower(node, environment)
        return tuple(environment[value] for value in output_node(self.entry).args[0])

    def _operand(self, node: fx.Node, user: fx.Node, environment: dict[fx.Node, Any]) -> Any:
        name = constant_name(node)
        if name is None:
            return environment[node]
        return self._table(self._buffers_of[name, self._layout(user, node)])

    def _lower(self, node: fx.Node, environment: dict[fx.Node, Any]) -> None:
        if is_call(node, ops.attention) and is_cached(node):
            self._cached_attention(node, environment)
            return
        if is_call(node, ops.windowed_attention):
            self._windowed_attention(node, environment)
            return
        if self._is_redeemed_later(node):
            return
        args = fx.map_arg(node.args, lambda n: self._operand(n, node, environment))
        kwargs = fx.map_arg(node.kwargs, lambda n: self._operand(n, node, environment))
        if is_call(node, aten.linear.default):
            environment[node] = self._linear(node, *args)
        elif is_call(node, ops.quantized_linear):
            environment[node] = quantized_linear(*args, accuracy_level=self.accuracy_level)
        else:
            environment[node] = LOWERINGS.get(node.target, node.target)(*args, **kwargs)

    def _linear(self, node: fx.Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if constant_name(node.args[1]) is not None and self._layout(node, node.args[1]) == "transposed":
            product = torch.matmul(x, weight)
            return product if bias is None else product + bias
        # A weight that others read too (a tied embedding) keeps its layout: Gemm transposes inside the kernel.
        flat = x.reshape(-1, x.shape[-1])
        operands = (flat, weight) if bias is None else (flat, weight, bias)
        out = torch.onnx.ops.symbolic(
            "::Gemm", operands, {"transB": 1}, dtype=x.dtype, shape=(flat.shape[0], weight.shape[0])
        )
        return out.reshape(*x.shape[:-1], weight.shape[0])

    def _is_redeemed_later(self, node: fx.Node) -> bool:
        """Whether every reader of a slot write or rotation is a cached attention that does the work itself."""
        if is_call(node, ops.write_slots):
            return any(is_call(user, ops.attention) and is_cached(user) for user in node.users)
        if is_call(node, ops.rotary_embedding):
            users = list(node.users)
            for user in users:
                reader = user if is_call(user, ops.attention) else next(iter(user.users), None)
                if not is_call(reader, ops.attention) or not is_cached(reader):
                    return False
                found = rotated_operands(reader.args[0], reader.args[1].args[1])
                if found is None or self._tables.get((found[2], found[3])) is None:
                    return False
            return bool(users)
        return False

    def _row_lengths(self, environment: dict[fx.Node, Any]) -> RowLengths:
        if self._lengths is None:
            self._lengths = RowLengths.of_mask(environment[input_placeholders(self.entry)["attention_mask"]])
        return self._lengths

    def _cached_attention(self, node: fx.Node, environment: dict[fx.Node, Any]) -> None:
        operands = arguments(node)
        key_write, value_write = operands["key"], operands["value"]
        query_node, key_node = operands["query"], key_write.args[1]
        heads = query_node.meta["val"].shape[1]
        rotation = None
        found = rotated_operands(query_node, key_node)
        tables = self._tables.get((found[2], found[3])) if found is not None else None
        if found is not None and tables is not None:
            query_node, key_node = found[0], found[1]
            rotation = Rotation(self._table(tables[0]), self._table(tables[1]), found[4])
        sinks = operands["sinks"]
        out, key, value = group_query_attention(
            heads_last(query_node, environment),
            heads_last(key_node, environment),
            heads_last(value_write.args[1], environment),
            environment[key_write.args[0]],
            environment[value_write.args[0]],
            self._row_lengths(environment),
            heads=heads,
            position_ids=environment[operands["query_positions"]],
            rotation=rotation,
            sinks=None if sinks is None else self._operand(sinks, node, environment),
            scale=operands["scale"],
            window=operands["window"],
            softcap=operands["softcap"],
        )
        environment[node] = out.unflatten(2, (heads, -1)).transpose(1, 2)
        environment[key_write], environment[value_write] = key, value

    def _windowed_attention(self, node: fx.Node, environment: dict[fx.Node, Any]) -> None:
        operands = arguments(node)
        heads = operands["query"].meta["val"].shape[1]
        sinks = operands["sinks"]
        out, key, value = group_query_attention(
            heads_last(operands["query"], environment),
            heads_last(operands["key"], environment),
            heads_last(operands["value"], environment),
            environment[operands["past_key"]],
            environment[operands["past_value"]],
            self._row_lengths(environment),
            heads=heads,
            position_ids=None,
            rotation=None,
            sinks=None if sinks is None else self._operand(sinks, node, environment),
            scale=operands["scale"],
            window=operands["window"],
            softcap=operands["softcap"],
            is_windowed_cache=True,
        )
        environment[node] = (out.unflatten(2, (heads, -1)).transpose(1, 2), key, value)


@contextmanager
def _quiet_exporter() -> Any:
    """The exporter logs and warns about its own internals."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _examples(entry: fx.GraphModule, program: Program) -> tuple[list[str], list[Tensor], list[dict[int, Any]]]:
    """Names, example tensors and dynamic axes of the inputs and states, in the order of the graph."""
    sizes = {"batch_size": 2, "sequence_length": 5, "total_sequence_length": 7, "logits_length": 3,
             "past_sequence_length": 16}  # fmt: skip
    # An entry without a cache has a mask as long as its tokens.
    dims = {name: torch.export.Dim(name) for name in sizes}
    is_cached_entry = bool(state_placeholders(entry))
    names, tensors, axes = [], [], []
    for node in placeholders(entry):
        if "constant" in node.meta:
            continue
        if "state" in node.meta:
            state = program.states[node.meta["state"]]
            labels = [
                "batch_size" if s == "batch" else "past_sequence_length" if s == "capacity" else s for s in state.shape
            ]
            names.append(state.name)
        else:
            labels = list(AXES.get(node.name, ("batch_size", "sequence_length")))
            if node.name == "attention_mask" and not is_cached_entry:
                labels[1] = "sequence_length"
            names.append(node.name)
        shape = [sizes[label] if isinstance(label, str) else label for label in labels]
        tensors.append(torch.zeros(shape, dtype=node.meta["val"].dtype))
        axes.append({axis: dims[label] for axis, label in enumerate(labels) if isinstance(label, str)})
    return names, tensors, axes


def _present_name(state: str) -> str:
    return state.replace("past_key_values.", "present.", 1)


def emit_entry(
    program: Program,
    entry_name: str,
    path: Path,
    data: ExternalDataWriter,
    *,
    serves: tuple[str, ...],
    accuracy_level: int = 4,
) -> EmittedGraph:
    """Write one entry as an ONNX file.

    Args:
        program: A program with a KV cache, or an encoder.
        entry_name: Which entry.
        path: Where to write.
        data: Weight file, shared by all entries of an artifact.
        serves: Entries this graph stands for.
        accuracy_level: Of `MatMulNBits`: 4 quantises activations to int8 inside the kernel, 0 computes in fp32.

    Returns:
        Names of inputs and outputs.

    Raises:
        CodegenError: The graph cannot be lowered.
    """
    entry = program.entries[entry_name]
    lowered = _Lowered(program, entry, accuracy_level).eval()
    names, tensors, axes = _examples(entry, program)
    states = list(state_placeholders(entry))
    outputs = [*program.outputs, *(_present_name(state) for state in states)]
    try:
        with torch.no_grad(), _quiet_exporter():
            exported = torch.export.export(lowered, tuple(tensors), dynamic_shapes=(tuple(axes),), strict=False)
            onnx_program = torch.onnx.export(
                exported, input_names=names, output_names=outputs, opset_version=OPSET, dynamo=True, verbose=False,
                optimize=True,
            )  # fmt: skip
    except JettisonError:
        raise
    except Exception as error:
        raise CodegenError(f"[onnx] {entry_name}: {type(error).__name__}: {str(error).splitlines()[0]}") from error
    assert onnx_program is not None, "export without a file returns the program"
    model = onnx_program.model
    _place_constants(model, lowered, data)
    _name_axes(model, axes)
    _make_optional(model)
    _strip_debris(model)
    onnx_ir.save(model, path)
    emitted = EmittedGraph(path, serves, names, outputs)
    emitted.states = {state: (state, _present_name(state)) for state in states}
    if any(is_call(node, ops.windowed_attention) for node in entry.graph.nodes):
        emitted.minimum_ort = MINIMUM_ORT["windowed_cache"]
    return emitted


def _place_constants(model: onnx_ir.Model, lowered: _Lowered, data: ExternalDataWriter) -> None:
    """Give every initializer its name and its bytes."""
    initializers = model.graph.initializers
    for attribute, (onnx_name, shape, constant) in lowered.layouts.items():
        value = initializers.pop(attribute, None)
        if value is None:
            continue  # folded away
        value.name = onnx_name
        value.const_value = data.tensor(onnx_name, shape, constant)
        initializers[onnx_name] = value


def _name_axes(model: onnx_ir.Model, axes: list[dict[int, Any]]) -> None:
    """Restore the names of dynamic axes, which the exporter numbers; tokens come first, states after."""
    graph = model.graph
    for value, named in zip(graph.inputs, axes, strict=True):
        sizes = list(value.shape)
        for axis, dim in named.items():
            sizes[axis] = dim.__name__
        value.shape = onnx_ir.Shape(sizes)
    past = {value.name: value for value in graph.inputs}
    for value in graph.outputs:
        source = past.get(value.name.replace("present.", "past_key_values.", 1))
        if source is not None:
            value.shape = source.shape
        elif value.name == "logits" and "logits_positions" in past:
            value.shape = onnx_ir.Shape(["batch_size", "logits_length", value.shape[-1]])
    graph.inputs.sort(key=lambda value: value.name.startswith("past_key_values."))


def _make_optional(model: onnx_ir.Model) -> None:
    """Give `logits_positions` a default, the last token of each row, so that other runtimes need not know it."""
    graph = model.graph
    for value in graph.inputs:
        if value.name == "logits_positions":
            value.shape = onnx_ir.Shape(["logits_batch_size", "logits_length"])
            default = torch.full((1, 1), -1, dtype=torch.int64)
            value.const_value = onnx_ir.tensor(default.numpy(), name=value.name)
            graph.initializers[value.name] = value


def _strip_debris(model: onnx_ir.Model) -> None:
    """Drop what the exporter notes about source lines: it names machine paths."""
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.producer_name, model.producer_version = "jettison", ""


def emit_program(
    program: Program,
    folder: Path,
    *,
    accuracy_level: int = 4,
    on_bytes: Callable[[int], None] | None = None,
) -> list[EmittedGraph]:
    """Write a program as `model.onnx`, or as `prefill.onnx` and `decode.onnx`, over one `model.onnx.data`.

    Entries with the same text share one graph that is general in the number of tokens.

    Args:
        program: What to write.
        folder: An existing folder.
        accuracy_level: See `emit_entry`.
        on_bytes: Progress over the weight file.

    Returns:
        One description per file.
    """
    with ExternalDataWriter(folder / "model.onnx.data", on_bytes) as data:
        entries = list(program.entries)
        if len(entries) == 2 and _same_graph(*program.entries.values()):
            return [
                emit_entry(program, entries[0], folder / "model.onnx", data, serves=tuple(entries),
                           accuracy_level=accuracy_level)
            ]  # fmt: skip
        if len(entries) == 1:
            return [
                emit_entry(program, entries[0], folder / "model.onnx", data, serves=(entries[0],),
                           accuracy_level=accuracy_level)
            ]  # fmt: skip
        return [
            emit_entry(program, name, folder / f"{name}.onnx", data, serves=(name,), accuracy_level=accuracy_level)
            for name in entries
        ]


def _same_graph(left: fx.GraphModule, right: fx.GraphModule) -> bool:
    from jettison.ir.text import _entry_lines, _Namer

    return _entry_lines("x", left, _Namer()) == _entry_lines("x", right, _Namer())


def weight_bytes(program: Program) -> int:
    """Bytes that the ONNX weight file needs, before padding; for the check of free space."""
    return sum(
        program.constants[name].nbytes
        for name in {name for entry in program.entries.values() for name in constant_placeholders(entry)}
    )
