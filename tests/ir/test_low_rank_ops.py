"""`low_rank_mlp` and `low_rank_attention` against their definition, their fake rules, and their checks."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from jettison.ir.compare import assert_close
from jettison.ir.ops import attention, low_rank_attention, low_rank_mlp, rotary_embedding
from jettison.ir.ops.gated_activation import ACTIVATIONS
from tests.helpers import weight_values


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Values in [-2, 2)."""
    return (4 * weight_values(math.prod(shape), seed)).reshape(shape).float()


def mlp_args(
    rows: int = 2, steps: int = 3, *, gated: bool = True, biased: bool = True, is_low: bool = True,
    activation: str = "silu",
) -> tuple[Any, ...]:  # fmt: skip
    """Operands with E 6, F 10, ranks 4, 5 and 3."""
    return (
        numbers(rows, steps, 4, seed=1) if gated else None, numbers(rows, steps, 5, seed=2),
        numbers(10, 4, seed=3) if gated else None, numbers(10, seed=4) if gated and biased else None,
        numbers(10, 5, seed=5), numbers(10, seed=6) if biased else None,
        numbers(3 if is_low else 6, 10, seed=7), numbers(6, 3, seed=8) if is_low else None,
        numbers(6, seed=9) if biased else None, activation,
    )  # fmt: skip


def attention_args(
    rows: int = 2, steps: int = 3, *, heads: int = 4, kv_heads: int = 2, rotated: int = 4, biased: bool = True,
    options: tuple[Any, ...] = (0.5, True, 0, 0.0),
) -> tuple[Any, ...]:  # fmt: skip
    """Operands with heads of 4 channels, values of 2, ranks 5, 3 and 1."""
    widths = (heads * 4, kv_heads * 4, kv_heads * 2)
    factors = [
        part
        for index, (width, rank) in enumerate(zip(widths, (5, 3, 1), strict=True))
        for part in (numbers(width, rank, seed=index), numbers(width, seed=9 + index) if biased else None)
    ]
    angles = numbers(1, steps, rotated // 2, seed=20) if rotated else None
    turns = (None, None) if angles is None else (angles.cos(), angles.sin())
    valid = torch.ones(rows, steps, dtype=torch.int64).index_fill(1, torch.tensor([steps - 1]), 0)
    inputs = [numbers(rows, steps, rank, seed=30 + rank) for rank in (5, 3, 1)]
    return (*inputs, *factors, *turns, None, None, valid, None, heads, kv_heads, False, *options)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("gated", [True, False])
def test_low_rank_mlp_is_one_linear_after_the_other(activation, gated):
    given = mlp_args(gated=gated, activation=activation)
    gate, up, gate_rows, gate_bias, up_rows, up_bias, columns, rows, bias, _ = (
        each.double() if isinstance(each, Tensor) else each for each in given
    )
    hidden = up @ up_rows.T + up_bias
    hidden = (
        ACTIVATIONS[activation](gate @ gate_rows.T + gate_bias) * hidden if gated else ACTIVATIONS[activation](hidden)
    )
    expected = hidden @ columns.T @ rows.T + bias
    assert_close(low_rank_mlp(*given), expected.float())
    # A dense second linear is the product of its factors.
    whole = list(given)
    whole[6:8] = [(rows @ columns).float(), None]
    assert_close(low_rank_mlp(*whole), expected.float())


def test_low_rank_attention_is_linears_a_rotation_and_an_attention():
    given = attention_args(2, 5)
    query, key, value, q_rows, q_bias, k_rows, k_bias, v_rows, v_bias, cos, sin, _, _, valid, *_ = given
    wide = [
        x @ rows.T + bias for x, rows, bias in ((query, q_rows, q_bias), (key, k_rows, k_bias), (value, v_rows, v_bias))
    ]
    heads = [each.unflatten(-1, (count, -1)).transpose(1, 2) for each, count in zip(wide, (4, 2, 2), strict=True)]
    turned = [rotary_embedding(each, cos, sin, False) for each in heads[:2]]
    expected = attention(*turned, heads[2], None, None, valid, None, 0.5, True, 0, 0.0)
    out = low_rank_attention(*given)
    assert out.shape == (2, 5, 4, 2)
    assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({0: None}, "gate and gate_rows must be given together"),
        ({0: None, 2: None}, "gate_bias needs a gate"),
        ({0: numbers(2, 2, 4)}, "gate must have the tokens"),
        ({2: numbers(10, 5)}, "gate_rows must be"),
        ({4: numbers(10, 5).double()}, "up_rows must be"),
        ({6: numbers(3, 9)}, "columns must be"),
        ({7: numbers(6, 4)}, "rows must be"),
        ({3: numbers(9)}, "gate_bias must have 10"),
        ({5: numbers(9)}, "up_bias must have 10"),
        ({8: numbers(3)}, "bias must have 6"),
    ],
)
def test_low_rank_mlp_checks_its_operands(change, words):
    args = list(mlp_args())
    for index, value in change.items():
        args[index] = value
    with pytest.raises(RuntimeError, match=words):
        low_rank_mlp(*args)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({15: 3}, "2 kv_heads must divide 3 heads"),
        ({9: None}, "cos and sin must be given together"),
        ({0: numbers(2, 5)}, "query must have three axes"),
        ({3: numbers(15, 5)}, "15 rows be 4 heads"),
        ({5: numbers(8, 4)}, "key_rows must be"),
        ({8: numbers(5)}, "value_bias must have 4"),
        ({3: numbers(8, 5), 4: None}, "equally wide"),
    ],
)
def test_low_rank_attention_checks_its_operands(change, words):
    args = list(attention_args())
    for index, value in change.items():
        args[index] = value
    with pytest.raises(RuntimeError, match=words):
        low_rank_attention(*args)


CALLS = [
    (low_rank_mlp, mlp_args()),
    (low_rank_mlp, mlp_args(1, 1, gated=False, biased=False)),
    (low_rank_mlp, mlp_args(is_low=False)),
    (low_rank_attention, attention_args()),
    (low_rank_attention, attention_args(1, 1, rotated=0, biased=False)),
    (low_rank_attention, attention_args(3, 2, rotated=2, options=(0.5, False, 2, 1.5))),
]


@pytest.mark.parametrize("number", range(len(CALLS)))
def test_fake_rule_gives_the_shape_dtype_and_strides_of_the_real_one(number):
    operator, args = CALLS[number]
    mode = FakeTensorMode()
    with mode:
        fake = operator(*(mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args))
    real = operator(*args)
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
    assert real.is_contiguous()
    torch.library.opcheck(operator, args, test_utils=("test_schema", "test_faketensor"))
