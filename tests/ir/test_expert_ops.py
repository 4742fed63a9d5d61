"""`jettison::experts` and `jettison::quantized_experts`: reference, routing, shapes, and what is not computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from jettison.ir.compare import assert_close
from jettison.ir.constants import Constant
from jettison.ir.interpret import experts_of
from jettison.ir.ops.experts import experts
from jettison.ir.ops.quantized_experts import quantized_experts
from jettison.ir.ops.quantized_linear import dequantize_reference
from tests.models.tiny_models import tiny_model

EXPERTS, WIDTH, INNER, CHOICES = 5, 40, 24, 2


def stacks(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = ((EXPERTS, 2 * INNER, WIDTH), (EXPERTS, WIDTH, INNER))
    return tuple((torch.randn(s, generator=generator) / s[-1] ** 0.5).to(dtype) for s in shapes)


def routing(tokens: int, among: int = EXPERTS) -> tuple[Tensor, Tensor, Tensor]:
    """x, indices and weights; only the first `among` experts are chosen."""
    generator = torch.Generator().manual_seed(tokens)
    indices = torch.stack([torch.randperm(among, generator=generator)[:CHOICES] for _ in range(tokens)])
    return torch.randn(tokens, WIDTH, generator=generator), indices, torch.rand(tokens, CHOICES, generator=generator)


def written_out(x: Tensor, indices: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Token by token in fp64, as the docstring has it."""
    out = torch.zeros(x.shape, dtype=torch.float64)
    for token, place in torch.cartesian_prod(torch.arange(len(x)), torch.arange(indices.shape[1])).tolist():
        expert = indices[token, place]
        gate, up = F.linear(x[token].double(), gate_up[expert].double()).chunk(2)
        out[token] += weights[token, place].double() * F.linear(F.silu(gate) * up, down[expert].double())
    return out.to(x.dtype)


@pytest.mark.parametrize("tokens", [1, 7, 64])
def test_computes_what_its_docstring_says(tokens: int):
    operands = (*routing(tokens), *stacks())
    assert_close(experts(*operands, "silu"), written_out(*operands))


@pytest.mark.parametrize("tokens", [1, 7])
def test_is_bit_for_bit_what_transformers_computes(tokens: int):
    stock = tiny_model("mixtral").model.layers[0].mlp.experts
    stock.config._experts_implementation = "eager"
    x, _, weights = routing(tokens)
    indices = torch.stack([torch.randperm(3)[:2] for _ in range(tokens)])
    with torch.no_grad():
        expected = stock(x[:, :32], indices, weights)
        assert experts(x[:, :32], indices, weights, stock.gate_up_proj, stock.down_proj, "silu").equal(expected)


@pytest.mark.parametrize("tokens", [1, 7])
def test_experts_that_nobody_chose_are_not_read(tokens: int):
    gate_up, down = stacks()
    expected = experts(*routing(tokens, among=3), gate_up, down, "silu")
    gate_up[3:] = down[3:] = float("nan")
    assert experts(*routing(tokens, among=3), gate_up, down, "silu").equal(expected)


@pytest.mark.parametrize("tokens", [1, 7])
def test_one_expert_may_have_all_tokens_and_be_chosen_twice(tokens: int):
    x, indices, weights = routing(tokens)
    operands = (x, torch.full_like(indices, 4), weights, *stacks())
    assert_close(experts(*operands, "silu"), written_out(*operands))
    assert experts(*operands, "gelu").isfinite().all()
    assert not torch.allclose(experts(*operands, "gelu"), experts(*operands, "silu"))


def test_weights_may_be_zero_negative_and_of_another_dtype():
    x, indices, weights = routing(7)
    weights[0], weights[1] = 0, -1
    operands = (x, indices, weights.double(), *stacks())
    out = experts(*operands, "silu")
    assert_close(out, written_out(*operands))
    assert (out.dtype, out[0].abs().max().item()) == (torch.float32, 0)


def test_narrow_dtypes_sum_in_fp32():
    x, indices, weights = routing(7)
    operands = (x.bfloat16(), indices, weights, *stacks(torch.bfloat16))
    assert_close(experts(*operands, "silu"), written_out(*operands), tolerance=2e-2, reason="bf16 products")


