"""`jettison::quantize_slots` and `jettison::dequantize_slots` in standard operators.

Shapes copy the sizes of the batch, heads and slots (zeros in a `Reshape`), so there may be no slot at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.codegen.onnx.functions import call, define

_CONSTANTS = """
    most = Constant <value_float = {most}.0> ()
    half_max = Constant <value_float = 65504.0> ()
    half_min = Constant <value_float = -65504.0> ()
    nothing = Constant <value_float = 0.0> ()
    unit = Constant <value_float = 1.0> ()
    axes = Constant <value_ints = [4, 6]> ()
    group_shape = Constant <value_ints: ints = @groups> ()
    range_shape = Constant <value_ints: ints = @ranges> ()
    code_shape = Constant <value_ints: ints = @codes> ()
    token_shape = Constant <value_ints: ints = @tokens> ()
"""


def _quantizing(bits: int) -> str:
    per_byte = 8 // bits
    parts = ", ".join(f"part_{index}" for index in range(per_byte))
    lines = [f"{parts} = Split <axis = -1, num_outputs = {per_byte}> (plain)"] if per_byte > 1 else []
    joined = "part_0" if per_byte > 1 else "plain"
    for index in range(1, per_byte):
        lines += [
            f"factor_{index} = Constant <value_float = {2 ** (bits * index)}.0> ()",
            f"moved_{index} = Mul (part_{index}, factor_{index})",
            f"joined_{index} = Add ({joined}, moved_{index})",
        ]
        joined = f"joined_{index}"
    packing = "\n    ".join(lines)
    return f"""
QuantizeSlots{bits} <groups, ranges, codes, tokens> (values) => (packed, scales, zeros)
{{ {_CONSTANTS.format(most=2**bits - 1)}
    grouped = Reshape (values, group_shape)
    low = ReduceMin <keepdims = 1> (grouped, axes)
    high = ReduceMax <keepdims = 1> (grouped, axes)
    zeros_in_range = Clip (low, half_min, half_max)
    zeros_grouped = Cast <to = 10> (zeros_in_range)
    start = Cast <to = 1> (zeros_grouped)
    width = Sub (high, start)
    step_exact = Div (width, most)
    step_in_range = Clip (step_exact, nothing, half_max)
    scales_grouped = Cast <to = 10> (step_in_range)
    step = Cast <to = 1> (scales_grouped)
    is_spread = Greater (step, nothing)
    divisor = Where (is_spread, step, unit)
    offset = Sub (grouped, start)
    quotient = Div (offset, divisor)
    rounded = Round (quotient)
    clipped = Clip (rounded, nothing, most)
    chosen = Where (is_spread, clipped, nothing)
    plain = Reshape (chosen, token_shape)
    {packing}
    bytes = Cast <to = 2> ({joined})
    packed = Reshape (bytes, code_shape)
    scales = Reshape (scales_grouped, range_shape)
    zeros = Reshape (zeros_grouped, range_shape)
}}"""


def _dequantizing(bits: int, is_by_channel: bool) -> str:
    """`is_by_channel`: a range is one channel of all tokens of a slot, which `DequantizeLinear` scales as it converts.

    Along the last axis its kernel is slower than a product behind it.
    """
    per_byte = 8 // bits
    lines, parts = [f"mask = Constant <value = uint8 {{{2**bits - 1}}}> ()"], []
    for index in range(per_byte):
        part = "by_token"
        if index:
            lines.append(f"shift_{index} = Constant <value = uint8 {{{bits * index}}}> ()")
            lines.append(f'shifted_{index} = BitShift <direction = "RIGHT"> ({part}, shift_{index})')
            part = f"shifted_{index}"
        if index < per_byte - 1:
            lines.append(f"masked_{index} = BitwiseAnd ({part}, mask)")
            part = f"masked_{index}"
        parts.append(part)
    # As bytes: behind the conversion it would move four times as many.
    lines.append(f"plain = Concat <axis = -1> ({', '.join(parts)})")
    unpacking = "\n    ".join(lines)
    if is_by_channel:
        scaling = "grouped = DequantizeLinear <axis = 3, block_size: int = @block> (plain, step)"
    else:
        # A reshape behind the conversion would make ONNX Runtime quantise and convert once more.
        scaling = """unit = Constant <value_float = 1.0> ()
    group_shape = Constant <value_ints: ints = @groups> ()
    codes_grouped = Reshape (plain, group_shape)
    numbers = DequantizeLinear (codes_grouped, unit)
    grouped = Mul (numbers, step)"""
    name, own = _dequantizer(bits, is_by_channel), "block" if is_by_channel else "groups"
    return f"""
{name} <{own}, ranges, tokens, token_count> (packed, scales, zeros) => (values)
{{
    range_shape = Constant <value_ints: ints = @ranges> ()
    token_shape = Constant <value_ints: ints = @tokens> ()
    per_slot = Constant <value_ints: ints = @token_count> ()
    by_token = Reshape (packed, token_shape)
    {unpacking}
    scales_wide = Cast <to = 1> (scales)
    zeros_wide = Cast <to = 1> (zeros)
    step = Reshape (scales_wide, range_shape)
    start = Reshape (zeros_wide, range_shape)
    {scaling}
    exact = Add (grouped, start)
    outer = Shape <end = 2> (packed)
    slots = Shape <start = 2, end = 3> (packed)
    all_tokens = Mul (slots, per_slot)
    dim = Shape <start = 4> (plain)
    shape = Concat <axis = 0> (outer, all_tokens, dim)
    values = Reshape <allowzero = 1> (exact, shape)
}}"""


def _dequantizer(bits: int, is_by_channel: bool) -> str:
    return f"Dequantize{'Channels' if is_by_channel else 'Slots'}{bits}"


for _bits in (2, 4, 8):
    define(f"QuantizeSlots{_bits}", _quantizing(_bits))
    for _is_by_channel in (False, True):
        define(_dequantizer(_bits, _is_by_channel), _dequantizing(_bits, _is_by_channel))


def quantize_slots(values: Tensor, bits: int, rows: int, columns: int) -> tuple[Tensor, ...]:
    """`jettison::quantize_slots`."""
    *outer, tokens, dim = values.shape
    codes = tokens * dim * bits // 8
    attributes = {
        "groups": [0, 0, 0, rows, tokens // rows, columns, dim // columns], "ranges": [0, 0, 0, rows * columns],
        "codes": [0, 0, 0, codes], "tokens": [0, 0, 0, tokens, dim],
    }  # fmt: skip
    ranges = (torch.float16, (*outer, rows * columns))
    return tuple(call(f"QuantizeSlots{bits}", [values], attributes, [(torch.uint8, (*outer, codes)), ranges, ranges]))


def dequantize_slots(codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, tokens: int, rows: int) -> Tensor:
    """`jettison::dequantize_slots`."""
    batch, heads, slots, width = codes.shape
    dim, columns = width * 8 // bits // tokens, scales.shape[3] // rows
    is_by_channel = rows == 1 and columns == dim
    ranges = [0, 0, 0, 1, dim] if is_by_channel else [0, 0, 0, rows, 1, columns, 1]
    attributes: dict[str, list[int] | int] = {
        "ranges": ranges, "tokens": [0, 0, 0, tokens, width // tokens], "token_count": [tokens],
    }  # fmt: skip
    if is_by_channel:
        attributes["block"] = tokens
    else:
        attributes["groups"] = [0, 0, 0, rows, tokens // rows, columns, dim // columns]
    shape = (batch, heads, slots * tokens, dim)
    return call(_dequantizer(bits, is_by_channel), [codes, scales, zeros], attributes, [(torch.float32, shape)])[0]
