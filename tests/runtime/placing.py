"""Models whose weights are on disk, for tests of what reads them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import Any

from jettison.ir.placement import Placement
from jettison.ir.program import Program


def on_disk(
    ring_bytes: int, *, share: float = 1.0, seed: int = 0, smallest: int = 4097, pinned: str = "^$"
) -> Callable[..., None]:
    """For `after_each` of `optimize`: a random share of the weights that are not small is on disk.

    Args:
        ring_bytes: Of the placement.
        share: Of the weights.
        seed: Of the choice.
        smallest: Bytes of the largest part of a weight that is taken; the parts are on one tier.
        pinned: Regular expression of names that are left in memory.
    """

    def place(_pass: Any, _record: Any, program: Program) -> None:
        if program.info.kind == "decoder" and "decode" not in program.entries:
            return  # no pass comes behind a placement
        chosen = random.Random(seed)
        whole = {part: name for name, packed in program.packed.items() for part in packed.parts.values()}
        sizes: dict[str, int] = {}
        for name, constant in program.used_constants().items():
            sizes[whole.get(name, name)] = max(sizes.get(whole.get(name, name), 0), constant.nbytes)
        taken = {
            name
            for name, size in sizes.items()
            if size >= smallest and chosen.random() < share and not re.search(pinned, name)
        }
        tiers = {name: "disk" for name in program.used_constants() if whole.get(name, name) in taken}
        program.placement = Placement(tiers, ring_bytes=ring_bytes)

    return place
