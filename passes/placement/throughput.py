"""Which block of batches would generate most tokens in a second: planned, and not executed yet.

A block is several batches of rows that go through a layer one after the other, so that the layer's weights are loaded
once for all of them. For a block of a given size, shares of weights, of keys and values and of hidden states on each
tier are a linear program that minimises the time of a prompt and of the tokens behind it; sizes are searched around it.

Differs from FlexGen's program: bytes of weights are those of their format, keys and values are those that the program's
states hold (shared heads, windows, compressed and dropped tokens), operations are counted in the graph (gated layers),
a phase takes the longest of its streams, and keys and values that are not on the device are moved there, because there
is no attention beside it.

Source: FlexGen (arXiv 2303.06865).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from jettison.ir.cost import Workload, call_costs, state_bytes
from jettison.ir.match import layer_index
from jettison.ir.program import Program
from jettison.ir.roofline import TYPICAL_CPU, TYPICAL_GPU, Rates, predict
from jettison.passes.placement.latency import Room
from jettison.passes.placement.memory import Needs, peak_activations
from jettison.passes.placement.units import Unit

_TIERS = ("device", "host", "disk")
_MOST_ROWS = 4096
# Columns of the program: shares of weights, of keys and values, of hidden states by tier; seconds of a layer.
_COLUMNS = 11
_PREFILL, _DECODE = 9, 10


@dataclass(frozen=True)
class Block:
    """Sizes of a block, as the linear program sees them; bytes and seconds of all layers, of one row where it says so.

    Attributes:
        rows: Of a batch.
        batches: Of the block.
        layers: L.
        new_tokens: Behind the prompt.
        weights: Bytes that can be placed.
        fixed: Bytes on the device whatever is placed, activations of a batch included.
        state_row: Bytes of keys and values of a row in the end.
        state_read_row: That a decode step reads of them, on average.
        state_written_row: That it writes.
        hidden_row: Bytes of a hidden state of a token.
        prompt: Tokens.
        prefill_seconds: That the prompt of a batch takes to compute.
        decode_seconds: That a step of a batch takes to compute.
    """

    rows: int
    batches: int
    layers: int
    new_tokens: int
    weights: float
    fixed: float
    state_row: float
    state_read_row: float
    state_written_row: float
    hidden_row: float
    prompt: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def all_rows(self) -> int:
        """Of all batches."""
        return self.rows * self.batches


@dataclass(frozen=True)
class BlockPlan:
    """A block, where its bytes are, and what it comes to.

    Attributes:
        block: Sizes.
        weights: Shares on the device, on the host and on disk; like the next two.
        states: Of keys and values.
        hidden: Of hidden states.
        seconds: Of all its tokens.
    """

    block: Block
    weights: tuple[float, ...]
    states: tuple[float, ...]
    hidden: tuple[float, ...]
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Generated."""
        return self.block.all_rows * self.block.new_tokens / self.seconds


def solve_block(block: Block, room: Room, rates: Rates) -> BlockPlan | None:
    """The fastest shares for a block; None if none fits.

    Args:
        block: Its sizes.
        room: Bytes that may be taken.
        rates: Of the machine.
    """
    from scipy.optimize import linprog

    rows, limits = [], []
    for row, limit in [*_memory(block, room), *_seconds(block, rates)]:
        scale = max(1e-12, float(np.abs(row).max()))
        rows.append(row / scale)
        limits.append(limit / scale)
    sums = np.zeros((3, _COLUMNS))
    for kind in range(3):
        sums[kind, 3 * kind : 3 * kind + 3] = 1
    most_host = 0.0 if room.host == 0 else 1.0
    bounds = [(0.0, (1.0, most_host, 1.0)[column % 3]) for column in range(9)] + [(0.0, None), (0.0, None)]
    costs = np.zeros(_COLUMNS)
    costs[_PREFILL], costs[_DECODE] = block.layers, block.layers * max(0, block.new_tokens - 1)
    result = linprog(costs, np.array(rows), np.array(limits), sums, np.ones(3), bounds)
    if not result.success:
        return None
    shares = [tuple(float(share) for share in result.x[3 * kind : 3 * kind + 3]) for kind in range(3)]
    return BlockPlan(block, shares[0], shares[1], shares[2], float(costs @ result.x))


def _memory(block: Block, room: Room) -> Iterator[tuple[np.ndarray, float]]:
    """Bytes of each tier: a row of the program, and its limit."""
    per_layer, states = block.weights / block.layers, block.all_rows * block.state_row
    hidden = block.all_rows * block.prompt * block.hidden_row
    for tier, limit in enumerate((room.fast, room.host, room.disk)):
        row = np.zeros(_COLUMNS)
        row[[tier, 3 + tier, 6 + tier]] = block.weights, states, hidden
        if tier == 0:
            # Two layers of what is streamed, and two batches of what belongs to one: one is used, one is loaded.
            buffers = 2 * np.array([per_layer, states / block.batches / block.layers, hidden / block.batches])
            row[[0, 3, 6]] -= buffers
            yield row, room.fast - block.fixed - float(buffers.sum())
        elif limit is not None:
            yield row, float(limit)


