"""An entry as Python code whose steps launch Triton kernels, and PyTorch runs what has none."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from jettison.codegen.triton.bitmap_step import BitmapStep
from jettison.codegen.triton.kernels.gather_down import GatherDown
from jettison.codegen.triton.kernels.gemm import DECODE_ROWS
from jettison.codegen.triton.launch import Launcher, Launchers
from jettison.codegen.triton.steps import (
    AttentionStep,
    CacheStep,
    JointAttentionStep,
    LinearStep,
    LookupStep,
    LowRankAttentionStep,
    LowRankMlpStep,
    NormStep,
    SparseMlpStep,
    Step,
    TorchStep,
)
from jettison.ir import ops
from jettison.ir.match import arguments, is_call
from jettison.ir.ops.write_slots import write_slots_
from jettison.ir.program import Program, output_node, placeholders
from jettison.runtime.bitmap_steps import RunBitmap
from jettison.runtime.device_weights import DeviceWeights
from jettison.runtime.low_rank_attention import run_low_rank_attention
from jettison.runtime.low_rank_mlp import run_low_rank_mlp
from jettison.runtime.low_rank_steps import RunLowRankAttention, RunLowRankMlp
from jettison.runtime.state_operators import attend_slots, slot_range

# What PyTorch runs some tokens at a time.
_CHUNKED = {ops.low_rank_attention: run_low_rank_attention, ops.low_rank_mlp: run_low_rank_mlp}


class _Runner:
    """What a step becomes; generated code calls it by its name."""

    __name__ = "run_step"


class RunLinear(_Runner):
    """Runs a `LinearStep`: one launch for one row of x, a norm and a launch for more."""

    def __init__(self, step: LinearStep, weights: DeviceWeights, launchers: Launchers) -> None:
        self.step = step
        self.weights = weights.of_linear(step.weights, step.form.dtype)
        self.bias = weights.joined(step.biases, step.dtype)
        self.norm = [] if step.norm is None else [weights.constant(step.norm)]
        self.gemv, self.few_rows, self.gemm = (launchers(each) for each in (step.gemv, step.few_rows, step.gemm))
        kernel = step.norm_kernel
        self.norm_launcher = None if kernel is None else launchers(kernel)

    def __call__(self, x: Tensor, *residual: Tensor) -> tuple[Tensor, ...]:
        """The results of the linears, columns of one matrix where there are several."""
        step = self.step
        flat = x.reshape(-1, step.columns)
        count = len(flat)
        out = x.new_empty(*x.shape[:-1], step.rows)
        after = [*self.bias, *(each.contiguous() for each in residual), out]
        if count == 1:
            with self.weights() as weights:
                self.gemv(flat, *self.norm, *weights, *after, sizes={})
        else:
            if self.norm_launcher is not None:
                normed = torch.empty_like(flat, memory_format=torch.contiguous_format)
                self.norm_launcher(flat.contiguous(), *self.norm, normed, sizes={"M": count})
                flat = normed
            launcher = self.few_rows if count <= DECODE_ROWS else self.gemm
            with self.weights() as weights:
                launcher(flat.contiguous(), *weights, *after, sizes={"M": count})
        return (out,) if len(step.outputs) == 1 else out.split(step.parts, -1)


class RunNorm(_Runner):
    """Runs a `NormStep`."""

    def __init__(self, step: NormStep, weights: DeviceWeights, launchers: Launchers) -> None:
        self.launcher, self.parameters = launchers(step.kernel), [weights.constant(name) for name in step.parameters]

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """The norm of each row."""
        x = x.contiguous()
        out = torch.empty_like(x)
        self.launcher(x, *self.parameters, out, sizes={"M": x.numel() // x.shape[-1]})
        return (out,)


class RunLookup(_Runner):
    """Runs a `LookupStep`."""

    def __init__(self, step: LookupStep, weights: DeviceWeights, launchers: Launchers) -> None:
        self.launcher = launchers(step.kernel)
        self.columns, self.dtype = step.kernel.columns, step.kernel.dtype
        self.weights = weights.stacked([step.weight], step.kernel.weight.dtype)

    def __call__(self, indices: Tensor) -> tuple[Tensor, ...]:
        """Rows of the table."""
        out = torch.empty(*indices.shape, self.columns, dtype=self.dtype, device=indices.device)
        self.launcher(indices.contiguous(), *self.weights, out, sizes={"M": indices.numel()})
        return (out,)


class RunSparseMlp(_Runner):
    """Runs a `SparseMlpStep`: two launches, whatever is named; a program per token."""

    def __init__(self, step: SparseMlpStep, weights: DeviceWeights, counters: Counters, launchers: Launchers) -> None:
        assert step.first is not None, "made with both"
        assert step.second is not None, "made with both"
        self.kept, self.neurons = step.first.kept, step.first.kept * step.first.group
        self.first, self.second = launchers(step.first), launchers(step.second)
        self.up = weights.stacked(step.up, step.first.weight.dtype) if step.first.weight.bits else [
            weights.constant(name) for name in step.up if isinstance(name, str)
        ]  # fmt: skip
        scale = None if isinstance(step.second, GatherDown) else step.second.weight.dtype
        self.down = weights.stacked([step.down], scale or step.first.dtype)
        self.up_bias = weights.joined(step.up_bias, step.first.dtype)
        self.after = [
            each for names in (step.absent, step.down_bias) for each in weights.joined(names, step.first.dtype)
        ]
        self._counters = counters

    def __call__(self, x: Tensor, indices: Tensor, *residual: Tensor) -> tuple[Tensor, ...]:
        """`[..., E]`."""
        flat, named = x.reshape(-1, x.shape[-1]).contiguous(), indices.reshape(-1, self.kept).contiguous()
        hidden, out = flat.new_empty(len(flat), self.neurons), x.new_empty(x.shape)
        sizes = {"M": len(flat)}
        self.first(flat, named, *self.up, *self.up_bias, hidden, sizes=sizes)
        after = [*self.after, *(each.contiguous() for each in residual), *self._scratch(flat), out]
        self.second(hidden, named, *self.down, *after, sizes=sizes)
        return (out,)

    def _scratch(self, flat: Tensor) -> list[Tensor]:
        """What splits leave for the last one, and the counters by which it is known; nothing where there are none."""
        kernel = self.second.kernel
        if not isinstance(kernel, GatherDown):
            return []
        splits = self.second.largest(lambda tuning: tuning["SPLITS"])
        parts = flat.new_empty(len(flat), splits, flat.shape[-1], dtype=torch.float32)
        return [parts, self._counters(len(flat) * self.second.largest(kernel.blocks))]


class RunCache(_Runner):
    """Runs a `CacheStep`; the caches are written in place."""

    def __init__(self, step: CacheStep, launchers: Launchers) -> None:
        assert step.kernel is not None, "made with one"
        self.kernel, self.launcher = step.kernel, launchers(step.kernel)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Rotated queries and the caches."""
        *angles, slots, key_cache, value_cache = others
        batch, steps = slots.shape
        rotated = query.new_empty(batch, self.kernel.heads, steps, self.kernel.dim)
        query, key, value = (_rows(part) for part in (query, key, value))
        rows = {"QUERY_ROW": query.stride(0), "KEY_ROW": key.stride(0), "VALUE_ROW": value.stride(0)}
        sizes = {"B": batch, "S": steps, "C": key_cache.shape[2], **rows}
        angles = [angle.contiguous() for angle in angles]
        self.launcher(
            query, key, value, *angles, slots.contiguous(), rotated, key_cache, value_cache, sizes=sizes
        )  # fmt: skip
        return rotated, key_cache, value_cache


