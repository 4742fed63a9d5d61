"""Numbers of the kernels over slabs against the operators, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from jettison.codegen.triton.kernels.base import Tuning
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.kernels.gather_down import GatherDown
from jettison.codegen.triton.kernels.gather_packed_down import GatherPackedDown
from jettison.codegen.triton.kernels.gather_up import GatherUp
from jettison.codegen.triton.kernels.weight_form import WeightForm
from jettison.codegen.triton.launch import Launcher
from jettison.codegen.triton.word_layout import to_words
from jettison.ir import ops
from jettison.ir.ops.quantized_linear import pack_codes, pack_zeros
from tests.codegen.test_triton_kernels import DEVICE, FP32

BF16, HALF = torch.bfloat16, torch.float16
GROUPS = 5


@dataclass(frozen=True)
class Case:
    """A layer and what is asked of it."""

    tokens: int
    kept: int
    group: int
    width: int
    activation: str = "relu"
    is_gated: bool = False
    has_rest: bool = False  # biases, stand-ins and residual
    dtype: torch.dtype = FP32
    bits: tuple[int, int] = (0, 0)  # of up and down
    columns: int = 32  # that share a scale
    has_zeros: bool = True

    @property
    def neurons(self) -> int:
        return GROUPS * self.group


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def packed(generator: torch.Generator, rows: int, columns: int, bits: int, case: Case) -> list[Any]:
    """Codes, scales and zeros."""
    blocks = -(-columns // case.columns)
    codes = torch.randint(0, 2**bits, (rows, blocks, case.columns), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(rows, blocks, generator=generator) + 0.5) * 2**-bits / columns**0.5
    zeros = torch.randint(0, 2**bits, (rows, blocks), generator=generator)
    return [pack_codes(codes, bits), scales, pack_zeros(zeros, bits) if case.has_zeros else None]


def on_device(*given: Tensor | None) -> list[Tensor]:
    """Those that there are."""
    return [each.to(DEVICE) for each in given if each is not None]


class Layer:
    """Random weights and inputs of a case, the operator over them, and the kernels."""

    def __init__(self, case: Case) -> None:
        self.case, generator = case, torch.Generator().manual_seed(case.tokens + case.kept + case.width)
        width, neurons, dtype = case.width, case.neurons, case.dtype
        self.x = normal(generator, case.tokens, width).to(dtype)
        self.indices = torch.stack([
            torch.randperm(GROUPS, generator=generator)[: case.kept] for _ in range(case.tokens)
        ])  # fmt: skip
        rest = [normal(generator, *shape).to(dtype) for shape in [(neurons,), (width,), (GROUPS + 1, width)]]
        self.up_bias, self.down_bias, self.absent = rest if case.has_rest else [None, None, None]
        self.residual = normal(generator, case.tokens, width).to(dtype) if case.has_rest else None
        halves = 1 + case.is_gated
        if case.bits[0]:
            self.up = [packed(generator, neurons, width, case.bits[0], case) for _ in range(halves)]
            self.down = packed(generator, width, neurons, case.bits[1], case)
        else:
            self.up = [(normal(generator, neurons, width) / width**0.5).to(dtype) for _ in range(halves)]
            self.down = (normal(generator, neurons, width) / (case.kept * case.group) ** 0.5).to(dtype)

    def expected(self) -> Tensor:
        """By the operator, in fp32 with the same weights."""
        case = self.case
        wide = lambda value: None if value is None else value.float()  # noqa: E731
        x, absent = self.x.float(), wide(self.absent)
        rest = [wide(self.up_bias), wide(self.down_bias)]
        if not case.bits[0]:
            *gate, up = map(wide, self.up)
            given = [x, self.indices, gate[0] if gate else None, up, rest[0], self.down.float(), rest[1], absent]
            out = ops.sparse_mlp(*given, case.activation, case.group)
        else:
            *gate, up = self.up
            parts = [*(gate[0] if gate else [None] * 3), *up, rest[0], *self.down, rest[1], absent]
            layout = [case.bits[0], case.columns, case.bits[1], case.columns, case.width, case.neurons]
            out = ops.quantized_sparse_mlp(x, self.indices, *parts, case.activation, case.group, *layout)
        return out if self.residual is None else out + self.residual.float()

    def words(self, parts: list[Any], bits: int) -> list[Tensor]:
        scale = FP32 if self.case.dtype == FP32 else HALF
        return to_words(*parts, bits, self.case.columns, scale, DEVICE).tensors

    def form(self, bits: int) -> WeightForm:
        case = self.case
        scale = FP32 if case.dtype == FP32 else HALF
        return WeightForm(scale, bits, case.columns, case.has_zeros) if bits else WeightForm(case.dtype)

    def kernels(self) -> tuple[GatherUp, GatherDown | GatherPackedDown]:
        case, rest = self.case, self.case.has_rest
        sizes = (case.width, case.neurons, case.kept, case.group, case.dtype)
        first = GatherUp(self.form(case.bits[0]), *sizes, case.activation, case.is_gated, rest)
        epilogue = Epilogue(rest, has_residual=rest)
        if case.bits[1]:
            return first, GatherPackedDown(self.form(case.bits[1]), *sizes, rest, epilogue)
        return first, GatherDown(*sizes, rest, epilogue)

    def found(self, first_tuning: Tuning | None = None, second_tuning: Tuning | None = None) -> Tensor:
        """By the kernels."""
        case, (first, second) = self.case, self.kernels()
        x, indices = on_device(self.x, self.indices)
        up = on_device(*self.up) if not case.bits[0] else [
            torch.cat(each) for each in zip(*(self.words(half, case.bits[0]) for half in self.up), strict=True)
        ]  # fmt: skip
        down = self.words(self.down, case.bits[1]) if case.bits[1] else on_device(self.down)
        hidden, out = x.new_empty(case.tokens, case.kept * case.group), torch.full_like(x, torch.nan)
        sizes = {"M": case.tokens}
        Launcher(first, first_tuning)(x, indices, *up, *on_device(self.up_bias), hidden, sizes=sizes)
        launcher = Launcher(second, second_tuning)
        given, scratch = [hidden, indices, *down, *on_device(self.absent, self.down_bias, self.residual)], []
        if isinstance(second, GatherDown):
            parts = hidden.new_empty(case.tokens, launcher.tuning["SPLITS"], case.width, dtype=FP32)
            counters = torch.zeros(case.tokens * second.blocks(launcher.tuning), dtype=torch.int32, device=DEVICE)
            scratch = [parts, counters]
            launcher(*given, *scratch, out, sizes=sizes)  # after it, the counters are zero again
        launcher(*given, *scratch, out, sizes=sizes)
        return out.cpu().float()


def check(layer: Layer, *tunings: Tuning) -> None:
    expected, found = layer.expected(), layer.found(*tunings)
    # Activations are rounded between the launches, and the result is.
    bound = 1e-5 if layer.case.dtype == FP32 else 3 * torch.finfo(layer.case.dtype).eps
    assert (found - expected).abs().max() < bound * expected.abs().max()


@pytest.mark.parametrize("case", [
    Case(1, 1, 32, 100),
    Case(1, GROUPS, 64, 33, "gelu", has_rest=True),
    Case(3, 2, 64, 96, "silu", is_gated=True, has_rest=True),
    Case(16, 3, 32, 48, "gelu_tanh", is_gated=True),
    Case(1, 2, 128, 64, "relu", has_rest=True, dtype=BF16),
    Case(3, 2, 32, 130, "silu", is_gated=True, has_rest=True, dtype=BF16),
    Case(1, 3, 48, 40, "gelu", is_gated=True, dtype=HALF),
], ids=str)  # fmt: skip
def test_dense(case):
    check(Layer(case))


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("case", [
    Case(1, 1, 32, 96),
    Case(1, 3, 64, 100, "silu", is_gated=True, has_rest=True),
    Case(3, 2, 128, 128, "gelu", has_rest=True, columns=128, has_zeros=False),
], ids=str)  # fmt: skip
def test_quantised(case, bits):
    check(Layer(Case(**{**case.__dict__, "bits": (bits, bits)})))


@pytest.mark.parametrize("case", [
    Case(16, 2, 96, 33, "relu", has_rest=True, bits=(4, 8)),
    Case(3, GROUPS, 64, 64, "silu", is_gated=True, has_rest=True, dtype=BF16, bits=(8, 4), columns=64),
    Case(1, 2, 64, 64, "relu", dtype=HALF, bits=(4, 4), has_zeros=False),
], ids=str)  # fmt: skip
def test_quantised_in_other_forms(case):
    check(Layer(case))


def test_tiles_that_end_within_a_layer():
    """What a GPU is launched with, whose tiles are smaller than those of the interpreter."""
    first = Tuning.of(BLOCK_N=8, BLOCK_W=32)
    check(Layer(Case(2, 3, 32, 72, "silu", True, True)), first, Tuning.of(SPLITS=4, BLOCK_N=16, BLOCK_E=32))
    check(Layer(Case(1, 1, 32, 72)), first, Tuning.of(SPLITS=8, BLOCK_N=16, BLOCK_E=128))
    packed = Layer(Case(2, 3, 64, 72, "silu", True, True, bits=(4, 4)))
    check(packed, first, Tuning.of(BLOCK_N=16, BLOCK_W=8))


def test_a_token_does_not_see_another_ones_groups():
    layer = Layer(Case(3, 2, 32, 64, "relu", bits=(4, 4)))
    layer.indices[1] = (layer.indices[1] + 1) % GROUPS
    together = layer.found()
    layer.indices[0] = (layer.indices[0] + 1) % GROUPS
    changed = layer.found()
    assert torch.equal(together[1:], changed[1:])
    assert not torch.equal(together[0], changed[0])
