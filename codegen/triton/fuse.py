"""Decides what goes together: an entry becomes steps, each one launch on a GPU or one operator that PyTorch runs.

| step      | nodes                                                                                     |
|-----------|-------------------------------------------------------------------------------------------|
| linear    | RMS norm, linears of the same x, then bias, activation or gate, and residual               |
| cache     | rotary embedding of queries and keys, and both writes to the cache                         |
| attention | attention of one token per row, and the reshape behind it                                  |
| sparse    | a feed-forward layer of which a token names slabs, and residual: two launches              |
| bitmap    | a linear over a bitmap weight, then bias and residual                                      |
| low rank  | a fused factored feed-forward layer and residual, or attention                            |
| norm      | an RMS norm whose result is read by more than one group                                    |
| lookup    | an embedding from a quantised table                                                        |

Each step says why it stops where it does; what has no kernel says why as well.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from jettison.codegen.triton.bitmap_step import bitmap_step
from jettison.codegen.triton.heads import peel, side_by_side
from jettison.codegen.triton.kernels.base import COMPUTED
from jettison.codegen.triton.kernels.decode_attention import DecodeAttention
from jettison.codegen.triton.kernels.embedding import Embedding
from jettison.codegen.triton.kernels.epilogue import ACTIVATIONS, Epilogue
from jettison.codegen.triton.kernels.joint_attention import JointAttention, Ranges
from jettison.codegen.triton.kernels.layer_norm import LayerNorm
from jettison.codegen.triton.kernels.norm import RmsNorm
from jettison.codegen.triton.kernels.rotary_write import RotaryWrite
from jettison.codegen.triton.kernels.top_k import MOST
from jettison.codegen.triton.kernels.weight_form import WeightForm
from jettison.codegen.triton.low_rank_step import low_rank_attention_step, low_rank_mlp_step
from jettison.codegen.triton.sparse_step import sparse_step
from jettison.codegen.triton.steps import (
    AttentionStep,
    CacheStep,
    JointAttentionStep,
    LinearStep,
    LookupStep,
    NormStep,
    Step,
    TorchStep,
)
from jettison.codegen.triton.word_layout import refusal, scale_dtype
from jettison.ir import ops
from jettison.ir.match import arguments, constant_name, is_call, only_user
from jettison.ir.packed_parts import LutParts, PackedParts, lut_parts_read, parts_read
from jettison.ir.program import Program

aten = torch.ops.aten
_ACTIVATION_OPS = {
    aten.relu.default: "relu", aten.silu.default: "silu", aten.sigmoid.default: "sigmoid", aten.gelu.default: "gelu",
}  # fmt: skip
_WITHOUT_KERNEL = {
    ops.head_candidates: "the search for the largest bounds has no kernel",
    ops.selected_linear: "a product with rows that are looked up has no kernel",
}


def fuse(program: Program, entry_name: str) -> list[Step]:
    """Cut an entry into steps.

    Args:
        program: With metadata.
        entry_name: Of the entry.

    Returns:
        Steps in an order in which they can run; placeholders and the output are in none.
    """
    entry = program.entries[entry_name]
    fusion = _Fusion(program, is_decode=entry_name == "decode")
    nodes = [node for node in entry.graph.nodes if node.op == "call_function"]
    for find in (
        fusion.attention,
        fusion.sparse_mlp,
        fusion.low_rank,
        fusion.bitmap,
        fusion.linears,
        fusion.norm,
        fusion.lookup,
    ):
        for node in nodes:
            if node not in fusion.step_of:
                find(node)
    for node in nodes:
        if node not in fusion.step_of:
            reason = fusion.misses.get(node) or _WITHOUT_KERNEL.get(node.target, "")
            fusion.add(TorchStep([node], list(node.all_input_nodes), [node], reason))
    return _ordered(nodes, fusion.step_of)


def _ordered(nodes: Sequence[fx.Node], step_of: dict[fx.Node, Step]) -> list[Step]:
    """Steps behind those whose values they take, else in the order of the graph."""
    done: dict[int, Step] = {}

    def visit(step: Step) -> None:
        if id(step) in done:
            return
        for value in step.inputs:
            if value in step_of and step_of[value] is not step:
                visit(step_of[value])
        done[id(step)] = step

    for node in nodes:
        visit(step_of[node])
    return list(done.values())


class _Fusion:
    """Steps found so far in one entry."""

    def __init__(self, program: Program, *, is_decode: bool) -> None:
        self.program, self.is_decode = program, is_decode
        self.step_of: dict[fx.Node, Step] = {}
        self.misses: dict[fx.Node, str] = {}

    def add(self, step: Step) -> None:
        """Take the nodes of a step."""
        for node in step.nodes:
            self.step_of[node] = step

    # Attention and the cache.

    def attention(self, node: fx.Node) -> None:
        """What surrounds the attention over a cache that is written in the same call."""
        if not is_call(node, ops.attention, ops.joint_attention):
            return
        found = arguments(node)
        key, value = found["key"], found["value"]
        if not (_is_write(key) and _is_write(value) and key.args[2] is value.args[2]):
            self.misses[node] = "the keys are no slots that this call writes"
            return
        self._cache_write(found["query"], key, value)
        if not self.is_decode:
            self.misses[node] = "PyTorch's own kernels attend to prompts"
        elif is_call(node, ops.attention):
            self._one_token(node, found)
        else:
            self._one_token_and_stored(node, found)

    def _cache_write(self, query: fx.Node, key: fx.Node, value: fx.Node) -> None:
        of_query, of_key, of_value = peel(query), peel(key.args[1]), peel(value.args[1])
        if of_query is None or of_key is None or of_value is None or of_value.angles is not None:
            self.misses[key] = "the heads are not cut out of a row of each token"
            return
        if of_query.angles != of_key.angles:
            self.misses[key] = "queries and keys rotate by different angles"
            return
        sources = [of_query.source, of_key.source, of_value.source]
        heads, dim = query.meta["val"].shape[1], query.meta["val"].shape[3]
        kv_heads = key.meta["val"].shape[1]
        dtype, angles = query.meta["val"].dtype, of_query.angles
        if dtype not in COMPUTED or value.meta["val"].shape[3] != dim:
            self.misses[key] = "values have another width than keys"
            return
        kernel = RotaryWrite(
            int(heads), int(kv_heads), int(dim), 2 * int(angles[0].meta["val"].shape[-1]) if angles else 0,
            bool(angles and angles[2]), dtype, key.meta["val"].dtype,
            angles[0].meta["val"].dtype if angles else torch.float32,
        )  # fmt: skip
        own = [*of_query.nodes, *of_key.nodes, *of_value.nodes, key, value]
        if any(user not in own for node in own if node not in (query, key, value) for user in node.users):
            self.misses[key] = "a head is read before it is rotated"
            return
        inputs = [*sources, *(angles[:2] if angles else ()), key.args[2], key.args[0], value.args[0]]
        self.add(CacheStep(own, inputs, [query, key, value], "keys and values go to the cache", kernel=kernel))

    def _one_token(self, node: fx.Node, found: dict[str, Any]) -> None:
        query, key, slots = found["query"], found["key"], found["query_positions"]
        if key.args[2] is not slots or found["key_positions"] is not None or found["key_valid"] is not None:
            self.misses[node] = "slots do not follow positions"
            return
        if found["sinks"] is not None or not found["causal"]:
            self.misses[node] = "sinks in the softmax have no kernel"
            return
        sizes = query.meta["val"].shape
        behind = side_by_side(node)
        if behind is None:
            self.misses[node] = "the heads are not put side by side"
            return
        kernel = DecodeAttention(
            int(sizes[1]), int(key.meta["val"].shape[1]), int(sizes[3]), found["scale"], found["window"],
            found["softcap"], query.meta["val"].dtype, key.meta["val"].dtype,
        )  # fmt: skip
        inputs = [query, key, found["value"], slots]
        self.add(AttentionStep([node, *behind], inputs, [behind[-1]], "the heads leave side by side", kernel=kernel))

    def _one_token_and_stored(self, node: fx.Node, found: dict[str, Any]) -> None:
        query, key, value, slots = (found[name] for name in ("query", "key", "value", "slots"))
        stored = [found["stored_key"], found["stored_value"]]
        behind = side_by_side(node)
        if behind is None or key.args[2] is not slots:
            self.misses[node] = "the heads are not put side by side"
            return
        if not all(is_call(each, ops.dequantize_slots) and only_user(each) is node for each in stored):
            self.misses[node] = "keys and values are not what slots hold, but computed from it"
            return
        read = [arguments(each) for each in stored]
        if len({(each["bits"], each["tokens"]) for each in read}) > 1:
            self.misses[node] = "keys and values are stored in different bits"
            return
        sizes, tokens = query.meta["val"].shape, read[0]["tokens"]
        counts = [int(each["scales"].meta["val"].shape[3]) for each in read]
        ranges = [
            Ranges(each["bits"], each["rows"], count // each["rows"]) for each, count in zip(read, counts, strict=True)
        ]
        kernel = JointAttention(
            int(sizes[1]), int(key.meta["val"].shape[1]), int(sizes[3]), found["scale"], tokens, ranges[0], ranges[1],
            query.meta["val"].dtype, key.meta["val"].dtype,
        )  # fmt: skip
        parts = [each[name] for each in read for name in ("codes", "scales", "zeros")]
        inputs = [query, *parts, found["stored_tokens"], key, value, slots]
        nodes = [*stored, node, *behind]
        self.add(JointAttentionStep(nodes, inputs, [behind[-1]], "codes are decoded in registers", kernel=kernel))

    # Feed-forward layers of which tokens name groups.

    def sparse_mlp(self, node: fx.Node) -> None:
        """Both halves of a sparse feed-forward layer, and the residual behind it."""
        if not is_call(node, ops.sparse_mlp, ops.quantized_sparse_mlp):
            return
        indices = arguments(node)["indices"]
        if indices is not None and is_call(indices, operator.getitem):
            self.misses[indices.args[0]] = f"PyTorch picks groups; kernels pick at most {MOST}"
        if not self.is_decode:
            self.misses[node] = "PyTorch's own kernels multiply prompts"
            return
        step = sparse_step(node, self._residual(node))
        if isinstance(step, str):
            self.misses[node] = step
        else:
            self.add(step)

    # What reads factors.

    def low_rank(self, node: fx.Node) -> None:
        """An attention whose heads are made on chip, or a factored feed-forward layer and the residual behind it."""
        if is_call(node, ops.low_rank_attention):
            step: Step | str = low_rank_attention_step(node)
        elif is_call(node, ops.low_rank_mlp):
            step = low_rank_mlp_step(node, self._residual(node))
        else:
            return
        if isinstance(step, str):
            self.misses[node] = step
        else:
            self.add(step)

    # What reads a bitmap.

    def bitmap(self, node: fx.Node) -> None:
        """A linear over a bitmap weight, and the residual behind it."""
        if not is_call(node, ops.bitmap_linear):
            return
        step = bitmap_step(node, self._residual(node), self.program)
        if isinstance(step, str):
            self.misses[node] = step
        else:
            self.add(step)

    # Linears.

    def linears(self, node: fx.Node) -> None:
        """All linears that read what this one reads, in the same form."""
        read = self._weight_read(node)
        if read is None:
            return
        x = node.args[0]
        form = read[1]
        together = [
            user for user in x.users
            if user not in self.step_of and (found := self._weight_read(user)) is not None and found[1] == form
            and user.args[0] is x and (_bias(user) is None) == (_bias(node) is None)
            and self._table(user) == self._table(node)
        ]  # fmt: skip
        gate = self._gate(together)
        if gate is not None:
            together, middle = [gate[0], gate[1]], gate[2]
            epilogue = Epilogue(_bias(node) is not None, middle.args[2], is_gated=True)
            nodes, outputs = [*together, middle], [middle]
        else:
            epilogue = Epilogue(_bias(node) is not None)
            nodes, outputs = list(together), list(together)
        step = self._linear_step(x, together, nodes, outputs, epilogue)
        if len(step.outputs) == 1:
            self._follow(step)
        self._precede(step, x)
        self.add(step)

    def _weight_read(self, node: fx.Node) -> tuple[PackedParts | LutParts | str, WeightForm] | None:
        """The weight of a linear and its form, or None where there is no kernel."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype not in COMPUTED:
            return None
        if is_call(node, aten.linear.default, ops.quantized_linear, ops.lut_linear):
            bias = _bias(node)
            if bias is not None and constant_name(bias) is None:
                self.misses[node] = "the bias is computed"
                return None
        if is_call(node, aten.linear.default):
            name = constant_name(node.args[1])
            return None if name is None else (name, WeightForm(node.args[1].meta["val"].dtype))
        if not is_call(node, ops.quantized_linear, ops.lut_linear):
            return None
        return self._packed(node, value.dtype)

    def _packed(self, node: fx.Node, dtype: torch.dtype) -> tuple[PackedParts | LutParts, WeightForm] | None:
        """A weight in a form that kernels read; else a reason is noted."""
        parts: PackedParts | LutParts | None = parts_read(node) or lut_parts_read(node)
        if parts is None:
            if is_call(node, ops.lut_linear, ops.lut_embedding):
                self.misses[node] = "a palette without scales has no kernel"
            return None
        reason = refusal(parts.bits, parts.group)
        if isinstance(parts, LutParts) and self.program.constants[parts.lut].shape[0] > 1:
            reason = "rows with tables of their own have no kernel"
        if reason is not None:
            self.misses[node] = reason
            return None
        if isinstance(parts, LutParts):
            return parts, WeightForm(scale_dtype(dtype), parts.bits, parts.group, has_table=True)
        return parts, WeightForm(scale_dtype(dtype), parts.bits, parts.group, parts.zeros is not None)

    def _table(self, node: fx.Node) -> str | None:
        """What tells tables of weights apart, where they have one."""
        parts = lut_parts_read(node)
        return None if parts is None else self.program.constants[parts.lut].digest

    def _gate(self, together: Sequence[fx.Node]) -> tuple[fx.Node, fx.Node, fx.Node] | None:
        """Gate, up and the activation of a gated MLP among linears."""
        for gate in together:
            middle = only_user(gate)
            if is_call(middle, ops.gated_activation) and middle.args[0] is gate and middle.args[2] in ACTIVATIONS:
                up = middle.args[1]
                if up in together and only_user(up) is middle and up.meta["val"].shape == gate.meta["val"].shape:
                    return gate, up, middle
        return None

    def _linear_step(
        self, x: fx.Node, linears: Sequence[fx.Node], nodes: list[fx.Node], outputs: list[fx.Node], epilogue: Epilogue
    ) -> LinearStep:
        read = [self._weight_read(linear) for linear in linears]
        weights = tuple(each[0] for each in read if each is not None)
        assert read[0] is not None
        biases = tuple(constant_name(_bias(linear)) or "" for linear in linears) if epilogue.has_bias else ()
        why = f"{len(linears)} linears read the same x" if len(linears) > 1 else ""
        return LinearStep(
            nodes, [x], outputs, why, weights, biases,
            tuple(int(linear.meta["val"].shape[-1]) for linear in linears), int(x.meta["val"].shape[-1]), read[0][1],
            x.meta["val"].dtype, epilogue=epilogue,
        )  # fmt: skip

    def _follow(self, step: LinearStep) -> None:
        """Take in what is done with the only result: an activation, then a residual."""
        epilogue, last = step.epilogue, step.outputs[0]
        after = self._free_user(last)
        name = _ACTIVATION_OPS.get(after.target) if after is not None else None
        if name is not None and not epilogue.is_gated:
            if name == "gelu" and arguments(after)["approximate"] == "tanh":
                name = "gelu_tanh"
            epilogue, last = Epilogue(epilogue.has_bias, name), after
            step.nodes.append(after)
        added = self._residual(last)
        if added is not None:
            after, other = added
            epilogue = Epilogue(epilogue.has_bias, epilogue.activation, epilogue.is_gated, True)
            step.inputs.append(other)
            step.nodes.append(after)
            last = after
        step.epilogue, step.outputs = epilogue, [last]

    def _residual(self, last: fx.Node) -> tuple[fx.Node, fx.Node] | None:
        """The sum that is all that reads a value, and what it is added to."""
        after = self._free_user(last)
        if after is None or not is_call(after, aten.add.Tensor) or after.kwargs:
            return None
        other = after.args[1] if after.args[0] is last else after.args[0]
        same = isinstance(other, fx.Node) and isinstance(other.meta["val"], torch.Tensor)
        return (after, other) if same and other is not last and _type(other) == _type(last) else None

    def _free_user(self, node: fx.Node) -> fx.Node | None:
        """The only user, if no other step has it."""
        user = only_user(node)
        return None if user in self.step_of else user

    def _precede(self, step: LinearStep, x: fx.Node) -> None:
        """Take in the norm of x, where nobody else reads it."""
        norm = _norm(x)
        if norm is None:
            return
        if any(user not in step.nodes for user in x.users):
            step.reason = f"{step.reason}; the norm has other readers".strip("; ")
            return
        step.norm, step.norm_eps = norm
        step.inputs[0] = x.args[0]
        step.nodes.insert(0, x)

    # Single nodes.

    def norm(self, node: fx.Node) -> None:
        """A norm by itself."""
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.dtype not in COMPUTED:
            return
        norm, columns = _norm(node), int(value.shape[-1])
        if norm is not None:
            self.add(NormStep([node], [node.args[0]], [node], "", norm[:1], RmsNorm(columns, value.dtype, norm[1])))
        if is_call(node, aten.layer_norm.default):
            found = arguments(node)
            given = [found[name] for name in ("weight", "bias") if found[name] is not None]
            names = tuple(name for name in map(constant_name, given) if name is not None)
            if found["weight"] is None or len(names) < len(given) or len(found["normalized_shape"]) != 1:
                self.misses[node] = "a norm without a weight has no kernel"
                return
            kernel = LayerNorm(columns, value.dtype, float(found["eps"]), len(names) == 2)
            self.add(NormStep([node], [node.args[0]], [node], "", names, kernel))

    def lookup(self, node: fx.Node) -> None:
        """An embedding."""
        if not is_call(node, ops.quantized_embedding, ops.lut_embedding):
            return
        dtype = node.meta["val"].dtype
        found = self._packed(node, dtype)
        if found is None:
            return
        parts, form = found
        kernel = Embedding(form, parts.columns, dtype)
        self.add(LookupStep([node], [arguments(node)["indices"]], [node], "", parts, kernel))


def _type(node: fx.Node) -> tuple[object, ...]:
    value = node.meta["val"]
    return (value.dtype, *map(str, value.shape))


def _bias(linear: fx.Node) -> fx.Node | None:
    bias = arguments(linear)["bias"]
    return bias if isinstance(bias, fx.Node) else None


def _norm(node: fx.Node) -> tuple[str, float] | None:
    """Weight and epsilon of an RMS norm over the last dimension."""
    if not is_call(node, aten.rms_norm.default):
        return None
    found = arguments(node)
    weight = constant_name(found["weight"])
    if weight is None or found["eps"] is None or len(found["normalized_shape"]) != 1:
        return None
    return weight, float(found["eps"])


def _is_write(node: object) -> bool:
    return is_call(node, ops.write_slots) and "state" in node.args[0].meta and len(node.args[0].users) == 1
