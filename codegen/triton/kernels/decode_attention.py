"""Attention of one new token per row over the slots of its cache, which several programs share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from jettison.codegen.triton.kernels.attention_tile import AttentionTile
from jettison.codegen.triton.kernels.base import ELEMENTS, TRITON_TYPES, Kernel, Tuning, block, deeper, lines, name_of


@dataclass(frozen=True)
class DecodeAttention(Kernel):
    """`[B, H, 1, D]` against `[B, Hkv, C, D]`, to `[B, 1, H * D]`.

    Attributes:
        heads: H.
        kv_heads: Hkv.
        dim: D.
        scale: Factor on the scores.
        window: Most recent tokens that are seen; 0 for all.
        softcap: Of the scores; 0 for none.
        dtype: Of queries and result.
        cache_dtype: Of keys and values.
    """

    heads: int
    kv_heads: int
    dim: int
    scale: float
    window: int
    softcap: float
    dtype: torch.dtype
    cache_dtype: torch.dtype

    @property
    def shared(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def name(self) -> str:
        """See `Kernel`."""
        extra = f"_window{self.window}" * bool(self.window) + f"_softcap{name_of(self.softcap)}" * bool(self.softcap)
        kinds = "_".join(dict.fromkeys(ELEMENTS[each] for each in (self.dtype, self.cache_dtype)))
        of = f"h{self.heads}x{self.kv_heads}_d{self.dim}_scale{name_of(self.scale)}"
        return f"decode_attention{extra}_{of}_{kinds}"

    @property
    def title(self) -> str:
        """See `Kernel`."""
        return f"Attention of one token of {self.heads} heads over a cache of {self.kv_heads}."

    @property
    def parameters(self) -> dict[str, str]:
        """See `Kernel`."""
        element, cache = (f"*{ELEMENTS[each]}" for each in (self.dtype, self.cache_dtype))
        return {
            "query_ptr": element, "key_ptr": cache, "value_ptr": cache, "slots_ptr": "*i64", "parts_ptr": "*fp32",
            "stats_ptr": "*fp32", "counters_ptr": "*i32", "out_ptr": element, "C": "i32",
        }  # fmt: skip

    def tunings(self) -> list[Tuning]:
        """See `Kernel`."""
        # A tile of keys and one of values, several of them in flight, have to fit into shared memory.
        most = max(16, (64 << 10) // (self.dim * self.cache_dtype.itemsize * 2))
        wanted = ((16, 64, 4, 2), (32, 64, 4, 2), (8, 128, 8, 2), (64, 32, 4, 3))
        found = [Tuning.of(warps, stages, SPLITS=splits, BLOCK_T=min(n, most)) for splits, n, warps, stages in wanted]
        return list(dict.fromkeys(found))

    def widest(self) -> Tuning:
        """See `Kernel`."""
        return Tuning.of(SPLITS=2, BLOCK_T=64)

    def grid(self, tuning: Tuning, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """See `Kernel`."""
        return (sizes["B"] * self.kv_heads, tuning["SPLITS"])

    def body(self) -> str:
        """See `Kernel`."""
        tile = AttentionTile(self.shared, self.dim, self.scale, self.softcap, self.dtype)
        kind = TRITON_TYPES[self.dtype]
        return block(
            f"D: tl.constexpr = {self.dim}",
            f"G: tl.constexpr = {self.shared}  # query heads of a key head",
            f"HKV: tl.constexpr = {self.kv_heads}",
            "pair = tl.program_id(0).to(tl.int64)",
            "split = tl.program_id(1)",
            "length = (tl.load(slots_ptr + pair // HKV) + 1).to(tl.int32)",
            f"begin = tl.maximum(length - {self.window}, 0)" if self.window else "begin = 0",
            "share = tl.cdiv(tl.cdiv(length - begin, SPLITS), BLOCK_T) * BLOCK_T",
            "first = begin + split * share",
            "last = tl.minimum(first + share, length)",
            tile.start_lines(),
            "# jettison.attention",
            "for tokens in range(first, last, BLOCK_T):",
            deeper(lines(
                "slot = tokens + tl.arange(0, BLOCK_T)",
                "seen = slot < last",
                "of_slot = (pair * C + slot[:, None]) * D + channel[None, :]",
                "in_slot = seen[:, None] & (channel < D)[None, :]",
                f"key = tl.load(key_ptr + of_slot, mask=in_slot, other=0).to({kind})",
                f"value = tl.load(value_ptr + of_slot, mask=in_slot, other=0).to({kind})",
                tile.visit_lines(),
            )),
            tile.join_lines(),
        )  # fmt: skip
