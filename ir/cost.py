"""What one call of an entry reads, writes and computes, node by node, from shapes alone: no machine is in it.

Bytes of weights are those of the form they are held in (packed parts, in the dtype the graph computes in). Of a table
that is only looked up the rows count, of routed experts and of sparse layers what the tokens of a call are expected to
choose. Keys and values are what a program's states hold: groups of heads, windows, compressed slots and dropped tokens
count because the shapes of states and operators say so.

Source: LLM-Viewer (arXiv 2402.16363) for the model; totals here are sums over the nodes of a graph, where its formulas
count heads of keys and values, the width of a feed-forward layer and the rows of its gate wrongly for some models.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from jettison.ir import ops
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.program import Program, output_node, placeholders, slot_counts

aten = torch.ops.aten
# Slots of a session are a multiple of this, and a prompt runs so many tokens at a time.
SLOT_GRANULE = 64
PREFILL_CHUNK = 512
# Kinds of operators, in the order of a table.
KINDS = ("embedding", "linear", "head", "experts", "attention", "other")

# Operators that read of a table only the rows they are asked for: the indices, and which operands are tables.
_LOOKUPS: Mapping[Any, tuple[str, tuple[str, ...]]] = {
    aten.embedding.default: ("indices", ("weight",)),
    ops.quantized_embedding: ("indices", ("codes", "scales", "zeros")),
    ops.lut_embedding: ("indices", ("codes", "scales", "steps")),
    ops.selected_linear: ("rows", ("weight",)),
}
# Operators that choose rows, experts or groups for each token: the choice, and what they read of by it.
_CHOICES: Mapping[Any, tuple[str, tuple[str, ...]]] = {
    ops.sparse_linear: ("indices", ("weight",)),
    ops.experts: ("indices", ("gate_up", "down")),
    ops.quantized_experts: (
        "indices",
        tuple(f"{stack}_{part}" for stack in ("gate_up", "down") for part in ("codes", "scales", "zeros")),
    ),
    ops.sparse_mlp: ("indices", ("gate", "up", "up_bias", "down")),
    ops.quantized_sparse_mlp: (
        "indices",
        (*(f"{stack}_{part}" for stack in ("gate", "up", "down") for part in ("codes", "scales", "zeros")), "up_bias"),
    ),
}
_EXPERTS = (ops.experts, ops.quantized_experts)
_SPARSE_MLPS = (ops.sparse_mlp, ops.quantized_sparse_mlp)
_ATTENTIONS = (
    ops.attention, ops.scored_attention, ops.windowed_attention, ops.joint_attention, ops.scored_joint_attention,
    ops.low_rank_attention, aten.scaled_dot_product_attention.default,
)  # fmt: skip
_MATMULS = (aten.matmul.default, aten.mm.default, aten.bmm.default)
# Values that share the memory of their operand, and calls that compute sizes.
_VIEWS = {
    "reshape", "view", "transpose", "unsqueeze", "squeeze", "expand", "permute", "slice", "select", "narrow", "alias",
    "unflatten", "flatten", "t", "detach", "getitem", "sym_size", "split", "chunk", "unbind",
}  # fmt: skip

# Library calls that operators come to, where they are more than one; counted in traces of decode steps on PyTorch.
_CALLS: Mapping[Any, float] = {
    aten.rms_norm.default: 6, aten.layer_norm.default: 2, ops.rotary_embedding: 9, ops.write_slots: 2,
    ops.gated_activation: 2, ops.quantized_embedding: 12, ops.quantize_slots: 8, ops.dequantize_slots: 6,
} | dict.fromkeys(_ATTENTIONS, 12)  # fmt: skip
_CALLS_BY_BITS = {2: 14, 4: 5, 8: 14}  # of linears with packed weights
_VIEW_CALLS = 0.5


@dataclass(frozen=True)
class Workload:
    """What a session is asked for.

    Attributes:
        batch: Rows, each with a sequence of its own.
        context: Tokens of a sequence, the prompt included: what a decode step attends to in the end.
        prompt: Tokens that come at once, at most the context.
    """

    batch: int = 1
    context: int = 1024
    prompt: int = 512

    @property
    def capacity(self) -> int:
        """Slots of a session for so many tokens."""
        return -(-self.context // SLOT_GRANULE) * SLOT_GRANULE


@dataclass(frozen=True)
class NodeCost:
    """One operator of one call.

    Attributes:
        name: Where it stands, or the constant that it reads.
        kind: One of `KINDS`.
        form: How the weight is held: a dtype (`bfloat16`), the format of codes (`int4`), or `table` for other codes;
            empty without a weight.
        rows: Vectors that a product multiplies with the weight.
        weights: Bytes read, by constant.
        lookups: Constants among them of which single rows are read.
        elements: Weights read, however they are coded.
        state_read: Bytes of states read.
        state_written: Bytes of states written.
        activation_bytes: Of other values, read and written.
        operations: Multiplications and additions, counted singly.
        calls: Of a library, that it comes to.
    """

    name: str
    kind: str
    form: str = ""
    rows: int = 1
    weights: Mapping[str, int] = field(default_factory=dict)
    lookups: frozenset[str] = frozenset()
    elements: int = 0
    state_read: int = 0
    state_written: int = 0
    activation_bytes: int = 0
    operations: int = 0
    calls: float = 1.0

    @property
    def weight_bytes(self) -> int:
        """Of all its constants."""
        return sum(self.weights.values())


@dataclass(frozen=True)
class CallCost:
    """One call of an entry.

    Attributes:
        entry: Which.
        tokens: New tokens of all rows together.
        nodes: Operators, in order.
        peak_activation_bytes: Most bytes of values alive at once, states and constants apart; an estimate, since
            kernels have memory of their own.
    """

    entry: str
    tokens: int
    nodes: tuple[NodeCost, ...]
    peak_activation_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Read."""
        return sum(node.weight_bytes for node in self.nodes)

    @property
    def state_read(self) -> int:
        """Bytes of states read."""
        return sum(node.state_read for node in self.nodes)

    @property
    def state_written(self) -> int:
        """Bytes of states written."""
        return sum(node.state_written for node in self.nodes)

    @property
    def operations(self) -> int:
        """Of all operators."""
        return sum(node.operations for node in self.nodes)

    def bytes_by_constant(self) -> Counter[str]:
        """Bytes read of each constant; one that two operators read counts twice."""
        total: Counter[str] = Counter()
        for node in self.nodes:
            total.update(node.weights)
        return total