def _rows(heads: Tensor) -> Tensor:
    """`[B, S, H * D]` or `[B, S, H, D]` as rows of tokens `[B * S, H * D]`: a view where they are evenly apart."""
    flat = heads.flatten(2)
    return flat.view(-1, flat.shape[2]) if flat.stride(0) == flat.shape[1] * flat.stride(1) else flat.flatten(0, 1)


class RunAttention(_Runner):
    """Runs an `AttentionStep`."""

    def __init__(self, step: AttentionStep, counters: Counters, launchers: Launchers) -> None:
        assert step.kernel is not None, "made with one"
        self.kernel, self.launcher = step.kernel, launchers(step.kernel)
        self.scratch = _Scratch(counters, self.launcher, step.kernel.kv_heads, step.kernel.shared, step.kernel.dim)

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, slots: Tensor) -> tuple[Tensor, ...]:
        """`[B, 1, H * D]`."""
        kernel, batch = self.kernel, query.shape[0]
        out = query.new_empty(batch, 1, kernel.heads * kernel.dim)
        self.launcher(
            query.contiguous(), key, value, slots.contiguous(),
            *self.scratch(query), out, sizes={"B": batch, "C": key.shape[2]},
        )  # fmt: skip
        return (out,)


class RunJointAttention(_Runner):
    """Runs a `JointAttentionStep`."""

    def __init__(self, step: JointAttentionStep, counters: Counters, launchers: Launchers) -> None:
        assert step.kernel is not None, "made with one"
        self.kernel, self.launcher = step.kernel, launchers(step.kernel)
        self.scratch = _Scratch(counters, self.launcher, step.kernel.kv_heads, step.kernel.shared, step.kernel.dim)

    def __call__(self, query: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """`[B, 1, H * D]`."""
        *stored, count, key, value, slots = others
        kernel, batch = self.kernel, query.shape[0]
        out = query.new_empty(batch, 1, kernel.heads * kernel.dim)
        sizes = {"B": batch, "SLOTS": stored[0].shape[2], "C": key.shape[2]}
        self.launcher(
            query.contiguous(), *stored, count, key, value, slots.contiguous(),
            *self.scratch(query), out, sizes=sizes,
        )  # fmt: skip
        return (out,)


class Counters:
    """How many programs of a launch have finished, for each thing that several of them share.

    They are zero between two launches, the last program of a launch sees to it; so all kernels share them.

    Args:
        device: Where.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._held: dict[int, Tensor] = {}

    def __call__(self, count: int) -> Tensor:
        """So many counters."""
        if count not in self._held:
            self._held[count] = torch.zeros(count, dtype=torch.int32, device=self._device)
        return self._held[count]


class _Scratch:
    """What splits of an attention leave for the last one, and the counters by which it is known."""

    def __init__(self, counters: Counters, launcher: Launcher, kv_heads: int, shared: int, dim: int) -> None:
        self._counters, self._launcher = counters, launcher
        self._kv_heads, self._shared, self._dim = kv_heads, shared, dim

    def __call__(self, query: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted values, maxima and sums, and counters."""
        pairs, splits = query.shape[0] * self._kv_heads, self._launcher.largest(lambda tuning: tuning["SPLITS"])
        parts = query.new_empty(pairs, splits, self._shared, self._dim, dtype=torch.float32)
        stats = query.new_empty(pairs, splits, self._shared, 2, dtype=torch.float32)
        return parts, stats, self._counters(pairs)


@dataclass(frozen=True)
class Parts:
    """What the entries of a program share.

    Attributes:
        weights: On the device.
        counters: See `Counters`.
        launchers: Of all kernels.
    """

    weights: DeviceWeights
    counters: Counters
    launchers: Launchers


def build_entry(
    program: Program, entry_name: str, steps: Sequence[Step], parts: Parts
) -> Callable[..., tuple[Tensor, ...]]:
    """Code that runs an entry: takes its states, then its inputs; returns what the graph returns.

    Args:
        program: Whose.
        entry_name: Of the entry.
        steps: What `fuse` made of it.
        parts: Of the program.
    """
    entry = program.entries[entry_name]
    builder = _Builder(parts)
    for node in placeholders(entry):
        builder.placeholder(node)
    for step in steps:
        builder.add(step)
    returned = output_node(entry).args[0]
    builder.graph.output(tuple(builder.value(node) for node in returned))
    return fx.GraphModule(nn.Module(), builder.graph).forward


class _Builder:
    """A graph of steps."""

    def __init__(self, parts: Parts) -> None:
        self.graph = fx.Graph()
        self._weights, self._counters, self._launchers = parts.weights, parts.counters, parts.launchers
        self._new: dict[fx.Node, Any] = {}

    def placeholder(self, node: fx.Node) -> None:
        """States and inputs are given; constants are fetched where PyTorch reads them."""
        if "constant" not in node.meta:
            self._new[node] = self.graph.placeholder(node.name)

    def value(self, node: fx.Node) -> fx.Node:
        """A value in the new graph."""
        if node not in self._new:
            name = node.meta["constant"]
            self._weights.constant(name)  # held, and counted, from the beginning
            self._new[node] = self.graph.call_function(self._weights.constant, (name,))
        return self._new[node]

    def add(self, step: Step) -> None:
        """Append a step."""
        if isinstance(step, TorchStep):
            self._torch(step.nodes[0])
            return
        run = self._runner(step)
        made = self.graph.call_function(run, tuple(self.value(node) for node in step.inputs))
        for index, node in enumerate(step.outputs):
            self._new[node] = self.graph.call_function(operator.getitem, (made, index))

    def _runner(self, step: Step) -> Callable[..., tuple[Tensor, ...]]:
        if isinstance(step, LinearStep):
            return RunLinear(step, self._weights, self._launchers)
        if isinstance(step, BitmapStep):
            return RunBitmap(step, self._weights, self._launchers)
        if isinstance(step, NormStep):
            return RunNorm(step, self._weights, self._launchers)
        if isinstance(step, LookupStep):
            return RunLookup(step, self._weights, self._launchers)
        if isinstance(step, SparseMlpStep):
            return RunSparseMlp(step, self._weights, self._counters, self._launchers)
        if isinstance(step, LowRankMlpStep):
            return RunLowRankMlp(step, self._weights, self._launchers)
        if isinstance(step, LowRankAttentionStep):
            return RunLowRankAttention(step, self._weights, self._launchers)
        if isinstance(step, CacheStep):
            return RunCache(step, self._launchers)
        if isinstance(step, JointAttentionStep):
            return RunJointAttention(step, self._counters, self._launchers)
        assert isinstance(step, AttentionStep), step
        return RunAttention(step, self._counters, self._launchers)

    def _torch(self, node: fx.Node) -> None:
        """One operator, on the device."""
        found = arguments(node) if is_call(node, ops.attention) else {}
        if found and found["query"].meta["val"].shape[2] != 1 and _follows_positions(found):
            operands = [found[name] for name in ("query", "key", "value")]
            slots = self.graph.call_function(slot_range, (self.value(found["query_positions"]),))
            options = [found[name] for name in ("key_positions", "key_valid", "sinks", "scale", "causal", "window",
                                                "softcap")]  # fmt: skip
            given = [*(self.value(each) for each in operands), slots, *self._translated(options)]
            self._new[node] = self.graph.call_function(attend_slots, tuple(given))
        elif is_call(node, ops.write_slots) and "state" in node.args[0].meta and len(node.args[0].users) == 1:
            self._new[node] = self.graph.call_function(write_slots_, tuple(self._translated(node.args)))
        else:
            copied = self.graph.node_copy(node, self.value)
            copied.target = _CHUNKED.get(node.target, node.target)
            if "device" in copied.kwargs:
                copied.kwargs = {**copied.kwargs, "device": self._weights.device}
            self._new[node] = copied

    def _translated(self, old: Sequence[Any]) -> list[Any]:
        return [self.value(each) if isinstance(each, fx.Node) else each for each in old]


def _follows_positions(found: Mapping[str, Any]) -> bool:
    """Whether keys are slots that are written at the positions of the queries."""
    key = found["key"]
    is_own = is_call(key, ops.write_slots) and key.args[2] is found["query_positions"]
    return is_own and found["key_positions"] is None and found["key_valid"] is None and bool(found["causal"])
