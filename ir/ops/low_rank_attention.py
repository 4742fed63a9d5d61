"""`jettison::low_rank_attention`: attention over queries, keys and values that are given in few dimensions.

Each of the three is `linear(x, columns)`, `r` numbers per token, and becomes heads inside the operator:

    query = linear(query, query_rows, query_bias)    [B, S, H * D], and keys and values alike
    out   = attention(rotate(query by head), rotate(key by head), value by head)

so that no caller ever sees them in full width. Keys are rotated after they are made, because an angle belongs to a pair
of channels of a head. One that is not factored has its whole weight for `rows`, and x as it is in front.

Source: FlashSVD (arXiv 2508.01506), whose kernel makes tiles of the three on chip.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.ops.attention import attention
from jettison.ir.ops.low_rank_mlp import check_bias, check_factor
from jettison.ir.ops.registration import define_op
from jettison.ir.ops.rotary_embedding import rotary_embedding


def by_head(
    x: Tensor, rows: Tensor, bias: Tensor | None, heads: int, linear: Callable[..., Tensor] = F.linear
) -> Tensor:
    """Queries, keys or values of some tokens in full width: `[B, heads, S, D]`, a view of `[B, S, heads * D]`.

    Args:
        x: `[B, S, r]`.
        rows: `[heads * D, r]`.
        bias: `[heads * D]`, or None.
        heads: How many there are.
        linear: What multiplies.
    """
    return linear(x, rows, bias).unflatten(-1, (heads, -1)).transpose(1, 2)


def _low_rank_attention(
    query: Tensor, key: Tensor, value: Tensor, query_rows: Tensor, query_bias: Tensor | None, key_rows: Tensor,
    key_bias: Tensor | None, value_rows: Tensor, value_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    query_positions: Tensor | None, key_positions: Tensor | None, key_valid: Tensor | None, sinks: Tensor | None,
    heads: int, kv_heads: int, interleaved: bool, scale: float, causal: bool, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """Define the operator: make the three whole, rotate, attend.

    Args:
        query: `[B, S, Rq]` f32, bf16 or f16.
        key: `[B, T, Rk]`; the three may be one tensor.
        value: `[B, T, Rv]`.
        query_rows: `[H * D, Rq]`, in the dtype of the query, as all weights.
        query_bias: `[H * D]`, or None.
        key_rows: `[Hkv * D, Rk]`.
        key_bias: `[Hkv * D]`, or None.
        value_rows: `[Hkv * Dv, Rv]`.
        value_bias: `[Hkv * Dv]`, or None.
        cos: `[B or 1, S, R / 2]`, as in `jettison::rotary_embedding`, for queries and for keys, which are as many then;
            None: nothing is rotated.
        sin: Likewise.
        query_positions: As in `jettison::attention`, like the next three.
        key_positions: Of the keys.
        key_valid: Which keys are tokens.
        sinks: Logits per head.
        heads: H.
        kv_heads: Hkv; divides H.
        interleaved: As in `jettison::rotary_embedding`.
        scale: As in `jettison::attention`, like the next three.
        causal: Whether later tokens are hidden.
        window: Positions seen back.
        softcap: Bound of the scores.

    Returns:
        `[B, S, H, Dv]`, contiguous: heads side by side, as the linear behind an attention reads them.
    """
    operands = (query, key, value, query_rows, query_bias, key_rows, key_bias, value_rows, value_bias, cos, sin)
    _check(*operands, heads, kv_heads)
    queries = by_head(query, query_rows, query_bias, heads)
    keys = by_head(key, key_rows, key_bias, kv_heads)
    values = by_head(value, value_rows, value_bias, kv_heads)
    if cos is not None and sin is not None:
        queries, keys = (rotary_embedding(each, cos, sin, interleaved) for each in (queries, keys))
    out = attention(
        queries, keys, values, query_positions, key_positions, key_valid, sinks, scale, causal, window, softcap
    )
    return out.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _fake_low_rank_attention(
    query: Tensor, key: Tensor, value: Tensor, query_rows: Tensor, query_bias: Tensor | None, key_rows: Tensor,
    key_bias: Tensor | None, value_rows: Tensor, value_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    query_positions: Tensor | None, key_positions: Tensor | None, key_valid: Tensor | None, sinks: Tensor | None,
    heads: int, kv_heads: int, interleaved: bool, scale: float, causal: bool, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    operands = (query, key, value, query_rows, query_bias, key_rows, key_bias, value_rows, value_bias, cos, sin)
    _check(*operands, heads, kv_heads)
    return query.new_empty(query.shape[0], query.shape[1], heads, value_rows.shape[0] // kv_heads)


low_rank_attention = define_op(
    "low_rank_attention(Tensor query, Tensor key, Tensor value, Tensor query_rows, Tensor? query_bias, "
    "Tensor key_rows, Tensor? key_bias, Tensor value_rows, Tensor? value_bias, Tensor? cos, Tensor? sin, "
    "Tensor? query_positions, Tensor? key_positions, Tensor? key_valid, Tensor? sinks, int heads, int kv_heads, "
    "bool interleaved, float scale, bool causal, int window, float softcap) -> Tensor",
    _low_rank_attention,
    _fake_low_rank_attention,
)


def _check(
    query: Tensor, key: Tensor, value: Tensor, query_rows: Tensor, query_bias: Tensor | None, key_rows: Tensor,
    key_bias: Tensor | None, value_rows: Tensor, value_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    heads: int, kv_heads: int,
) -> None:  # fmt: skip
    torch._check(
        heads > 0 and kv_heads > 0 and heads % kv_heads == 0,
        lambda: f"{kv_heads} kv_heads must divide {heads} heads",
    )
    torch._check((cos is None) == (sin is None), lambda: "cos and sin must be given together")
    stacks = (
        ("query", query, query_rows, query_bias, heads),
        ("key", key, key_rows, key_bias, kv_heads),
        ("value", value, value_rows, value_bias, kv_heads),
    )
    for name, x, rows, bias, count in stacks:
        width = rows.shape[0]
        torch._check(
            x.dim() == 3 and width % count == 0,
            lambda name=name, width=width, count=count: (
                f"{name} must have three axes, and its {width} rows be {count} heads"
            ),
        )
        check_factor(query, f"{name}_rows", rows, (width, x.shape[-1]))
        check_bias(f"{name}_bias", bias, width)
    torch._check(
        query_rows.shape[0] // heads == key_rows.shape[0] // kv_heads,
        lambda: "heads of queries and of keys must be equally wide",
    )
