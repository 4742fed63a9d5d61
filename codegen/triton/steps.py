"""What an entry is cut into: groups of nodes that one launch computes, and the kernels that do."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from jettison.codegen.triton.kernels.base import Kernel
from jettison.codegen.triton.kernels.decode_attention import DecodeAttention
from jettison.codegen.triton.kernels.embedding import Embedding
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.kernels.gather_down import GatherDown
from jettison.codegen.triton.kernels.gather_packed_down import GatherPackedDown
from jettison.codegen.triton.kernels.gather_up import GatherUp
from jettison.codegen.triton.kernels.gemm import Gemm
from jettison.codegen.triton.kernels.gemv import Gemv
from jettison.codegen.triton.kernels.joint_attention import JointAttention
from jettison.codegen.triton.kernels.layer_norm import LayerNorm
from jettison.codegen.triton.kernels.low_rank_attention import LowRankAttention
from jettison.codegen.triton.kernels.low_rank_mlp import LowRankMlp
from jettison.codegen.triton.kernels.norm import RmsNorm
from jettison.codegen.triton.kernels.rotary_write import RotaryWrite
from jettison.codegen.triton.kernels.weight_form import WeightForm
from jettison.ir.packed_parts import LutParts, PackedParts


@dataclass
class Step:
    """Nodes that run together.

    Attributes:
        nodes: In the order of the graph.
        inputs: Values that it takes when it runs.
        outputs: Nodes whose values it returns, in this order.
        reason: Why these nodes, or why no kernel.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    reason: str = ""

    def kernels(self) -> Iterator[Kernel]:
        """What it may launch; nothing for what PyTorch runs."""
        return iter(())


@dataclass
class KernelStep(Step):
    """Nodes that one kernel computes.

    Attributes:
        kernel: Which.
    """

    kernel: Kernel | None = None

    def kernels(self) -> Iterator[Kernel]:
        """See `Step`."""
        if self.kernel is not None:
            yield self.kernel


@dataclass
class TorchStep(Step):
    """One node that PyTorch runs."""


@dataclass
class LinearStep(Step):
    """Linears that read the same x, with what stands before and behind them.

    `inputs` is x, and the residual if there is one.

    Attributes:
        weights: Of each linear, the packed one or the name of a dense one.
        biases: Names of constants, as many as weights or none.
        parts: Rows of each weight.
        columns: K.
        form: Of all of them.
        dtype: Of x.
        norm: Name of the weight of an RMS norm of x, or None.
        norm_eps: Of that norm.
        epilogue: What follows the products.
    """

    weights: tuple[PackedParts | LutParts | str, ...] = ()
    biases: tuple[str, ...] = ()
    parts: tuple[int, ...] = ()
    columns: int = 0
    form: WeightForm = field(default_factory=lambda: WeightForm(torch.float32))
    dtype: torch.dtype = torch.float32
    norm: str | None = None
    norm_eps: float = 0.0
    epilogue: Epilogue = field(default_factory=Epilogue)

    @property
    def rows(self) -> int:
        """N of the result."""
        return self.parts[0] if self.epilogue.is_gated else sum(self.parts)

    @property
    def gemv(self) -> Gemv:
        """For one row of x."""
        eps = None if self.norm is None else self.norm_eps
        return Gemv(self.form, self.columns, self.rows, self.dtype, eps, self.epilogue)

    @property
    def few_rows(self) -> Gemm:
        """For a batch that decodes."""
        return Gemm(self.form, self.columns, self.rows, self.dtype, True, self.epilogue)

    @property
    def gemm(self) -> Gemm:
        """For prompts."""
        return replace(self.few_rows, is_decode=False)

    @property
    def norm_kernel(self) -> RmsNorm | None:
        """The norm by itself, before products of several rows."""
        return None if self.norm is None else RmsNorm(self.columns, self.dtype, self.norm_eps)

    def kernels(self) -> Iterator[Kernel]:
        """See `Step`."""
        yield from (self.gemv, self.few_rows, self.gemm)
        if self.norm_kernel is not None:
            yield self.norm_kernel


@dataclass
class NormStep(Step):
    """A norm by itself; `inputs` is x.

    Attributes:
        parameters: Names of constants: the weight, and the bias of a layer norm that has one.
        kernel: What computes it.
    """

    parameters: tuple[str, ...] = ()
    kernel: RmsNorm | LayerNorm = field(default_factory=lambda: RmsNorm(1, torch.float32, 0.0))

    def kernels(self) -> Iterator[Kernel]:
        """See `Step`."""
        yield self.kernel