def _seconds(block: Block, rates: Rates) -> Iterator[tuple[np.ndarray, float]]:
    """A layer takes as long as each of its streams: rows of the program that say `stream - seconds <= 0`."""
    states = (
        block.all_rows
        / block.layers
        * np.array([[0.0, block.state_row], [block.state_read_row, block.state_written_row]])
    )
    hidden = block.all_rows * block.hidden_row * np.array([block.prompt, 1])
    computing_seconds = (block.prefill_seconds, block.decode_seconds)
    for index, phase in enumerate((_PREFILL, _DECODE)):
        read, written = states[index]
        links = [((2,), rates.disk)] + ([((1, 2), rates.copy)] if rates.copy else [])
        for tiers, rate in links:
            loads, stores = np.zeros(_COLUMNS), np.zeros(_COLUMNS)
            for tier in tiers:
                loads[[tier, 3 + tier, 6 + tier]] = block.weights / block.layers, read, hidden[index]
                stores[[3 + tier, 6 + tier]] = written, hidden[index]
            for stream in (loads, stores):
                stream /= rate
                stream[phase] = -1
                yield stream, 0.0
        computing = np.zeros(_COLUMNS)
        computing[phase] = -1
        yield computing, -block.batches * computing_seconds[index] / block.layers


def block_of(program: Program, work: Workload, units: Sequence[Unit], needs: Needs, rates: Rates, rows: int) -> Block:
    """The sizes of a block of one batch."""
    one = Workload(rows, work.context, work.prompt)
    middle = Workload(rows, (work.prompt + work.context) // 2, work.prompt)
    step, prompt = call_costs(program, "decode", middle), call_costs(program, "prefill", one)
    layers = len({layer_index(name) for name in program.states} - {None}) or 1
    hidden = max((node.activation_bytes for call in step for node in call.nodes if node.kind == "embedding"), default=0)
    return Block(
        rows, 1, layers, max(1, work.context - work.prompt), sum(unit.memory_bytes for unit in units),
        needs.process + needs.weights + peak_activations(program, one), state_bytes(program, one) / rows,
        sum(call.state_read for call in step) / rows, sum(call.state_written for call in step) / rows,
        hidden / rows, work.prompt, predict(prompt, rates).compute, predict(step, rates).compute,
    )  # fmt: skip


def best_block(
    program: Program, work: Workload, units: Sequence[Unit], needs: Needs, room: Room, rates: Rates
) -> BlockPlan | None:
    """The block that generates most tokens in a second; None if not even one row fits.

    Args:
        program: A decoder with a cache.
        work: Its context and prompt count; its rows do not.
        units: Weights that can be placed.
        needs: Process and other weights count; states and activations are those of a block.
        room: Bytes that may be taken.
        rates: Of the machine.
    """
    best: BlockPlan | None = None
    rows = 1
    while rows <= _MOST_ROWS:
        found, batches = None, 1
        block = block_of(program, work, units, needs, rates, rows)
        while rows * batches <= _MOST_ROWS:
            plan = solve_block(replace(block, batches=batches), room, rates)
            if plan is None or (found is not None and plan.tokens_per_second < found.tokens_per_second):
                break
            found, batches = plan, math.ceil(batches * 1.5)
        if found is None:
            break
        if best is None or found.tokens_per_second > best.tokens_per_second:
            best = found
        rows *= 2
    return best


def block_note(program: Program, work: Workload, units: Sequence[Unit], needs: Needs, room: Room) -> str:
    """What the best block is, in a sentence, with usual rates."""
    if "decode" not in program.entries:
        return "An encoder generates nothing: there is no block of steps to plan."
    rates = TYPICAL_GPU if room.host != 0 else TYPICAL_CPU
    best = best_block(program, work, units, needs, room, rates)
    return "No block fits, not even of one row." if best is None else block_text(best)


def block_text(plan: BlockPlan) -> str:
    """A plan as a sentence."""
    shares = "; ".join(
        f"{what} "
        + ", ".join(f"{share:.0%} on {tier}" for share, tier in zip(each, _TIERS, strict=True) if share > 5e-3)
        for what, each in (("weights", plan.weights), ("states", plan.states), ("hidden states", plan.hidden))
    )
    return (
        f"A block of {plan.block.batches} batches of {plan.block.rows} rows would generate "
        f"{plan.tokens_per_second:,.1f} tokens per second ({shares}). Blocks are planned, not executed yet: the "
        "placement is that of single steps."
    )
