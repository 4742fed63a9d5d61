"""`jettison::sparse_mlp` and `jettison::quantized_sparse_mlp`: reference, groups, stand-ins, refusals."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from jettison.ir.compare import assert_close
from jettison.ir.ops import quantized_sparse_mlp, sparse_mlp
from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.ir.ops.quantized_linear import dequantize_reference
from tests.helpers import weight_values

WIDTH, NEURONS, GROUP, KEPT = 12, 40, 8, 2
GROUPS = NEURONS // GROUP
SHAPES = ((1, WIDTH), (7, WIDTH), (2, 3, WIDTH))
OPTIONAL = ("gate", "up_bias", "down_bias", "absent")


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Values in [-1, 1)."""
    return (2 * weight_values(math.prod(shape), seed)).reshape(shape).float()


def some_groups(*shape: int, groups: int = GROUPS, kept: int = KEPT) -> Tensor:
    """Different ones for each token."""
    scores = numbers(*shape, groups, seed=sum(shape))
    return scores.topk(kept, -1).indices


def operands(*given: str) -> dict[str, Tensor | None]:
    """Weights of a layer, with those optional ones that are named."""
    made = {
        "gate": numbers(NEURONS, WIDTH, seed=1), "up": numbers(NEURONS, WIDTH, seed=2),
        "up_bias": numbers(NEURONS, seed=3), "down": numbers(NEURONS, WIDTH, seed=4),
        "down_bias": numbers(WIDTH, seed=5), "absent": numbers(GROUPS + 1, WIDTH, seed=6),
    }  # fmt: skip
    made["absent"][-1] = made["absent"][:-1].sum(0)
    return {name: value if name in ("up", "down", *given) else None for name, value in made.items()}


def written_out(x: Tensor, indices: Tensor | None, activation: str, group: int, **weights: Any) -> Tensor:
    """Token by token and neuron by neuron in fp64, as the docstring has it."""
    gate, up, up_bias, down, down_bias, absent = (None if w is None else w.double() for w in weights.values())
    rows, out = x.reshape(-1, x.shape[-1]).double(), []
    groups = up.shape[0] // group
    named = [range(groups)] * len(rows) if indices is None else indices.reshape(-1, indices.shape[-1]).tolist()
    for row, its_groups in zip(rows, named, strict=True):
        total = torch.zeros_like(row) if down_bias is None else down_bias.clone()
        for number in range(groups):
            if number not in its_groups:
                total += 0 if absent is None else absent[number]
                continue
            for neuron in range(number * group, (number + 1) * group):
                value = up[neuron] @ row + (0 if up_bias is None else up_bias[neuron])
                if gate is None:
                    value = ACTIVATIONS[activation](value)
                else:
                    value = ACTIVATIONS[activation](gate[neuron] @ row) * value
                total += value * down[neuron]
        out.append(total)
    return torch.stack(out).reshape(x.shape).to(x.dtype)


def in_order(x: Tensor, indices: Tensor | None, weights: dict[str, Any]) -> tuple[Any, ...]:
    return (x, indices, *weights.values())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "given", [(), ("gate",), ("up_bias", "down_bias"), ("absent",), ("gate", "up_bias"), OPTIONAL], ids="-".join
)
def test_computes_what_its_docstring_says(given: tuple[str, ...], shape: tuple[int, ...]):
    x, weights = numbers(*shape, seed=9), operands(*given)
    for indices in (some_groups(*shape[:-1]), None):
        for activation in ("relu", "silu"):
            out = sparse_mlp(*in_order(x, indices, weights), activation, GROUP)
            assert_close(out, written_out(x, indices, activation, GROUP, **weights))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str):
    x, indices = numbers(7, WIDTH), some_groups(7)
    for weights in (operands(*OPTIONAL), operands("up_bias")):
        out = sparse_mlp(*in_order(x, indices, weights), activation, GROUP)
        assert_close(out, written_out(x, indices, activation, GROUP, **weights))


