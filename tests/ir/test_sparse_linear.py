"""`sparse_linear` against its definition, its fake rule, and its checks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from jettison.ir.compare import assert_close
from jettison.ir.ops import sparse_linear
from tests.helpers import weight_values


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Values in [-2, 2)."""
    return (4 * weight_values(math.prod(shape), seed)).reshape(shape).float()


def sparse_args(rows: int = 2, steps: int = 3, kept: int | None = 3, biased: bool = True) -> tuple[Any, ...]:
    x = numbers(rows, steps, 8, seed=1)
    indices = None if kept is None else x.abs().topk(kept, -1).indices
    return x, indices, numbers(8, 5, seed=2), numbers(5, seed=3) if biased else None


@pytest.mark.parametrize("kept", [1, 3, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sparse_linear_adds_up_the_rows_that_a_token_names(kept, dtype):
    x, indices, weight, bias = (a.to(dtype) if a.is_floating_point() else a for a in sparse_args(kept=kept))
    out = sparse_linear(x, indices, weight, bias)
    for row in range(2):
        for step in range(3):
            named = indices[row, step]
            expected = bias.double() + sum(x[row, step, i].double() * weight[i].double() for i in named)
            assert torch.allclose(out[row, step].double(), expected, atol=1e-5 if dtype == torch.float32 else 0.1)
    if kept == 8:
        assert_close(out, sparse_linear(x, None, weight, bias))
        assert_close(out, torch.nn.functional.linear(x, weight.T, bias))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({2: numbers(7, 5)}, "weight must be"),
        ({2: numbers(8, 5).double()}, "weight must be"),
        ({1: torch.zeros(2, 3, dtype=torch.int64)}, "as many axes as x"),
        ({1: torch.zeros(2, 3, 1)}, "must be integers"),
        ({3: numbers(8)}, "bias must have 5"),
    ],
)
def test_sparse_linear_checks_its_operands(change, words):
    args = list(sparse_args())
    for index, value in change.items():
        args[index] = value
    with pytest.raises(RuntimeError, match=words):
        sparse_linear(*args)


CALLS = [sparse_args(), sparse_args(1, 1, 8, False), sparse_args(kept=None), sparse_args(1, 5, 1)]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_fake_rule_gives_the_shape_dtype_and_strides_of_the_real_one(number):
    args = CALLS[number]
    mode = FakeTensorMode()
    with mode:
        fake = sparse_linear(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    real = sparse_linear(*args)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert real.is_contiguous()
    torch.library.opcheck(sparse_linear, args, test_utils=("test_schema", "test_faketensor"))
