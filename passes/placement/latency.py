"""Which weights are pinned so that a step waits least: an integer program over kinds of weights.

Weights of the same bytes are as good as each other, so a variable counts how many of a kind are on a tier: a model has
a dozen kinds, however many layers. Which of a kind are streamed is spread evenly over the layers, so that computing
what is pinned leaves time to read what is not.

A decode step reads all weights once in the same order. A window over them that moves on, as a least-recently-used cache
has it, holds nothing that is asked for next; a fixed subset saves its bytes on every step.

Source: FlexGen (arXiv 2303.06865) for placement as a linear program; TPI-LLM (arXiv 2410.00531) for what windows cost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from jettison.passes.placement.memory import MOST_RING_BYTES, Needs, usual_ring
from jettison.passes.placement.units import Unit

# What a byte costs from a tier: from disk some times more than from pinned host memory.
_COSTS = {"host": 1.0, "disk": 8.0}
# Sizes of slabs that are tried as the largest to be streamed.
_MOST_CAPS = 8
# The solver stops here; it has found the best long before, and proves it for a few hundred kinds of weights.
_MOST_NODES = 20_000


@dataclass(frozen=True)
class Room:
    """Bytes that may be taken.

    Attributes:
        fast: Of the memory where products are computed.
        host: Of the memory beside a GPU for weights; 0 where there is none.
        disk: None for as many as there are.
    """

    fast: int
    host: int | None = 0
    disk: int | None = None


@dataclass(frozen=True)
class Chosen:
    """Where weights are.

    Attributes:
        tiers: Of each unit that is streamed, by name.
        ring_bytes: Of the buffers.
    """

    tiers: Mapping[str, str]
    ring_bytes: int


class DoesNotFitError(Exception):
    """No placement fits.

    Attributes:
        tier: Where room is missing: `fast` or `disk`.
        needed: Bytes that would do there.
        ring_bytes: Of the ring that is counted in.
        held: Bytes of weights that are pinned because a slab of them is more than that ring has room for.
    """

    def __init__(self, tier: str, needed: int, ring_bytes: int = 0, held: int = 0) -> None:
        super().__init__(f"{tier} needs {needed:,} bytes")
        self.tier, self.needed, self.ring_bytes, self.held = tier, needed, ring_bytes, held


def place(units: Sequence[Unit], needs: Needs, room: Room) -> Chosen:
    """The placement with which a step reads least over the slow links.

    Args:
        units: What can be streamed, in the order in which it is read.
        needs: What is taken first.
        room: What there is.

    Raises:
        DoesNotFitError: Nothing can be left out any more, or the slower tiers are full.
    """
    left = room.fast - needs.total
    if sum(unit.memory_bytes for unit in units) <= left:
        return Chosen({}, 0)
    best: tuple[bool, float, dict[str, str], int] | None = None
    usual = usual_ring(units)
    short: list[tuple[int, int, int]] = []
    full: list[int] = []
    for cap in _caps(units):
        # Larger slabs are pinned, so that the ring can be small; rows that are looked up need no ring.
        may_stream = [unit for unit in units if unit.is_table or unit.slab_bytes <= cap]
        held = sum(unit.memory_bytes for unit in units) - sum(unit.memory_bytes for unit in may_stream)
        if left < held + 2 * cap:
            short.append((needs.total + held + 2 * cap, 2 * cap, held))
            continue
        ring = min(left - held, max(2 * cap, usual)) if cap else 0
        tiers = _solve(may_stream, left - held - ring, room)
        if tiers is None:
            full.append(sum(unit.memory_bytes for unit in may_stream) - (left - held - ring) - (room.host or 0))
            continue
        cost = sum(_COSTS[tiers[unit.name]] * unit.read_bytes for unit in units if unit.name in tiers)
        # Through a smaller ring than usual, reads are smaller and wait for each other: no bytes saved make up for it.
        is_small = cap > 0 and ring < usual
        if best is None or (is_small, cost) < best[:2]:
            best = is_small, cost, tiers, ring
    if best is None:
        # Whole weights leave gaps in the faster tiers, so a little more may be asked for than is missing.
        raise DoesNotFitError("disk", min(full)) if full else DoesNotFitError("fast", *min(short))
    *_, tiers, ring = best
    pinned = sum(unit.memory_bytes for unit in units if unit.name not in tiers)
    streamed = sum(unit.memory_bytes for unit in units if unit.name in tiers and not unit.is_table)
    # Half of what is left over; the other half is for what no estimate knows.
    return Chosen(tiers, max(ring, min(MOST_RING_BYTES, streamed, ring + (left - ring - pinned) // 2)))


def _caps(units: Sequence[Unit]) -> list[int]:
    """Bytes of the largest slab that may be streamed: a few to try, and 0 for none."""
    sizes = sorted({unit.slab_bytes for unit in units if not unit.is_table})
    step = -(-len(sizes) // _MOST_CAPS)
    return [0, *sizes[:: -max(1, step)][::-1]]


def _solve(units: Sequence[Unit], fast: int, room: Room) -> dict[str, str] | None:
    """The tiers of those that are not pinned; None if none fit."""
    kinds: dict[tuple[int, int], list[Unit]] = {}
    for unit in units:
        kinds.setdefault((unit.memory_bytes, unit.read_bytes), []).append(unit)
    everything = sum(unit.memory_bytes for unit in units)
    limits = (fast, everything if room.host is None else room.host, everything if room.disk is None else room.disk)
    counts = _counts([(*kind, len(each)) for kind, each in kinds.items()], limits) if units else []
    if counts is None:
        return None
    tiers: dict[str, str] = {}
    for each, (_, on_host, on_disk) in zip(kinds.values(), counts, strict=True):
        slow = spread(len(each), on_host + on_disk)
        from_disk = {slow[index] for index in spread(len(slow), on_disk)}
        tiers |= {each[index].name: "disk" if index in from_disk else "host" for index in slow}
    order = [unit.name for unit in units]
    return dict(sorted(tiers.items(), key=lambda item: order.index(item[0])))


def spread(count: int, chosen: int) -> list[int]:
    """Indices of some of several things, as evenly as can be.

    Args:
        count: How many there are.
        chosen: How many of them.
    """
    return [(2 * index + 1) * count // (2 * chosen) for index in range(chosen)]


def _counts(kinds: Sequence[tuple[int, int, int]], limits: Sequence[int]) -> list[tuple[int, ...]] | None:
    """How many of each kind are on each tier.

    Args:
        kinds: Bytes in memory, bytes read by a step, and how many there are.
        limits: Bytes of each tier.

    Returns:
        Three numbers for each kind; None if there is no such choice.
    """
    limit = list(limits)
    while True:
        found = _milp(kinds, limit)
        if found is None:
            return None
        taken = [sum(size * row[tier] for (size, _, _), row in zip(kinds, found, strict=True)) for tier in range(3)]
        # The solver may miss a constraint by a hair: then the next try has that much less.
        over = [max(0, used - most) for used, most in zip(taken, limits, strict=True)]
        if not any(over):
            return found
        limit = [most - excess for most, excess in zip(limit, over, strict=True)]


def _milp(kinds: Sequence[tuple[int, int, int]], limits: Sequence[int]) -> list[tuple[int, ...]] | None:
    # Not with the module: machines that only run kernels need no SciPy.
    from scipy.optimize import Bounds, LinearConstraint, milp

    sizes, reads, counts = (np.array(column, dtype=float) for column in zip(*kinds, strict=True))
    n, scale = len(kinds), max(1.0, float(sizes.max()))
    costs = np.concatenate([np.zeros(n), _COSTS["host"] * reads, _COSTS["disk"] * reads])
    every = np.concatenate([np.eye(n)] * 3, axis=1)
    by_tier = np.kron(np.eye(3), sizes / scale)
    result = milp(
        costs / max(1.0, float(reads.max())),
        integrality=np.ones(3 * n),
        bounds=Bounds(0, np.tile(counts, 3)),
        constraints=[
            LinearConstraint(every, counts, counts),
            LinearConstraint(by_tier, ub=np.array([max(0, limit) for limit in limits]) / scale),
        ],
        options={"mip_rel_gap": 0.0, "node_limit": _MOST_NODES},
    )
    if result.x is None:
        return None
    rows = np.rint(result.x).astype(int).reshape(3, n).T
    return [tuple(int(count) for count in row) for row in rows]