def test_the_interpreter_converts_only_what_was_chosen():
    gate_up, down = stacks(torch.bfloat16)
    x, indices, weights = routing(7, among=3)
    read: list[int] = []

    class Watched(Constant):
        def rows(self, start: int, stop: int) -> Tensor:
            read.extend(range(start, stop))
            return super().rows(start, stop)

    constants = [Watched("stack", stack, torch.float32) for stack in (gate_up, down)]
    out = experts_of(x, indices, weights, *constants, "silu")
    assert out.equal(experts(x, indices, weights, gate_up.float(), down.float(), "silu"))
    assert sorted(set(read)) == sorted(set(indices.flatten().tolist()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 3, WIDTH)}, "one row per token"),
        ({1: torch.zeros(7, CHOICES)}, "indices must be integers"),
        ({2: torch.zeros(7, CHOICES + 1)}, "of one shape"),
        ({3: torch.zeros(EXPERTS, 2 * INNER, WIDTH + 1)}, r"stacks must be \[X, 2 \* F, 40\]"),
        ({4: torch.zeros(EXPERTS - 1, WIDTH, INNER)}, "stacks must be"),
        ({4: torch.zeros(EXPERTS, WIDTH, INNER, dtype=torch.bfloat16)}, "the dtype of x"),
    ],
)
def test_refuses_operands_that_do_not_fit(change: dict[int, Tensor], message: str):
    operands = [*routing(7), *stacks()]
    for place, value in change.items():
        operands[place] = value
    with pytest.raises(RuntimeError, match=message):
        experts(*operands, "silu")


# Packed.


def packed_stack(
    rows: int, columns: int, bits: int, group: int, has_zeros: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Every byte pattern is legal, so all codes, zero points and signs of scales occur."""
    generator = torch.Generator().manual_seed(rows * columns + bits)
    blocks = -(-columns // group)

    def drawn(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    zeros = drawn(EXPERTS, rows, -(-blocks * bits // 8)) if has_zeros else None
    scales = torch.randn(EXPERTS, rows, blocks, generator=generator) / 2**bits / columns**0.5
    return drawn(EXPERTS, rows, blocks, group * bits // 8), scales, zeros


def decoded(parts: tuple[Tensor, Tensor, Tensor | None], bits: int, group: int, columns: int) -> Tensor:
    flat = [None if part is None else part.flatten(0, 1) for part in parts]
    return dequantize_reference(*flat, bits, group, columns).unflatten(0, (EXPERTS, -1))


@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize("has_zeros", [True, False])
@pytest.mark.parametrize(("up", "down"), [((4, 32), (4, 32)), ((8, 32), (4, 16)), ((2, 64), (8, 128))])
def test_packed_experts_compute_with_the_decoded_stacks(
    tokens: int, has_zeros: bool, up: tuple[int, int], down: tuple[int, int]
):
    """Neither 40 nor 24 is a multiple of every group: the last group of a row is padded."""
    gate_up, out = packed_stack(2 * INNER, WIDTH, *up, has_zeros), packed_stack(WIDTH, INNER, *down, has_zeros)
    operands = routing(tokens)
    expected = experts(*operands, decoded(gate_up, *up, WIDTH), decoded(out, *down, INNER), "silu")
    assert_close(quantized_experts(*operands, *gate_up, *out, "silu", *up, *down), expected)


def test_packed_experts_that_nobody_chose_are_not_read():
    gate_up, down = packed_stack(2 * INNER, WIDTH, 4, 32, True), packed_stack(WIDTH, INNER, 4, 32, True)
    for _, scales, _ in (gate_up, down):
        scales[3:] = float("nan")
    assert quantized_experts(*routing(7, among=3), *gate_up, *down, "silu", 4, 32, 4, 32).isfinite().all()


def test_packed_experts_refuse_parts_that_do_not_fit():
    gate_up, down = packed_stack(2 * INNER, WIDTH, 4, 32, True), packed_stack(WIDTH, INNER, 4, 32, True)
    for parts, message in (
        ((gate_up[0].flatten(0, 1), *gate_up[1:], *down), "gate_up_codes must be"),
        ((*gate_up, down[0][:-1], *down[1:]), "down_codes must be"),
        ((gate_up[0], gate_up[1][0], gate_up[2], *down), "gate_up_scales must have three axes"),
        ((*gate_up, *down[:2], down[2][:, :, :0]), r"zeros must be u8\[40, 1\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            quantized_experts(*routing(7), *parts, "silu", 4, 32, 4, 32)


def test_fake_rules_return_the_strides_that_the_operators_return():
    gate_up, down = packed_stack(2 * INNER, WIDTH, 4, 32, False), packed_stack(WIDTH, INNER, 4, 32, False)
    dense, packed = (*stacks(), "silu"), (*gate_up, *down, "silu", 4, 32, 4, 32)
    x, indices, weights = routing(7)
    x = x.t().contiguous().t()  # a result must not inherit these strides
    for operator, operands in ((experts, dense), (quantized_experts, packed)):
        real = operator(x, indices, weights, *operands)
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(o) if isinstance(o, Tensor) else o for o in (x, indices, weights, *operands)]
            fake = operator(*fakes)
        assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), real.dtype)
