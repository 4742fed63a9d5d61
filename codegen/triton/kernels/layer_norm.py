"""Layer norm of each row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from jettison.codegen.triton.kernels.base import ELEMENTS, TRITON_TYPES, Kernel, Tuning, block, name_of


@dataclass(frozen=True)
class LayerNorm(Kernel):
    """`y = (x - mean(x)) / std(x) * w + b`.

    Attributes:
        columns: E.
        dtype: Of everything.
        eps: Added to the variance.
        has_bias: Whether b is added.
    """

    columns: int
    dtype: torch.dtype
    eps: float
    has_bias: bool = True

    @property
    def name(self) -> str:
        """See `Kernel`."""
        bias = "_bias" if self.has_bias else ""
        return f"layer_norm{name_of(self.eps)}{bias}_e{self.columns}_{ELEMENTS[self.dtype]}"

    @property
    def title(self) -> str:
        """See `Kernel`."""
        return f"Layer norm of rows of {self.columns}."

    @property
    def parameters(self) -> dict[str, str]:
        """See `Kernel`."""
        names = ["x_ptr", "norm_ptr", *(["bias_ptr"] if self.has_bias else []), "out_ptr"]
        return dict.fromkeys(names, f"*{ELEMENTS[self.dtype]}")

    def tunings(self) -> list[Tuning]:
        """See `Kernel`."""
        width = 1 << (self.columns - 1).bit_length()
        return [Tuning.of(warps, BLOCK_E=width) for warps in ((4, 8) if width <= 4096 else (8, 16))]

    def grid(self, tuning: Tuning, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """See `Kernel`."""
        return (sizes["M"],)

    def body(self) -> str:
        """See `Kernel`."""
        inside = f"column < {self.columns}"
        guard = f", mask={inside}"
        return block(
            "column = tl.arange(0, BLOCK_E)",
            f"at = tl.program_id(0).to(tl.int64) * {self.columns} + column",
            f"x = tl.load(x_ptr + at{guard}, other=0).to(tl.float32)",
            "# aten.layer_norm",
            f"centred = tl.where({inside}, x - tl.sum(x, 0) / {self.columns}, 0.0)",
            f"inverse_std = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / {self.columns} + {self.eps!r})",
            f"y = centred * inverse_std * tl.load(norm_ptr + column{guard}, other=0).to(tl.float32)",
            f"y += tl.load(bias_ptr + column{guard}, other=0).to(tl.float32)" if self.has_bias else "",
            f"tl.store(out_ptr + at, y.to({TRITON_TYPES[self.dtype]}){guard})",
        )
