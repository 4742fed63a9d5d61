"""A linear over a bitmap weight, with bias and residual, as one launch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from jettison.codegen.triton.kernels.base import COMPUTED, Kernel
from jettison.codegen.triton.kernels.bitmap_gemm import BitmapGemm
from jettison.codegen.triton.kernels.bitmap_gemv import BitmapGemv
from jettison.codegen.triton.kernels.bitmap_tile import BitmapForm
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.steps import Step
from jettison.ir.match import arguments, constant_name
from jettison.ir.packed_parts import BitmapParts, bitmap_parts_read
from jettison.ir.program import Program


@dataclass
class BitmapStep(Step):
    """A linear; `inputs` is x, and the residual if there is one.

    Attributes:
        weight: Its parts.
        biases: Name of the bias, or nothing.
        kernel: For one row of x.
    """

    weight: BitmapParts = field(default_factory=lambda: BitmapParts("", "", "", None, 4, 64, 0))
    biases: tuple[str, ...] = ()
    kernel: BitmapGemv = field(default_factory=lambda: BitmapGemv(BitmapForm(4, 64), 1, 1, torch.float32))

    @property
    def few_rows(self) -> BitmapGemm:
        """For a batch that decodes."""
        own = self.kernel
        return BitmapGemm(own.weight, own.columns, own.rows, own.dtype, True, own.epilogue)

    @property
    def gemm(self) -> BitmapGemm:
        """For prompts."""
        return replace(self.few_rows, is_decode=False)

    def kernels(self) -> Iterator[Kernel]:
        """See `Step`."""
        yield from (self.kernel, self.few_rows, self.gemm)


def bitmap_step(node: fx.Node, added: tuple[fx.Node, fx.Node] | None, program: Program) -> BitmapStep | str:
    """The step of a linear over a bitmap weight, or why there is none.

    Args:
        node: A call of `jettison.bitmap_linear`.
        added: The sum behind it that nothing else reads, and what it is added to.
        program: Its program.
    """
    read, value = arguments(node), node.meta["val"]
    parts = bitmap_parts_read(node)
    bias = constant_name(read["bias"])
    if parts is None or (bias is None and read["bias"] is not None):
        return "a part of the weight, or the bias, is computed"
    if value.dtype not in COMPUTED:
        return f"kernels do not compute in {str(value.dtype).removeprefix('torch.')}"
    if parts.scales is not None and program.constants[parts.scales].dtype != torch.bfloat16:
        return "scales of bitmap weights are read in bf16"
    form = BitmapForm(parts.bits, parts.group, program.constants[parts.values].dtype)
    epilogue = Epilogue(bias is not None, has_residual=added is not None)
    kernel = BitmapGemv(form, parts.columns, int(value.shape[-1]), value.dtype, epilogue)
    nodes, inputs = [node], [read["x"]]
    if added is not None:
        nodes, inputs = [*nodes, added[0]], [*inputs, added[1]]
    why = "the weight is expanded in registers"
    return BitmapStep(nodes, inputs, [nodes[-1]], why, parts, () if bias is None else (bias,), kernel)
