"""NF4: 4-bit codes of quantiles of the normal distribution, scaled by the largest magnitude of each group.

Parts (the layout of `jettison.ir.ops.lut_linear`): `codes` u8 `[N, k_blocks, group / 2]`, `lut` f32 `[1, 16]`, and
either `scales` f32 `[N, k_blocks]` or, with `double`, `scale_codes` u8 `[N, k_blocks]` and `scale_steps` f32 `[N, 1]`.
Groups are cut along rows and the last one of a row is padded, where bitsandbytes cuts the flattened matrix, so that a
group may straddle two rows; for K that is a multiple of the group the two agree up to the order of nibbles.

`scale = max |w|`, `code = nearest level of w / scale`. `|w - w'| <= 0.152 * scale`, half of the widest gap between
levels. The largest weight, zero, and a group of `m`, `-m` and zeros are exact; so are constant groups.

Double quantisation. `scale = (scale_code * step)^2` with one `step` per row and codes 1 ... 255 (0 for groups of zeros
alone): 8 + 32 * group / K bits per group. Codes of square roots, because the scales of a row differ in magnitude: the
squared error of NF4 grows by at most 0.05 % on normal, Student-t(4), planted outliers (x 100) and unequal columns, and
not measurably on the matrices of tiny-llama. Where the scales themselves are coded it grows by up to 0.34 % (per row),
and by up to 0.38 % with the signed dynamic code of bitsandbytes after taking off the mean (per 256 groups), which saves
0.03 bit per weight at K = 1024. A group whose largest weight is below 1 / 65025 of that of its row is lost.

Source: QLoRA (arXiv 2305.14314) for the levels and the idea of double quantisation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, fx

from jettison.ir.edit import Edit
from jettison.ir.errors import OptionError
from jettison.ir.ops import lut_embedding, lut_linear
from jettison.ir.ops.lut_linear import group_scales
from jettison.ir.ops.quantized_linear import pack_codes, unpack_codes
from jettison.passes.formats.base import SMALLEST_SCALE, Grid, WeightFormat
from jettison.passes.options import option

GROUPS = (32, 64, 128)
LEVELS = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
T = TypeVar("T")

# [-1, 1] in bins, for rounding: the level of the lower end of each, and the border to the next. Ten times as fast as a
# search among the borders.
_BINS = 64
_MIDDLES = (torch.tensor(LEVELS)[1:] + torch.tensor(LEVELS)[:-1]) / 2
# A little below the end, since the position of a ratio among the bins is rounded.
_FIRST = torch.bucketize(torch.arange(_BINS) / (_BINS / 2) - 1 - 1e-6, _MIDDLES).to(torch.uint8)
_BORDERS = torch.cat([_MIDDLES, torch.tensor([torch.inf])])[_FIRST.to(torch.int64)]


@dataclass(frozen=True)
class Nf4(WeightFormat):
    """A weight format: 4-bit codes of fixed levels, a scale per `group` columns.

    Attributes:
        group: 32, 64 or 128 columns that share a scale.
        double: scales are stored in 8 bits.

    Raises:
        OptionError: a field is outside its range.
    """

    id: ClassVar[str] = "nf4"
    group: Literal[32, 64, 128] = option(64, doc="columns that share a scale")
    double: bool = option(True, doc="store scales in 8 bits")

    def __post_init__(self) -> None:
        if type(self.group) is not int or self.group not in GROUPS:
            choices = ", ".join(str(choice) for choice in GROUPS)
            raise OptionError(f"[nf4] group={self.group!r}: needs one of {choices}. Set group to one of them.")
        if not isinstance(self.double, bool):
            raise OptionError(f"[nf4] double={self.double!r}: needs true or false. Set one of the two.")

    @property
    def name(self) -> str:
        """The canonical text, for example `nf4{group=64,double=true}`."""
        return f"nf4{{group={self.group},double={str(self.double).lower()}}}"

    @property
    def shared_parts(self) -> tuple[str, ...]:
        """See `WeightFormat`."""
        return ("lut",)

    def part_specs(self, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """See `WeightFormat`."""
        rows, columns = shape
        k_blocks = -(-columns // self.group)
        specs: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((rows, k_blocks, self.group // 2), torch.uint8),
            "lut": ((1, len(LEVELS)), torch.float32),
        }
        if self.double:
            return {
                **specs,
                "scale_codes": ((rows, k_blocks), torch.uint8),
                "scale_steps": ((rows, 1), torch.float32),
            }
        return {**specs, "scales": ((rows, k_blocks), torch.float32)}

    def fit(self, groups: Tensor) -> Grid:
        """See `WeightFormat`; the scale of a group of zeros is 0."""
        scales = groups.abs().amax(-1)
        return Grid(scales.masked_fill_(scales < SMALLEST_SCALE, 0.0))

    def stored(self, grid: Grid) -> Grid:
        """See `WeightFormat`: scales as `double` leaves them."""
        if not self.double:
            return grid
        scales = group_scales(*self._scale_codes(grid.scales))
        assert scales is not None, "scales are given"
        return Grid(scales)

    def round(self, groups: Tensor, grid: Grid) -> Tensor:
        """See `WeightFormat`."""
        scales = grid.scales.masked_fill(grid.scales == 0, 1.0).unsqueeze(-1)
        ratios = groups / scales
        # No bin has more than one border between levels: its first level, and the next where the border is passed.
        bins = ((ratios + 1) * (_BINS / 2)).clamp_(0, _BINS - 1).to(torch.int32).view(-1)
        passed = ratios.view(-1) > _BORDERS.index_select(0, bins)
        return _FIRST.index_select(0, bins).add_(passed).view(groups.shape)

    def values(self, codes: Tensor, grid: Grid) -> Tensor:
        """See `WeightFormat`: `level * scale`."""
        found = torch.tensor(LEVELS).index_select(0, codes.reshape(-1).to(torch.int32))
        return found.view(codes.shape).mul_(grid.scales.unsqueeze(-1))

    def pack(self, codes: Tensor, grid: Grid) -> dict[str, Tensor]:
        """See `WeightFormat`."""
        parts = {"codes": pack_codes(codes, 4), "lut": torch.tensor([LEVELS])}
        if not self.double:
            return {**parts, "scales": grid.scales}
        scale_codes, steps = self._scale_codes(grid.scales)
        return {**parts, "scale_codes": scale_codes, "scale_steps": steps}

    def unpack(self, parts: dict[str, Tensor], shape: tuple[int, int]) -> tuple[Tensor, Grid]:
        """See `WeightFormat`."""
        scales, steps = _scale_parts(parts)
        found = group_scales(scales, steps)
        assert found is not None, "checked against part_specs"
        return unpack_codes(parts["codes"], 4), Grid(found)

    def call_linear(
        self, edit: Edit, x: fx.Node, parts: dict[str, fx.Node], bias: fx.Node | None, shape: tuple[int, int]
    ) -> fx.Node:
        """See `WeightFormat`."""
        return edit.call(
            lut_linear, x, parts["codes"], parts["lut"], *_scale_parts(parts), bias, 4, self.group, shape[1]
        )

    def call_embedding(
        self, edit: Edit, indices: fx.Node, parts: dict[str, fx.Node], shape: tuple[int, int]
    ) -> fx.Node:
        """See `WeightFormat`."""
        return edit.call(
            lut_embedding, indices, parts["codes"], parts["lut"], *_scale_parts(parts), 4, self.group, shape[1]
        )

    def _scale_codes(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[n, b]` u8 and steps `[n, 1]` f32 of scales; those that it returned come back bit for bit."""
        steps = scales.amax(1, keepdim=True).sqrt_() / 255
        # Twelve bits of mantissa: 255 steps are then exact, and the root of their square is, too.
        steps = ((steps.view(torch.int32) + 0x800) & -0x1000).view(torch.float32)
        steps.masked_fill_(steps == 0, 1.0)
        codes = (scales.sqrt() / steps).round_().clamp_(0, 255)
        codes.masked_fill_((codes == 0) & (scales > 0), 1.0)
        return codes.to(torch.uint8), steps


def _scale_parts(parts: dict[str, T]) -> tuple[T, T | None]:
    """Scales and steps as the operator takes them."""
    return (parts["scale_codes"], parts["scale_steps"]) if "scale_codes" in parts else (parts["scales"], None)
