"""`int4`: `int8` with half the bits.

Bytes per layer: B * Hkv * (residual * (D + Dv) * itemsize + T * ((D + Dv) / 2 + 8)), T the tokens stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from jettison.passes.policies.int8 import Int8


@dataclass(frozen=True)
class Int4(Int8):
    """See the module docstring."""

    name: ClassVar[str] = "int4"
    bits: ClassVar[int] = 4