@dataclass
class LookupStep(Step):
    """Rows of a quantised table; `inputs` is the indices.

    Attributes:
        weight: The table.
        kernel: What computes it.
    """

    weight: PackedParts | LutParts = field(default_factory=lambda: PackedParts("", "", None, 8, 32, 0))
    kernel: Embedding = field(default_factory=lambda: Embedding(WeightForm(torch.float32), 1, torch.float32))

    def kernels(self) -> Iterator[Kernel]:
        """See `Step`."""
        yield self.kernel


@dataclass
class SparseMlpStep(Step):
    """A feed-forward layer of which each token names slabs; `inputs` are x, the indices, and the residual if any.

    Attributes:
        up: The gate, if there is one, and up: packed weights, or names of dense ones.
        down: Likewise.
        up_bias: Names of constants, one or none, like the next two.
        absent: Stand-ins.
        down_bias: Of the result.
        first: To the activations of the named neurons.
        second: From them to the result.
    """

    up: tuple[PackedParts | str, ...] = ()
    down: PackedParts | str = ""
    up_bias: tuple[str, ...] = ()
    absent: tuple[str, ...] = ()
    down_bias: tuple[str, ...] = ()
    first: GatherUp | None = None
    second: GatherDown | GatherPackedDown | None = None

    def kernels(self) -> Iterator[Kernel]:
        """See `Step`."""
        yield from (kernel for kernel in (self.first, self.second) if kernel is not None)


@dataclass
class Product:
    """A linear of several: the weights it reads, one below the other, and its kernels for few tokens and for many.

    Attributes:
        weights: Names of constants.
        biases: Likewise, as many as weights or none.
        columns: K.
        rows: N of the result.
        dtype: Of everything.
        epilogue: What follows.
    """

    weights: tuple[str, ...]
    biases: tuple[str, ...]
    columns: int
    rows: int
    dtype: torch.dtype
    epilogue: Epilogue = field(default_factory=Epilogue)

    @property
    def gemv(self) -> Gemv:
        """For one row of x."""
        return Gemv(WeightForm(self.dtype), self.columns, self.rows, self.dtype, None, self.epilogue)

    @property
    def few_rows(self) -> Gemm:
        """For a batch that decodes."""
        return Gemm(WeightForm(self.dtype), self.columns, self.rows, self.dtype, True, self.epilogue)

    @property
    def gemm(self) -> Gemm:
        """For prompts."""
        return replace(self.few_rows, is_decode=False)


@dataclass
class LowRankMlpStep(Step):
    """A factored feed-forward layer; `inputs` are what the gate is made of, if there is one, up's, and the residual.

    Attributes:
        neurons: Products that make the neurons of few tokens: one, or up and then the gate that multiplies it.
        sums: The product that reads them.
        last: Second factor of the second linear, or None.
        kernel: Neurons and `sums` of a long prompt.
        rows: Names of the weights that the kernel reads in front of `sums`: of the gate, if there is one, and of up.
        biases: Of those of them that have one.
    """

    neurons: tuple[Product, ...] = ()
    sums: Product | None = None
    last: Product | None = None
    kernel: LowRankMlp | None = None
    rows: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()

    def kernels(self) -> Iterator[Kernel]:
        """See `Step`."""
        products = [each for each in (*self.neurons, self.sums, self.last) if each is not None]
        for product in products:
            yield from (product.gemv, product.few_rows, product.gemm)
        if self.kernel is not None:
            yield self.kernel


@dataclass
class LowRankAttentionStep(KernelStep):
    """Attention over heads that are made on chip.

    `inputs` are what queries, keys and values are made of, and what there is of cosines, sines, positions of queries
    and of keys, which keys are tokens, and sinks.

    Attributes:
        kernel: What computes it.
        rows: Names of the three weights.
        biases: Of those that have one.
    """

    kernel: LowRankAttention | None = None
    rows: tuple[str, ...] = ()
    biases: tuple[str, ...] = ()


@dataclass
class CacheStep(KernelStep):
    """Queries and keys rotated, keys and values written; `inputs` are q, k, v, then cos and sin, the slots, the caches.

    `outputs` are the rotated queries and the two caches.

    Attributes:
        kernel: What computes it.
    """

    kernel: RotaryWrite | None = None


@dataclass
class JointAttentionStep(KernelStep):
    """Attention of one token per row over a compressed cache, too.

    `inputs` are the queries, codes, scales and zeros of the stored keys, and of the values, how many are stored, the
    newest keys and values, and the slots.

    Attributes:
        kernel: What computes it.
    """

    kernel: JointAttention | None = None


@dataclass
class AttentionStep(KernelStep):
    """Attention of one token per row; `inputs` are the queries, the caches and the slots.

    Attributes:
        kernel: What computes it.
    """

    kernel: DecodeAttention | None = None
