"""`jettison::complete_logits`: logits of all tokens, of which only some candidates' are exact."""

from __future__ import annotations

import torch
from torch import Tensor

from jettison.ir.ops.registration import define_op


def complete_logits_reference(estimate: Tensor, candidates: Tensor, candidate_logits: Tensor) -> Tensor:
    """Put exact logits among estimates.

    No estimate is left above the best candidate: the best token is one that was computed.

    Args:
        estimate: `[..., V]`.
        candidates: `[..., k]` i64, each once.
        candidate_logits: `[..., k]` in the dtype of the estimates.

    Returns:
        `[..., V]`, contiguous: a candidate's logit where there is one, else the estimate, below the best candidate.
    """
    best = candidate_logits.amax(-1, keepdim=True)
    # Below and not equal to it, or the token with the lower id would win.
    below = best - best.abs() * (2 * torch.finfo(estimate.dtype).eps)
    return torch.minimum(estimate, below).scatter(-1, candidates, candidate_logits)


def _fake_complete_logits(estimate: Tensor, candidates: Tensor, candidate_logits: Tensor) -> Tensor:
    torch._check(
        candidate_logits.dtype == estimate.dtype,
        lambda: f"candidate_logits must be {estimate.dtype}, found {candidate_logits.dtype}",
    )
    return torch.empty_like(estimate, memory_format=torch.contiguous_format)


complete_logits = define_op(
    "complete_logits(Tensor estimate, Tensor candidates, Tensor candidate_logits) -> Tensor",
    complete_logits_reference,
    _fake_complete_logits,
)
