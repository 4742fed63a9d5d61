"""Operators that the torch runtime replaces, against those they replace."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jettison.ir import ops
from jettison.ir.compare import assert_close
from jettison.runtime.lowered_entry import _PARSED, rotary_factors, rotate, take_rows


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotated", [8, 6])
@pytest.mark.parametrize(("rows", "steps"), [(1, 1), (2, 1), (2, 5)])
def test_rotate(rows: int, steps: int, rotated: int, interleaved: bool) -> None:
    angles = random(rows, steps, rotated // 2, seed=1)
    # As from a projection: heads behind positions.
    x = random(rows, steps, 3, 8).transpose(1, 2)
    cos, sin = angles.cos(), angles.sin()
    result = rotate(x, cos, sin, interleaved, rotary_factors(cos, sin))
    assert result.is_contiguous()
    assert_close(result, ops.rotary_embedding(x, cos, sin, interleaved))


def test_rotate_keeps_the_dtype_of_x() -> None:
    angles, x = random(1, 4, 4), random(1, 2, 4, 8).bfloat16()
    cos, sin = angles.cos(), angles.sin()
    result = rotate(x, cos, sin, False, rotary_factors(cos, sin))
    assert torch.equal(result, ops.rotary_embedding(x, cos, sin, False))


@pytest.mark.parametrize("bias", [None, random(4)])
def test_take_rows(bias: Tensor | None) -> None:
    joint = random(2, 3, 10)
    result = take_rows(joint, 5, 4, bias)
    assert result.is_contiguous()
    assert torch.equal(result, joint[..., 5:9] if bias is None else joint[..., 5:9] + bias)
    step = random(1, 1, 10)
    assert (take_rows(step, 5, 4, None).data_ptr() == step[..., 5:].data_ptr()) is True


def test_parsed_operators_are_the_same_operators() -> None:
    x, weight = random(2, 3, 8), random(8)
    arguments = {
        "add.Tensor": (x, x), "mul.Tensor": (x, 2.0), "reshape": (x, [2, -1]), "rms_norm": (x, [8], weight, 1e-6),
        "sym_size.int": (x, 1), "transpose.int": (x, 1, 2),
    }  # fmt: skip
    assert len(arguments) == len(_PARSED)
    for operator, parsed in _PARSED.items():
        given = arguments[str(operator).removeprefix("aten.").removesuffix(".default")]
        expected, result = operator(*given), parsed(*given)
        assert torch.equal(torch.as_tensor(result), torch.as_tensor(expected))
