"""Attention over compressed and uncompressed tokens: `GroupQueryAttention` for prompts, one softmax for steps.

`GroupQueryAttention` appends to the uncompressed part and attends to it, which is all there is to attend to during a
prompt: it is computed as with the cache of `full`, by the same kernel. Only when something is stored, the result is
left aside and computed over both parts instead. The operators for that are a function of the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.codegen.onnx.functions import call, define
from jettison.codegen.onnx.written_attention import scored_attention
from jettison.ir.ops.joint_attention import joint_positions

_INPUTS = "attended, query, stored_key, stored_value, stored_tokens, key, value, slots"
# Rows of queries: those of a key head, then the tokens of the call. A slot that is not seen gets the lowest score.
_TEXT = """
{name} <scale, kv_heads> ({inputs}) => ({outputs})
{{
    factor = Constant <value_float: float = @scale> ()
    key_heads = Constant <value_int: int = @kv_heads> ()
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    two = Constant <value_ints = [2]> ()
    rest = Constant <value_ints = [-1]> ()
    first = Constant <value_int = 0> ()
    step = Constant <value_int = 1> ()
    lowest = Constant <value_float = -3.4028234e38> ()
    most = ReduceMax <keepdims = 0> (stored_tokens)
    is_stored = Greater (most, first)
    {outputs} = If (is_stored) <
        then_branch = over_both () => ({then}) {{
            head_dim = Shape <start = 3> (query)
            heads = Shape <start = 1, end = 2> (query)
            key_heads_1 = Reshape (key_heads, one)
            shared = Div (heads, key_heads_1)
            grouped_shape = Concat <axis = 0> (zero, key_heads_1, rest, head_dim)
            scaled = Mul (query, factor)
            grouped = Reshape (scaled, grouped_shape)
            stored_key_t = Transpose <perm = [0, 1, 3, 2]> (stored_key)
            stored_scores = MatMul (grouped, stored_key_t)
            stored_size = Shape <start = 2, end = 3> (stored_key)
            stored_end = Squeeze (stored_size)
            stored_slots = Range (first, stored_end, step)
            filled = Unsqueeze (stored_tokens, one)
            is_filled = Less (stored_slots, filled)
            filled_axes = Constant <value_ints = [1, 2]> ()
            filled_mask = Unsqueeze (is_filled, filled_axes)
            stored_masked = Where (filled_mask, stored_scores, lowest)
            key_t = Transpose <perm = [0, 1, 3, 2]> (key)
            scores = MatMul (grouped, key_t)
            size = Shape <start = 2, end = 3> (key)
            end = Squeeze (size)
            all_slots = Range (first, end, step)
            own_slots = Unsqueeze (slots, two)
            is_seen = LessOrEqual (all_slots, own_slots)
            seen_once = Unsqueeze (is_seen, one)
            all_of_it = Concat <axis = 0> (one, shared, one, one)
            seen_by_each = Expand (seen_once, all_of_it)
            mask_shape = Concat <axis = 0> (zero, one, rest, size)
            seen_in_rows = Reshape (seen_by_each, mask_shape)
            masked = Where (seen_in_rows, scores, lowest)
            both = Concat <axis = -1> (stored_masked, masked)
            weights = Softmax <axis = -1> (both)
            sizes = Concat <axis = 0> (stored_size, size)
            stored_weights, own_weights = Split <axis = -1> (weights, sizes)
            stored_part = MatMul (stored_weights, stored_value)
            own_part = MatMul (own_weights, value)
            rows = Add (stored_part, own_part)
            steps = Shape <start = 2, end = 3> (query)
            by_head_shape = Concat <axis = 0> (zero, heads, steps, rest)
            by_head = Reshape (rows, by_head_shape)
            by_token = Transpose <perm = [0, 2, 1, 3]> (by_head)
            flat_shape = Shape (attended)
            joint = Reshape (by_token, flat_shape)
            {then_more}
        }},
        else_branch = over_one () => ({otherwise}) {{
            alone = Identity (attended)
            {otherwise_more}
        }}
    >
}}
"""
define("JointAttention", _TEXT.format(
    name="JointAttention", inputs=_INPUTS, outputs="out", then="joint", then_more="", otherwise="alone",
    otherwise_more="",
))  # fmt: skip
define("ScoredJointAttention", _TEXT.format(
    name="ScoredJointAttention", inputs=f"{_INPUTS}, received_alone", outputs="out, received", then="joint, of_rows",
    then_more="of_rows = ReduceSum <keepdims = 0> (own_weights, two)", otherwise="alone, of_one",
    otherwise_more="of_one = Identity (received_alone)",
))  # fmt: skip


def over_both(
    attended: Tensor, query: Tensor, stored: tuple[Tensor, ...], key: Tensor, value: Tensor, slots: Tensor,
    scale: float, received: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """A call of the function.

    Args:
        attended: `[B, S, H * D]`, attention over `key` and `value` alone.
        query: `[B, H, S, D]`.
        stored: As in `jettison::joint_attention`: keys, values and how many of them each row has.
        key: `[B, Hkv, C, D]`.
        value: `[B, Hkv, C, D]`.
        slots: `[B, S] i64`.
        scale: Factor on the scores.
        received: `[B, Hkv, C] f32`, what each slot received from attention over `key` and `value` alone; or None.

    Returns:
        `[B, S, H * D]`, and if `received` was given, what each slot received.
    """
    attributes = {"scale": scale, "kv_heads": key.shape[1]}
    operands = (attended, query, *stored, key, value, slots)
    types = [(attended.dtype, tuple(attended.shape))]
    if received is None:
        return tuple(call("JointAttention", operands, attributes, types))
    types.append((received.dtype, tuple(received.shape)))
    return tuple(call("ScoredJointAttention", (*operands, received), attributes, types))


def joint_attention(
    query: Tensor, stored_key: Tensor, stored_value: Tensor, stored_tokens: Tensor, key: Tensor, value: Tensor,
    slots: Tensor, scale: float,
) -> Tensor:  # fmt: skip
    """`jettison::joint_attention` for shapes that `GroupQueryAttention` refuses: always over both parts."""
    return scored_joint_attention(query, stored_key, stored_value, stored_tokens, key, value, slots, scale)[0]


def scored_joint_attention(
    query: Tensor, stored_key: Tensor, stored_value: Tensor, stored_tokens: Tensor, key: Tensor, value: Tensor,
    slots: Tensor, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`jettison::scored_joint_attention` likewise."""
    positions = joint_positions(stored_key.shape[2], stored_tokens, key.shape[2], slots)
    keys, values = torch.cat([stored_key, key], 2), torch.cat([stored_value, value], 2)
    out, received = scored_attention(query, keys, values, *positions, None, None, scale, True, 0, 0.0)
    # Not as a slice, whose start the exporter would want to know.
    own = stored_key.shape[2] + torch.arange(key.shape[2])
    return out, received.index_select(2, own)
