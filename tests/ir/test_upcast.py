"""Weights stored in bf16 compute as if they were fp32, converted only while they are used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettison.ir import constants
from jettison.ir.upcast import UpcastWeights, evaluating
from tests.models.tiny_models import randomize


class Model(nn.Module):
    """Embedding, a function of hidden states and of the module, head."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.embed, self.head = nn.Embedding(23, 8), nn.Linear(8, 23)
        self.norm, self.inner = nn.LayerNorm(8), nn.Linear(8, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.stack = nn.Parameter(torch.zeros(3, 8, 8))
        self.register_buffer("table", torch.randn(8, 8, generator=torch.Generator().manual_seed(2)))
        self.register_buffer("counts", torch.arange(8))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.function(self, self.embed(input_ids)))


def _narrow(function: Callable[[Any, Tensor], Tensor]) -> Model:
    return randomize(Model(function)).to(torch.bfloat16).eval()


def _in_fp32(model: Model, ids: Tensor) -> Tensor:
    """What the same weights give when the whole model is converted."""
    wide = Model(model.function)
    wide.load_state_dict(model.state_dict())
    with torch.no_grad():
        return wide.eval()(ids)


IDS = torch.arange(10).reshape(2, 5)

FUNCTIONS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "linear": lambda self, x: self.inner(x),
    "linear_without_bias": lambda self, x: F.linear(x, self.inner.weight),
    "linear_with_bias_by_name": lambda self, x: F.linear(x, self.inner.weight, bias=self.inner.bias),
    "linear_by_names": lambda self, x: F.linear(input=x, weight=self.inner.weight, bias=self.inner.bias),
    "layer_norm": lambda self, x: self.norm(x),
    "multiply": lambda self, x: x * self.scale,
    "multiply_on_the_left": lambda self, x: self.scale * x,
    "matmul": lambda self, x: x @ self.inner.weight,
    "transposed_attribute": lambda self, x: x @ self.inner.weight.T,
    "transposed_method": lambda self, x: x @ self.inner.weight.t(),
    "rows_of_a_stack": lambda self, x: F.linear(x, self.stack[1]),
    "inside_a_list": lambda self, x: torch.cat([self.scale, x[0, 0]]).mean() * x,
    "cast_to_the_dtype_of_a_weight": lambda self, x: self.inner((x * 1.001).to(self.inner.weight.dtype)),
    "new_of_the_dtype_of_a_weight": lambda self, x: x + torch.full((8,), 1.001, dtype=self.scale.dtype),
    "buffer": lambda self, x: x @ self.table,
    "integer_buffer": lambda self, x: x * self.counts,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_computes_what_fp32_weights_compute(name: str):
    model = _narrow(FUNCTIONS[name])
    with torch.no_grad(), UpcastWeights(model, torch.float32):
        found = model(IDS)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, _in_fp32(model, IDS), rtol=0, atol=0)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_large_weights_are_converted_a_few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "CHUNK_BYTES", 8 * 4 * 3)
    model = _narrow(FUNCTIONS["linear"])
    converted: list[int] = []
    original = constants.Constant.rows

    def rows(self: constants.Constant, start: int, stop: int) -> Tensor:
        converted.append(stop - start)
        return original(self, start, stop)

    monkeypatch.setattr(constants.Constant, "rows", rows)
    with torch.no_grad(), UpcastWeights(model, torch.float32):
        found = model(IDS)
    torch.testing.assert_close(found, _in_fp32(model, IDS), rtol=1e-6, atol=1e-6)
    assert max(converted) == 3
    assert sum(converted) == 8 + 23


def test_nothing_changes_outside_the_mode():
    model = _narrow(FUNCTIONS["linear"])
    with torch.no_grad():
        before = model(IDS)
        with UpcastWeights(model, torch.float32):
            assert model(IDS).dtype == torch.float32
        assert before.dtype == model(IDS).dtype == torch.bfloat16
        assert model(IDS).equal(before)


def test_weights_of_the_dtype_asked_for_are_left_alone():
    model = randomize(Model(FUNCTIONS["linear"]))
    with torch.no_grad(), UpcastWeights(model, torch.float32):
        assert model(IDS).equal(_in_fp32(model, IDS))


def test_reading_attributes_of_a_weight_converts_nothing():
    model = _narrow(FUNCTIONS["linear"])
    weight = model.inner.weight
    with UpcastWeights(model, torch.float32):
        assert (tuple(weight.shape), weight.device.type, weight.numel(), weight.dim()) == ((8, 8), "cpu", 64, 2)
        assert weight.dtype == torch.float32  # as computations with it see it
    assert weight.dtype == torch.bfloat16


def test_evaluating_gives_every_submodule_its_mode_back():
    model = Model(FUNCTIONS["linear"]).train()
    model.norm.eval()
    before = [each.training for each in model.modules()]
    with evaluating(model):
        assert not any(each.training for each in model.modules())
    assert [each.training for each in model.modules()] == before


def test_evaluating_gives_modes_back_after_a_failure():
    model = Model(FUNCTIONS["linear"]).train()

    def fail() -> None:
        with evaluating(model):
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail()
    assert all(each.training for each in model.modules())
