"""Products with dense fp32 weights, by oneDNN where that is faster than what PyTorch itself calls.

PyTorch multiplies fp32 matrices with MKL, which takes its AVX-512 code on Intel's processors only; oneDNN, which is in
every x86 build of PyTorch too, takes it wherever the processor has it. On two Zen 4 cores a prompt's products run at
more than twice the rate (benchmarks/results/dense_linear.json). Both add up in fp32, in another order.

It is the operator behind `torch.compile`'s fusion of linears, and has no documentation; a build without it multiplies
as PyTorch does.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# Multiplications from which on it is used. A call costs 12 us more than one of MKL, and a shape that is new half a
# millisecond or more; smaller products are over by then.
FEWEST_PRODUCTS = 1 << 21


@functools.cache
def has_onednn() -> bool:
    """Whether this processor and this build of PyTorch gain from it."""
    is_there = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    return is_there and torch.backends.cpu.get_cpu_capability() == "AVX512"


def run_dense_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, whole_rows: int | None = None) -> Tensor:
    """`aten::linear`.

    Args:
        x: `[..., K]`.
        weight: `[N, K]`.
        bias: `[N]`, or None.
        whole_rows: Rows of the weight that these are a slab of, so that slabs are multiplied as the whole is.

    Returns:
        `[..., N]`, contiguous.
    """
    rows = weight.shape[0] if whole_rows is None else whole_rows
    # numel() is K of each of the rows of x: times N, the multiplications.
    if x.dtype is not torch.float32 or x.numel() * rows < FEWEST_PRODUCTS or not has_onednn():
        return F.linear(x, weight, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return product
