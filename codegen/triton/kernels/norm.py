"""RMS norm of each row, after a residual is added where there is one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from jettison.codegen.triton.kernels.base import ELEMENTS, TRITON_TYPES, Kernel, Tuning, block, name_of


@dataclass(frozen=True)
class RmsNorm(Kernel):
    """`y = x / rms(x) * w`, of `x + residual`, which is stored too, where there is a residual.

    Attributes:
        columns: E.
        dtype: Of everything.
        eps: Added to the mean square.
        has_residual: Whether something is added first.
    """

    columns: int
    dtype: torch.dtype
    eps: float
    has_residual: bool = False

    @property
    def name(self) -> str:
        """See `Kernel`."""
        residual = "_residual" if self.has_residual else ""
        return f"rms_norm{name_of(self.eps)}{residual}_e{self.columns}_{ELEMENTS[self.dtype]}"

    @property
    def title(self) -> str:
        """See `Kernel`."""
        return f"RMS norm of rows of {self.columns}{', after a residual' if self.has_residual else ''}."

    @property
    def parameters(self) -> dict[str, str]:
        """See `Kernel`."""
        names = ["x_ptr", *(["residual_ptr", "sum_ptr"] if self.has_residual else []), "norm_ptr", "out_ptr"]
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
        kind = TRITON_TYPES[self.dtype]
        guard = f", mask=column < {self.columns}"
        residual = [
            f"x += tl.load(residual_ptr + at{guard}, other=0).to(tl.float32)",
            f"tl.store(sum_ptr + at, x.to({kind}){guard})",
        ]
        return block(
            "column = tl.arange(0, BLOCK_E)",
            f"at = tl.program_id(0).to(tl.int64) * {self.columns} + column",
            f"x = tl.load(x_ptr + at{guard}, other=0).to(tl.float32)",
            ["# aten.add.Tensor", *residual] if self.has_residual else "",
            "# aten.rms_norm",
            f"inverse_rms = 1.0 / tl.sqrt(tl.sum(x * x, 0) / {self.columns} + {self.eps!r})",
            f"y = x * inverse_rms * tl.load(norm_ptr + column{guard}, other=0).to(tl.float32)",
            f"tl.store(out_ptr + at, y.to({kind}){guard})",
        )
