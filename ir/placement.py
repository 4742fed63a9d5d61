"""Where a program's weights are while it runs: the annotation that `place-weights` writes and runtimes obey.

A *tier* is `device` (where products are computed: memory of the GPU, or of the machine for the CPU targets), `host`
(memory of the machine beside a GPU) or `disk`. A constant without a tier here is on the device all the time, *pinned*.
Others are *streamed*: they pass through a ring of buffers on the device, in the order in which entries read them, from
the file of the artifact that `runtime/weight_store.py` writes, or `runtime/device_store.py` for a GPU. A cyclic window
of them would hit nothing, since a decode step reads every weight once in the same order: that is why a fixed subset is
pinned.
"""

from __future__ import annotations

from dataclasses import dataclass, field

TIERS = ("device", "host", "disk")
# Of host memory that weights pass through on their way from disk to a GPU.
READ_AHEAD_BYTES = 64 << 20


@dataclass(frozen=True)
class Placement:
    """What is streamed, and within which memory.

    Attributes:
        tiers: `host` or `disk`, by the name of a constant; all parts of a packed weight are on one tier.
        limits: Bytes that may be taken on a tier, by its name, as the user stated them; nothing where none is. On
            the tier where the process lives it counts all of its resident memory.
        ring_bytes: Of the buffers that streamed weights pass through; how far reading runs ahead of computing.
        states: Tier of each state of the cache that is not on the device.
        batch: Sequences that the limits have room for; 0 if nobody counted.
        context: Tokens of each of them, in the end.
        prompt: Tokens of each that come at once.
    """

    tiers: dict[str, str] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    ring_bytes: int = 0
    states: dict[str, str] = field(default_factory=dict)
    batch: int = 0
    context: int = 0
    prompt: int = 0

    def of(self, constant: str) -> str:
        """The tier of a constant."""
        return self.tiers.get(constant, "device")
