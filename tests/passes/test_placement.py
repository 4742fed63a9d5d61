"""What `place-weights` solves, against brute force on small sets: no model here."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import pytest

from jettison.ir.cost import Workload
from jettison.ir.roofline import Rates
from jettison.passes.cache_kv import CacheKV
from jettison.passes.placement.latency import DoesNotFitError, Room, place, spread
from jettison.passes.placement.memory import MOST_RING_BYTES, USUAL_RING_BYTES, Needs, needs_of, step_of, usual_ring
from jettison.passes.placement.throughput import Block, best_block, block_text, solve_block
from jettison.passes.placement.units import Unit, find_units
from tests.models.tiny_programs import tiny_program

COSTS = {"host": 1, "disk": 8}


def unit(name, size, read=None, slab=None, is_table=False):
    read = size if read is None else read
    return Unit(name, (f"{name}.codes", f"{name}.scales"), size, read, min(size, slab or size), is_table)


def some_units(seed, count=9):
    draw = random.Random(seed)
    units = [unit(f"w{index}", draw.choice((40, 64, 64, 100, 130)), slab=16) for index in range(count)]
    return [*units, unit("table", 200, 2, is_table=True)]


def cost(units, tiers):
    return sum(COSTS[tiers[each.name]] * each.read_bytes for each in units if each.name in tiers)


def least_cost(units, fast, host=0, disk=math.inf):
    """Of all choices of a tier for each."""
    best = math.inf
    for tiers in itertools.product(("device", "host", "disk"), repeat=len(units)):
        taken = dict.fromkeys(("device", "host", "disk"), 0)
        for each, tier in zip(units, tiers, strict=True):
            taken[tier] += each.memory_bytes
        if taken["device"] <= fast and taken["host"] <= host and taken["disk"] <= disk:
            chosen = {each.name: tier for each, tier in zip(units, tiers, strict=True) if tier != "device"}
            best = min(best, cost(units, chosen))
    return best


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fast", [200, 333, 500])
def test_the_fewest_bytes_are_read(seed, fast):
    units = some_units(seed)
    chosen = place(units, Needs(0, 0, 0, 0), Room(fast))
    pinned = sum(each.memory_bytes for each in units if each.name not in chosen.tiers)
    assert pinned + chosen.ring_bytes <= fast
    # Whatever is left by the ring that was counted on.
    ring = max(32, min(usual_ring(units), fast))
    assert cost(units, chosen.tiers) <= least_cost(units, fast - ring)


@pytest.mark.parametrize("seed", range(4))
def test_three_tiers_against_brute_force(seed):
    units = some_units(seed, 7)
    room = Room(260, 150)
    chosen = place(units, Needs(0, 0, 0, 0), room)
    ring = max(32, usual_ring(units))
    assert cost(units, chosen.tiers) <= least_cost(units, room.fast - ring, 150)
    on_host = [each for each in units if chosen.tiers.get(each.name) == "host"]
    assert 0 < sum(each.memory_bytes for each in on_host) <= 150


def test_a_table_that_is_looked_up_goes_first_and_needs_no_ring():
    units = [unit("a", 100), unit("table", 50, 1, is_table=True), unit("b", 100)]
    chosen = place(units, Needs(0, 0, 0, 0), Room(210))
    assert (chosen.tiers, chosen.ring_bytes) == ({"table": "disk"}, 0)


def test_what_fits_is_pinned():
    chosen = place([unit("a", 100)], Needs(1, 2, 3, 4), Room(110))
    assert (chosen.tiers, chosen.ring_bytes) == ({}, 0)


def test_one_byte_less_streams():
    units = [unit("a", 100, slab=10), unit("b", 50, slab=10)]
    chosen = place(units, Needs(1, 2, 3, 4), Room(159))
    assert chosen.tiers == {"b": "disk"}
    assert chosen.ring_bytes >= 20


def test_a_large_slab_is_pinned_where_its_ring_would_take_more():
    units = [unit("head", 100), *(unit(f"w{index}", 20) for index in range(4))]
    chosen = place(units, Needs(0, 0, 0, 0), Room(170))
    assert "head" not in chosen.tiers
    assert 40 <= chosen.ring_bytes < 200


def test_what_is_streamed_is_spread_over_the_layers():
    units = [unit(f"layers.{index}", 100, slab=10) for index in range(12)]
    chosen = place(units, Needs(0, 0, 0, 0), Room(900 + usual_ring(units)))
    assert list(chosen.tiers) == ["layers.2", "layers.6", "layers.10"]
    assert spread(4, 4) == [0, 1, 2, 3]
    assert spread(5, 0) == []


def test_rings_of_large_models_are_of_the_usual_size():
    units = [unit(f"w{index}", 100 << 20, slab=8 << 20) for index in range(20)]
    assert usual_ring(units) == USUAL_RING_BYTES
    chosen = place(units, Needs(0, 0, 0, 0), Room((500 << 20) + USUAL_RING_BYTES))
    assert len(chosen.tiers) == 15
    assert chosen.ring_bytes == USUAL_RING_BYTES
    more = place(units, Needs(0, 0, 0, 0), Room((599 << 20) + USUAL_RING_BYTES))
    assert USUAL_RING_BYTES < more.ring_bytes <= MOST_RING_BYTES


def test_too_little_memory_says_how_much_would_do():
    units = [unit("a", 1000, slab=100), unit("b", 30)]
    with pytest.raises(DoesNotFitError) as caught:
        place(units, Needs(10, 20, 30, 40), Room(150))
    assert (caught.value.tier, caught.value.needed, caught.value.ring_bytes) == ("fast", 300, 200)
    # With that it fits, and with a byte less it does not.
    assert place(units, Needs(10, 20, 30, 40), Room(300)).ring_bytes >= 200
    with pytest.raises(DoesNotFitError):
        place(units, Needs(10, 20, 30, 40), Room(299))


def test_a_full_disk_says_how_much_would_do():
    units = [unit("a", 1000, slab=100), unit("b", 500, slab=100)]
    with pytest.raises(DoesNotFitError) as caught:
        place(units, Needs(0, 0, 0, 0), Room(900, 0, 100))
    assert caught.value.tier == "disk"
    assert cost(units, place(units, Needs(0, 0, 0, 0), Room(900, 0, 1000)).tiers) == 8 * 1000


def test_hundreds_of_kinds_are_solved():
    draw = random.Random(1)
    units = [unit(f"w{index}", draw.randrange(10_000, 90_000), slab=1000) for index in range(300)]
    everything = sum(each.memory_bytes for each in units)
    chosen = place(units, Needs(0, 0, 0, 0), Room(everything // 2))
    left = everything // 2 - usual_ring(units)
    pinned = sum(each.memory_bytes for each in units if each.name not in chosen.tiers)
    assert 0.999 * left <= pinned <= left


# --------------------------------------------------------------------------------------------------------------- units


def test_units_are_whole_weights_in_the_order_of_a_step():
    program = tiny_program("llama", CacheKV())
    units, misses = find_units(program, step_of(program, Workload(1, 64, 16)))
    assert misses == []
    assert units[0].name == "model.embed_tokens.weight"
    assert units[0].is_table
    assert units[0].read_bytes == 32 * 4
    assert units[-1].name == "lm_head.weight"
    assert all(each.memory_bytes == each.read_bytes for each in units[1:])
    needs = needs_of(program, Workload(1, 64, 16), units, 5)
    fixed = (2 * 2 + 1) * 32 * 4 + 4 * 4  # norms and frequencies
    assert (needs.process, needs.weights, needs.states) == (5, fixed, program.state_bytes(1, 64))
    assert needs.total == 5 + fixed + needs.states + needs.activations


# ---------------------------------------------------------------------------------------------------------- throughput

RATES = Rates(read=1e9, products={"float32": 1e12}, disk=1e6, copy=1e7)
BLOCK = Block(
    rows=2, batches=3, layers=4, new_tokens=8, weights=4000.0, fixed=100.0, state_row=200.0, state_read_row=150.0,
    state_written_row=10.0, hidden_row=5.0, prompt=4, prefill_seconds=1e-4, decode_seconds=5e-5,
)  # fmt: skip


def grid_seconds(block, room, rates, step=0.1):
    """The least time over shares in steps, from the formulas themselves."""
    shares = [round(step * index, 9) for index in range(round(1 / step) + 1)]
    triples = [(a, b, round(1 - a - b, 9)) for a in shares for b in shares if a + b <= 1 + 1e-9]
    rows, per_layer = block.all_rows, block.weights / block.layers
    states, hidden = rows * block.state_row, rows * block.prompt * block.hidden_row
    best = math.inf
    for w, c, h in itertools.product(triples, triples, ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))):
        device = block.weights * w[0] + states * c[0] + hidden * h[0] + block.fixed
        device += 2 * per_layer * (1 - w[0]) + 2 * states / block.batches / block.layers * (1 - c[0])
        device += 2 * hidden / block.batches * (1 - h[0])
        host = block.weights * w[1] + states * c[1] + hidden * h[1]
        disk = block.weights * w[2] + states * c[2] + hidden * h[2]
        if device > room.fast or host > room.host or disk > (room.disk or math.inf):
            continue

        def layer(read, written, moved, computing, w=w, c=c, h=h):
            streams = [computing]
            for tiers, rate in (((2,), rates.disk), ((1, 2), rates.copy)):
                load = sum(per_layer * w[t] + read * c[t] + moved * h[t] for t in tiers)
                store = sum(written * c[t] + moved * h[t] for t in tiers)
                streams += [load / rate, store / rate]
            return max(streams)

        prefill = layer(0, states / block.layers, hidden, block.batches * block.prefill_seconds / block.layers)
        decode = layer(
            rows * block.state_read_row / block.layers, rows * block.state_written_row / block.layers,
            rows * block.hidden_row, block.batches * block.decode_seconds / block.layers,
        )  # fmt: skip
        best = min(best, block.layers * (prefill + (block.new_tokens - 1) * decode))
    return best


@pytest.mark.parametrize("fast", [3000, 4500, 6000])
@pytest.mark.parametrize("host", [1500, 4000])
def test_blocks_are_at_least_as_fast_as_a_grid_of_shares(fast, host):
    room = Room(fast, host)
    plan = solve_block(BLOCK, room, RATES)
    assert plan is not None
    on_grid = grid_seconds(BLOCK, room, RATES)
    # The grid is coarse: never faster, and not far off.
    assert plan.seconds <= on_grid * (1 + 1e-6)
    assert plan.seconds >= 0.6 * on_grid
    for shares in (plan.weights, plan.states, plan.hidden):
        assert sum(shares) == pytest.approx(1)
        assert min(shares) >= -1e-9
    assert plan.tokens_per_second == pytest.approx(6 * 8 / plan.seconds)


def test_a_block_that_does_not_fit_is_none():
    assert solve_block(BLOCK, Room(500, 0, 100), RATES) is None


def test_without_a_host_tier_nothing_is_there():
    plan = solve_block(BLOCK, Room(3000, 0), RATES)
    assert [shares[1] for shares in (plan.weights, plan.states, plan.hidden)] == [0, 0, 0]
    assert "host" not in block_text(plan)


def test_larger_blocks_share_what_is_streamed():
    block = replace(BLOCK, state_row=1.0, state_read_row=1.0, state_written_row=0.1, hidden_row=0.1)
    plans = [solve_block(replace(block, batches=batches), Room(3000, 0), RATES) for batches in (1, 4, 16)]
    speeds = [plan.tokens_per_second for plan in plans if plan is not None]
    assert len(speeds) == 3
    assert speeds[1] > 3.5 * speeds[0]
    assert speeds[2] > 3.5 * speeds[1]


def test_the_best_block_of_a_program_fits_its_memory():
    program, work = tiny_program("llama", CacheKV()), Workload(1, 64, 16)
    units, _ = find_units(program, step_of(program, work))
    needs = needs_of(program, work, units, 0)
    rates = Rates(read=1e12, products={"float32": 1e15}, disk=1e6, call_seconds=1e-6)
    small, large = (
        best_block(program, work, units, needs, Room(needs.total + room, 0), rates) for room in (90_000, 900_000)
    )
    assert small is not None
    assert large is not None
    assert large.block.all_rows > small.block.all_rows
    assert large.tokens_per_second > small.tokens_per_second
    assert large.block.all_rows * large.block.state_row * large.states[0] < needs.total + 900_000
    assert best_block(program, work, units, needs, Room(needs.process, 0), rates) is None
