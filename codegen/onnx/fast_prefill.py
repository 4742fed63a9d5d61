"""`prefill=fast`: the linears of a prompt in 8-bit integers, weights and activations, as `DynamicQuantizeMatMul`.

A prompt is bound by arithmetic, not by bytes, and CPUs multiply 8-bit integers faster than anything else (with AMX 3.6
times as fast as `MatMulNBits` at 128 rows, with AVX512-VNNI 1.3 times at 512). The price is a second copy of the
weights, one byte each, and activations that share one scale per tensor. Decoding is bound by bytes and stays as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx
from torch.onnx.ops import symbolic

from jettison.codegen.onnx.packed_projections import pack_projections
from jettison.ir import ops
from jettison.ir.constants import Constant
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.ops.quantized_linear import dequantize_rows, row_chunks
from jettison.ir.program import Program

aten = torch.ops.aten
# Smaller products are no gain.
SMALLEST_WEIGHTS = 1 << 14


def weight_operands(node: fx.Node) -> tuple[str, ...] | None:
    """Names of the operands that are the weight of a linear over all tokens of a call; None for any other node.

    The head is none: it runs on the tokens that are asked for, and its bytes would count twice for nothing.
    """
    if is_call(node, aten.linear.default):
        names: tuple[str, ...] = ("weight",)
    elif is_call(node, ops.quantized_linear):
        names = ("codes", "scales", "zeros")
    else:
        return None
    out = node.meta["val"]
    if out.dim() != 3 or out.dtype != torch.float32 or isinstance(out.shape[1], int):
        return None
    operands = arguments(node)
    if any(operands[name] is not None and constant_name(operands[name]) is None for name in names):
        return None
    is_every_token = str(out.shape[1]) == str(_length(node.graph))
    return names if is_every_token and out.shape[2] * _in_features(node) >= SMALLEST_WEIGHTS else None


def _length(graph: fx.Graph) -> object:
    ids = next(node for node in graph.nodes if node.op == "placeholder" and node.name == "input_ids")
    return ids.meta["val"].shape[1]


def _in_features(node: fx.Node) -> int:
    return int(node.args[0].meta["val"].shape[-1])


def fast_bytes(program: Program) -> int:
    """Bytes of the 8-bit weights and their scales that the fast form of `prefill` has."""
    if "prefill" not in program.entries:
        return 0
    program = pack_projections(program)
    nodes = program.entries["prefill"].graph.nodes
    weights = {weight.name: weight for weight in (Int8Weight(node, program) for node in nodes if weight_operands(node))}
    return sum(part.nbytes for weight in weights.values() for part in (weight.codes, weight.scales))


class Int8Weight:
    """The weight of a linear as `[K, N]` 8-bit integers with one scale per output, computed when it is written.

    Args:
        node: A linear for which `weight_operands` holds.
        program: Holds its constants.

    Attributes:
        name: Of the pair; one per weight.
        codes: `[K, N] i8`.
        scales: `[N] f32`.
    """

    def __init__(self, node: fx.Node, program: Program) -> None:
        operands = arguments(node)
        self._parts = {
            name: program.constants[str(constant_name(operands[name]))]
            for name in weight_operands(node) or ()
            if operands[name] is not None
        }
        self._layout = (operands.get("bits"), operands.get("group"), _in_features(node))
        first = next(iter(self._parts.values()))
        self.shape = (_in_features(node), first.shape[0])
        self.name = f"{first.name.removesuffix('.codes')}.prefill"
        self.codes = _Part(f"{self.name}.codes", self.shape, torch.int8, self)
        self.scales = _Part(f"{self.name}.scales", self.shape[1:], torch.float32, self)
        self._scales: Tensor | None = None

    def part(self, dtype: torch.dtype) -> Tensor:
        """The codes or the scales; the scales are kept from the time the codes are computed."""
        if dtype == torch.float32 and self._scales is not None:
            return self._scales
        codes = torch.empty(self.shape[::-1], dtype=torch.int8)
        self._scales = torch.empty(self.shape[1])
        for rows in row_chunks(self.shape[1], self.shape[0]):
            weight = self._rows(rows)
            # A row of zeros has any scale.
            scale = weight.abs().amax(1).clamp_min(torch.finfo(torch.float32).tiny) / 127
            codes[rows] = (weight / scale[:, None]).round().to(torch.int8)
            self._scales[rows] = scale
        return self._scales if dtype == torch.float32 else codes.t().contiguous()

    def _rows(self, rows: slice) -> Tensor:
        pieces = {name: constant.rows(rows.start, rows.stop) for name, constant in self._parts.items()}
        if "weight" in pieces:
            return pieces["weight"].to(torch.float32)
        bits, group, in_features = self._layout
        assert bits is not None, "quantised linears say how"
        assert group is not None, "quantised linears say how"
        return dequantize_rows(pieces["codes"], pieces["scales"], pieces.get("zeros"), bits, group, in_features)


class _Part(Constant):
    """A tensor that is computed when it is read, whole."""

    def __init__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, weight: Int8Weight) -> None:
        super().__init__(name, torch.empty(shape, dtype=dtype, device="meta"), dtype)
        self._weight = weight

    def value(self) -> Tensor:
        return self._weight.part(self.dtype)

    def rows(self, start: int, stop: int) -> Tensor:
        return self.value()[start:stop]

    def row_chunks(self):  # type: ignore[no-untyped-def]
        yield 0, self.shape[0]


def int8_linear(x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ (codes * scales) + bias` with x quantised to 8 bits, one scale and zero point for the whole tensor.

    Args:
        x: `[B, S, K] f32`.
        codes: `[K, N] i8`.
        scales: `[N] f32`.
        bias: `[N] f32` or None.

    Returns:
        `[B, S, N] f32`.
    """
    return symbolic(
        "com.microsoft::DynamicQuantizeMatMul",
        (x, codes, scales, None, bias) if bias is not None else (x, codes, scales),
        {},
        dtype=x.dtype,
        shape=(*x.shape[:-1], codes.shape[1]),
        version=1,
    )
