"""`jettison::rotary_embedding`: rotary position embedding (RoFormer, arXiv 2104.09864), both layouts."""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.ir.ops.registration import define_op


def _rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotate the first R channels of each head by an angle per position; the other channels pass through.

    Args:
        x: `[B, H, S, D]`.
        cos: `[B, S, R/2]`, cosine of the angle of each channel pair.
        sin: `[B, S, R/2]`.
        interleaved: Pairs are channels (2i, 2i+1) (GPT-J) if true, (i, i + R/2) (Llama, GPT-NeoX) if false.

    Returns:
        `[B, H, S, D]`, contiguous, dtype of `x`.
    """
    rotated_channels = 2 * cos.shape[-1]
    cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
    rotated, rest = x[..., :rotated_channels], x[..., rotated_channels:]
    if interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], -1).flatten(-2)
    else:
        first, second = rotated.chunk(2, -1)
        turned = torch.cat([first * cos - second * sin, second * cos + first * sin], -1)
    return torch.cat([turned, rest], -1)


def _fake_rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


rotary_embedding = define_op(
    "rotary_embedding(Tensor x, Tensor cos, Tensor sin, bool interleaved) -> Tensor",
    _rotary_embedding,
    _fake_rotary_embedding,
)
