"""How long the calls of `cost.py` take on a machine of known rates, with some of the weights streamed.

An operator takes the longest of three times: to move its bytes, to do its arithmetic, and, where a kernel decodes
weights, to decode them; and the time of its calls. A call of an entry is the sum of its operators. Streamed weights are
read beside it, ahead through a ring of buffers and from one call to the next, so a phase takes the longer of computing
and streaming, and what is computed of the last slab.

Source: LLM-Viewer (arXiv 2402.16363); the third roof and overlapped reads are ours.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from jettison.ir.cost import CallCost, NodeCost
from jettison.ir.placement import Placement

# Bytes that are streamed at once.
SLAB_BYTES = 8 << 20
# A direct read of single rows of a table, in seconds.
ROW_READ_SECONDS = 1e-4
# Rows of a product from which weights are decoded once and multiplied, instead of decoded for every row; where nothing
# was measured.
_DECODED_ONCE = 16.0


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        read: Bytes of the memory that products read from.
        products: Operations of large products, by dtype.
        weights: Weights that a product with one row reads, by their form: a dtype, `int4`, `int8`, `bitmap` (zeros
            included), or `decoded` for those that no kernel reads as they are.
        disk: Bytes of direct reads from the file system of the artifact.
        copy: Bytes from host memory to the device; 0 where they are one.
        call_seconds: That a call of a library takes, whatever it does.
        process_bytes: Resident memory of a process that has imported the runtime and holds no model.
        decoding: Weights that a product with many rows decodes, by their form, before it multiplies them.
        starts: Seconds that a product with one row takes beside decoding its weights, by their form.
    """

    read: float
    products: Mapping[str, float]
    weights: Mapping[str, float] = field(default_factory=dict)
    disk: float = 1e9
    copy: float = 0.0
    call_seconds: float = 5e-6
    process_bytes: int = 336 << 20
    decoding: Mapping[str, float] = field(default_factory=dict)
    starts: Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """The rates as JSON-ready values."""
        return asdict(self)

    def product(self, form: str) -> float:
        """Operations of large products with weights in a form."""
        # Without kernels of its own for codes, a machine decodes them to what is fastest.
        usual = "bfloat16" if form in ("int4", "bitmap") or not self.weights else "float32"
        return self.products.get(form) or self.products.get(usual) or max(self.products.values())


# Of no machine in particular: where nothing was measured. A core or two and an NVMe disk; a GPU behind PCIe 4.
TYPICAL_CPU = Rates(
    2e10, {"float32": 1e11, "bfloat16": 2e11}, {"float32": 5e9, "bfloat16": 1e10, "int4": 2e10, "int8": 2e10,
    "bitmap": 1e10, "decoded": 1e9},
)  # fmt: skip
TYPICAL_GPU = Rates(
    1.5e12, {"float32": 1.5e13, "bfloat16": 2e14, "float16": 2e14}, disk=3e9, copy=2e10, process_bytes=1 << 30,
)  # fmt: skip


@dataclass(frozen=True)
class Time:
    """Of a phase, in seconds, and what it waits for.

    Attributes:
        compute: Of the operators.
        disk: Of reads from disk.
        copy: Of copies from host memory to the device.
        fill: Of what no computing hides.
        kinds: `compute` by kind of operator.
        roofs: `compute` by what bounds each operator: `memory`, `arithmetic`, `decoding` or `calls`.
    """

    compute: float
    disk: float
    copy: float
    fill: float
    kinds: Mapping[str, float]
    roofs: Mapping[str, float]

    @property
    def seconds(self) -> float:
        """Of the phase."""
        return max(self.compute, self.disk, self.copy) + self.fill

    @property
    def bound_by(self) -> str:
        """What most of the time is for."""
        streams = {"disk": self.disk, "copies": self.copy}
        longest = max(streams, key=lambda name: streams[name])
        if streams[longest] > self.compute:
            return longest
        return max(self.roofs, key=lambda name: self.roofs[name])


def node_seconds(node: NodeCost, rates: Rates) -> dict[str, float]:
    """Seconds that an operator takes on each of its roofs; the longest is how long it takes."""
    moved = node.weight_bytes + node.state_read + node.state_written + node.activation_bytes
    product = node.operations / rates.product(node.form)
    seconds = {"memory": moved / rates.read, "arithmetic": product}
    if not node.elements or node.kind == "embedding" or not rates.weights:
        return seconds
    if node.form in rates.weights and node.form in rates.products:
        seconds["memory"] = max(seconds["memory"], node.elements / rates.weights[node.form])
        return seconds
    rate = rates.weights.get(node.form, rates.weights.get("decoded", rates.read))
    # A kernel decodes weights for every row; for many it is given decoded ones.
    rows = node.operations / (2 * node.elements)
    once = node.elements / rates.decoding.get(node.form, rate / _DECODED_ONCE)
    for_each = rows * node.elements / rate
    return {
        "memory": seconds["memory"], "decoding": for_each if for_each <= once + product else once,
        "arithmetic": 0.0 if for_each <= once + product else product,
    }  # fmt: skip


def predict(calls: Sequence[CallCost], rates: Rates, placement: Placement | None = None) -> Time:
    """How long some calls take, one after the other.

    Args:
        calls: Of a phase.
        rates: Of the machine.
        placement: Which constants are streamed, and from where; None for none.

    Returns:
        Their time. Reading runs ahead from one call to the next, so the sum of the calls counts.
    """
    kinds: defaultdict[str, float] = defaultdict(float)
    roofs: defaultdict[str, float] = defaultdict(float)
    disk = copy = fill = 0.0
    for call in calls:
        for node in call.nodes:
            seconds = node_seconds(node, rates)
            roof = max(seconds, key=lambda name: seconds[name])
            # What is decoded once is multiplied afterwards.
            spent = seconds["arithmetic"] + seconds["decoding"] if "decoding" in seconds else seconds[roof]
            spent = max(spent, seconds["memory"])
            calling = node.calls * rates.call_seconds
            if node.elements and node.kind != "embedding":
                calling += rates.starts.get(node.form, 0.0)
            kinds[node.kind] += spent + calling
            roofs[roof] += spent
            roofs["calls"] += calling
        tiers = streamed_bytes(call, placement)
        disk += tiers["disk"] / rates.disk
        copy += (tiers["host"] + tiers["disk"]) / rates.copy if rates.copy else 0.0
        fill += _lookup_seconds(call, placement)
    compute, streamed = sum(kinds.values()), max(disk * rates.disk, copy * rates.copy)
    if streamed and placement is not None:
        # Reading goes on across calls, so what nothing hides is the computing of the last slab to arrive.
        slab = min(SLAB_BYTES, placement.ring_bytes // 2)
        fill += compute * min(1.0, slab / streamed)
    return Time(compute, disk, copy, fill, dict(kinds), dict(roofs))


def streamed_bytes(call: CallCost, placement: Placement | None) -> Counter[str]:
    """Bytes of weights that a call reads, by the tier they are on."""
    tiers: Counter[str] = Counter({"device": 0, "host": 0, "disk": 0})
    for node in call.nodes:
        for name, count in node.weights.items():
            tiers["device" if placement is None else placement.of(name)] += count
    return tiers


def _lookup_seconds(call: CallCost, placement: Placement | None) -> float:
    """Of reads of single rows, which are asked for when they are needed."""
    if placement is None:
        return 0.0
    tables = [node for node in call.nodes if any(placement.of(name) == "disk" for name in node.lookups)]
    return sum(node.rows * ROW_READ_SECONDS for node in tables)
