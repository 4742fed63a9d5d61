"""Runs what `codegen/triton/bitmap_step.py` plans."""

from __future__ import annotations

from torch import Tensor

from jettison.codegen.triton.bitmap_step import BitmapStep
from jettison.codegen.triton.kernels.gemm import DECODE_ROWS
from jettison.codegen.triton.launch import Launchers
from jettison.runtime.device_weights import DeviceWeights


class RunBitmap:
    """Runs a `BitmapStep`: one launch, which reads the weight as it is stored."""

    __name__ = "run_step"

    def __init__(self, step: BitmapStep, weights: DeviceWeights, launchers: Launchers) -> None:
        self.columns, self.rows = step.kernel.columns, step.kernel.rows
        self.weight = weights.bitmap(step.weight)
        self.bias = weights.joined(step.biases, step.kernel.dtype)
        self.gemv, self.few_rows, self.gemm = (launchers(each) for each in (step.kernel, step.few_rows, step.gemm))

    def __call__(self, x: Tensor, *residual: Tensor) -> tuple[Tensor, ...]:
        """`[..., N]`."""
        flat = x.reshape(-1, self.columns).contiguous()
        out = x.new_empty(*x.shape[:-1], self.rows)
        given = (flat, *self.weight, *self.bias, *(each.contiguous() for each in residual), out)
        if len(flat) == 1:
            self.gemv(*given, sizes={})
        else:
            launcher = self.few_rows if len(flat) <= DECODE_ROWS else self.gemm
            launcher(*given, sizes={"M": len(flat)})
        return (out,)
