"""A graph as a module of ONNX-ready calls: the exporter traces its forward."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.onnx.ops import symbolic

from jettison.codegen.onnx.cached_attention import (
    Rotation,
    RowLengths,
    flat_readers,
    fused_readers,
    group_query_attention,
    heads_last,
    is_fused,
    packed_projection,
    rotated_operands,
)
from jettison.codegen.onnx.external_data import DTYPES, ComputedConstant, TransposedConstant
from jettison.codegen.onnx.fast_prefill import Int8Weight, int8_linear, weight_operands
from jettison.codegen.onnx.joint_attention import over_both
from jettison.codegen.onnx.lowerings import LOWERINGS, quantized_experts, quantized_linear
from jettison.codegen.onnx.residual_norm import norm_of_sum, sum_and_norm
from jettison.codegen.onnx.routed_experts import InterleavedConstant, stack_layout
from jettison.codegen.onnx.written_attention import received
from jettison.ir import ops
from jettison.ir.constants import Constant
from jettison.ir.errors import UnsupportedError
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.program import Program, input_placeholders, output_node, placeholders
from jettison.ir.rotary_table import angle_table

aten = torch.ops.aten
# Constants up to this many bytes are shown to the exporter, which may fold them away. Larger ones are inputs of the
# traced module: their values are neither read nor folded, and they become initializers afterwards.
LARGEST_FOLDED_BYTES = 4096


class LoweredGraph(nn.Module):
    """A graph as a module whose forward calls the lowering of each node.

    Args:
        program: Holds the constants.
        entry: One of its graphs.
        accuracy_level: Of `MatMulNBits`; see `emit_entry`.
        is_fast: Whether the linears of a prompt compute in 8-bit integers; see `fast_prefill`.

    Attributes:
        folded: Names of the initializers that the exporter may fold, by buffer name.
        placed: Names of the initializers that stand behind the inputs of the graph in `forward`, in order.
        layouts: Shape of each initializer and the constant it is filled from, by name.
    """

    def __init__(self, program: Program, entry: fx.GraphModule, accuracy_level: int, is_fast: bool = False) -> None:
        super().__init__()
        self.program, self.entry, self.accuracy_level, self.is_fast = program, entry, accuracy_level, is_fast
        self._int8: dict[fx.Node, Int8Weight] = {}
        self.layouts: dict[str, tuple[tuple[int, ...], Constant]] = {}
        self.folded: dict[str, str] = {}
        self.placed: list[str] = []
        self._tensors: dict[str, Tensor] = {}
        self._buffers_of: dict[tuple[str, str], str] = {}
        self._tables: dict[Any, tuple[str, str] | None] = {}
        self._tables_of_rows = {
            constant_name(node.args[2])
            for each in program.entries.values()
            for node in each.graph.nodes
            if is_call(node, ops.selected_linear)
        }
        self._plan()

    def _plan(self) -> None:
        """Register a buffer for every constant in every layout that some node wants, and for rotation tables."""
        for node in self.entry.graph.nodes:
            if is_call(node, ops.attention, ops.scored_attention) and is_fused(node):
                found = rotated_operands(node)
                if found is not None:
                    self._plan_tables(found.cos, found.sin)
            replaced = self._plan_int8(node)
            for operand in node.all_input_nodes:
                name = constant_name(operand)
                if name is not None and operand not in replaced:
                    self._buffer(name, self._layout(node, operand))

    def _plan_int8(self, node: fx.Node) -> list[fx.Node]:
        """Register the weight of a fast linear; returns the operands that it stands for."""
        names = weight_operands(node) if self.is_fast else None
        if names is None:
            return []
        weight = self._int8[node] = Int8Weight(node, self.program)
        for part in (weight.codes, weight.scales):
            if part.name not in self.layouts:
                self._register(part.name, part.shape, part)
        return [arguments(node)[name] for name in names]

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
            self._register(names[-1], tuple(table.shape), ComputedConstant(names[-1], table))
        self._tables[key] = (names[0], names[1])

    def _rotation(self, node: fx.Node) -> tuple[fx.Node, fx.Node, Rotation] | None:
        """Unrotated query and key of a fused attention, and tables, if it is the attention that rotates."""
        found = rotated_operands(node)
        names = None if found is None else self._tables.get((found.cos, found.sin))
        if found is None or names is None:
            return None
        tables = [self._tensors[name] for name in names]
        return found.query, found.key, Rotation(tables[0], tables[1], found.is_interleaved)

    def _layout(self, node: fx.Node, operand: fx.Node) -> str:
        if is_call(node, ops.quantized_embedding) and node.args[1] is operand:
            return "rows"
        if is_call(node, aten.linear.default) and node.args[1] is operand:
            # Where rows are looked up as well, in this entry or another, there is one constant for both.
            return "plain" if len(operand.users) > 1 or constant_name(operand) in self._tables_of_rows else "transposed"
        if is_call(node, ops.low_rank_attention, ops.low_rank_mlp) and len(operand.meta["val"].shape) == 2:
            return "transposed"  # their matrices; biases have one axis
        if is_call(node, ops.experts, ops.quantized_experts):
            return stack_layout(node, operand)
        return "plain"

    def _buffer(self, name: str, layout: str) -> str:
        key = (name, layout)
        if key not in self._buffers_of:
            constant = self.program.constants[name]
            shape, onnx_name = constant.shape, name
            if layout == "rows":
                shape, onnx_name = (constant.shape[0], constant.shape[1] * constant.shape[2]), f"{name}.rows"
            elif layout == "transposed":
                constant = TransposedConstant(f"{name}.T", constant)
                shape, onnx_name = constant.shape, f"{name}.T"
            elif layout == "interleaved":
                constant = InterleavedConstant(f"{name}.interleaved", constant)
                shape, onnx_name = constant.shape, f"{name}.interleaved"
            elif layout == "stacked":
                shape, onnx_name = (*constant.shape[:2], constant.shape[2] * constant.shape[3]), f"{name}.stacked"
            self._register(onnx_name, shape, constant)
            self._buffers_of[key] = onnx_name
        return self._buffers_of[key]

    def _register(self, onnx_name: str, shape: tuple[int, ...], constant: Constant) -> None:
        if constant.dtype not in DTYPES:
            raise UnsupportedError(f'[onnx] {onnx_name}: ONNX holds no {constant.dtype} weights. Use target="torch".')
        self.layouts[onnx_name] = (shape, constant)
        if constant.nbytes > LARGEST_FOLDED_BYTES:
            self.placed.append(onnx_name)
            return
        attribute = f"constant_{len(self.folded)}"
        self.folded[attribute] = onnx_name
        self.register_buffer(attribute, constant.value().reshape(shape).contiguous())

    def examples(self) -> list[Tensor]:
        """Tensors in the place of the large constants; nobody reads them, so their pages are never allocated."""
        return [
            torch.empty(shape, dtype=constant.dtype) for shape, constant in map(self.layouts.__getitem__, self.placed)
        ]

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """Call every lowering in order.

        Args:
            *inputs: States and run-time inputs, in the order of the graph, then the constants in `placed`.

        Returns:
            What the graph returns, without the states that it only reads.
        """
        environment: dict[fx.Node, Any] = {}
        given = iter(inputs)
        self._tensors = {name: getattr(self, attribute) for attribute, name in self.folded.items()}
        self._tensors |= dict(zip(self.placed, inputs[len(inputs) - len(self.placed) :], strict=True))
        for node in placeholders(self.entry):
            if "constant" not in node.meta:
                environment[node] = next(given)
        named = input_placeholders(self.entry)
        if "logits_positions" in named:
            node = named["logits_positions"]
            environment[node] = _for_every_row(environment[node], environment[named["input_ids"]])
        self._lengths: dict[fx.Node, RowLengths] = {}
        for node in self.entry.graph.nodes:
            if node.op == "call_function":
                self._lower(node, environment)
        # An output may be a constant (an encoder that also returns a table). States that were only read are none.
        return tuple(
            self._operand(value, output_node(self.entry), environment)
            for value in output_node(self.entry).args[0]
            if "state" not in value.meta
        )

    def _operand(self, node: fx.Node, user: fx.Node, environment: dict[fx.Node, Any]) -> Any:
        name = constant_name(node)
        if name is None:
            return environment[node]
        return self._tensors[self._buffers_of[name, self._layout(user, node)]]

    def _lower(self, node: fx.Node, environment: dict[fx.Node, Any]) -> None:
        if node in environment:  # an operator before it computed it too
            return
        if is_fused(node):
            is_windowed = is_call(node, ops.windowed_attention)
            attend = self._windowed_attention if is_windowed else self._cached_attention
            attend(node, environment)
            return
        if self._is_redeemed_later(node):
            return
        norm = norm_of_sum(node)
        if norm is not None:
            residual, update = (self._operand(each, node, environment) for each in node.args[:2])
            weight = self._operand(norm.args[2], norm, environment)
            environment[node], environment[norm] = sum_and_norm(residual, update, weight, arguments(norm)["eps"])
            return
        if node in self._int8:
            environment[node] = self._int8_linear(node, environment)
            return
        args = fx.map_arg(node.args, lambda n: self._operand(n, node, environment))
        kwargs = fx.map_arg(node.kwargs, lambda n: self._operand(n, node, environment))
        if is_call(node, aten.linear.default):
            environment[node] = self._linear(node, *args)
        elif is_call(node, ops.quantized_linear):
            environment[node] = quantized_linear(*args, accuracy_level=self.accuracy_level)
        elif is_call(node, ops.quantized_experts):
            environment[node] = quantized_experts(*args, accuracy_level=self.accuracy_level)
        else:
            if is_call(node, ops.write_slots):
                _require_positions(node)
            environment[node] = LOWERINGS.get(node.target, node.target)(*args, **kwargs)

    def _int8_linear(self, node: fx.Node, environment: dict[fx.Node, Any]) -> Tensor:
        weight, operands = self._int8[node], arguments(node)
        x, bias = (
            None if each is None else self._operand(each, node, environment)
            for each in (node.args[0], operands["bias"])
        )
        return int8_linear(x, self._tensors[weight.codes.name], self._tensors[weight.scales.name], bias)

    def _linear(self, node: fx.Node, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if constant_name(node.args[1]) is not None and self._layout(node, node.args[1]) == "transposed":
            product = torch.matmul(x, weight)
            return product if bias is None else product + bias
        # A weight that others read too (a tied embedding) keeps its layout: Gemm transposes inside the kernel.
        flat = x.reshape(-1, x.shape[-1])
        operands = (flat, weight) if bias is None else (flat, weight, bias)
        shape = (flat.shape[0], weight.shape[0])
        out = symbolic("::Gemm", operands, {"transB": 1}, dtype=x.dtype, shape=shape)
        return out.reshape(*x.shape[:-1], weight.shape[0])

    def _is_redeemed_later(self, node: fx.Node) -> bool:
        """Whether every reader of a slot write or rotation is a fused attention that does the work itself."""
        if is_call(node, ops.write_slots):
            return bool(fused_readers(node))
        if is_call(node, ops.rotary_embedding):
            readers = [
                attention
                for user in node.users
                for attention in (fused_readers(user) if is_call(user, ops.write_slots) else [user])
            ]
            return bool(readers) and all(
                is_call(reader, ops.attention, ops.scored_attention)
                and is_fused(reader)
                and self._rotation(reader) is not None
                for reader in readers
            )
        return False

    def _row_lengths(self, slots: fx.Node | None, environment: dict[fx.Node, Any]) -> RowLengths:
        """Tokens that the rows of a cache hold, by where those of this call go; None for windows."""
        mask = input_placeholders(self.entry)["attention_mask"]
        if slots is not None and is_call(slots, ops.next_slots):
            mask = slots.args[0]
        if mask not in self._lengths:
            self._lengths[mask] = RowLengths.of_mask(environment[mask])
        return self._lengths[mask]

    def _cached_attention(self, node: fx.Node, environment: dict[fx.Node, Any]) -> None:
        operands = arguments(node)
        key_write, value_write = operands["key"], operands["value"]
        rotation = self._rotation(node)
        query, key = (operands["query"], key_write.args[1]) if rotation is None else rotation[:2]
        heads = query.meta["val"].shape[1]
        sinks = operands.get("sinks")
        is_scored = is_call(node, ops.scored_attention, ops.scored_joint_attention)
        is_joint = is_call(node, ops.joint_attention, ops.scored_joint_attention)
        slots = operands["slots" if is_joint else "query_positions"]
        lengths = self._row_lengths(slots, environment)
        out, new_key, new_value, *probabilities = group_query_attention(
            *_operands_of_heads(query, key, value_write.args[1], environment),
            environment[key_write.args[0]],
            environment[value_write.args[0]],
            lengths,
            heads=heads,
            position_ids=environment[input_placeholders(self.entry)["position_ids"]],
            rotation=None if rotation is None else rotation[2],
            sinks=None if sinks is None else self._operand(sinks, node, environment),
            scale=operands["scale"],
            window=operands.get("window", 0),
            softcap=operands.get("softcap", 0.0),
            is_scored=is_scored,
        )
        each_received = received(probabilities[0], lengths.mask, new_key) if is_scored else None
        if is_joint:
            stored = tuple(environment[operands[f"stored_{part}"]] for part in ("key", "value", "tokens"))
            read = environment[operands["query"]], stored, new_key, new_value, environment[slots]
            out, *scored = over_both(out, *read, operands["scale"], each_received)
            each_received = scored[0] if is_scored else None
        by_head, attended = out.unflatten(2, (heads, -1)).transpose(1, 2), node
        environment[node] = by_head
        if each_received is not None:
            environment[node] = (by_head, each_received)
            attended = next(part for part in node.users if part.args[1] == 0)
        environment.update(dict.fromkeys(flat_readers(attended), out))
        environment[key_write], environment[value_write] = new_key, new_value

    def _windowed_attention(self, node: fx.Node, environment: dict[fx.Node, Any]) -> None:
        operands = arguments(node)
        heads = operands["query"].meta["val"].shape[1]
        sinks = operands["sinks"]
        out, key, value = group_query_attention(
            *_operands_of_heads(operands["query"], operands["key"], operands["value"], environment),
            environment[operands["past_key"]],
            environment[operands["past_value"]],
            self._row_lengths(None, environment),
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
        for part in node.users:
            if is_call(part, operator.getitem) and part.args[1] == 0:
                environment.update(dict.fromkeys(flat_readers(part), out))


def _operands_of_heads(
    query: fx.Node, key: fx.Node, value: fx.Node, environment: dict[fx.Node, Any]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Query, key and value with heads last, or their packed projection in place of all three."""
    packed = packed_projection(query, key, value, environment)
    if packed is not None:
        return packed, None, None
    return heads_last(query, environment), heads_last(key, environment), heads_last(value, environment)


def _for_every_row(logits_positions: Tensor, input_ids: Tensor) -> Tensor:
    """`logits_positions` of one row, or of every row, as `[B, P]`."""
    rows = symbolic("::Shape", (input_ids,), {"start": 0, "end": 1}, dtype=torch.int64, shape=(1,))
    columns = symbolic("::Shape", (logits_positions,), {"start": 1, "end": 2}, dtype=torch.int64, shape=(1,))
    shape = (input_ids.shape[0], logits_positions.shape[1])
    return symbolic("::Expand", (logits_positions, torch.cat([rows, columns])), {}, dtype=torch.int64, shape=shape)


def _require_positions(node: fx.Node) -> None:
    """`ScatterND` cannot drop a value, as a negative slot would; positions and ends of rows are never negative."""
    slots = node.args[2]
    is_input = slots.op == "placeholder" and slots.name in ("position_ids", "stored_slots")
    if not is_input and not is_call(slots, ops.next_slots) and slots.meta["val"].dim() != 3:
        raise UnsupportedError(
            f"[onnx] {node.meta.get('where') or node.name}: writes the cache at slots that are computed, and ONNX has "
            'no operator that leaves some of them out. Use target="torch".'
        )
