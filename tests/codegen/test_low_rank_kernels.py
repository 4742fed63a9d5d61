"""Numbers of the kernels over factors against the operators, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from jettison.codegen.triton.kernels.base import Tuning
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.kernels.low_rank_attention import LowRankAttention, Masks
from jettison.codegen.triton.kernels.low_rank_mlp import LowRankMlp
from jettison.codegen.triton.launch import Launcher
from jettison.ir import ops
from jettison.ir.ops.gated_activation import ACTIVATIONS
from tests.codegen.test_triton_kernels import DEVICE, FP32

BF16, HALF = torch.bfloat16, torch.float16
# Of the largest number of the result, beyond what the dtype rounds: sums in another order.
TOLERANCE = {FP32: 1e-5, BF16: 2**-6, HALF: 2**-9}


@dataclass(frozen=True)
class MlpCase:
    """A layer, and how many tokens."""

    tokens: int
    up_rank: int
    neurons: int
    width: int
    activation: str = "gelu"
    gate_rank: int = 0
    has_bias: bool = False
    has_rest: bool = False  # bias and residual of the result
    dtype: torch.dtype = FP32


@dataclass
class MlpLayer:
    """Random weights of a case, the operator over them, and the kernel."""

    case: MlpCase
    given: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        case, generator = self.case, torch.Generator().manual_seed(self.case.neurons + self.case.width)

        def normal(*shape: int) -> Tensor:
            return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(case.dtype)

        self.residual = normal(case.tokens, case.width) if case.has_rest else None
        is_gated = case.gate_rank > 0
        self.given = {
            "gate": 2 * normal(case.tokens, case.gate_rank) if is_gated else None,
            "up": 2 * normal(case.tokens, case.up_rank),
            "gate_rows": 2 * normal(case.neurons, case.gate_rank) if is_gated else None,
            "gate_bias": normal(case.neurons) if case.has_bias and is_gated else None,
            "up_rows": 2 * normal(case.neurons, case.up_rank),
            "up_bias": normal(case.neurons) if case.has_bias else None,
            "columns": normal(case.width, case.neurons),
            "rows": None,
            "bias": normal(case.width) if case.has_rest else None,
        }

    def expected(self) -> Tensor:
        wide = [None if each is None else each.double() for each in self.given.values()]
        out = ops.low_rank_mlp(*wide, self.case.activation)
        return out if self.residual is None else out + self.residual.double()

    def kernel(self) -> LowRankMlp:
        case = self.case
        after = Epilogue(case.has_rest, has_residual=case.has_rest)
        has_gate_bias = case.has_bias and case.gate_rank > 0
        return LowRankMlp(
            case.up_rank, case.gate_rank, case.neurons, case.width, case.dtype, case.activation, case.has_bias,
            has_gate_bias, after,
        )  # fmt: skip

    def run(self, tuning: Tuning | None = None) -> Tensor:
        order = ("gate", "gate_rows", "up", "up_rows", "gate_bias", "up_bias", "columns", "bias")
        given = [self.given[name] for name in order] + [self.residual]
        out = torch.full((self.case.tokens, self.case.width), torch.nan, dtype=self.case.dtype, device=DEVICE)
        tensors = [each.to(DEVICE) for each in given if each is not None]
        Launcher(self.kernel(), tuning)(*tensors, out, sizes={"M": self.case.tokens})
        return out.cpu()


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


def check_mlp(case: MlpCase, tuning: Tuning | None = None) -> None:
    layer = MlpLayer(case)
    assert error(layer.run(tuning), layer.expected()) < TOLERANCE[case.dtype]


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("gate_rank", [0, 9])
def test_activations(activation, gate_rank):
    check_mlp(MlpCase(17, 9, 50, 33, activation, gate_rank, has_bias=True))


@pytest.mark.parametrize(("tokens", "up_rank", "neurons", "width"), [
    (1, 1, 1, 1), (17, 307, 100, 307), (65, 16, 96, 129), (40, 100, 37, 192), (3, 64, 128, 64), (33, 5, 640, 10),
])  # fmt: skip
def test_sizes_that_fill_no_tile(tokens, up_rank, neurons, width):
    check_mlp(MlpCase(tokens, up_rank, neurons, width))
    check_mlp(MlpCase(tokens, up_rank, neurons, width, "silu", 7, has_bias=True, has_rest=True))


def test_gate_and_up_of_different_ranks():
    check_mlp(MlpCase(20, 24, 64, 48, "silu", 100, has_bias=True))
    check_mlp(MlpCase(20, 100, 64, 48, "silu", 24))


@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_half_precision(dtype):
    check_mlp(MlpCase(33, 40, 96, 72, "gelu", has_bias=True, has_rest=True, dtype=dtype))
    check_mlp(MlpCase(33, 40, 96, 72, "silu", 40, dtype=dtype))


@pytest.mark.parametrize("tuning", [
    Tuning.of(BLOCK_M=16, BLOCK_F=16, BLOCK_K=16), Tuning.of(BLOCK_M=32, BLOCK_F=64, BLOCK_K=32),
], ids=str)  # fmt: skip
def test_tiles(tuning):
    check_mlp(MlpCase(37, 40, 100, 72, "silu", 24, has_bias=True, has_rest=True), tuning)


def test_a_width_that_does_not_fit_is_cut():
    case = MlpCase(18, 8, 32, 1100, has_bias=True, has_rest=True)
    assert (MlpLayer(case).kernel().copies, MlpLayer(MlpCase(18, 8, 32, 512)).kernel().copies) == (3, 1)
    check_mlp(case)


@pytest.mark.parametrize(
    ("width", "pieces"), [(307, [128, 128, 64]), (64, [64]), (9, [64]), (448, [128, 128, 128, 64])]
)
def test_pieces_waste_little(width, pieces):
    kernel = LowRankMlp(64, 0, 256, width, BF16, "relu")
    assert kernel.pieces == pieces
    assert kernel.most_tokens * sum(pieces) <= 1 << 14


def test_the_comparisons_can_fail():
    layer = MlpLayer(MlpCase(20, 24, 64, 48, "silu", 24, has_bias=True))
    layer.given["gate_bias"] = layer.given["gate_bias"] + 0.05
    found = layer.run()
    layer.given["gate_bias"] = layer.given["gate_bias"] - 0.05
    assert error(found, layer.expected()) > 10 * TOLERANCE[FP32]


@dataclass(frozen=True)
class AttentionCase:
    """An attention; see `LowRankAttention`."""

    queries: int = 21
    keys: int = 21
    heads: tuple[int, int] = (4, 2)
    dims: tuple[int, int] = (24, 24)  # of queries and keys, and of values
    ranks: tuple[int, int, int] = (9, 20, 7)
    rotated: int = 0
    interleaved: bool = False
    masks: Masks = field(default_factory=Masks)
    softcap: float = 0.0
    has_sinks: bool = False
    has_bias: bool = True
    dtype: torch.dtype = FP32
    batch: int = 2


def attention_kernel(case: AttentionCase) -> LowRankAttention:
    return LowRankAttention(
        *case.heads, *case.dims, case.ranks, (case.has_bias,) * 3, case.rotated, case.interleaved, case.dims[0] ** -0.5,
        case.softcap, case.has_sinks, case.masks, case.dtype,
    )  # fmt: skip


def check_attention(case: AttentionCase, tuning: Tuning | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(case.queries + 100 * case.keys)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    (heads, kv_heads), (dim, value_dim), masks = case.heads, case.dims, case.masks
    counts = (heads * dim, kv_heads * dim, kv_heads * value_dim)
    tokens = (case.queries, case.keys, case.keys)
    read = [normal(case.batch, count, rank) for count, rank in zip(tokens, case.ranks, strict=True)]
    rows = [normal(count, rank) / rank**0.5 for count, rank in zip(counts, case.ranks, strict=True)]
    biases = [normal(count) if case.has_bias else None for count in counts]
    # Of all rows of the batch the same.
    angles = torch.rand(1, case.queries, case.rotated // 2, generator=generator) * 6 if case.rotated else None
    asked = torch.randint(0, case.keys, (case.batch, case.queries), generator=generator)
    places = torch.randint(-2, case.keys, (1, case.keys), generator=generator)
    valid = torch.rand(case.batch, case.keys, generator=generator) < 0.7
    valid[0] = False  # nothing is seen in this row
    given = [
        None if angles is None else angles.cos(), None if angles is None else angles.sin(),
        asked if masks.has_query_positions else None, places if masks.has_key_positions else None,
        valid if masks.has_valid else None, normal(heads).float() if case.has_sinks else None,
    ]  # fmt: skip
    scale, wide = dim**-0.5, lambda each: None if each is None else each.double() if each.is_floating_point() else each
    factors = [part for pair in zip(rows, biases, strict=True) for part in pair]
    rest = (heads, kv_heads, case.interleaved, scale, masks.causal, masks.window, case.softcap)
    expected = ops.low_rank_attention(*map(wide, (*read, *factors, *given)), *rest)
    kernel = attention_kernel(case)
    given[4] = None if given[4] is None else given[4].view(torch.uint8)
    tensors = [each.to(DEVICE) for each in (*read, *rows, *biases, *given) if each is not None]
    out = torch.full(expected.shape, torch.nan, dtype=case.dtype, device=DEVICE)
    sizes = {"B": case.batch, "S": case.queries, "T": case.keys, "ANGLES": 0, "ASKED": case.queries, "PLACES": 0}
    Launcher(kernel, tuning)(*tensors, out, sizes=sizes)
    assert error(out.cpu(), expected) < TOLERANCE[case.dtype]
    return out.cpu()


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (3, 1)])
@pytest.mark.parametrize(("rotated", "interleaved"), [(0, False), (24, False), (24, True), (10, False), (10, True)])
def test_heads_and_rotations(heads, rotated, interleaved):
    check_attention(AttentionCase(heads=heads, rotated=rotated, interleaved=interleaved))


@pytest.mark.parametrize("masks", [
    Masks(causal=True), Masks(causal=True, window=5), Masks(window=5), Masks(True, 4, True, True, True),
    Masks(has_valid=True), Masks(has_key_positions=True), Masks(causal=True, has_query_positions=True),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("has_rest", [False, True], ids=["plain", "softcap and sinks"])
def test_masks(masks, has_rest):
    """Over several tiles of queries and of keys."""
    tuning = Tuning.of(BLOCK_M=16, BLOCK_T=16, BLOCK_K=16)
    case = AttentionCase(37, 37, masks=masks, softcap=3.0 * has_rest, has_sinks=has_rest)
    out = check_attention(case, tuning)
    if masks.has_valid:
        assert not out[0].any(), "a query that sees nothing gets zeros"


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 70), (70, 3), (130, 66)])
@pytest.mark.parametrize("dims", [(8, 8), (40, 17)])
def test_sizes(queries, keys, dims):
    check_attention(AttentionCase(queries, keys, dims=dims, ranks=(1, 33, 130), has_bias=False))


@pytest.mark.parametrize("dtype", [BF16, HALF])
def test_attention_in_half_precision(dtype):
    check_attention(AttentionCase(40, 40, dims=(32, 32), rotated=32, masks=Masks(causal=True), dtype=dtype))


def test_a_wrong_mask_is_found(monkeypatch):
    """The comparisons of attention can fail: keys are cut off as if queries stood at their places."""
    monkeypatch.setattr(Masks, "follows_places", True)
    case = AttentionCase(37, 37, ranks=(8, 8, 8), masks=Masks(causal=True, has_query_positions=True))
    with pytest.raises(AssertionError):
        check_attention(case, Tuning.of(BLOCK_M=16, BLOCK_T=16, BLOCK_K=16))