def test_naming_every_group_is_the_dense_layer():
    """In any order; nothing stands in then."""
    x, weights = numbers(7, WIDTH), operands(*OPTIONAL)
    every = torch.stack([torch.arange(GROUPS).roll(turn) for turn in range(7)])
    dense = sparse_mlp(*in_order(x, None, weights), "silu", GROUP)
    assert_close(sparse_mlp(*in_order(x, every, weights), "silu", GROUP), dense)
    without = operands("gate", "up_bias", "down_bias")
    assert torch.equal(dense, sparse_mlp(*in_order(x, None, without), "silu", GROUP))


def test_the_groups_in_which_a_relu_fires_are_all_of_it():
    """One group of neurons for each kind of token, and biases that keep the others silent."""
    kinds = torch.tensor([0, 3, 3, 1, 4, 2, 0])
    weights = operands("up_bias", "down_bias")
    weights["up"] = numbers(NEURONS, WIDTH, seed=2).abs() * 0.1
    weights["up"][torch.arange(NEURONS), torch.arange(NEURONS) // GROUP] += 4
    weights["up_bias"] = -2 - numbers(NEURONS, seed=3).abs()
    x = numbers(7, WIDTH).abs() * 0.1
    x[torch.arange(7), kinds] += 2
    out = sparse_mlp(*in_order(x, kinds[:, None], weights), "relu", GROUP)
    dense = sparse_mlp(*in_order(x, None, weights), "relu", GROUP)
    assert_close(out, dense, tolerance=1e-6)
    others = sparse_mlp(*in_order(x, (kinds[:, None] + 1) % GROUPS, weights), "relu", GROUP)
    assert (others - dense).abs().max() > 0.1


def test_tokens_do_not_touch_one_another():
    x, indices, weights = numbers(7, WIDTH), some_groups(7), operands(*OPTIONAL)
    together = sparse_mlp(*in_order(x, indices, weights), "silu", GROUP)
    for row in range(7):
        alone = sparse_mlp(*in_order(x[row : row + 1], indices[row : row + 1], weights), "silu", GROUP)
        assert_close(together[row : row + 1], alone)


def test_naming_a_group_twice_is_naming_it():
    """Without stand-ins; tokens are to name different groups, and `topk` does."""
    x, weights = numbers(7, WIDTH), operands("gate", "up_bias", "down_bias")
    once = some_groups(7, kept=1)
    twice = sparse_mlp(*in_order(x, once.expand(7, 2), weights), "silu", GROUP)
    assert torch.equal(twice, sparse_mlp(*in_order(x, once, weights), "silu", GROUP))


def test_neurons_that_nobody_named_may_be_anything_finite():
    x, weights = numbers(7, WIDTH), operands("gate", "up_bias")
    indices = some_groups(7, groups=3)
    expected = sparse_mlp(*in_order(x, indices, weights), "silu", GROUP)
    for name in ("gate", "up", "down"):
        weights[name][3 * GROUP :] = 1e3
    assert_close(sparse_mlp(*in_order(x, indices, weights), "silu", GROUP), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_dtypes_keep_theirs(dtype: torch.dtype):
    x, indices = numbers(7, WIDTH).to(dtype), some_groups(7)
    weights = {name: None if value is None else value.to(dtype) for name, value in operands(*OPTIONAL).items()}
    out = sparse_mlp(*in_order(x, indices, weights), "silu", GROUP)
    assert out.dtype == dtype
    expected = written_out(x, indices, "silu", GROUP, **weights)
    assert_close(out, expected, tolerance=5e-2, reason="activations and sums are rounded to the dtype")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 7}, "groups of 7 must divide the 40 neurons"),
        ({"group": 0}, "groups of 0 must divide"),
        ({"indices": torch.zeros(7, KEPT)}, r"indices must be integers with as many axes as x \(2\)"),
        ({"indices": torch.zeros(7, dtype=torch.int64)}, "as many axes as x"),
        ({"gate": torch.zeros(NEURONS, WIDTH + 1)}, r"gate must be torch.float32\[40, 12\], found torch.*13\]"),
        ({"up": torch.zeros(NEURONS, WIDTH + 1)}, r"up must be torch.float32\[40, 12\]"),
        ({"down": torch.zeros(WIDTH, NEURONS)}, r"down must be torch.float32\[40, 12\], found torch.float32\[12, 40\]"),
        ({"down": torch.zeros(NEURONS, WIDTH, dtype=torch.bfloat16)}, "found torch.bfloat16"),
        ({"up_bias": torch.zeros(NEURONS - 1)}, "up_bias must have 40 values"),
        ({"down_bias": torch.zeros(1)}, "down_bias must have 12 values"),
        ({"absent": torch.zeros(GROUPS, WIDTH)}, r"absent must be \[6, 12\], found \[5, 12\]"),
    ],
)  # fmt: skip
def test_refuses_operands_that_do_not_fit(change: dict[str, Any], message: str):
    given = {"x": numbers(7, WIDTH), "indices": some_groups(7), **operands(*OPTIONAL), "activation": "silu"}
    call = {**given, "group": GROUP, **change}
    with pytest.raises(RuntimeError, match=message):
        sparse_mlp(*call.values())
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match=message):
        sparse_mlp(*(mode.from_tensor(each) if isinstance(each, Tensor) else each for each in call.values()))


