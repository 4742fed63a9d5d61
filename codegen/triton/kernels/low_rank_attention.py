"""Attention over a whole sequence whose queries, keys and values are given in few dimensions: heads are made on chip.

A program owns a tile of queries of one head. It makes them once, and then visits the keys: of some tokens it makes the
keys, rotates them, attends, makes the values, and forgets both. So nothing as wide as the heads is in memory, and each
key is made again for every tile of queries and every query head that reads it, which is what the saving costs. Channels
that rotate are made apart, the two of a pair in two tiles, since a product of scores does not mind in which order
channels come.

Source: FlashSVD (arXiv 2508.01506); Dao, "FlashAttention-2" (arXiv 2307.08691) for the softmax on the way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from jettison.codegen.triton.kernels.base import ELEMENTS, TRITON_TYPES, Kernel, Tuning, block, deeper, lines, name_of
from jettison.codegen.triton.kernels.gemm import LEAST_TILE

_LOG2_E = 1.4426950408889634
_NAMES = ("query", "key", "value")


def _power(count: int) -> int:
    return max(LEAST_TILE, 1 << (count - 1).bit_length())


@dataclass(frozen=True)
class _Part:
    """Channels of a head that stand in one tile.

    Attributes:
        suffix: Of its variables.
        channels: Expression of the channels, in terms of `index`.
        index: Name of the places in the tile.
        count: Places that are channels; the tile may be wider.
    """

    suffix: str
    channels: str
    index: str
    count: int


@dataclass(frozen=True)
class Masks:
    """What decides which keys a query sees.

    Attributes:
        causal: Whether later tokens are hidden.
        window: Positions seen back; 0 for all.
        has_query_positions: Whether queries have positions other than their places.
        has_key_positions: Likewise keys, of which negative ones are hidden.
        has_valid: Whether it is said for each key if it is a token.
    """

    causal: bool = False
    window: int = 0
    has_query_positions: bool = False
    has_key_positions: bool = False
    has_valid: bool = False

    @property
    def name(self) -> str:
        """For names of kernels; of the last three, the first letter of whom they are about."""
        given = {"q": self.has_query_positions, "k": self.has_key_positions, "v": self.has_valid}
        letters = "".join(letter for letter, is_there in given.items() if is_there)
        window = f"window{self.window}_" if self.window else ""
        return "causal_" * self.causal + window + (f"given_{letters}_" if letters else "")

    @property
    def follows_places(self) -> bool:
        """Whether keys that no query of a tile sees are told by their place."""
        return not (self.has_query_positions or self.has_key_positions)

    @property
    def compares(self) -> bool:
        """Whether what a query sees depends on its position."""
        return self.causal or self.window > 0


@dataclass(frozen=True)
class LowRankAttention(Kernel):
    """`jettison::low_rank_attention` of `[B, S, Rq]`, `[B, T, Rk]` and `[B, T, Rv]`, to `[B, S, H, Dv]`.

    Attributes:
        heads: H.
        kv_heads: Hkv.
        dim: D, of queries and keys; of more than 128 and of as many values, tiles spill.
        value_dim: Dv.
        ranks: Rq, Rk and Rv.
        has_bias: Of the three.
        rotated: Channels of a head that rotate; 0 for none.
        interleaved: See `jettison::rotary_embedding`.
        scale: Factor on the scores.
        softcap: Of the scores; 0 for none.
        has_sinks: Whether heads have a sink.
        masks: See there.
        dtype: Of queries, weights and result.
        angles: Of cosines and sines.
    """

    heads: int
    kv_heads: int
    dim: int
    value_dim: int
    ranks: tuple[int, int, int]
    has_bias: tuple[bool, bool, bool]
    rotated: int
    interleaved: bool
    scale: float
    softcap: float
    has_sinks: bool
    masks: Masks
    dtype: torch.dtype
    angles: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        """See `Kernel`."""
        ranks = "x".join(f"{rank}{'b' * bias}" for rank, bias in zip(self.ranks, self.has_bias, strict=True))
        turned = f"turn{self.rotated}{'i' * self.interleaved}_" if self.rotated else ""
        extra = f"softcap{name_of(self.softcap)}_" * bool(self.softcap) + "sinks_" * self.has_sinks
        dims = "x".join(dict.fromkeys(map(str, (self.dim, self.value_dim))))
        of = f"h{self.heads}x{self.kv_heads}_d{dims}_scale{name_of(self.scale)}"
        given = (self.dtype, self.angles) if self.rotated else (self.dtype,)
        kinds = "_".join(dict.fromkeys(ELEMENTS[each] for each in given))
        return f"low_rank_attention_{ranks}_{turned}{self.masks.name}{extra}{of}_{kinds}"

    @property
    def title(self) -> str:
        """See `Kernel`."""
        return f"Attention of {self.heads} heads over {self.kv_heads}, made of {self.ranks} dimensions."

    @property
    def parameters(self) -> dict[str, str]:
        """See `Kernel`."""
        element = f"*{ELEMENTS[self.dtype]}"
        names = [f"{name}_ptr" for name in _NAMES] + [f"{name}_rows_ptr" for name in _NAMES]
        names += [f"{name}_bias_ptr" for name, has_bias in zip(_NAMES, self.has_bias, strict=True) if has_bias]
        found = dict.fromkeys(names, element)
        if self.rotated:
            found |= dict.fromkeys(("cos_ptr", "sin_ptr"), f"*{ELEMENTS[self.angles]}")
        found |= {
            name: kind
            for name, kind, is_there in (
                ("asked_ptr", "*i64", self.masks.has_query_positions),
                ("places_ptr", "*i64", self.masks.has_key_positions),
                ("valid_ptr", "*u8", self.masks.has_valid),
                ("sinks_ptr", "*fp32", self.has_sinks),
            )
            if is_there
        }
        sizes = ["S", "T"] + ["ANGLES"] * bool(self.rotated)
        sizes += ["ASKED"] * self.masks.has_query_positions + ["PLACES"] * self.masks.has_key_positions
        return {**found, "out_ptr": element, **dict.fromkeys(sizes, "i32")}

    @property
    def parts(self) -> list[_Part]:
        """Of the channels of queries and keys."""
        if not self.rotated:
            return [_Part("", "channel", "channel", self.dim)]
        half = self.rotated // 2
        first, second = ("2 * pair", "2 * pair + 1") if self.interleaved else ("pair", f"{half} + pair")
        rest = self.dim - self.rotated
        last = [_Part("2", f"{self.rotated} + rest", "rest", rest)] if rest else []
        return [_Part("0", first, "pair", half), _Part("1", second, "pair", half), *last]

    def tunings(self) -> list[Tuning]:
        """See `Kernel`."""
        wide = _power(max(self.dim, self.value_dim))
        if self.dtype == torch.float32:
            wanted = [(16, 16, 16, 8, 1), (16, 32, 16, 8, 1), (32, 16, 16, 8, 1)]
        elif wide > 64:
            wanted = [(64, 32, 16, 8, 2), (64, 32, 32, 8, 2), (64, 32, 64, 8, 2), (128, 32, 32, 8, 2)]
            if self.rotated and not self.masks.follows_places:  # angles and positions take registers, too
                wanted.insert(0, (32, 32, 16, 8, 2))
        else:
            wanted = [(128, 32, 32, 8, 2), (64, 32, 64, 8, 2), (128, 64, 32, 8, 2)]
        return [
            Tuning.of(warps, stages, BLOCK_M=queries, BLOCK_T=keys, BLOCK_K=ranks)
            for queries, keys, ranks, warps, stages in wanted
        ]

    def widest(self) -> Tuning:
        """See `Kernel`."""
        return Tuning.of(BLOCK_M=64, BLOCK_T=64, BLOCK_K=min(512, _power(max(self.ranks))))

    def grid(self, tuning: Tuning, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """See `Kernel`."""
        return (-(-sizes["S"] // tuning["BLOCK_M"]), self.heads, sizes["B"])

    def body(self) -> str:
        """See `Kernel`."""
        indices = {part.index: part.count for part in self.parts} | {"column": self.value_dim}
        kind = TRITON_TYPES[self.dtype]
        return block(
            "tile = tl.program_id(0)",
            "head = tl.program_id(1)",
            f"kv_head = head // {self.heads // self.kv_heads}",
            "batch = tl.program_id(2).to(tl.int64)",
            [f"{index} = tl.arange(0, {_power(count)})" for index, count in indices.items()],
            "m = tile * BLOCK_M + tl.arange(0, BLOCK_M)",
            "in_m = m < S",
            "# queries: aten.linear" + " and jettison.rotary_embedding" * bool(self.rotated),
            self._made("query", "m", "in_m", "BLOCK_M", "S", self.parts, "head", self.dim),
            self._turned("query", "m", "in_m"),
            self._asked_lines(),
            self._empty_lines(),
            "# jettison.attention",
            self._range_lines(),
            "for tokens in range(begin, last, BLOCK_T):",
            deeper(self._visit()),
            # A query that sees nothing gets zeros.
            "mean /= tl.where(weight > 0, weight, 1.0)[:, None]",
            f"to = ((batch * S + m)[:, None] * {self.heads} + head) * {self.value_dim} + column[None, :]",
            f"tl.store(out_ptr + to, mean.to({kind}), mask=in_m[:, None] & (column < {self.value_dim})[None, :])",
        )

    def _made(
        self, name: str, token: str, inside: str, tile: str, count: str, parts: list[_Part], head: str, dim: int
    ) -> list[str]:
        """Heads of some tokens in fp32, a variable for each part."""
        index = _NAMES.index(name)
        rank, has_bias = self.ranks[index], self.has_bias[index]
        row = {part.suffix: f"{head} * {dim} + {part.channels}" for part in parts}
        return lines(
            [f"{name}{part.suffix} = tl.zeros([{tile}, {_power(part.count)}], tl.float32)" for part in parts],
            f"for first in range(0, {rank}, BLOCK_K):",
            deeper(lines(
                "at = first + tl.arange(0, BLOCK_K)",
                f"in_rank = at < {rank}",
                f"of_x = (batch * {count} + {token})[:, None] * {rank} + at[None, :]",
                f"x = tl.load({name}_ptr + of_x, mask={inside}[:, None] & in_rank[None, :], other=0)",
                *([
                    f"of_rows = ({row[part.suffix]})[:, None] * {rank} + at[None, :]",
                    f"in_rows = ({part.index} < {part.count})[:, None] & in_rank[None, :]",
                    f"rows = tl.load({name}_rows_ptr + of_rows, mask=in_rows, other=0)",
                    f"{name}{part.suffix} = tl.dot(x, tl.trans(rows), {name}{part.suffix}, input_precision='ieee')",
                ] for part in parts),
            )),
            [
                f"{name}{part.suffix} += tl.load({name}_bias_ptr + {row[part.suffix]}, "
                f"mask={part.index} < {part.count}, other=0).to(tl.float32)[None, :]"
                for part in parts
            ] if has_bias else [],
        )  # fmt: skip

    def _turned(self, name: str, token: str, inside: str) -> list[str]:
        """Rotate what was made, and bring it to the dtype of products."""
        kind, half = TRITON_TYPES[self.dtype], self.rotated // 2
        mask = f"mask={inside}[:, None] & (pair < {half})[None, :], other=0"
        # Names of their own: in a loop a variable keeps its shape.
        turn = [
            f"{name}_angle = batch * ANGLES + {token}[:, None] * {half} + pair[None, :]",
            f"{name}_cos = tl.load(cos_ptr + {name}_angle, {mask}).to(tl.float32)",
            f"{name}_sin = tl.load(sin_ptr + {name}_angle, {mask}).to(tl.float32)",
            f"{name}_turned = {name}0 * {name}_cos - {name}1 * {name}_sin",
            f"{name}1 = {name}1 * {name}_cos + {name}0 * {name}_sin",
            f"{name}0 = {name}_turned",
        ]
        cast = [f"{name}{part.suffix} = {name}{part.suffix}.to({kind})" for part in self.parts]
        return lines(turn if self.rotated else [], cast)

    def _asked_lines(self) -> list[str]:
        """`asked`: positions of the queries."""
        if not self.masks.compares:
            return []
        if self.masks.has_query_positions:
            return ["asked = tl.load(asked_ptr + batch * ASKED + m, mask=in_m, other=0).to(tl.int32)"]
        return ["asked = m"]

    def _empty_lines(self) -> list[str]:
        """Nothing visited yet but the sink, which has a weight and no value."""
        most = "tl.full([BLOCK_M], -float('inf'), tl.float32)"
        return lines(
            "most = tl.zeros([BLOCK_M], tl.float32) + tl.load(sinks_ptr + head)"
            if self.has_sinks else f"most = {most}",
            f"weight = tl.full([BLOCK_M], {1.0 if self.has_sinks else 0.0}, tl.float32)",
            f"mean = tl.zeros([BLOCK_M, {_power(self.value_dim)}], tl.float32)",
        )  # fmt: skip

    def _range_lines(self) -> list[str]:
        """`begin` and `last`: keys that some query of the tile may see."""
        begin, last = "0", "T"
        if self.masks.follows_places and self.masks.causal:
            last = "tl.minimum(T, (tile + 1) * BLOCK_M)"
        if self.masks.follows_places and self.masks.window:
            begin = f"tl.maximum(tile * BLOCK_M - {self.masks.window - 1}, 0)"
        return [f"begin = {begin}", f"last = {last}"]

    def _visit(self) -> list[str]:
        """Make the keys of some tokens, attend, and make the values."""
        kind, cap = TRITON_TYPES[self.dtype], repr(self.softcap)
        value = [_Part("", "column", "column", self.value_dim)]
        return lines(
            "token = tokens + tl.arange(0, BLOCK_T)",
            "in_keys = token < T",
            self._made("key", "token", "in_keys", "BLOCK_T", "T", self.parts, "kv_head", self.dim),
            self._turned("key", "token", "in_keys"),
            [
                f"scores = tl.dot(query{part.suffix}, tl.trans(key{part.suffix}){', scores' if index else ''}, "
                "input_precision='ieee')"
                for index, part in enumerate(self.parts)
            ],
            f"scores *= {self.scale!r}",
            f"scores = {cap} * (2 * tl.sigmoid(2 * scores / {cap}) - 1)" if self.softcap else "",
            self._seen_lines(),
            "scores = tl.where(seen, scores, -float('inf'))",
            "higher = tl.maximum(most, tl.max(scores, 1))",
            # Of a query that has seen nothing yet.
            "level = tl.where(higher > -float('inf'), higher, 0.0)",
            f"kept = tl.exp2((most - level) * {_LOG2_E})",
            f"shares = tl.exp2((scores - level[:, None]) * {_LOG2_E})",
            "weight = weight * kept + tl.sum(shares, 1)",
            self._made("value", "token", "in_keys", "BLOCK_T", "T", value, "kv_head", self.value_dim),
            f"mean = tl.dot(shares.to({kind}), value.to({kind}), mean * kept[:, None], input_precision='ieee')",
            "most = higher",
        )

    def _seen_lines(self) -> list[str]:
        """`seen [BLOCK_M, BLOCK_T]`, or `[1, BLOCK_T]` where all queries see the same."""
        masks = self.masks
        place = "token"
        given, keys = [], ["in_keys"]
        if masks.has_valid:
            given.append("valid = tl.load(valid_ptr + batch * T + token, mask=in_keys, other=0)")
            keys.append("(valid != 0)")
        if masks.has_key_positions:
            place = "place"
            given.append("place = tl.load(places_ptr + batch * PLACES + token, mask=in_keys, other=-1).to(tl.int32)")
            keys.append("(place >= 0)")
        given.append(f"seen = ({' & '.join(keys)})[None, :]")
        if masks.causal:
            given.append(f"seen = seen & ({place}[None, :] <= asked[:, None])")
        if masks.window:
            given.append(f"seen = seen & ({place}[None, :] > asked[:, None] - {masks.window})")
        return given
