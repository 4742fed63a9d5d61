"""Factored feed-forward layers as ONNX: a `Loop` over chunks of tokens, in a function of the model.

The weights are read from the graph around the loop, where ONNX Runtime packs them once, as it does outside of one. A
decode step is one turn of the loop, which costs less than ten microseconds
(`benchmarks/results/low_rank_chunks.json`); so there is no second form of the layer beside it, whose weights would be
packed a second time. Chunks are as even as they can be, and joined by one copy of the results.
"""

from __future__ import annotations

import functools

from torch import Tensor

from jettison.codegen.onnx.functions import call, define
from jettison.ir.token_chunks import chunk_tokens

_TEXT = """
{name} <most> ({inputs}) => (out)
{{
    yes_number = Constant <value_int = 1> ()
    yes = Cast <to = 9> (yes_number)
    zero = Constant <value_ints = [0]> ()
    one = Constant <value_ints = [1]> ()
    most_number = Constant <value_int: int = @most> ()
    most_tokens = Reshape (most_number, one)
    tokens = Shape <start = 0, end = 1> (up)
    before_most = Sub (most_tokens, one)
    rounded = Add (tokens, before_most)
    full_chunks = Div (rounded, most_tokens)
    chunks = Max (full_chunks, one)
    before_chunks = Sub (chunks, one)
    rounded_tokens = Add (tokens, before_chunks)
    size = Div (rounded_tokens, chunks)
    turns = Squeeze (chunks)
    none = SequenceEmpty <dtype = 1> ()
    results = Loop (turns, yes, none) <
        body = chunk_of_tokens (int64 turn, bool goes_on, seq(float) done) => (bool still, seq(float) more) {{
            number = Unsqueeze (turn, zero)
            start = Mul (number, size)
            stop = Add (start, size)
            {body}
            more = SequenceInsert (done, result)
            still = Identity (goes_on)
        }}
    >
    out = ConcatFromSequence <axis = 0> (results)
}}
"""
# From `x` to `y`.
_ACTIVATIONS = {
    "gelu": "{y} = Gelu ({x})",
    "gelu_tanh": '{y} = Gelu <approximate = "tanh"> ({x})',
    "relu": "{y} = Relu ({x})",
    "sigmoid": "{y} = Sigmoid ({x})",
    "silu": "{y}_share = Sigmoid ({x})\n{y} = Mul ({x}, {y}_share)",
}
# Everything is fp32 on a CPU.
_ITEM_BYTES = 4


def linear_text(x: str, weight: str, bias: str | None, y: str) -> str:
    """A product with a transposed weight, and the addition that ONNX Runtime takes into it."""
    if bias is None:
        return f"{y} = MatMul ({x}, {weight})\n"
    return f"{y}_product = MatMul ({x}, {weight})\n{y} = Add ({y}_product, {bias})\n"


@functools.cache
def _function(given: tuple[str, ...], activation: str) -> str:
    """Name of the function for these operands, which is defined when it is first asked for."""
    name = "LowRankMlp_" + "_".join((activation, *(part for part in given if part not in ("up", "up_rows", "columns"))))

    def bias(of: str) -> str | None:
        return of if of in given else None

    body = "up_chunk = Slice (up, start, stop, zero)\n" + linear_text("up_chunk", "up_rows", bias("up_bias"), "neurons")
    if "gate" in given:
        body += "gate_chunk = Slice (gate, start, stop, zero)\n"
        body += linear_text("gate_chunk", "gate_rows", bias("gate_bias"), "gates")
        body += _ACTIVATIONS[activation].format(x="gates", y="turned") + "\nhidden = Mul (turned, neurons)\n"
    else:
        body += _ACTIVATIONS[activation].format(x="neurons", y="hidden") + "\n"
    if "rows" in given:
        body += linear_text("hidden", "columns", None, "summed") + linear_text("summed", "rows", bias("bias"), "result")
    else:
        body += linear_text("hidden", "columns", bias("bias"), "result")
    define(name, _TEXT.format(name=name, inputs=", ".join(given), body=body))
    return name


def low_rank_mlp(
    gate: Tensor | None, up: Tensor, gate_rows: Tensor | None, gate_bias: Tensor | None, up_rows: Tensor,
    up_bias: Tensor | None, columns: Tensor, rows: Tensor | None, bias: Tensor | None, activation: str,
) -> Tensor:  # fmt: skip
    """`jettison::low_rank_mlp`, with all four matrices transposed; see `LoweredGraph`."""
    width = (columns if rows is None else rows).shape[1]
    flat = up.reshape(-1, up.shape[-1])
    operands = {
        "gate": None if gate is None else gate.reshape(-1, gate.shape[-1]), "up": flat, "gate_rows": gate_rows,
        "gate_bias": gate_bias, "up_rows": up_rows, "up_bias": up_bias, "columns": columns, "rows": rows, "bias": bias,
    }  # fmt: skip
    given = {name: value for name, value in operands.items() if value is not None}
    at_once = (1 if gate is None else 2) * up_rows.shape[1] + columns.shape[1]
    attributes = {"most": chunk_tokens(at_once * _ITEM_BYTES)}
    types = [(up.dtype, (flat.shape[0], width))]
    (out,) = call(_function(tuple(given), activation), tuple(given.values()), attributes, types)
    return out.reshape(*up.shape[:-1], width)