# Packed.

IN, OUT_GROUP = 48, 16


def packed(
    rows: int, columns: int, bits: int, group: int, has_zeros: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Every byte pattern is legal, so all codes, zero points and signs of scales occur."""
    generator = torch.Generator().manual_seed(rows * columns + bits)
    blocks = -(-columns // group)

    def drawn(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    zeros = drawn(rows, -(-blocks * bits // 8)) if has_zeros else None
    scales = torch.randn(rows, blocks, generator=generator) / 2**bits / columns**0.5
    return drawn(rows, blocks, group * bits // 8), scales, zeros


def packed_call(
    x: Tensor, indices: Tensor, up: tuple[int, int] = (4, 32), down: tuple[int, int] = (4, OUT_GROUP),
    *, is_gated: bool = True, has_rest: bool = True, has_zeros: bool = True, neurons: int = 96, group: int = 32,
) -> tuple[dict[str, Any], dict[str, Tensor | None]]:  # fmt: skip
    """Arguments of the packed operator by name, and the decoded weights."""
    parts = {
        "gate": packed(neurons, IN, *up, has_zeros) if is_gated else (None, None, None),
        "up": packed(neurons, IN, *up, has_zeros),
        "down": packed(IN, neurons, *down, has_zeros),
    }
    parts["up"] = (parts["up"][0].flip(0).contiguous(), *parts["up"][1:])  # not the gate
    rest = {
        "up_bias": numbers(neurons, seed=3), "down_bias": numbers(IN, seed=5),
        "absent": numbers(neurons // group + 1, IN, seed=6),
    }  # fmt: skip
    rest["absent"][-1] = rest["absent"][:-1].sum(0)
    rest = rest if has_rest else dict.fromkeys(rest)
    call: dict[str, Any] = {"x": x, "indices": indices}
    for name in ("gate", "up"):
        call |= {f"{name}_{part}": value for part, value in zip(("codes", "scales", "zeros"), parts[name], strict=True)}
    call["up_bias"] = rest["up_bias"]
    call |= {f"down_{part}": value for part, value in zip(("codes", "scales", "zeros"), parts["down"], strict=True)}
    call |= {"down_bias": rest["down_bias"], "absent": rest["absent"], "activation": "silu", "group": group}
    call |= {"up_bits": up[0], "up_group": up[1], "down_bits": down[0], "down_group": down[1]}
    dense = {
        "gate": dequantize_reference(*parts["gate"], *up, IN) if is_gated else None,
        "up": dequantize_reference(*parts["up"], *up, IN), "up_bias": rest["up_bias"],
        "down": dequantize_reference(*parts["down"], *down, neurons).T, "down_bias": rest["down_bias"],
        "absent": rest["absent"],
    }  # fmt: skip
    return {**call, "width": IN, "neurons": neurons}, dense


@pytest.mark.parametrize("shape", [(1, IN), (7, IN), (2, 3, IN)], ids=str)
@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize(
    ("up", "down"), [((4, 32), (4, 16)), ((8, 16), (4, 32)), ((2, 64), (8, 32)), ((3, 32), (3, 32))]
)
def test_packed_layers_compute_with_the_decoded_weights(
    up: tuple[int, int], down: tuple[int, int], is_gated: bool, shape: tuple[int, ...]
):
    """48 columns are no multiple of every group: the last group of a row is padded."""
    x, indices = numbers(*shape, seed=9), some_groups(*shape[:-1], groups=3, kept=2)
    for rest in (True, False):
        call, dense = packed_call(x, indices, up, down, is_gated=is_gated, has_rest=rest, has_zeros=rest)
        expected = written_out(x, indices, "silu", 32, **dense)
        assert_close(quantized_sparse_mlp(*call.values()), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": 24}, "groups of 24 neurons must be whole groups of 16 columns of down"),
        ({"group": 64}, "groups of 64 must divide the 96 neurons"),
        ({"indices": torch.zeros(7, 2)}, "indices must be integers"),
        ({"neurons": 192}, "up must have 192 rows, down and x 48 rows and columns, found 96, 48 and 48"),
        ({"x": numbers(7, IN + 1)}, "found 96, 48 and 49"),
        ({"up_scales": numbers(96, 3)}, r"scales must be floating point \[96, 2\]"),
        ({"down_zeros": torch.zeros(IN, 2, dtype=torch.uint8)}, r"zeros must be u8\[48, 3\]"),
        ({"gate_codes": torch.zeros(95, 2, 16, dtype=torch.uint8)}, "gate must have the codes of up"),
        ({"gate_scales": None}, "gate_scales must be given with gate_codes"),
        ({"up_bias": torch.zeros(1)}, "up_bias must have 96 values"),
        ({"down_bias": torch.zeros(1)}, "down_bias must have 48 values"),
        ({"absent": torch.zeros(3, IN)}, r"absent must be \[4, 48\]"),
    ],
)
def test_packed_layers_refuse_operands_that_do_not_fit(change: dict[str, Any], message: str):
    call, _ = packed_call(numbers(7, IN), some_groups(7, groups=3))
    call |= change
    with pytest.raises(RuntimeError, match=message):
        quantized_sparse_mlp(*call.values())
    with FakeTensorMode() as mode, pytest.raises(RuntimeError, match=message):
        quantized_sparse_mlp(*(mode.from_tensor(each) if isinstance(each, Tensor) else each for each in call.values()))


@pytest.mark.parametrize("has_rest", [True, False])
def test_the_packed_operator_has_the_right_fake_rule(has_rest: bool):
    x = numbers(IN, 7).T  # a result must not inherit these strides
    call, _ = packed_call(x, some_groups(7, groups=3), has_rest=has_rest)
    torch.library.opcheck(quantized_sparse_mlp, tuple(call.values()), test_utils=("test_schema", "test_faketensor"))
    out = quantized_sparse_mlp(*call.values())
    with FakeTensorMode() as mode:
        fake = quantized_sparse_mlp(*(mode.from_tensor(o) if isinstance(o, Tensor) else o for o in call.values()))
    assert (fake.shape, fake.stride(), fake.dtype) == (out.shape, out.stride(), out.dtype)
    assert out.is_contiguous()
