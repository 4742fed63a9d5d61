"""`jettison::sparse_mlp`: a feed-forward layer of which each token reads the groups of neurons it names.

A group is `group` neurons that follow each other: slab `g` of a matrix `[F, E]` is its rows `g * group` to
`(g + 1) * group - 1`. With M as the neurons of the groups that a token names,

    out = down_bias + sum over i in M of activation(up[i] @ x + up_bias[i]) * down[i]

and, with a gate, `activation(gate[i] @ x) * (up[i] @ x + up_bias[i])` instead. Both matrices have a neuron's weights in
one row, so that a group is contiguous in each.

What a group contributes on average where it is not named can be added in its place: `absent[g]` for every group g that
is not named. The sum of all of them is the last row, so that only the named ones are read to be taken off.

Every token has its own groups, whatever other tokens are computed with it; kernels may read the union once.

Source: Deja Vu (arXiv 2310.17157) for neurons chosen per token; HiRE (arXiv 2402.09360) for groups of them.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.ir.ops.registration import define_op


def keep_groups(hidden: Tensor, indices: Tensor, group: int) -> Tensor:
    """Activations with those of the neurons that a token does not name at zero.

    Args:
        hidden: `[..., F]`.
        indices: `[..., k] i64`, groups that each token names; naming one twice is naming it.
        group: Neurons of a group.

    Returns:
        `[..., F]`.
    """
    by_group = hidden.unflatten(-1, (-1, group))
    kept = torch.zeros(by_group.shape[:-1], dtype=hidden.dtype, device=hidden.device).scatter_(-1, indices, 1.0)
    return (by_group * kept.unsqueeze(-1)).flatten(-2)


def add_absent(out: Tensor, indices: Tensor | None, absent: Tensor | None, down_bias: Tensor | None) -> Tensor:
    """The product with what is added to it: the bias, and what stands in for the groups that are not named.

    Args:
        out: `[..., E]`.
        indices: As in the operator, like the next two.
        absent: Stand-ins.
        down_bias: Of the layer.
    """
    if down_bias is not None:
        out = out + down_bias
    if indices is None or absent is None:
        return out
    return out + (absent[-1] - F.embedding(indices, absent).sum(-2)).to(out.dtype)


def _sparse_mlp(
    x: Tensor, indices: Tensor | None, gate: Tensor | None, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, absent: Tensor | None, activation: str, group: int,
) -> Tensor:  # fmt: skip
    """Define the operator: compute every neuron, and drop those that are not named.

    Args:
        x: `[..., E]` f32, bf16 or f16.
        indices: `[..., k] i64` in `[0, F / group)`, all of a token different; None names every group.
        gate: `[F, E]` in the dtype of x, or None.
        up: `[F, E]` in the dtype of x.
        up_bias: `[F]`, or None.
        down: `[F, E]`: a row per neuron, so the transposed weight of a linear.
        down_bias: `[E]`, or None.
        absent: `[F / group + 1, E]`, what stands in for each group that is not named, then their sum; or None.
        activation: A key of `ACTIVATIONS`.
        group: Neurons of a group; divides F.

    Returns:
        `[..., E]` in the dtype of x, contiguous.
    """
    _check(x, indices, gate, up, up_bias, down, down_bias, group)
    check_absent(x, absent, up.shape[0] // group)
    hidden = F.linear(x, up, up_bias)
    hidden = ACTIVATIONS[activation](hidden) if gate is None else ACTIVATIONS[activation](F.linear(x, gate)) * hidden
    out = (hidden if indices is None else keep_groups(hidden, indices, group)).matmul(down)
    return add_absent(out, indices, absent, down_bias).contiguous()


def _fake_sparse_mlp(
    x: Tensor, indices: Tensor | None, gate: Tensor | None, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, absent: Tensor | None, activation: str, group: int,
) -> Tensor:  # fmt: skip
    _check(x, indices, gate, up, up_bias, down, down_bias, group)
    check_absent(x, absent, up.shape[0] // group)
    return x.new_empty(x.shape)


sparse_mlp = define_op(
    "sparse_mlp(Tensor x, Tensor? indices, Tensor? gate, Tensor up, Tensor? up_bias, Tensor down, Tensor? down_bias, "
    "Tensor? absent, str activation, int group) -> Tensor",
    _sparse_mlp,
    _fake_sparse_mlp,
)


def check_groups(x: Tensor, indices: Tensor | None, neurons: int, group: int) -> None:
    """Check what names the groups, as an operator's own argument check.

    Raises:
        RuntimeError: through `torch._check`, as ATen operators do, so that it also works on symbolic shapes.
    """
    torch._check(
        group > 0 and neurons % group == 0,
        lambda: f"groups of {group} must divide the {neurons} neurons",
    )
    torch._check(
        indices is None or (not indices.is_floating_point() and indices.dim() == x.dim()),
        lambda: f"indices must be integers with as many axes as x ({x.dim()})",
    )


def check_absent(x: Tensor, absent: Tensor | None, groups: int) -> None:
    """Check the stand-ins; see `check_groups`."""
    torch._check(
        absent is None or tuple(absent.shape) == (groups + 1, x.shape[-1]),
        lambda: f"absent must be [{groups + 1}, {x.shape[-1]}], found {None if absent is None else list(absent.shape)}",
    )


def check_biases(up_bias: Tensor | None, down_bias: Tensor | None, neurons: int, width: int) -> None:
    """Check what is added to neurons and to the result; see `check_groups`."""
    for name, bias, count in (("up_bias", up_bias, neurons), ("down_bias", down_bias, width)):
        torch._check(
            bias is None or tuple(bias.shape) == (count,),
            lambda name=name, bias=bias, count=count: f"{name} must have {count} values, found {list(bias.shape)}",
        )


def _check(
    x: Tensor, indices: Tensor | None, gate: Tensor | None, up: Tensor, up_bias: Tensor | None, down: Tensor,
    down_bias: Tensor | None, group: int,
) -> None:  # fmt: skip
    check_groups(x, indices, up.shape[0], group)
    shape = (up.shape[0], x.shape[-1])
    for name, matrix in (("gate", gate), ("up", up), ("down", down)):
        torch._check(
            matrix is None or (tuple(matrix.shape) == shape and matrix.dtype == x.dtype),
            lambda name=name, matrix=matrix: (
                f"{name} must be {x.dtype}{list(shape)}, found {matrix.dtype}{list(matrix.shape)}"
            ),
        )
    check_biases(up_bias, down_bias, *shape)
