"""What the kernels of decode attention share: a tile of query heads that visits keys, and the joining of splits.

The query heads of a key head are the rows of one tile, so that each key is read once. Every split keeps a maximum, a
sum and a weighted value, in fp32; a counter per key head tells the last program that all are there, and is zero again
when it has joined them, so that a captured graph can run once more. Channels may come in several parts, as codes that
share a byte do.

Source: Dao et al., "Flash-Decoding for long-context inference" (2023).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from jettison.codegen.triton.kernels.base import TRITON_TYPES, deeper, lines

_LOG2_E = 1.4426950408889634
# Tiles of products have at least this many rows and columns.
_LEAST = 16
_OF_PART = "of_part = (part + head[:, None]) * D + channel[None, :]"


def _power(count: int) -> int:
    return max(_LEAST, 1 << (count - 1).bit_length())


@dataclass(frozen=True)
class AttentionTile:
    """Lines of a kernel over one key head.

    Attributes:
        shared: G, query heads of a key head.
        dim: D.
        scale: Factor on the scores.
        softcap: Of the scores; 0 for none.
        dtype: Of queries and result, and what products take.
        parts: Of the channels.
    """

    shared: int
    dim: int
    scale: float
    softcap: float
    dtype: torch.dtype
    parts: int = 1

    @property
    def rows(self) -> int:
        """Of the tile; `G` of them are heads."""
        return _power(self.shared)

    @property
    def part_channels(self) -> int:
        """Channels of a part."""
        return self.dim // self.parts

    @property
    def width(self) -> int:
        """Columns of a part; `part_channels` of them are channels."""
        return _power(self.part_channels)

    def names(self, name: str) -> list[str]:
        """A variable for each part."""
        return [name] if self.parts == 1 else [f"{name}{part}" for part in range(self.parts)]

    def channels(self, part: int) -> str:
        """Expression of the channels of a part."""
        return f"{part * self.part_channels} + channel" if part else "channel"

    def start_lines(self) -> list[str]:
        """`query`, and nothing visited yet; needs `pair`, the key head."""
        return lines(
            f"head = tl.arange(0, {self.rows})",
            f"channel = tl.arange(0, {self.width})",
            f"in_query = (head < G)[:, None] & (channel < {self.part_channels})[None, :]",
            "of_query = (pair * G + head[:, None]) * D + channel[None, :]",
            [
                f"{name} = tl.load(query_ptr + of_query + {part * self.part_channels}, mask=in_query, other=0)"
                for part, name in enumerate(self.names("query"))
            ],
            self._empty_lines(),
        )

    def _empty_lines(self) -> list[str]:
        return lines(
            f"most = tl.full([{self.rows}], -float('inf'), tl.float32)",
            f"weight = tl.zeros([{self.rows}], tl.float32)",
            [f"{name} = tl.zeros([{self.rows}, {self.width}], tl.float32)" for name in self.names("mean")],
        )

    def visit_lines(self) -> list[str]:
        """Take in the keys and values of some tokens, `seen` or not."""
        kind = TRITON_TYPES[self.dtype]
        products = [
            f"scores = tl.dot({query}, tl.trans({key}){', scores' if part else ''}, input_precision='ieee')"
            for part, (query, key) in enumerate(zip(self.names("query"), self.names("key"), strict=True))
        ]
        cap = repr(self.softcap)
        return lines(
            products,
            f"scores *= {self.scale!r}",
            f"scores = {cap} * (2 * tl.sigmoid(2 * scores / {cap}) - 1)" if self.softcap else "",
            "scores = tl.where(seen[None, :], scores, -float('inf'))",
            "higher = tl.maximum(most, tl.max(scores, 1))",
            f"kept = tl.exp2((most - higher) * {_LOG2_E})",
            f"shares = tl.exp2((scores - higher[:, None]) * {_LOG2_E})",
            "weight = weight * kept + tl.sum(shares, 1)",
            [
                f"{mean} = tl.dot(shares.to({kind}), {value}, {mean} * kept[:, None], input_precision='ieee')"
                for mean, value in zip(self.names("mean"), self.names("value"), strict=True)
            ],
            "most = higher",
        )

    def join_lines(self) -> list[str]:
        """Leave what this split has found, and join all splits in the last program; needs `split`."""
        kind = TRITON_TYPES[self.dtype]
        return lines(
            "part = (pair * SPLITS + split) * G",
            _OF_PART,
            [
                f"tl.store(parts_ptr + of_part + {part * self.part_channels}, {mean}, mask=in_query)"
                for part, mean in enumerate(self.names("mean"))
            ],
            "tl.store(stats_ptr + (part + head) * 2, most, mask=head < G)",
            "tl.store(stats_ptr + (part + head) * 2 + 1, weight, mask=head < G)",
            "tl.debug_barrier()",
            "finished = tl.atomic_add(counters_ptr + pair, 1, sem='acq_rel')",
            "if finished == SPLITS - 1:",
            deeper(lines(
                "tl.debug_barrier()",
                self._empty_lines(),
                "for other in range(0, SPLITS):",
                deeper(self._join_one()),
                [
                    f"tl.store(out_ptr + of_query + {part * self.part_channels}, "
                    f"({mean} / weight[:, None]).to({kind}), mask=in_query)"
                    for part, mean in enumerate(self.names("mean"))
                ],
                "tl.store(counters_ptr + pair, 0)",
            )),
        )  # fmt: skip

    def _join_one(self) -> list[str]:
        return lines(
            "part = (pair * SPLITS + other) * G",
            _OF_PART,
            "its_most = tl.load(stats_ptr + (part + head) * 2, mask=head < G, other=0)",
            "its_weight = tl.load(stats_ptr + (part + head) * 2 + 1, mask=head < G, other=1)",
            "higher = tl.maximum(most, its_most)",
            # A split without tokens, the first one too, where both are minus infinity.
            f"kept = tl.where(weight > 0, tl.exp2((most - higher) * {_LOG2_E}), 0.0)",
            f"gained = tl.where(its_weight > 0, tl.exp2((its_most - higher) * {_LOG2_E}), 0.0)",
            *(
                [
                    f"its_mean = tl.load(parts_ptr + of_part + {part * self.part_channels}, mask=in_query, other=0)",
                    f"{mean} = {mean} * kept[:, None] + its_mean * gained[:, None]",
                ]
                for part, mean in enumerate(self.names("mean"))
            ),
            "weight = weight * kept + its_weight * gained",
            "most = higher",
        )
