"""What captured transformers models call in the place of their kernels for routed experts."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.ir.errors import UnsupportedError
from jettison.ir.ops.experts import experts
from jettison.ir.ops.gated_activation import ACTIVATIONS


def experts_forward(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Leave one `jettison::experts` in the graph, or linears where these experts are of another kind.

    Args:
        self: The module that holds the stacked weights of X experts.
        hidden: `[T, E]`.
        top_k_index: `[T, k] i64`, experts of each token.
        top_k_weights: `[T, k]`.

    Returns:
        `[T, E]`.
    """
    if getattr(self, "_is_expert_parallel", False):
        raise UnsupportedError("its experts are spread over devices. Load the model on one device.")
    activation = _gated_activation(self)
    if activation is None:
        return _every_expert(self, hidden, top_k_index, top_k_weights)
    return experts(hidden, top_k_index, top_k_weights, self.gate_up_proj, self.down_proj, activation)


def _gated_activation(self: Any) -> str | None:
    """The activation of experts that compute what `jettison::experts` does; None for others."""
    is_plain = (
        getattr(self, "has_gate", True)
        and getattr(self, "is_concatenated", True)
        and not getattr(self, "has_bias", False)
        and not getattr(self, "is_transposed", False)
        and not getattr(self, "has_post_expert_norm", False)
        and getattr(self._apply_gate, "__name__", "") == "_default_apply_gate"
    )
    if not is_plain:
        return None
    # A new thread is outside the trace: what is computed there is computed now.
    with ThreadPoolExecutor(1) as executor:
        return executor.submit(_known_activation, self.act_fn).result()


@torch.no_grad()
def _known_activation(function: Any) -> str | None:
    """Name of the activation that a function computes, whatever its class is called."""
    probe = torch.linspace(-8, 8, 257)
    found = function(probe)
    # The two forms of GELU are 5e-4 apart.
    return next((name for name, known in ACTIVATIONS.items() if torch.allclose(known(probe), found, atol=1e-5)), None)


def _every_expert(self: Any, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Every expert as ordinary linears over all tokens, weighted with zero where a token was not routed.

    Passes, formats and targets see nothing but linears, for X / k times the multiplications.
    """
    has_bias, is_transposed = getattr(self, "has_bias", False), getattr(self, "is_transposed", False)
    has_gate = getattr(self, "has_gate", True)
    numbers = torch.arange(self.num_experts, device=hidden.device)
    chosen = (top_k_index.unsqueeze(-1) == numbers).to(hidden.dtype)
    routing = (chosen * top_k_weights.to(hidden.dtype).unsqueeze(-1)).sum(1)

    def project(x: Tensor, name: str, expert: int) -> Tensor:
        weight = getattr(self, name)[expert]
        bias = getattr(self, f"{name}_bias")[expert] if has_bias else None
        if not is_transposed:
            return F.linear(x, weight, bias)
        return x @ weight if bias is None else x @ weight + bias

    total = torch.zeros_like(hidden)
    for expert in range(self.num_experts):
        inner = project(hidden, "gate_up_proj" if has_gate else "up_proj", expert)
        inner = self._apply_gate(inner) if has_gate else self.act_fn(inner)
        out = project(inner, "down_proj", expert)
        if getattr(self, "has_post_expert_norm", False):
            out = self.post_expert_norm(out)
        total = total + out * routing[:, expert : expert + 1]
    return total
