"""`jettison::head_candidates`: the tokens that may be the best ones, chosen by estimates of their logits.

HiRE (arXiv 2402.09360) on a language-model head: a cheap estimate of all logits, the `count` most promising tokens, and
only their rows of the head read exactly. Where every estimate has a bound on its error, the tokens with the largest
*upper bounds* are taken, so that the largest of the others bounds all logits that are not computed: a candidate above
it is better than every token outside, which is proven and not hoped. The next `reserve` tokens are listed with their
bounds: where a candidate is not above all others, those that reach it are few, and computing them settles it.

The bound. Let `Z_i` be a row of the head, `Z~_i` the row of the estimator, `x` what both read. Then

    |Z_i x - estimate_i| <= |Z_i - Z~_i| |x| + |Z~_i| d(x) + 2^-8 |estimate_i|

with norms in the sense of Euclid. The first term is Cauchy-Schwarz; the pass that makes `errors` adds to the norm of
`Z_i - Z~_i` what the kernels of all targets may round: x, or weights that were decoded, to bf16, and sums in fp32.
`d(x)` is for kernels that round x to 8-bit integers in blocks of `group`, as ONNX Runtime's `MatMulNBits` with accuracy
level 4 does: `|x - s round(x / s)|`, with `s = max |x| / 127` over each block. The last term is for kernels that round
results to bf16. A target that rounds less pays little for this: the first term is ten times the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.ops.registration import define_op

# Of a result that was rounded to bf16, compared with itself.
RESULT_ROUNDING = 2.0**-8
# Estimates per block in the search: the maxima of blocks are searched first, and then only blocks that have one of the
# best. Of V = 128256 it takes a third of the time of one search; 16 and 64 per block take longer.
BLOCK = 32


def head_candidates_reference(
    estimate: Tensor, x: Tensor, errors: Tensor | None, count: int, reserve: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose candidates, and bound the logits of all other tokens.

    Args:
        estimate: `[..., V]` of the dtype of x.
        x: `[..., K]`, what the head reads.
        errors: `[2, V]` f32: in front of `|x|`, and in front of `d(x)`, rounded up; None to choose by estimate.
        count: How many; all where there are fewer tokens.
        reserve: How many of the others to list; all where there are fewer.
        group: Columns that a kernel rounds together, see the module.

    Returns:
        Candidates `[..., k]` i64, k the least of count and V. The R next tokens `[..., R]` i64, R the least of reserve
        and V - k. And `[..., R + 1]` f32, not rising: entry j bounds the logits of token j of these and of all behind
        it, listed or not (without `errors`: their estimates); minus infinity where there is none.
    """
    upper = estimate.to(torch.float32)
    if errors is not None:
        upper = torch.add(upper, upper.abs(), alpha=RESULT_ROUNDING) + _error_norms(x, group) @ errors
    vocabulary = estimate.shape[-1]
    count, listed = min(count, vocabulary), min(count + reserve, vocabulary)
    values, tokens = _largest(upper, min(listed + 1, vocabulary))
    bounds = values[..., count:]
    if listed == vocabulary:
        bounds = F.pad(bounds, (0, 1), value=-torch.inf)
    # Not `contiguous`, which leaves the strides of sizes 1 and 0 as they are.
    parts = tokens[..., :count], tokens[..., count:listed], bounds
    candidates, others, bounds = (part.clone(memory_format=torch.contiguous_format) for part in parts)
    return candidates, others, bounds


def _error_norms(x: Tensor, group: int) -> Tensor:
    """`|x|` and `d(x)` side by side: `[..., 2]` f32."""
    wide = x.to(torch.float32)
    padding = -wide.shape[-1] % group
    blocks = (F.pad(wide, (0, padding)) if padding else wide).unflatten(-1, (-1, group))
    # A block of zeros has no error; dividing by the smallest number leaves it zero.
    step = (blocks.abs().amax(-1, keepdim=True) / 127.0).clamp_min(torch.finfo(torch.float32).tiny)
    rounded = blocks - (blocks / step).round() * step
    norms = [(part * part).sum(-1, keepdim=True).sqrt() for part in (wide, rounded.flatten(-2))]
    return torch.cat(norms, -1)


def _largest(upper: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest values `[..., count]` of `[..., V]`, in descending order, and where they are."""
    vocabulary = upper.shape[-1]
    if vocabulary <= 2 * BLOCK * count:
        return upper.topk(count)
    padding = -vocabulary % BLOCK
    blocks = (F.pad(upper, (0, padding), value=-torch.inf) if padding else upper).unflatten(-1, (-1, BLOCK))
    # Each of the `count` largest lies in a block whose maximum is among the `count` largest.
    chosen = blocks.amax(-1).topk(count, sorted=False).indices
    inside = blocks.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, BLOCK)).flatten(-2)
    values, places = inside.topk(count)
    return values, chosen.gather(-1, places // BLOCK) * BLOCK + places % BLOCK


def _fake_head_candidates(
    estimate: Tensor, x: Tensor, errors: Tensor | None, count: int, reserve: int, group: int
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(
        count > 0 and reserve >= 0 and group > 0,
        lambda: f"count and group must be positive, reserve at least 0, found {count}, {group} and {reserve}",
    )
    leading, vocabulary = estimate.shape[:-1], estimate.shape[-1]
    if errors is not None:
        torch._check(
            errors.dtype == torch.float32 and tuple(errors.shape) == (2, vocabulary),
            lambda: f"errors must be f32[2, {vocabulary}], found {errors.dtype}{list(errors.shape)}",
        )
    count = min(count, vocabulary)
    reserve = min(reserve, vocabulary - count)
    return (
        estimate.new_empty((*leading, count), dtype=torch.int64),
        estimate.new_empty((*leading, reserve), dtype=torch.int64),
        estimate.new_empty((*leading, reserve + 1), dtype=torch.float32),
    )


head_candidates = define_op(
    "head_candidates(Tensor estimate, Tensor x, Tensor? errors, int count, int reserve, int group) "
    "-> (Tensor, Tensor, Tensor)",
    head_candidates_reference,
    _fake_head_candidates,
)