def call_costs(program: Program, phase: str, work: Workload) -> list[CallCost]:
    """The calls of a phase.

    Args:
        program: With metadata.
        phase: `prefill`, which runs the prompt some tokens at a time; `decode`, one step at the end of the context; or
            `forward` of an encoder, over the prompt.
        work: What is asked for.
    """
    if phase == "decode":
        return [call_cost(program, "decode", work, 1, work.context)]
    if phase == "forward":
        return [call_cost(program, "forward", work, work.prompt, work.prompt)]
    stops = [*range(PREFILL_CHUNK, work.prompt, PREFILL_CHUNK), work.prompt]
    return [
        call_cost(program, "prefill", work, stop - start, stop) for start, stop in zip([0, *stops], stops, strict=False)
    ]


def phases(program: Program) -> tuple[str, ...]:
    """What is run of a program."""
    return ("prefill", "decode") if "decode" in program.entries else ("forward",)


def call_cost(program: Program, entry: str, work: Workload, new_tokens: int, total_tokens: int) -> CallCost:
    """One call.

    Args:
        program: With metadata.
        entry: Which.
        work: For the rows of the batch and the slots of states.
        new_tokens: Of a row in this call.
        total_tokens: That a row has behind it.
    """
    sizes = _Sizes(program, entry, work, new_tokens, total_tokens)
    reader = _Reader(program, entry, sizes)
    graph = program.entries[entry].graph
    nodes = [found for node in graph.nodes if node.op == "call_function" for found in reader.costs(node)]
    return CallCost(entry, work.batch * new_tokens, tuple(_once(nodes)), _peak(graph, reader))


def state_bytes(program: Program, work: Workload) -> int:
    """Most bytes of the states of a session, in the prompt or behind it."""
    after = slot_counts(program.retentions.values(), program.storages.values(), work.capacity, work.prompt)
    # A prompt is attended to exactly: its tokens leave their slots behind it.
    within = after | {name: max(after[name], work.prompt) for name in program.retentions}
    total = 0
    for state in program.states.values():
        slots = next((within[size] for size in state.shape if size in within), work.capacity)
        total += math.prod(state.sizes(work.batch, slots)) * state.dtype.itemsize
    return total


def _once(nodes: Sequence[NodeCost]) -> Iterator[NodeCost]:
    """A table that a head reads whole, too, is not read again by a lookup."""
    whole = {name for node in nodes for name in node.weights if name not in node.lookups}
    for node in nodes:
        if whole.isdisjoint(node.lookups):
            yield node
        else:
            kept = {name: count for name, count in node.weights.items() if name not in whole & node.lookups}
            yield NodeCost(**{**vars(node), "weights": kept, "lookups": node.lookups & frozenset(kept)})


