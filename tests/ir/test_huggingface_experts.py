"""Which experts of transformers become `jettison::experts`, and what the others become."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from jettison.ir.compare import assert_close
from jettison.ir.errors import UnsupportedError
from jettison.ir.huggingface_experts import _gated_activation, _known_activation, experts_forward
from tests.models.tiny_models import tiny_model


@pytest.fixture(scope="module")
def mixtral_experts() -> nn.Module:
    return tiny_model("mixtral").model.layers[0].mlp.experts


def routed(tokens: int = 5) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    indices = torch.stack([torch.randperm(3, generator=generator)[:2] for _ in range(tokens)])
    return torch.randn(tokens, 32, generator=generator), indices, torch.rand(tokens, 2, generator=generator)


@pytest.mark.parametrize(
    ("function", "name"),
    [(nn.SiLU(), "silu"), (nn.GELU(), "gelu"), (nn.GELU("tanh"), "gelu_tanh"), (nn.ReLU(), "relu"), (nn.Tanh(), None)],
)
def test_activations_are_known_by_what_they_compute(function: nn.Module, name: str | None):
    assert _known_activation(function) == name


@pytest.mark.parametrize(
    ("attribute", "value"),
    [("has_bias", True), ("is_transposed", True), ("has_gate", False), ("is_concatenated", False),
     ("has_post_expert_norm", True), ("act_fn", nn.Tanh()), ("_apply_gate", lambda x: x)],
)  # fmt: skip
def test_other_kinds_are_told_apart(mixtral_experts: nn.Module, attribute: str, value: object):
    assert _gated_activation(mixtral_experts) == "silu"
    other = copy.copy(mixtral_experts)
    other.__dict__ = {**mixtral_experts.__dict__, "_modules": dict(mixtral_experts._modules)}
    setattr(other, attribute, value)
    assert _gated_activation(other) is None


def test_linears_over_all_tokens_compute_the_same(mixtral_experts: nn.Module):
    """With an activation that the operator does not have."""
    other = copy.deepcopy(mixtral_experts)
    other.act_fn, other.config._experts_implementation = nn.Tanh(), "eager"
    with torch.no_grad():
        assert_close(experts_forward(other, *routed()), other(*routed()))


def test_experts_on_several_devices_are_refused(mixtral_experts: nn.Module):
    other = copy.deepcopy(mixtral_experts)
    other._is_expert_parallel = True
    with pytest.raises(UnsupportedError, match="one device"):
        experts_forward(other, *routed())
