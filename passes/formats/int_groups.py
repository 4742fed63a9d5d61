"""Integer groups: 8-, 4-, 3- and 2-bit weights with one scale per group of columns.

Parts (the layout of `com.microsoft::MatMulNBits`, spelled out in `jettison.ir.ops.quantized_linear`):
`codes` u8 `[N, k_blocks, group * bits / 8]`, `scales` f32 `[N, k_blocks]`, and, unless symmetric, `zeros` u8
`[N, ceil(k_blocks * bits / 8)]` or, with `float_zeros`, f32 `[N, k_blocks]`. K that is not a multiple of the group is
padded with codes equal to the zero point, which decode to 0 (with `float_zeros`, with codes of the last column).

Asymmetric. `lo = min(0, min w)`, `hi = max(0, max w)`, `s = (hi - lo) / (2^b - 1)`, `z = round(-lo / s)`,
`code = clip(round(w / s) + z, 0, 2^b - 1)`. Zero has to be in the range: the zero point is an integer among the codes,
so the representable range contains 0 whatever the scale, and a range without it would be clipped, not resolved.
`|w - w'| <= s / 2` up to fp32 rounding.

Symmetric. `m` = the entry of largest magnitude with its sign, `s = m / -2^(b-1)` (so scales may be negative), zero
point `2^(b-1)`, not stored. All codes are used and `m` is exact. `|w - w'| <= |s| / 2`, except for weights beyond
`-m (1 - 2^-b)` on the side opposite to `m`, whose code is clipped: there `|w - w'| <= |s|`.

Float zero points. `lo = min w`, `hi = max w`, `s = (hi - lo) / (2^b - 1)`, `z = -lo / s`, unrounded, so that zero need
not be in the range; `code = clip(round(w / s + z), 0, 2^b - 1)`. `|w - w'| <= s / 2`. This is what methods that move
the zero point (HQQ) store; they lose all they gain if it is rounded.

A constant group decodes to its constant within fp32 rounding, an all-zero group exactly (its scale is 1).
Groups whose scale would be below the smallest normal fp32 count as all zero.

Relative squared error measured on N(0, 1) weights and on the matrices of tiny-llama, 4 bits, group 32 / 64 / 128: this
asymmetric rule .0065 / .0083 / .0102 and .0067 / .0085 / .0103; this symmetric rule .0074 / .0090 / .0107 and
.0075 / .0093 / .0110; the textbook symmetric rule `s = max|w| / 7` .0094 / .0116 / .0138 and .0096 / .0119 / .0142.
Leaving zero out of the range changes nothing there and turns .0005 into .35 on weights 1 + 0.1 N(0, 1). At 2 bits the
symmetric rule is the better one (group 32: .131 against .165).

Source: ONNX Runtime, MLAS block quantiser (both rules); llama.cpp `Q4_0` (the signed scale).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, fx

from jettison.ir.edit import Edit
from jettison.ir.errors import OptionError
from jettison.ir.ops import quantized_embedding, quantized_linear
from jettison.ir.ops.quantized_linear import pack_codes, pack_zeros, unpack_codes, unpack_zeros
from jettison.passes.formats.base import LARGEST_WEIGHT, SMALLEST_SCALE, Grid, WeightFormat, pad_with_last
from jettison.passes.options import option

__all__ = ["BITS", "GROUPS", "LARGEST_WEIGHT", "IntGroups"]

BITS = (8, 4, 3, 2)
GROUPS = (32, 64, 128)


@dataclass(frozen=True)
class IntGroups(WeightFormat):
    """A weight format: `bits`-bit codes, a scale and a zero point per `group` columns.

    Attributes:
        bits: 8, 4, 3 or 2 bits per code.
        group: 32, 64 or 128 columns that share a scale and a zero point.
        symmetric: the zero point is the middle of the code range and is not stored.
        float_zeros: zero points are fp32 numbers between the codes.

    Raises:
        OptionError: a field is outside its range.
    """

    id: ClassVar[str] = "int"
    bits: Literal[8, 4, 3, 2] = option(4, doc="bits per weight")
    group: Literal[32, 64, 128] = option(32, doc="columns that share a scale and a zero point")
    symmetric: bool = option(False, doc="no zero points: fewer bytes, a larger error")
    float_zeros: bool = option(False, doc="zero points in fp32, between the codes: more bytes")

    def __post_init__(self) -> None:
        for field, value, legal in (("bits", self.bits, BITS), ("group", self.group, GROUPS)):
            if type(value) is not int or value not in legal:
                choices = ", ".join(str(choice) for choice in legal)
                raise OptionError(
                    f"[int-groups] {field}={value!r}: needs one of {choices}, because these are the layouts that the "
                    f"kernels read. Set {field} to one of them."
                )
        for field, flag in (("symmetric", self.symmetric), ("float_zeros", self.float_zeros)):
            if not isinstance(flag, bool):
                raise OptionError(f"[int-groups] {field}={flag!r}: needs true or false. Set one of the two.")
        if self.symmetric and self.float_zeros:
            raise OptionError(
                "[int-groups] symmetric=true, float_zeros=true: symmetric groups have no zero points. Leave one out."
            )

    @property
    def name(self) -> str:
        """The canonical text, for example `int4{group=32,symmetric=false}`."""
        zeros = ",float_zeros=true" if self.float_zeros else ""
        return f"int{self.bits}{{group={self.group},symmetric={str(self.symmetric).lower()}{zeros}}}"

    def part_specs(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `WeightFormat`."""
        rows, columns = shape
        k_blocks = -(-columns // self.group)
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((rows, k_blocks, self.group * self.bits // 8), torch.uint8),
            "scales": ((rows, k_blocks), torch.float32),
        }
        if self.float_zeros:
            specs["zeros"] = ((rows, k_blocks), torch.float32)
        elif not self.symmetric:
            specs["zeros"] = ((rows, -(-k_blocks * self.bits // 8)), torch.uint8)
        return specs

    def fit(self, groups: Tensor) -> Grid:
        """See `WeightFormat` and the rules in the module docstring."""
        lo, hi = groups.amin(-1), groups.amax(-1)
        if not self.float_zeros:
            # Clamping with 0 includes zero in the range, and makes padding (zeros) harmless to the statistics.
            lo.clamp_(max=0)
            hi.clamp_(min=0)
        if self.symmetric:
            scales = torch.where(hi > -lo, hi, lo) / -(2 ** (self.bits - 1))
            return Grid(scales.masked_fill_(scales.abs() < SMALLEST_SCALE, 1.0))
        scales = (hi - lo) / self._top_code
        scales.masked_fill_(scales < SMALLEST_SCALE, 1.0)
        zeros = -lo / scales
        return Grid(scales, zeros if self.float_zeros else zeros.round_().clamp_(0, self._top_code))

    def round(self, groups: Tensor, grid: Grid) -> Tensor:
        """See `WeightFormat`."""
        codes = groups.div(grid.scales.unsqueeze(-1))
        codes = codes.add_(self._zeros(grid)).round_() if self.float_zeros else codes.round_().add_(self._zeros(grid))
        # Through int16: fp32 to u8 in one step is not vectorised and takes seven times as long.
        return codes.clamp_(0, self._top_code).to(torch.int16).to(torch.uint8)

    def values(self, codes: Tensor, grid: Grid) -> Tensor:
        """See `WeightFormat`: `(code - zero) * scale`."""
        return codes.to(torch.float32).sub_(self._zeros(grid)).mul_(grid.scales.unsqueeze(-1))

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """See `WeightFormat`."""
        parts = {"codes": pack_codes(codes, self.bits), "scales": grid.scales}
        if grid.zeros is not None:
            parts["zeros"] = grid.zeros if self.float_zeros else pack_zeros(grid.zeros, self.bits)
        return parts

    def unpack(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Grid]:
        """See `WeightFormat`."""
        scales, zeros = parts["scales"], parts.get("zeros")
        if zeros is not None:
            zeros = unpack_zeros(zeros, self.bits, scales.shape[1])
        return unpack_codes(parts["codes"], self.bits), Grid(scales, zeros)

    def split_groups(self, weight: Tensor) -> Tensor:
        """See `WeightFormat`; with `float_zeros` padded with the last column, since zero may lie outside the range."""
        return super().split_groups(pad_with_last(weight, self.group) if self.float_zeros else weight)

    def unsupported_on(self, target: str) -> str | None:
        """See `WeightFormat`."""
        if target != "onnx" or self.bits != 3:
            return None
        return "ONNX Runtime's CPU kernel MatMulNBits takes 2, 4 or 8 bits, not 3"

    def call_linear(
        self, edit: Edit, x: fx.Node, parts: dict[str, fx.Node], bias: fx.Node | None, shape: tuple[int, int]
    ) -> fx.Node:
        """See `WeightFormat`."""
        return edit.call(quantized_linear, x, *_stored(parts), bias, self.bits, self.group, shape[1])

    def call_embedding(
        self, edit: Edit, indices: fx.Node, parts: dict[str, fx.Node], shape: tuple[int, int]
    ) -> fx.Node:
        """See `WeightFormat`."""
        return edit.call(quantized_embedding, indices, *_stored(parts), self.bits, self.group, shape[1])

    @property
    def _top_code(self) -> int:
        return 2**self.bits - 1

    def _zeros(self, grid: Grid) -> Tensor | float:
        return 2.0 ** (self.bits - 1) if grid.zeros is None else grid.zeros.unsqueeze(-1)


def _stored(parts: dict[str, fx.Node]) -> tuple[fx.Node | None, ...]:
    return parts["codes"], parts["scales"], parts.get("zeros")
