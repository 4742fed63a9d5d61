"""`jettison::low_rank_attention` with PyTorch, some rows of the batch at a time.

Keys and values in full width are those of one row, or of as many short ones as make a product worth its weights;
queries are those of a block of tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.ir.ops.attention import QUERY_ROWS, attend, visible_keys
from jettison.ir.ops.low_rank_attention import by_head
from jettison.ir.ops.rotary_embedding import rotary_embedding
from jettison.ir.token_chunks import FEWEST
from jettison.runtime.dense_linear import run_dense_linear


def run_low_rank_attention(
    query: Tensor, key: Tensor, value: Tensor, query_rows: Tensor, query_bias: Tensor | None, key_rows: Tensor,
    key_bias: Tensor | None, value_rows: Tensor, value_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    query_positions: Tensor | None, key_positions: Tensor | None, key_valid: Tensor | None, sinks: Tensor | None,
    heads: int, kv_heads: int, interleaved: bool, scale: float, causal: bool, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """`jettison::low_rank_attention`; see there."""
    batch, steps = query.shape[:2]
    out = query.new_empty(batch, steps, heads, len(value_rows) // kv_heads)
    if query_positions is None:
        query_positions = torch.arange(steps, device=query.device)[None]
    if key_positions is None:
        key_positions = torch.arange(key.shape[1], device=query.device)[None]
    at_once = max(1, FEWEST // max(1, key.shape[1]))
    for first in range(0, batch, at_once):
        taken = slice(first, first + at_once)
        keys = by_head(key[taken], key_rows, key_bias, kv_heads, run_dense_linear)
        values = by_head(value[taken], value_rows, value_bias, kv_heads, run_dense_linear)
        row_cos, row_sin = _of_rows(cos, taken), _of_rows(sin, taken)
        if row_cos is not None and row_sin is not None:
            keys = rotary_embedding(keys, row_cos, row_sin, interleaved)
        valid = _of_rows(key_valid, taken)
        asking, places = (each if len(each) == 1 else each[taken] for each in (query_positions, key_positions))
        for start in range(0, steps, QUERY_ROWS):
            block = slice(start, start + QUERY_ROWS)
            queries = by_head(query[taken, block], query_rows, query_bias, heads, run_dense_linear)
            if row_cos is not None and row_sin is not None:
                queries = rotary_embedding(queries, row_cos[:, block], row_sin[:, block], interleaved)
            visible = visible_keys(asking[:, block], places, valid, causal, window)
            out[taken, block] = attend(queries, keys, values, visible, sinks, scale, softcap).transpose(1, 2)
    return out


def _of_rows(given: Tensor | None, taken: slice) -> Tensor | None:
    """What belongs to some rows of the batch of what there is for each of them, or once for all."""
    return given if given is None or len(given) == 1 else given[taken]
