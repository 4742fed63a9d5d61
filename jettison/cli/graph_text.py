"""What the canonical text in an artifact declares: constants, packed weights, states and entries.

The text is in every artifact, whatever the target, and reading it needs neither torch nor the weights.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

_CONSTANT = re.compile(r"constant @(\S+): (\w+)\[([\d,]*)\](?: stored (\w+))?")
_PACKED = re.compile(r"packed @(\S+): (.+)\[([\d,]*)\]$")
_STREAM = re.compile(r"stream @(\S+): (\w+)$")
_ENTRY = re.compile(r"entry (\w+)\(")
_CALL = re.compile(r"  %\d+: .*? = ([\w.]+)\(")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Weight:
    """A weight as the graph reads it, of one constant or of the several that a packed one is made of.

    Attributes:
        name: Of the dense weight.
        format: The dtype it is held in, or the text of a weight format.
        shape: Of the dense weight.
        bytes: Of all its parts.
        tier: Where it is read from for each token, `host` or `disk`; None where it stays in memory.
    """

    name: str
    format: str
    shape: tuple[int, ...]
    bytes: int
    tier: str | None = None

    @property
    def layer(self) -> int | None:
        """Number of the layer in its name."""
        return layer_of(self.name)


@dataclass
class GraphText:
    """See the module docstring.

    Attributes:
        weights: In alphabetical order.
        entries: Operators of each entry, with how often each occurs.
    """

    weights: list[Weight] = field(default_factory=list)
    entries: dict[str, Counter[str]] = field(default_factory=dict)


def layer_of(name: str) -> int | None:
    """The first number between dots: 3 for `model.layers.3.mlp.up_proj.weight`; None where there is none."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else None


def dtype_bytes(dtype: str) -> float:
    """Bytes of one element of a dtype in canonical text: 4 for `f32`."""
    bits = re.sub(r"\D", "", dtype)
    return int(bits) / 8 if bits else 1


def slot_counts(manifest: Mapping[str, Any], capacity: int, new_tokens: int = 0) -> dict[str, int]:
    """Sizes of states that a session chooses.

    Args:
        manifest: `jettison.json`.
        capacity: Tokens of a sequence.
        new_tokens: How many of them were generated, for states that drop tokens after a prompt only.
    """
    context = manifest["model"]["context"]
    counts = {"capacity": capacity}
    for kept in manifest.get("retentions", []):
        added = new_tokens if kept["every"] is None else kept["every"]
        counts[kept["name"]] = capacity if kept["budget"] is None else min(context, kept["budget"] + added)
    for storage in manifest.get("storages", []):
        # As `slot_counts` of `jettison.ir.program`, which is not imported: torch would be, too.
        held = capacity if storage["takes_dropped"] else counts[storage["retention"]]
        counts[storage["name"]] = max(0, held - storage["keep"]) // storage["tokens"]
        if not storage["takes_dropped"]:
            counts[storage["retention"]] = min(held, storage["residual"])
    return counts


def state_bytes(states: Iterable[Mapping[str, Any]], slots: Mapping[str, int]) -> int:
    """Bytes of states of one sequence that `jettison.json` declares, with as many slots as `slot_counts` says."""
    sizes = {"batch": 1, **slots}
    counts = ((s["dtype"], math.prod(sizes.get(size, size) for size in s["shape"])) for s in states)
    return int(sum(dtype_bytes(dtype) * count for dtype, count in counts))


def read_graph(text: str, target: str) -> GraphText:
    """Read the declarations of a canonical text.

    Args:
        text: See `jettison.ir.text.program_text`.
        target: Of the artifact: an ONNX file holds constants in the dtype that the graph computes in, the torch target
            as they are stored.
    """
    graph = GraphText()
    constants: dict[str, Weight] = {}
    packed: dict[str, tuple[str, tuple[int, ...]]] = {}
    tiers: dict[str, str] = {}
    entry: Counter[str] = Counter()
    for line in text.splitlines():
        if found := _CALL.match(line):
            entry[found[1]] += 1
        elif found := _CONSTANT.match(line):
            name, dtype, shape, stored = found[1], found[2], _sizes(found[3]), found[4]
            held = dtype if target == "onnx" or stored is None else stored
            constants[name] = Weight(name, held, shape, int(math.prod(shape) * dtype_bytes(held)))
        elif found := _PACKED.match(line):
            packed[found[1]] = found[2], _sizes(found[3])
        elif found := _STREAM.match(line):
            tiers[found[1]] = found[2]
        elif found := _ENTRY.match(line):
            entry = graph.entries.setdefault(found[1], Counter())
    graph.weights = _joined(constants, packed, tiers)
    return graph


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(int(size) for size in text.split(",") if size)


def _joined(
    constants: dict[str, Weight], packed: Mapping[str, tuple[str, tuple[int, ...]]], tiers: Mapping[str, str]
) -> list[Weight]:
    """Weights, the parts of a packed one added up."""
    weights = []
    for name, (weight_format, shape) in packed.items():
        parts = [part for part in constants if part.rpartition(".")[0] == name]
        count = sum(constants.pop(part).bytes for part in parts)
        tier = next((tiers[part] for part in parts if part in tiers), None)
        weights.append(Weight(name, weight_format, shape, count, tier))
    dense = [replace(weight, tier=tiers.get(weight.name)) for weight in constants.values()]
    return sorted([*weights, *dense], key=lambda weight: weight.name)
