"""Attention of one new token per row over a compressed cache and the newest tokens, which are not compressed.

Codes are decoded in registers, where they are needed: nothing of the cache is written in full precision. The channels
of a token are cut into as many parts as codes share a byte, and each part is a product of its own. A program takes a
slot of the compressed part at a time, or `BLOCK_T` where slots are single tokens; the newest tokens are the first
split's.

The layout is that of `jettison::quantize_slots`; keys and values may be grouped differently, as KIVI does
(arXiv 2402.02750).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from jettison.codegen.triton.kernels.attention_tile import AttentionTile
from jettison.codegen.triton.kernels.base import ELEMENTS, TRITON_TYPES, Kernel, Tuning, block, deeper, lines, name_of

# Tiles of products have at least this many tokens.
LEAST_TOKENS = 16


@dataclass(frozen=True)
class Ranges:
    """How the codes of a slot are grouped.

    Attributes:
        bits: 2, 4 or 8.
        rows: Groups along the tokens of a slot.
        columns: Groups along the channels.
    """

    bits: int
    rows: int
    columns: int


@dataclass(frozen=True)
class JointAttention(Kernel):
    """`jettison::joint_attention` of `[B, H, 1, D]`, to `[B, 1, H * D]`.

    Attributes:
        heads: H.
        kv_heads: Hkv.
        dim: D.
        scale: Factor on the scores.
        tokens: Of a slot of the compressed part.
        key: Grouping of the keys, in as many bits as the values.
        value: Of the values.
        dtype: Of queries and result.
        cache_dtype: Of the newest keys and values.
    """

    heads: int
    kv_heads: int
    dim: int
    scale: float
    tokens: int
    key: Ranges
    value: Ranges
    dtype: torch.dtype
    cache_dtype: torch.dtype

    @property
    def shared(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    @property
    def name(self) -> str:
        """See `Kernel`."""
        groups = "_".join(f"{each.rows}x{each.columns}" for each in (self.key, self.value))
        kinds = "_".join(dict.fromkeys(ELEMENTS[each] for each in (self.dtype, self.cache_dtype)))
        of = f"h{self.heads}x{self.kv_heads}_d{self.dim}_scale{name_of(self.scale)}"
        stored = f"int{self.key.bits}_t{self.tokens}_{groups}"
        return f"joint_attention_{stored}_{of}_{kinds}"

    @property
    def title(self) -> str:
        """See `Kernel`."""
        what = f"{self.kv_heads} of {self.key.bits} bits, and the newest tokens"
        return f"Attention of one token of {self.heads} heads over {what}."

    @property
    def parameters(self) -> dict[str, str]:
        """See `Kernel`."""
        element, cache = (f"*{ELEMENTS[each]}" for each in (self.dtype, self.cache_dtype))
        stored = {
            f"{name}_{kind}_ptr": "*u8" if kind == "codes" else "*fp16"
            for name in ("key", "value")
            for kind in ("codes", "scales", "zeros")
        }
        return {
            "query_ptr": element, **stored, "stored_ptr": "*i64", "key_ptr": cache, "value_ptr": cache,
            "slots_ptr": "*i64", "parts_ptr": "*fp32", "stats_ptr": "*fp32", "counters_ptr": "*i32",
            "out_ptr": element, "SLOTS": "i32", "C": "i32",
        }  # fmt: skip

    @property
    def _is_slot_at_once(self) -> bool:
        return self.tokens >= LEAST_TOKENS

    def tunings(self) -> list[Tuning]:
        """See `Kernel`."""
        tokens = 1 << (self.tokens - 1).bit_length() if self._is_slot_at_once else 32
        return [
            Tuning.of(warps, SPLITS=splits, BLOCK_T=tokens) for splits, warps in ((16, 4), (32, 4), (64, 4), (32, 8))
        ]

    def widest(self) -> Tuning:
        """See `Kernel`."""
        return Tuning.of(SPLITS=2, BLOCK_T=self.tunings()[0]["BLOCK_T"])

    def grid(self, tuning: Tuning, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """See `Kernel`."""
        return (sizes["B"] * self.kv_heads, tuning["SPLITS"])

    def body(self) -> str:
        """See `Kernel`."""
        tile = self._tile
        step = self.tokens if self._is_slot_at_once else "BLOCK_T"
        return block(
            f"D: tl.constexpr = {self.dim}",
            f"G: tl.constexpr = {self.shared}  # query heads of a key head",
            f"HKV: tl.constexpr = {self.kv_heads}",
            f"TOKENS: tl.constexpr = {self.tokens}  # of a compressed slot",
            "pair = tl.program_id(0).to(tl.int64)",
            "split = tl.program_id(1)",
            "stored = tl.load(stored_ptr + pair // HKV).to(tl.int32)",
            f"share = tl.cdiv(tl.cdiv(stored, SPLITS), {step}) * {step}",
            "first = split * share",
            "last = tl.minimum(first + share, stored)",
            tile.start_lines(),
            "# jettison.dequantize_slots, and the part of jettison.joint_attention over what is stored",
            f"for tokens in range(first, last, {step}):",
            deeper(self._stored_lines()),
            "# the part over the newest tokens",
            "if split == 0:",
            "    length = (tl.load(slots_ptr + pair // HKV) + 1).to(tl.int32)",
            "    for tokens in range(0, length, BLOCK_T):",
            deeper(deeper(self._newest_lines())),
            tile.join_lines(),
        )

    @property
    def _tile(self) -> AttentionTile:
        return AttentionTile(self.shared, self.dim, self.scale, 0.0, self.dtype, 8 // self.key.bits)

    def _stored_lines(self) -> list[str]:
        """Some compressed tokens."""
        if self._is_slot_at_once:
            where = [
                "slot = tokens // TOKENS",
                "row = tl.arange(0, BLOCK_T)",
                "seen = (row < TOKENS) & (tokens + row < last)",
                "of_slot = pair * SLOTS + slot",
            ]
        else:
            where = [
                "row = (tokens + tl.arange(0, BLOCK_T)) % TOKENS",
                "seen = tokens + tl.arange(0, BLOCK_T) < last",
                "of_slot = (pair * SLOTS + (tokens + tl.arange(0, BLOCK_T)) // TOKENS)[:, None]",
            ]
        width = self._tile.part_channels
        of_token = "(of_slot * TOKENS + row[:, None])"
        return lines(
            where,
            f"of_codes = {of_token} * {width} + channel[None, :]",
            f"in_codes = seen[:, None] & (channel < {width})[None, :]",
            self._decoded("key", self.key),
            self._decoded("value", self.value),
            self._tile.visit_lines(),
        )

    def _decoded(self, name: str, ranges: Ranges) -> list[str]:
        """`key0`, `key1` ...: the numbers of each part of the channels."""
        kind = TRITON_TYPES[self.dtype]
        found = [f"{name}_codes = tl.load({name}_codes_ptr + of_codes, mask=in_codes, other=0)"]
        per_row, per_column = self.tokens // ranges.rows, self.dim // ranges.columns
        # One range for all tokens of a slot is loaded once for all of them.
        of_row = f" + (row // {per_row})[:, None] * {ranges.columns}" if ranges.rows > 1 else ""
        is_shared = self._is_slot_at_once and ranges.rows == 1
        mask = f"(channel < {self._tile.part_channels})[None, :]" if is_shared else "in_codes"
        for part, variable in enumerate(self._tile.names(name)):
            of_range = f"of_slot * {ranges.rows * ranges.columns}{of_row}"
            channels = f"(({self._tile.channels(part)}) // {per_column})[None, :]"
            guard = f"mask={mask}, other=0"
            code = f"{name}_codes >> {ranges.bits * part}" if part else f"{name}_codes"
            found += [
                f"of_range = {of_range} + {channels}",
                f"scale = tl.load({name}_scales_ptr + of_range, {guard}).to(tl.float32)",
                f"zero = tl.load({name}_zeros_ptr + of_range, {guard}).to(tl.float32)",
                f"{variable} = ((({code}) & {2**ranges.bits - 1}).to(tl.float32) * scale + zero).to({kind})",
            ]
        return found

    def _newest_lines(self) -> list[str]:
        """Some tokens in full precision."""
        kind, width = TRITON_TYPES[self.dtype], self._tile.part_channels
        return lines(
            "slot = tokens + tl.arange(0, BLOCK_T)",
            "seen = slot < length",
            "of_slot = (pair * C + slot[:, None]) * D + channel[None, :]",
            f"in_slot = seen[:, None] & (channel < {width})[None, :]",
            [
                f"{variable} = tl.load({name}_ptr + of_slot + {part * width}, mask=in_slot, other=0).to({kind})"
                for name in ("key", "value")
                for part, variable in enumerate(self._tile.names(name))
            ],
            self._tile.visit_lines(),
        )