class _Sizes:
    """Numbers for the symbols of an entry."""

    def __init__(self, program: Program, entry: str, work: Workload, new: int, total: int) -> None:
        counts = slot_counts(program.retentions.values(), program.storages.values(), total, min(work.prompt, total))
        if entry == "prefill":
            # Tokens of a prompt leave their slots behind it.
            counts |= dict.fromkeys(program.retentions, total) | dict.fromkeys(program.storages, 0)
        masks = {kept.mask: counts[kept.name] for kept in program.retentions.values()}
        lengths = {"attention_mask": total, "logits_positions": 1, **masks}
        self._numbers: dict[sympy.Symbol, sympy.Integer] = {}
        self._known: dict[sympy.Expr, int] = {}
        for node in placeholders(program.entries[entry]):
            if "constant" in node.meta:
                continue
            state = program.states.get(node.meta.get("state", ""))
            if state is None:
                wanted = (work.batch, *(lengths.get(node.name, new) for _ in node.meta["val"].shape[1:]))
            else:
                slots = next((counts[size] for size in state.shape if size in counts), total)
                wanted = state.sizes(work.batch, slots)
            for size, number in zip(node.meta["val"].shape, wanted, strict=False):
                expression = sympy.sympify(size.node.expr) if isinstance(size, torch.SymInt) else None
                if isinstance(expression, sympy.Symbol):
                    self._numbers.setdefault(expression, sympy.Integer(number))

    def number(self, size: Any) -> int:
        """A size as a number."""
        if not isinstance(size, torch.SymInt):
            return int(size)
        expression = sympy.sympify(size.node.expr)
        if expression not in self._known:
            value = expression.xreplace(self._numbers)
            self._known[expression] = int(value) if value.is_number else int(size.node.hint or 1)
        return self._known[expression]

    def shape(self, value: Tensor) -> tuple[int, ...]:
        """Sizes of a tensor."""
        return tuple(self.number(size) for size in value.shape)

    def bytes(self, value: Any) -> int:
        """Of a tensor, or of several; nothing for numbers."""
        if isinstance(value, Tensor):
            return math.prod(self.shape(value)) * value.dtype.itemsize
        return sum(self.bytes(each) for each in value) if isinstance(value, (tuple, list)) else 0


