"""AWQ: channels of an input that are large are made small, and their weights large, so that these are rounded finely.

For the linears that read one input x, `s_j = mean|x_j| ^ alpha`, divided by `sqrt(max s * min s)`; the columns of their
weights are multiplied by s and what makes x divides by it, which computes the same. Of 20 values of alpha in [0, 1) the
one is kept with the least squared error of the outputs, `sum_w (w - w') H (w - w')T` with `H = sum x xT`; it is
measured on at most 512 rows of each weight. Then the range of every group is cut to the part, of 1, 0.95, ..., 0.55,
with the least `(w - w') H_gg (w - w')T` over the products `H_gg` of its own columns.

Where nothing in front of a linear can divide (an attention output, an input read by something else, too), it is only
cut.

Source: AWQ (arXiv 2306.00978), llm-awq auto_scale.py and auto_clip.py. There alpha is judged by the output of the whole
attention or MLP, on the tokens; here by those of the linears, on all tokens at once through their products. There the
queries' and keys' projections are not cut, because that error is not the one of their products; here they are not, too.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from jettison.passes.formats import WeightFormat
from jettison.passes.methods.base import InputStatistics, Method, RowEncoder
from jettison.passes.methods.clipping import clipped_grid

_ALPHAS = 20
_SAMPLED_ROWS = 512
_SMALLEST_SCALE = 1e-4
_CLIP_STEPS, _CLIP_LOWEST = 10, 0.55
_QUERIES_AND_KEYS = re.compile(r"(?:^|[._])(?:q|k|query|key|qkv)(?:[._]|$)|query_key_value|c_attn|Wqkv")


@dataclass(frozen=True)
class AWQ(Method):
    """See the module docstring."""

    name: ClassVar[str] = "awq"
    needs_inputs: ClassVar[bool] = True
    scales_inputs: ClassVar[bool] = True

    def input_scales(
        self, weights: Sequence[Tensor], weight_format: WeightFormat, statistics: InputStatistics
    ) -> Tensor | None:
        """The best of 20 powers of the mean magnitudes; None where that is the first, all ones."""
        sampled = [weight[:: -(-len(weight) // _SAMPLED_ROWS)] for weight in weights]
        magnitudes = (statistics.magnitudes / statistics.tokens).clamp_(min=_SMALLEST_SCALE)
        best: tuple[float, Tensor | None] = (torch.inf, None)
        for step in range(_ALPHAS):
            scales = magnitudes ** (step / _ALPHAS)
            scales = (scales / (scales.max() * scales.min()).sqrt()).clamp_(min=_SMALLEST_SCALE)
            cost = 0.0
            for weight in sampled:
                groups = weight_format.split_groups(weight * scales)
                grid = weight_format.stored(weight_format.fit(groups))
                rounded = weight_format.values(weight_format.round(groups, grid), grid)
                error = rounded.flatten(1)[:, : weight.shape[1]] / scales - weight
                cost += float(((error @ statistics.products) * error).sum())
            if cost < best[0]:
                best = (cost, scales if step else None)
        return best[1]

    def row_encoder(self, weight_format: WeightFormat, statistics: InputStatistics | None) -> RowEncoder:
        """Cuts ranges, except for queries and keys, and where there are no statistics."""
        if statistics is None:
            return weight_format.encode_rows
        group = weight_format.group
        columns = len(statistics.magnitudes)
        blocks = torch.zeros(-(-columns // group), group, group)
        for index, block in enumerate(blocks):
            own = statistics.products[index * group :, index * group :][:group, :group]
            block[: len(own), : len(own)] = own

        def weigh(error: Tensor) -> Tensor:
            return (torch.einsum("nbg,bgh->nbh", error, blocks) * error).sum(-1)

        def encode(rows: Tensor, where: str, first_row: int) -> dict[str, Tensor]:
            if _QUERIES_AND_KEYS.search(where):
                return weight_format.encode_rows(rows, where, first_row)
            groups = weight_format.split_groups(rows)
            weight_format.check_values(groups, where, first_row)
            grid = weight_format.stored(
                clipped_grid(weight_format, groups, weigh, steps=_CLIP_STEPS, lowest=_CLIP_LOWEST)
            )
            return weight_format.pack(weight_format.round(groups, grid), grid)

        return encode
