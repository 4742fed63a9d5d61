"""Attention over low-rank queries, keys and values as ONNX: a `Loop` over the rows of the batch.

All three, and the scores, exist for one row at a time. The operators are a function of the model, like those of
`low_rank_mlp`.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from jettison.codegen.onnx.functions import call, define
from jettison.codegen.onnx.low_rank_mlp import linear_text
from jettison.ir.ops.attention import visible_keys

# Rows of scores: those of a key head, query head by query head. A key that is not seen gets the lowest score.
_TEXT = """
{name} <scale, heads, kv_heads, softcap, interleaved, rotated> ({inputs}) => (out)
{{
    yes_number = Constant <value_int = 1> ()
    yes = Cast <to = 9> (yes_number)
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    rest = Constant <value_ints = [-1]> ()
    nothing = Constant <value_float = 0.0> ()
    lowest = Constant <value_float = -3.4028234e38> ()
    factor = Constant <value_float: float = @scale> ()
    heads_number = Constant <value_int: int = @heads> ()
    query_count = Reshape (heads_number, one)
    key_heads_number = Constant <value_int: int = @kv_heads> ()
    key_count = Reshape (key_heads_number, one)
    by_head = Concat <axis = 0> (zero, query_count, rest)
    by_key_head = Concat <axis = 0> (zero, key_count, rest)
    batch = Shape <start = 0, end = 1> (query)
    steps = Shape <start = 1, end = 2> (query)
    rows = Squeeze (batch)
    {before}
    out = Loop (rows, yes) <
        body = row_of_the_batch (int64 row, bool goes_on) => (bool still, float[steps, heads, channels] attended) {{
            still = Identity (goes_on)
            {body}
        }}
    >
}}
"""
_SOFTCAP = "divided = Div (scores, cap)\nbounded = Tanh (divided)\ncapped = Mul (bounded, cap)"
_SINKS = """
column_shape = Concat <axis = 0> (query_count, steps, one)
column = Expand (sink_column, column_shape)
with_sinks = Concat <axis = -1> (masked, column)
all_weights = Softmax <axis = -1> (with_sinks)
keys_seen = Shape <start = 2, end = 3> (masked)
last = Constant <value_ints = [2]> ()
weights = Slice (all_weights, zero, keys_seen, last)
"""


def _heads_text(part: str, count: str, *, has_bias: bool) -> str:
    """`{part}_heads`: `[heads, S, D]` of the row."""
    text = f"{part}_row = Gather <axis = 0> ({part}, row)\n"
    text += linear_text(f"{part}_row", f"{part}_rows", f"{part}_bias" if has_bias else None, f"{part}_wide")
    text += f"{part}_split = Reshape ({part}_wide, {count})\n"
    return text + f"{part}_heads = Transpose <perm = [1, 0, 2]> ({part}_split)\n"


def _rotation_text(part: str, *, is_partial: bool) -> str:
    """`{part}_turned` from `{part}_heads`."""
    text = f"{part}_four = Unsqueeze ({part}_heads, zero)\n"
    rotate = "RotaryEmbedding <interleaved: int = @interleaved>"
    if not is_partial:
        text += f"{part}_rotated = {rotate} ({part}_four, cos_row, sin_row)\n"
    else:
        # See `rotary_embedding` in `lowerings`: the kernel's partial form is wrong.
        text += f"{part}_first, {part}_last = Split <axis = 3> ({part}_four, parts)\n"
        text += f"{part}_partly = {rotate} ({part}_first, cos_row, sin_row)\n"
        text += f"{part}_rotated = Concat <axis = 3> ({part}_partly, {part}_last)\n"
    return text + f"{part}_turned = Squeeze ({part}_rotated, zero)\n"


def _of_row(name: str, values: str, *, is_kept: bool) -> str:
    """What belongs to the row of what there is for each of them, or once for all."""
    index = f"{name}_index"
    text = f"{index} = Min (row, {values}_end)\n"
    if is_kept:
        return text + f"{index}_1 = Unsqueeze ({index}, zero)\n{name} = Gather <axis = 0> ({values}, {index}_1)\n"
    return text + f"{name} = Gather <axis = 0> ({values}, {index})\n"


def _end(values: str) -> str:
    """`{values}_end`: the index of the last one along the batch."""
    return (
        f"{values}_count = Shape <start = 0, end = 1> ({values})\n{values}_before = Sub ({values}_count, one)\n"
        f"{values}_end = Squeeze ({values}_before)\n"
    )


@functools.cache
def _function(given: tuple[str, ...], is_partial: bool, has_softcap: bool) -> str:
    """Name of the function for these operands, which is defined when it is first asked for."""
    needed = ("query", "key", "value", "query_rows", "key_rows", "value_rows")
    optional = [part for part in given if part not in needed]
    flags = ["partial"] * is_partial + ["softcap"] * has_softcap
    name = "_".join(["LowRankAttention", *optional, *flags])
    before, body = "", ""
    for part, count in (("query", "by_head"), ("key", "by_key_head"), ("value", "by_key_head")):
        body += _heads_text(part, count, has_bias=f"{part}_bias" in given)
    turned = "heads"
    if "cos" in given:
        turned = "turned"
        before += _end("cos") + "rotated_number = Constant <value_int: int = @rotated> ()\n"
        body += _of_row("cos_row", "cos", is_kept=True) + _of_row("sin_row", "sin", is_kept=True).replace(
            "sin_end", "cos_end"
        )
        if is_partial:
            body += "rotated_1 = Reshape (rotated_number, one)\nwidth = Shape <start = 2, end = 3> (query_heads)\n"
            body += "left = Sub (width, rotated_1)\nparts = Concat <axis = 0> (rotated_1, left)\n"
        body += _rotation_text("query", is_partial=is_partial) + _rotation_text("key", is_partial=is_partial)
    body += f"scaled = Mul (query_{turned}, factor)\nchannels_of = Shape <start = 2, end = 3> (scaled)\n"
    body += "grouped_shape = Concat <axis = 0> (key_count, rest, channels_of)\n"
    body += f"grouped = Reshape (scaled, grouped_shape)\nkey_t = Transpose <perm = [0, 2, 1]> (key_{turned})\n"
    body += "grouped_scores = MatMul (grouped, key_t)\nscore_shape = Concat <axis = 0> (query_count, steps, rest)\n"
    body += "scores = Reshape (grouped_scores, score_shape)\n"
    scores = "scores"
    if has_softcap:
        before += "cap = Constant <value_float: float = @softcap> ()\n"
        body += _SOFTCAP + "\n"
        scores = "capped"
    if "visible" in given:
        before += _end("visible")
        body += _of_row("seen", "visible", is_kept=True) + f"masked = Where (seen, {scores}, lowest)\n"
    else:
        body += f"masked = Identity ({scores})\n"
    if "sinks" in given:
        before += "two_axes = Constant <value_ints = [1, 2]> ()\nsink_column = Unsqueeze (sinks, two_axes)\n"
        body += _SINKS
    else:
        body += "weights = Softmax <axis = -1> (masked)\n"
    body += "keys = Shape <start = 2, end = 3> (weights)\nweight_shape = Concat <axis = 0> (key_count, rest, keys)\n"
    body += "grouped_weights = Reshape (weights, weight_shape)\nsums = MatMul (grouped_weights, value_heads)\n"
    body += "sums_by_head = Reshape (sums, score_shape)\nby_token = Transpose <perm = [1, 0, 2]> (sums_by_head)\n"
    if "sees" in given:
        body += _of_row("sees_row", "sees", is_kept=False).replace("sees_end", "visible_end")
        body += "attended = Where (sees_row, by_token, nothing)\n"
    else:
        body += "attended = Identity (by_token)\n"
    define(name, _TEXT.format(name=name, inputs=", ".join(given), before=before, body=body))
    return name


def low_rank_attention(
    query: Tensor, key: Tensor, value: Tensor, query_rows: Tensor, query_bias: Tensor | None, key_rows: Tensor,
    key_bias: Tensor | None, value_rows: Tensor, value_bias: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    query_positions: Tensor | None, key_positions: Tensor | None, key_valid: Tensor | None, sinks: Tensor | None,
    heads: int, kv_heads: int, interleaved: bool, scale: float, causal: bool, window: int, softcap: float,
) -> Tensor:  # fmt: skip
    """`jettison::low_rank_attention`, with the three matrices transposed; see `LoweredGraph`."""
    batch, steps = query.shape[:2]
    channels, rotated = query_rows.shape[1] // heads, 0 if cos is None else 2 * cos.shape[-1]
    visible = _visible(query, key, query_positions, key_positions, key_valid, causal, window)
    operands = {
        "query": query, "key": key, "value": value, "query_rows": query_rows, "query_bias": query_bias,
        "key_rows": key_rows, "key_bias": key_bias, "value_rows": value_rows, "value_bias": value_bias, "cos": cos,
        "sin": sin, "visible": visible, "sees": None if visible is None else visible.any(-1)[:, :, None, None],
        "sinks": sinks,
    }  # fmt: skip
    given = {name: each for name, each in operands.items() if each is not None}
    attributes = {
        "scale": scale, "heads": heads, "kv_heads": kv_heads, "softcap": softcap, "interleaved": int(interleaved),
        "rotated": rotated,
    }  # fmt: skip
    name = _function(tuple(given), 0 < rotated < channels, bool(softcap))
    types = [(query.dtype, (batch, steps, heads, value_rows.shape[1] // kv_heads))]
    return call(name, tuple(given.values()), attributes, types)[0]


def _visible(
    query: Tensor, key: Tensor, query_positions: Tensor | None, key_positions: Tensor | None, key_valid: Tensor | None,
    causal: bool, window: int,
) -> Tensor | None:  # fmt: skip
    """Which key each query sees, `[B or 1, S or 1, T] bool`, in the fewest values that say so; None if all are seen."""
    if not causal and not window and key_positions is None:
        return None if key_valid is None else (key_valid != 0)[:, None, :]
    query_positions = torch.arange(query.shape[1])[None] if query_positions is None else query_positions
    key_positions = torch.arange(key.shape[1])[None] if key_positions is None else key_positions
    return visible_keys(query_positions, key_positions, key_valid, causal, window)