class _Reader:
    """Costs of the nodes of one entry."""

    def __init__(self, program: Program, entry: str, sizes: _Sizes) -> None:
        self.program, self.sizes = program, sizes
        graph = program.entries[entry]
        returned: Any = output_node(graph).args[0]
        # States are updated in place: what is returned as one is the same memory.
        self.states = {node for node in placeholders(graph) if "state" in node.meta}
        self.states |= {node for node in returned[len(program.outputs_of(entry)) :] if isinstance(node, fx.Node)}

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Of the value of a node; of the first one of several."""
        value = node.meta["val"]
        return self.sizes.shape(value[0] if isinstance(value, (tuple, list)) else value)

    def is_view(self, node: fx.Node) -> bool:
        """Whether a node moves no bytes."""
        name = getattr(node.target, "__name__", str(node.target)).partition(".")[0]
        return name in _VIEWS or node.target is operator.getitem

    def costs(self, node: fx.Node) -> Iterator[NodeCost]:
        """One for each operator; views move no bytes, and are called all the same."""
        if node.target is operator.getitem:
            return
        if self.is_view(node):
            yield NodeCost(str(node.meta.get("where") or node.name), "other", calls=_VIEW_CALLS)
            return
        weights = self._weights(node)
        products = self._products(node)
        lookups = _operands(node, _LOOKUPS.get(node.target, ("", ()))[1])
        form, elements = self._form(node, weights)
        yield NodeCost(
            self._name(node, weights), self._kind(node), form, self._rows(node), weights,
            frozenset(name for name in weights if name in lookups), elements, *self._state_bytes(node),
            self._activations(node), self._elementwise(node) if products is None else products, _calls(node),
        )  # fmt: skip

    def _name(self, node: fx.Node, weights: Mapping[str, int]) -> str:
        return next(iter(weights), None) or str(node.meta.get("where") or node.name)

    def _kind(self, node: fx.Node) -> str:
        if is_call(node, aten.embedding.default, ops.quantized_embedding, ops.lut_embedding):
            return "embedding"
        if is_call(node, *_EXPERTS):
            return "experts"
        if is_call(node, *_ATTENTIONS):
            return "attention"
        if is_call(node, *_SPARSE_MLPS, ops.low_rank_mlp):
            return "linear"
        if _is_linear(node):
            return "head" if self.shape(node)[-1] == self.program.info.vocab_size else "linear"
        return "other"

    def _rows(self, node: fx.Node) -> int:
        return max(1, math.prod(self.shape(node)[:-1])) if isinstance(node.meta["val"], Tensor) else 1

    def _weights(self, node: fx.Node) -> dict[str, int]:
        """Bytes read, by constant."""
        found: dict[str, int] = {}
        share_of = self._shares(node)
        for operand in node.all_input_nodes:
            name = constant_name(operand)
            if name is not None:
                found[name] = round(self.program.constants[name].nbytes * share_of(name))
        return found

    def _shares(self, node: fx.Node) -> Callable[[str], float]:
        """How much of a constant a node reads."""
        if node.target in _LOOKUPS:
            indices, tables = _LOOKUPS[node.target]
            asked = math.prod(self.shape(arguments(node)[indices]))
            named = _operands(node, tables)
            return lambda name: min(1.0, asked / self.program.constants[name].shape[0]) if name in named else 1.0
        if node.target in _CHOICES and arguments(node)[_CHOICES[node.target][0]] is not None:
            share, named = self._chosen(node), _operands(node, _CHOICES[node.target][1])
            absent = constant_name(arguments(node).get("absent"))
            return lambda name: share if name in named or name == absent else 1.0
        return lambda name: 1.0

    def _chosen(self, node: fx.Node) -> float:
        """Share of the rows, experts or groups that the tokens of a call choose, expected where each chooses anew."""
        *tokens, kept = self.shape(arguments(node)["indices"])
        return 1 - (1 - min(1.0, kept / self._choices(node))) ** math.prod(tokens)

    def _choices(self, node: fx.Node) -> int:
        read = arguments(node)
        if is_call(node, *_SPARSE_MLPS):
            stack = read["up"] if is_call(node, ops.sparse_mlp) else read["up_codes"]
            return self.shape(stack)[0] // int(read["group"])
        first = read["weight"] if is_call(node, ops.sparse_linear) else node.args[3]
        return self.shape(first)[0]

    def _form(self, node: fx.Node, weights: Mapping[str, int]) -> tuple[str, int]:
        """How the weight is held, and how many weights are read."""
        if not weights:
            return "", 0
        read = arguments(node)
        if is_call(node, ops.bitmap_linear):
            return "bitmap", self.shape(read["bitmap"])[0] * int(read["in_features"])
        if "codes" in read or "up_codes" in read or "gate_up_codes" in read:
            bits = next((int(read[key]) for key in ("bits", "up_bits", "gate_up_bits") if key in read), 8)
            stacks = {constant_name(operand) for key, operand in read.items() if key.endswith("codes")}
            codes = sum(count for name, count in weights.items() if name in stacks)
            return ("table" if "lut" in read else f"int{bits}"), codes * 8 // bits
        largest = max(weights, key=lambda name: weights[name])
        dtype = self.program.constants[largest].dtype
        return str(dtype).removeprefix("torch."), sum(weights.values()) // dtype.itemsize

    def _state_bytes(self, node: fx.Node) -> tuple[int, int]:
        """Bytes of states read and written."""
        if is_call(node, ops.write_slots):
            return 0, self.sizes.bytes(arguments(node)["values"].meta["val"])
        read = sum(self.sizes.bytes(each.meta["val"]) for each in node.all_input_nodes if each in self.states)
        if is_call(node, ops.windowed_attention):
            return read, sum(self.sizes.bytes(arguments(node)[name].meta["val"]) for name in ("key", "value"))
        if is_call(node, *_ATTENTIONS):
            *_, steps, _ = self.shape(node.args[0])
            slots, window = self.shape(node.args[1])[2], int(arguments(node).get("window") or 0)
            if window and slots > window + steps - 1:
                read = read * (window + steps - 1) // slots
        return read, 0

    def _activations(self, node: fx.Node) -> int:
        values = [each for each in node.all_input_nodes if each not in self.states and constant_name(each) is None]
        if node not in self.states:
            values.append(node)
        return sum(self.sizes.bytes(each.meta["val"]) for each in values)

    def _elementwise(self, node: fx.Node) -> int:
        value = node.meta["val"]
        return math.prod(self.sizes.shape(value)) if isinstance(value, Tensor) else 0

    def _products(self, node: fx.Node) -> int | None:
        """Operations of a product; None for what is none."""
        read = arguments(node)
        if is_call(node, *_ATTENTIONS):
            return self._attention_operations(node)
        if is_call(node, *_EXPERTS):
            tokens, kept = self.shape(read["indices"])
            neurons = self.shape(node.args[3])[1] // 2
            return 2 * tokens * kept * 3 * neurons * self.shape(read["x"])[-1]
        if is_call(node, *_SPARSE_MLPS):
            stack, gate = ("up", "gate") if is_call(node, ops.sparse_mlp) else ("up_codes", "gate_codes")
            neurons, matrices = self.shape(read[stack])[0], 2 + (read[gate] is not None)
            share = 1.0 if read["indices"] is None else self.shape(read["indices"])[-1] / self._choices(node)
            return round(2 * self._rows(node) * neurons * share * matrices * self.shape(node)[-1])
        if is_call(node, ops.low_rank_mlp):
            names = [constant_name(each) for each in node.all_input_nodes]
            count = sum(math.prod(self.program.constants[name].shape) for name in names if name is not None)
            return 2 * self._rows(node) * count
        if is_call(node, ops.sparse_linear) and read["indices"] is not None:
            return 2 * math.prod(self.shape(node)) * self.shape(read["indices"])[-1]
        if _is_linear(node) or is_call(node, *_MATMULS):
            return 2 * math.prod(self.shape(node)) * self.shape(node.args[0])[-1]
        return None

    def _attention_operations(self, node: fx.Node) -> int:
        read = arguments(node)
        if is_call(node, ops.low_rank_attention):
            batch, steps, _ = self.shape(read["query"])
            keys, wide = self.shape(read["key"])[1], self.shape(read["query_rows"])[0]
            made = sum(self.shape(read[f"{name}_rows"])[0] * self.shape(read[name])[-1] for name in ("key", "value"))
            return 4 * batch * steps * keys * wide + 2 * batch * keys * made
        batch, heads, steps, dim = self.shape(read["query"])
        keys = self.shape(read["key"])[2]
        for stored in ("stored_key", "past_key"):
            keys += self.shape(read[stored])[2] if stored in read else 0
        window = int(read.get("window") or 0)
        return 4 * batch * heads * steps * min(keys, window + steps - 1 if window else keys) * dim


def _calls(node: fx.Node) -> float:
    if is_call(node, ops.quantized_linear):
        return _CALLS_BY_BITS.get(arguments(node)["bits"], 8)
    return _CALLS.get(node.target, 1)


def _is_linear(node: fx.Node) -> bool:
    """Whether a node multiplies its first operand with a matrix."""
    name = getattr(node.target, "_schema", None)
    return name is not None and str(name.name).partition("::")[2].endswith("linear")


def _operands(node: fx.Node, names: Sequence[str]) -> set[str]:
    """Constants that a node takes as operands of these names."""
    if not names:
        return set()
    read = arguments(node)
    return {name for name in (constant_name(read[each]) for each in names if each in read) if name is not None}


def _peak(graph: fx.Graph, reader: _Reader) -> int:
    """Most bytes of values alive at once; a view keeps alive what it is a view of."""
    nodes = list(graph.nodes)
    owner: dict[fx.Node, fx.Node] = {}
    last: dict[fx.Node, int] = {}
    for index, node in enumerate(nodes):
        for each in node.all_input_nodes:
            if each.op == "call_function":
                last[owner[each]] = index
        if node.op == "call_function":
            first = next((each for each in node.all_input_nodes if each.op == "call_function"), None)
            owner[node] = owner[first] if reader.is_view(node) and first is not None else node
            last.setdefault(owner[node], index)
    ends: dict[int, list[fx.Node]] = {}
    for node, index in last.items():
        ends.setdefault(index, []).append(node)
    alive = peak = 0
    held: dict[fx.Node, int] = {}
    for index, node in enumerate(nodes):
        if node in owner and owner[node] is node and node not in reader.states and not reader.is_view(node):
            held[node] = reader.sizes.bytes(node.meta["val"])
            alive += held[node]
        peak = max(peak, alive + _scratch(node, reader))
        alive -= sum(held.pop(each, 0) for each in ends.get(index, ()))
    return peak


def _scratch(node: fx.Node, reader: _Reader) -> int:
    """What attention of several queries holds for itself: who sees whom, and keys and values for every head."""
    if not is_call(node, *_ATTENTIONS) or is_call(node, ops.low_rank_attention):
        return 0
    read = arguments(node)
    batch, heads, steps, dim = reader.shape(read["query"])
    if steps == 1:
        return 0
    itemsize, keys = read["query"].meta["val"].dtype.itemsize, reader.shape(read["key"])[2]
    if read.get("softcap") or read.get("sinks") is not None or "scored" in str(node.target):
        return 3 * batch * heads * steps * keys * itemsize
    repeated = 2 * batch * heads * keys * dim * itemsize if heads != reader.shape(read["key"])[1] else 0
    return batch * steps * keys * (1 + itemsize) + repeated
