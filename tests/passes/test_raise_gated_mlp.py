from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from jettison.passes.raise_gated_mlp import RaiseGatedMlp
from jettison.passes.strip_export_asserts import StripExportAsserts
from tests.helpers import (
    assert_declines,
    assert_golden,
    assert_idempotent,
    assert_same_numbers,
    export_body,
    run_pass,
)

WIDTHS = {"gate": (16, 8), "up": (16, 8), "down": (8, 16)}
ACTIVATIONS = {
    "silu": F.silu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
    "gelu": F.gelu,
    "gelu_tanh": lambda gate: F.gelu(gate, approximate="tanh"),
}


def gated_mlp(activation, is_gate_first=True):
    def function(self, x):
        gate, up = activation(F.linear(x, self.gate)), F.linear(x, self.up)
        return F.linear(gate * up if is_gate_first else up * gate, self.down)

    return export_body(function, **WIDTHS)


def test_golden_silu(snapshot):
    before = gated_mlp(F.silu)
    after, record = assert_golden(snapshot, RaiseGatedMlp(), before, "silu")
    assert record.rewrites == 1
    assert_same_numbers(before, after)


def test_golden_halves_of_one_linear(snapshot):
    def function(self, x):
        gate, up = F.linear(x, self.both).chunk(2, -1)
        return up * F.silu(gate)

    before = export_body(function, both=(16, 8))
    after, record = assert_golden(snapshot, RaiseGatedMlp(), before, "halves_of_one_linear")
    assert record.rewrites == 1
    assert_same_numbers(before, after)


@pytest.mark.parametrize("is_gate_first", [True, False])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation(name, is_gate_first):
    before = gated_mlp(ACTIVATIONS[name], is_gate_first)
    after, record = run_pass(RaiseGatedMlp(), before)
    assert record.rewrites == 1
    assert f"'{name}')" in str(after)
    assert_same_numbers(before, after)


def test_runs_twice_like_once():
    assert_idempotent(RaiseGatedMlp(), gated_mlp(F.silu))


def test_declines_when_the_activation_is_read_elsewhere():
    def function(self, x):
        gate = F.silu(F.linear(x, self.gate))
        return gate * F.linear(x, self.up) + gate

    program = export_body(function, gate=(16, 8), up=(16, 8))
    assert_declines(RaiseGatedMlp(), program, reason="the activation has other users")


@pytest.mark.parametrize(
    "function",
    [lambda self, x: F.silu(x) * F.linear(x, self.up), lambda self, x: F.silu(x) * self.scale],
    ids=["one_channel", "vector"],
)
def test_declines_when_shapes_broadcast(function):
    program = export_body(function, up=(1, 8), scale=(8,))
    assert_declines(RaiseGatedMlp(), program, reason="the gate and the value have different shapes")


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x * torch.sigmoid(x),
        lambda self, x: (lambda y: y * y)(F.relu(x)),
        lambda self, x: F.silu(x) * 3,
        lambda self, x: F.silu(x) + x,
        lambda self, x: torch.tanh(x) * x.exp(),
    ],
    ids=["written_out_silu", "relu_squared", "number", "sum", "tanh"],
)
def test_is_not_interested_in_other_products(function):
    assert_declines(RaiseGatedMlp(), export_body(function), reason=None)


def test_declines_when_dtypes_promote():
    """The product of a bf16 gate and an fp32 value is fp32; the fused operator has the dtype of its gate."""
    program, _ = run_pass(StripExportAsserts(), export_body(lambda self, x: F.silu(x.to(torch.bfloat16)) * x.exp()))
    assert_declines(RaiseGatedMlp(), program, reason="the gate and the value have different dtypes")
