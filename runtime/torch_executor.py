"""Runs a program with PyTorch: the graph as generated Python code, states updated in place.

Operators that read or write states are replaced by forms that work on the state itself and skip the slots no query
sees; the operators in `ir/ops` define what these must compute.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from jettison.ir import ops
from jettison.ir.errors import OptionError
from jettison.ir.match import is_call
from jettison.ir.ops.windowed_attention import resident_tokens
from jettison.ir.ops.write_slots import write_slots_
from jettison.ir.program import Program, input_placeholders, placeholders, state_placeholders
from jettison.runtime.executor import EntrySignature


class TorchExecutor:
    """See `Executor`. Weights are held once, in the dtype the graph computes in.

    Args:
        program: What to run; its metadata are not needed.
    """

    def __init__(self, program: Program) -> None:
        self.info = program.info
        self.states = dict(program.states)
        self._values: dict[str, Tensor] = {}
        self._calls: dict[str, Callable[..., tuple[Tensor, ...]]] = {}
        self._constants: dict[str, list[Tensor]] = {}
        self.entries: dict[str, EntrySignature] = {}
        for name, entry in program.entries.items():
            taken = [node.meta["constant"] for node in placeholders(entry) if "constant" in node.meta]
            for constant in taken:
                if constant not in self._values:
                    self._values[constant] = program.constants[constant].value()
            self._constants[name] = [self._values[constant] for constant in taken]
            self._calls[name] = _in_place(entry)
            self.entries[name] = EntrySignature(
                tuple(input_placeholders(entry)), tuple(state_placeholders(entry)), program.outputs
            )
        self.weight_bytes = sum(value.numel() * value.element_size() for value in self._values.values())

    def run(self, entry: str, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Executor.run`."""
        signature = self.entries.get(entry)
        if signature is None:
            raise OptionError(f"[torch] no entry {entry!r}: this program has {', '.join(self.entries)}.")
        given = [states[name] for name in signature.states] + [inputs[name] for name in signature.inputs]
        with torch.inference_mode():
            returned = self._calls[entry](*self._constants[entry], *given)
            for name, new in zip(signature.states, returned[len(signature.outputs) :], strict=True):
                if new.data_ptr() != states[name].data_ptr():
                    states[name].copy_(new)
        return dict(zip(signature.outputs, returned, strict=False))


def _in_place(entry: fx.GraphModule) -> Callable[..., tuple[Tensor, ...]]:
    """Generated code of a graph in which operators on states work in place."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in entry.graph.nodes:
        mapping[node] = graph.node_copy(node, lambda old: mapping[old])
        if is_call(node, ops.write_slots) and _is_own_state(node.args[0]):
            mapping[node].target = write_slots_
        elif is_call(node, ops.windowed_attention) and _is_own_state(node.args[3]) and _is_own_state(node.args[4]):
            mapping[node].target = windowed_attention_
        elif is_call(node, ops.attention) and _reads_slots_by_position(node):
            mapping[node].target = attend_slots
    return fx.GraphModule(nn.Module(), graph)


def _is_own_state(node: fx.Node) -> bool:
    """Whether a node is a state whose old value nobody else reads, so that it may be overwritten."""
    return "state" in node.meta and len(node.users) == 1


def _reads_slots_by_position(node: fx.Node) -> bool:
    """Whether an attention reads keys that were just written at the positions of its queries."""
    key, positions, key_positions, key_valid, causal = (node.args[index] for index in (1, 3, 4, 5, 8))
    return is_call(key, ops.write_slots) and key.args[2] is positions and not key_positions and not key_valid and causal


def attend_slots(
    query: Tensor, key: Tensor, value: Tensor, positions: Tensor, key_positions: None, key_valid: None,
    sinks: Tensor | None, scale: float, causal: bool, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """`jettison::attention` where the slot of a token is its position; reads the slots that some query sees.

    Arguments as there.

    Returns:
        `[B, H, S, Dv]`.
    """
    first, last = int(positions.min()), int(positions.max())
    start = max(0, first + 1 - window) if window else 0
    key, value = key[:, :, start : last + 1], value[:, :, start : last + 1]
    if first == last and not softcap and sinks is None:
        return _attend_all(query, key, value, scale)
    slots = torch.arange(start, last + 1)[None]
    return ops.attention(query, key, value, positions, slots, None, sinks, scale, True, window, softcap)


def windowed_attention_(
    query: Tensor, key: Tensor, value: Tensor, past_key: Tensor, past_value: Tensor, new_tokens: Tensor,
    total_tokens: Tensor, sinks: Tensor | None, scale: float, window: int, softcap: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`jettison::windowed_attention` that updates the cache in place; the window moves only when the cache is full.

    Arguments as there.

    Returns:
        The output, and `past_key` and `past_value` themselves.
    """
    new, total = new_tokens.tolist(), total_tokens.tolist()
    if len(set(new)) > 1 or len(set(total)) > 1:
        rows = [slice(row, row + 1) for row in range(len(new))]
        outs = [
            windowed_attention_(
                query[row], key[row], value[row], past_key[row], past_value[row], new_tokens[row], total_tokens[row],
                sinks, scale, window, softcap,
            )[0]
            for row in rows
        ]  # fmt: skip
        return torch.cat(outs), past_key, past_value
    steps, capacity, before = query.shape[2], past_key.shape[2], total[0] - new[0]
    resident = int(resident_tokens(torch.tensor(before), capacity, window))
    stop = resident + steps
    if new[0] != steps or stop > capacity:
        out, new_key, new_value = ops.windowed_attention(
            query, key, value, past_key, past_value, new_tokens, total_tokens, sinks, scale, window, softcap
        )
        return out, past_key.copy_(new_key), past_value.copy_(new_value)
    past_key[:, :, resident:stop] = key
    past_value[:, :, resident:stop] = value
    start = max(0, resident + 1 - window)
    keys, values = past_key[:, :, start:stop].to(query.dtype), past_value[:, :, start:stop].to(query.dtype)
    if steps == 1 and not softcap and sinks is None:
        return _attend_all(query, keys, values, scale), past_key, past_value
    positions = torch.arange(before, before + steps)[None]
    slots = torch.arange(before - resident + start, before + steps)[None]
    out = ops.attention(query, keys, values, positions, slots, None, sinks, scale, True, window, softcap)
    return out, past_key, past_value


def _attend_all(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Attention of one position that sees every key given: no mask to build and none to read."""
    return F.scaled_dot_product_attention(
        query, key, value, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    ).contiguous()
