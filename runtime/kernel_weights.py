"""Weights in the layout of the kernels of `codegen/triton`, wherever they will lie."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from jettison.codegen.triton.word_layout import WordWeight, to_words
from jettison.ir.ops.lut_linear import group_scales
from jettison.ir.packed_parts import BitmapParts, LutParts, PackedParts
from jettison.ir.program import Program
from jettison.runtime.bitmap_weight import row_begins

Weights = Sequence[PackedParts | LutParts | str]
"""Those that one launch reads: all packed in one form, or all dense, by name."""
_Read = Callable[[str], Tensor]
_META = torch.device("meta")


def stacked(program: Program, weights: Weights, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Weights one below the other: what kernels take for them.

    Args:
        program: Whose.
        weights: Which.
        dtype: Of scales and offsets.
        device: Where to.
    """
    return _stacked(lambda name: program.constants[name].value(), weights, dtype, device)


def stacked_shapes(program: Program, weights: Weights, dtype: torch.dtype) -> list[Tensor]:
    """What `stacked` returns, without values: those of the program may be elsewhere."""

    def read(name: str) -> Tensor:
        constant = program.constants[name]
        return torch.empty(constant.shape, dtype=constant.dtype)

    with _META:
        return _stacked(read, weights, dtype, _META)


def _stacked(read: _Read, weights: Weights, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    dense = [each for each in weights if isinstance(each, str)]
    if dense:
        return [torch.cat([read(name).to(device) for name in dense])]
    own = [_words(read, each, dtype, device) for each in weights if not isinstance(each, str)]
    if len(own) == 1:
        return own[0].tensors
    # The table is the same for all of them.
    rows = [[each for each in weight.tensors if each is not weight.table] for weight in own]
    table = [] if own[0].table is None else [own[0].table]
    return [*(torch.cat(parts) for parts in zip(*rows, strict=True)), *table]


def _words(read: _Read, parts: PackedParts | LutParts, dtype: torch.dtype, device: torch.device) -> WordWeight:
    if isinstance(parts, LutParts):
        return _looked_up(read, parts, dtype, device)
    codes, scales, zeros = (None if name is None else read(name) for name in (parts.codes, parts.scales, parts.zeros))
    assert codes is not None, "only zero points may be missing"
    assert scales is not None, "only zero points may be missing"
    return to_words(codes, scales, zeros, parts.bits, parts.group, dtype, device)


def _looked_up(read: _Read, parts: LutParts, dtype: torch.dtype, device: torch.device) -> WordWeight:
    codes, lut, scales, steps = (
        None if name is None else read(name) for name in (parts.codes, parts.lut, parts.scales, parts.steps)
    )
    found = group_scales(scales, steps)
    assert codes is not None, "only steps may be missing"
    assert found is not None, "only steps may be missing"
    assert lut is not None, "only steps may be missing"
    return to_words(codes, found, None, parts.bits, parts.group, dtype, device, lut.flatten())


def bitmap(program: Program, parts: BitmapParts, device: torch.device) -> list[Tensor]:
    """A bitmap weight, and where in its values each row begins: what kernels take for it.

    Raises:
        ArtifactError: The bitmap and the values do not belong together.
    """
    held, starts, values = (program.constants[name].value() for name in (parts.bitmap, parts.starts, parts.values))
    begins = row_begins(held, starts, values, parts.bits)
    scales = [] if parts.scales is None else [program.constants[parts.scales].value()]
    found = [held.contiguous().view(torch.int32), begins[:-1].clone(), values, *scales]
    return [each.to(device).contiguous() for each in found]
