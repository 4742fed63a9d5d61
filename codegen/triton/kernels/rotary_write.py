"""Rotates queries and keys by their positions, and writes keys and values to their slots of the cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from jettison.codegen.triton.kernels.base import ELEMENTS, TRITON_TYPES, Kernel, Tuning, block, deeper


@dataclass(frozen=True)
class RotaryWrite(Kernel):
    """One program per token and head; rows of the inputs are tokens, with the heads side by side and maybe more.

    Attributes:
        heads: H.
        kv_heads: Hkv.
        dim: D.
        rotated: Channels that rotate, the first ones of each head; 0 for none.
        is_interleaved: Whether pairs are neighbours instead of halves apart.
        dtype: Of everything but the angles, which are fp32, and the slots.
        cache_dtype: Of the cache.
    """

    heads: int
    kv_heads: int
    dim: int
    rotated: int
    is_interleaved: bool
    dtype: torch.dtype
    cache_dtype: torch.dtype
    angle_dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """See `Kernel`."""
        how = f"rotary{self.rotated}{'_interleaved' if self.is_interleaved else ''}_" if self.rotated else ""
        kinds = "_".join(dict.fromkeys(ELEMENTS[each] for each in (self.dtype, self.cache_dtype)))
        return f"{how}write_cache_h{self.heads}x{self.kv_heads}_d{self.dim}_{kinds}"

    @property
    def title(self) -> str:
        """See `Kernel`."""
        return f"{'Rotary embedding of' if self.rotated else 'Copy'} {self.heads} heads; {self.kv_heads} to the cache."

    @property
    def parameters(self) -> dict[str, str]:
        """See `Kernel`."""
        element, cache, angle = (f"*{ELEMENTS[each]}" for each in (self.dtype, self.cache_dtype, self.angle_dtype))
        angles = {"cos_ptr": angle, "sin_ptr": angle} if self.rotated else {}
        return {
            "query_ptr": element, "key_ptr": element, "value_ptr": element, **angles, "slots_ptr": "*i64",
            "rotated_ptr": element, "key_cache_ptr": cache, "value_cache_ptr": cache, "QUERY_ROW": "i32",
            "KEY_ROW": "i32", "VALUE_ROW": "i32", "S": "i32", "C": "i32",
        }  # fmt: skip

    def tunings(self) -> list[Tuning]:
        """See `Kernel`."""
        return [Tuning.of(1, BLOCK_D=1 << (self.dim - 1).bit_length())]

    def grid(self, tuning: Tuning, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """See `Kernel`."""
        return (sizes["B"] * sizes["S"], self.heads + 2 * self.kv_heads)

    def body(self) -> str:
        """See `Kernel`."""
        kind, cache = TRITON_TYPES[self.dtype], TRITON_TYPES[self.cache_dtype]
        inside = "channel < D"
        return block(
            f"H: tl.constexpr = {self.heads}",
            f"HKV: tl.constexpr = {self.kv_heads}",
            f"D: tl.constexpr = {self.dim}",
            "token = tl.program_id(0).to(tl.int64)",
            "head = tl.program_id(1)",
            "channel = tl.arange(0, BLOCK_D)",
            f"inside = {inside}",
            "batch = token // S",
            "slot = tl.load(slots_ptr + token) + tl.zeros([BLOCK_D], tl.int64)",
            "# jettison.rotary_embedding of a query" if self.rotated else "",
            "if head < H:",
            deeper([
                "source = query_ptr + token * QUERY_ROW + head * D",
                *self._rotated(),
                "to = ((batch * H + head) * S + token % S) * D + channel",
                f"tl.store(rotated_ptr + to, y.to({kind}), mask=inside)",
            ]),
            "# of a key, and jettison.write_slots" if self.rotated else "# jettison.write_slots of a key",
            "elif head < H + HKV:",
            deeper([
                "source = key_ptr + token * KEY_ROW + (head - H) * D",
                *self._rotated(),
                "to = ((batch * HKV + head - H) * C + slot) * D + channel",
                f"tl.store(key_cache_ptr + to, y.to({cache}), mask=inside & (slot >= 0))",
            ]),
            "# jettison.write_slots of a value",
            "else:",
            deeper([
                "source = value_ptr + token * VALUE_ROW + (head - H - HKV) * D",
                "y = tl.load(source + channel, mask=inside, other=0).to(tl.float32)",
                "to = ((batch * HKV + head - H - HKV) * C + slot) * D + channel",
                f"tl.store(value_cache_ptr + to, y.to({cache}), mask=inside & (slot >= 0))",
            ]),
        )  # fmt: skip

    def _rotated(self) -> list[str]:
        """`y`: the head at `source`, rotated."""
        found = ["y = tl.load(source + channel, mask=inside, other=0).to(tl.float32)"]
        if not self.rotated:
            return found
        half = self.rotated // 2
        if self.is_interleaved:
            pair = ["pair = channel // 2", "other = channel ^ 1", "is_first = channel % 2 == 0"]
        else:
            pair = [
                f"pair = channel % {half}",
                f"is_first = channel < {half}",
                f"other = tl.where(is_first, channel + {half}, channel - {half})",
            ]
        return [
            *found,
            *pair,
            f"turns = channel < {self.rotated}",
            f"cos = tl.load(cos_ptr + token * {half} + pair, mask=turns, other=1).to(tl.float32)",
            f"sin = tl.load(sin_ptr + token * {half} + pair, mask=turns, other=0).to(tl.float32)",
            "z = tl.load(source + other, mask=turns, other=0).to(tl.float32)",
            "y = y * cos + tl.where(is_first, -z, z) * sin",
        ]
