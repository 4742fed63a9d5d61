"""`jettison::sparse_mlp` and its quantised form with PyTorch.

Over floating-point weights of one token, slabs of the first matrix are multiplied where they lie, and rows of the
second are added up by the kernel of `embedding_bag`, which copies nothing (a gather and a product take several times as
long). Elsewhere slabs are gathered, then multiplied by the dense kernels.

Tokens that run together read the union of their groups once, and each drops the activations of those it did not name:
results do not depend on who else is in the batch. From half of the groups on, gathering them takes longer than reading
all (benchmarks/results/contextual_sparsity.json), and everything is read.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.ir.ops.sparse_mlp import add_absent, keep_groups
from jettison.runtime.packed_linear import SLAB_ROWS, PackedWeight

# Of the neurons: the largest union that is gathered.
MOST_GATHERED = 0.5
# Bytes from which on a slab is worth a call: a smaller one is copied to its neighbours first.
_SMALLEST_SLAB = 128 << 10


class _Slabs:
    """The slabs that some tokens read.

    Args:
        indices: `[T, k]`, groups that each token names.
        groups: G.
        per_slab: Groups of a slab: what a kernel can read alone may be larger than a group.
    """

    def __init__(self, indices: Tensor, groups: int, per_slab: int) -> None:
        self._indices, self._per_slab = indices, per_slab
        is_single = len(indices) == 1 and per_slab == 1
        self.slabs = indices[0] if is_single else (indices // per_slab).unique()
        self._is_exact = is_single
        self.is_worth_it = len(self.slabs) * per_slab <= MOST_GATHERED * groups

    def keep(self, hidden: Tensor, group: int) -> Tensor:
        """Drop activations `[T, N]` of the slabs' neurons that a token did not name, in place."""
        if self._is_exact:
            return hidden
        held = (self.slabs[:, None] * self._per_slab + torch.arange(self._per_slab)).flatten()
        named = (self._indices[:, :, None] == held).any(1)
        hidden.view(len(hidden), -1, group).mul_(named[:, :, None])
        return hidden


def run_sparse_mlp(
    x: Tensor, indices: Tensor | None, gate: Tensor | None, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, absent: Tensor | None, activation: str, group: int,
) -> Tensor:  # fmt: skip
    """`jettison::sparse_mlp`; see there."""
    rows = x.reshape(-1, x.shape[-1])
    activate = ACTIVATIONS[activation]
    named = None if indices is None else indices.reshape(-1, indices.shape[-1])
    slabs = None if named is None else _Slabs(named, len(up) // group, 1)
    if slabs is not None and slabs.is_worth_it and len(rows) == 1:
        taken = slabs.slabs
        hidden = _linear_of_slabs(rows, up, taken, group)
        if up_bias is not None:
            hidden += up_bias.view(-1, group).index_select(0, taken).view(1, -1)
        hidden = activate(hidden) if gate is None else activate(_linear_of_slabs(rows, gate, taken, group)) * hidden
        out = sum_of_rows(hidden, down, (taken[:, None] * group + torch.arange(group)).flatten())
    elif slabs is None or not slabs.is_worth_it:
        hidden = F.linear(rows, up, up_bias)
        hidden = activate(hidden) if gate is None else activate(F.linear(rows, gate)) * hidden
        out = (hidden if named is None else keep_groups(hidden, named, group)) @ down
    else:
        taken = slabs.slabs
        bias = None if up_bias is None else up_bias.view(-1, group).index_select(0, taken).flatten()
        hidden = F.linear(rows, _rows(up, taken, group), bias)
        hidden = activate(hidden) if gate is None else activate(F.linear(rows, _rows(gate, taken, group))) * hidden
        out = slabs.keep(hidden, group) @ _rows(down, taken, group)
    return add_absent(out, named, absent, down_bias).view(x.shape)


def _linear_of_slabs(x: Tensor, matrix: Tensor, slabs: Tensor, rows: int) -> Tensor:
    """`[1, n * rows]`: the product of one token with slabs of a matrix `[F, E]`."""
    if rows * matrix.shape[1] * matrix.element_size() < _SMALLEST_SLAB:
        return F.linear(x, _rows(matrix, slabs, rows))
    by_slab = matrix.view(-1, rows, matrix.shape[1])
    return torch.cat([F.linear(x, by_slab[slab]) for slab in slabs.tolist()], -1)


def sum_of_rows(weights: Tensor, matrix: Tensor, rows: Tensor) -> Tensor:
    """`[1, E]`: rows of a matrix `[F, E]`, weighted and added up.

    Args:
        weights: `[1, N]`.
        matrix: In the dtype of the weights.
        rows: `[N] i64`.
    """
    # The kernel gives every thread a bag.
    bags = min(torch.get_num_threads(), len(rows))
    offsets = torch.arange(bags) * len(rows) // bags
    sums = F.embedding_bag(rows, matrix, offsets, mode="sum", per_sample_weights=weights[0])
    return sums.sum(0, keepdim=True, dtype=torch.float32).to(weights.dtype)


def _rows(matrix: Tensor, slabs: Tensor, rows: int) -> Tensor:
    """Slabs of a matrix `[F, E]`, one behind the other."""
    width = matrix.shape[1]
    return matrix.view(-1, rows * width).index_select(0, slabs).view(-1, width)


def groups_per_slab(group: int) -> int | None:
    """How many groups of neurons the kernels of quantised weights read at a time; None where they cannot cut there."""
    if group % SLAB_ROWS == 0:
        return 1
    return SLAB_ROWS // group if SLAB_ROWS % group == 0 else None


def run_quantized_sparse_mlp(
    gate: PackedWeight | None, up: PackedWeight, down: PackedWeight, x: Tensor, indices: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, absent: Tensor | None, activation: str, group: int, neurons: int,
) -> Tensor:  # fmt: skip
    """`jettison::quantized_sparse_mlp`, up to the rounding of `PackedWeight.linear`; see there.

    Args:
        gate: `[F, E]`, or None.
        up: `[F, E]`.
        down: `[E, F]`.
        x: As in the operator, like the next six.
        indices: Groups.
        up_bias: Of the neurons.
        down_bias: Of the result.
        absent: Stand-ins.
        activation: Name.
        group: Neurons of a group.
        neurons: F.
    """
    rows, activate = x.reshape(-1, x.shape[-1]), ACTIVATIONS[activation]
    named = indices.reshape(-1, indices.shape[-1])
    per_slab = groups_per_slab(group)
    is_whole = per_slab is not None and neurons % (per_slab * group) == 0
    slabs = _Slabs(named, neurons // group, per_slab) if per_slab is not None and is_whole else None
    if slabs is None or not slabs.is_worth_it:
        hidden = up.linear(rows, up_bias)
        hidden = activate(hidden) if gate is None else activate(gate.linear(rows, None)) * hidden
        out = down.linear(keep_groups(hidden, named, group), None)
    else:
        assert per_slab is not None, "sliced"
        taken, size = slabs.slabs, per_slab * group
        hidden = up.linear_of_rows(rows, taken, size)
        if up_bias is not None:
            hidden += up_bias.view(-1, size).index_select(0, taken).flatten()
        hidden = activate(hidden) if gate is None else activate(gate.linear_of_rows(rows, taken, size)) * hidden
        out = down.linear_of_columns(slabs.keep(hidden, group), taken, size)
    return add_absent(out, named, absent, down_bias).view(x.shape)
