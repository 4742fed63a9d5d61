"""Products with dense fp32 weights: the same numbers whichever library multiplies, and every shape of x."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.runtime import dense_linear
from jettison.runtime.dense_linear import FEWEST_PRODUCTS, has_onednn, run_dense_linear

needs_onednn = pytest.mark.skipif(not has_onednn(), reason="needs AVX-512 and a build with oneDNN")


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.mark.parametrize("shape", [(1, 512), (7, 512), (2, 3, 512), (1, 0, 512), (64, 512), (512,)])
@pytest.mark.parametrize("width", [65, 4096])
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_a_linear(shape: tuple[int, ...], width: int, has_bias: bool) -> None:
    x, weight, bias = drawn(*shape), drawn(width, 512), drawn(width) if has_bias else None
    found, wanted = run_dense_linear(x, weight, bias), F.linear(x, weight, bias)
    assert found.shape == wanted.shape
    assert found.is_contiguous()
    # Sums of 512 products of normal numbers, in another order.
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=5e-5)


def test_an_x_that_is_not_contiguous() -> None:
    x, weight = drawn(3, 512, 40).transpose(1, 2), drawn(2048, 512)
    assert x.numel() * len(weight) >= FEWEST_PRODUCTS
    torch.testing.assert_close(run_dense_linear(x, weight), F.linear(x, weight), rtol=1e-5, atol=5e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_types_are_multiplied_as_before(dtype: torch.dtype) -> None:
    x, weight = drawn(64, 512).to(dtype), drawn(2048, 512).to(dtype)
    assert torch.equal(run_dense_linear(x, weight), F.linear(x, weight))


@needs_onednn
def test_small_products_do_not_pay_for_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    multiplied: list[str] = []
    monkeypatch.setattr(dense_linear.F, "linear", lambda x, *_: multiplied.append("mkl") or x)
    weight = drawn(2048, 512)
    run_dense_linear(drawn(1, 512), weight)
    assert multiplied == ["mkl"]
    run_dense_linear(drawn(2, 512), weight)
    assert multiplied == ["mkl"]


def test_a_build_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_linear, "has_onednn", lambda: False)
    x, weight = drawn(64, 512), drawn(2048, 512)
    assert torch.equal(run_dense_linear(x, weight), F.linear(x, weight))


@pytest.mark.parametrize("tokens", [1, 17, 300])
@pytest.mark.parametrize("height", [64, 192, 1024])
def test_slabs_are_multiplied_as_the_whole_is(tokens: int, height: int) -> None:
    x, weight, bias = drawn(tokens, 1024), drawn(3000, 1024), drawn(3000)
    slabs = [slice(start, start + height) for start in range(0, 3000, height)]
    found = [run_dense_linear(x, weight[rows], bias[rows], 3000) for rows in slabs]
    assert torch.equal(torch.cat(found, -1), run_dense_linear(x, weight, bias))
