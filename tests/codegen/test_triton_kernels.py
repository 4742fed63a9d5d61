"""Numbers of the kernels, in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.codegen.triton.kernels.base import Tuning
from jettison.codegen.triton.kernels.decode_attention import DecodeAttention
from jettison.codegen.triton.kernels.embedding import Embedding
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.kernels.gemm import Gemm
from jettison.codegen.triton.kernels.gemv import Gemv
from jettison.codegen.triton.kernels.joint_attention import JointAttention, Ranges
from jettison.codegen.triton.kernels.layer_norm import LayerNorm
from jettison.codegen.triton.kernels.norm import RmsNorm
from jettison.codegen.triton.kernels.rotary_write import RotaryWrite
from jettison.codegen.triton.kernels.top_k import TopK
from jettison.codegen.triton.kernels.weight_form import WeightForm
from jettison.codegen.triton.launch import Launcher, choose_device
from jettison.codegen.triton.word_layout import WordWeight, refusal, to_words
from jettison.ir import ops
from jettison.ir.compare import assert_close
from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.ir.ops.lut_linear import look_up_reference
from jettison.ir.ops.quantized_linear import dequantize_rows, pack_codes, pack_zeros

FP32 = torch.float32
DEVICE = choose_device()


def packed(rows: int, columns: int, bits: int, group: int, has_zeros: bool) -> tuple[WordWeight, Tensor]:
    """A random weight as kernels read it, and decoded."""
    generator = torch.Generator().manual_seed(rows + columns + bits)
    blocks = -(-columns // group)
    codes = torch.randint(0, 2**bits, (rows, blocks, group), dtype=torch.uint8, generator=generator)
    scales = (torch.rand(rows, blocks, generator=generator) - 0.3) * 0.02
    zeros = pack_zeros(torch.randint(0, 2**bits, (rows, blocks), generator=generator), bits) if has_zeros else None
    parts = pack_codes(codes, bits), scales, zeros, bits, group
    return to_words(*parts, FP32, DEVICE), dequantize_rows(*parts, columns).contiguous()


def normal(*shape: int, seed: int = 0) -> Tensor:
    """Random numbers on the device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("has_zeros", [True, False])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_one_row(bits, group, has_zeros):
    columns, rows = 256, 48
    words, weight = packed(rows, columns, bits, group, has_zeros)
    kernel = Gemv(WeightForm(FP32, bits, group, has_zeros), columns, rows, FP32)
    x, out = normal(1, columns), normal(rows)
    Launcher(kernel)(x, *words.tensors, out, sizes={})
    assert_close(out.cpu(), (x.cpu().double() @ weight.T.double())[0].float(), tolerance=1e-5)


@pytest.mark.parametrize("bits", [0, 8, 4, 3, 2])
@pytest.mark.parametrize(("columns", "rows"), [(100, 37), (384, 33)], ids=["padded group", "three groups"])
def test_one_row_of_odd_shapes(bits, columns, rows):
    group = 128 if columns == 384 else 32
    words, weight = packed(rows, columns, bits or 4, group, True)
    form = WeightForm(FP32, bits, group, True) if bits else WeightForm(FP32)
    given = words.tensors if bits else [weight.to(DEVICE)]
    x, norm, residual = normal(1, columns), normal(columns, seed=1), normal(rows, seed=2)
    kernel = Gemv(form, columns, rows, FP32, 1e-5, Epilogue(has_residual=True))
    out = normal(rows)
    Launcher(kernel)(x, norm, *given, residual, out, sizes={})
    expected = F.rms_norm(x.cpu(), (columns,), norm.cpu(), 1e-5) @ weight.T + residual.cpu()
    assert_close(out.cpu(), expected[0], tolerance=1e-5)


@pytest.mark.parametrize("count", [1, 7, 16, 17, 64])
@pytest.mark.parametrize("bits", [0, 4, 3])
def test_several_rows(count, bits):
    columns, rows = 160, 40
    words, weight = packed(rows, columns, bits or 4, 64, True)
    form = WeightForm(FP32, bits, 64, True) if bits else WeightForm(FP32)
    kernel = Gemm(form, columns, rows, FP32, is_decode=count <= 16, epilogue=Epilogue(has_bias=True, activation="gelu"))
    x, bias, out = normal(count, columns), normal(rows, seed=1), normal(count, rows)
    given = words.tensors if bits else [weight.to(DEVICE)]
    Launcher(kernel)(x, *given, bias, out, sizes={"M": count})
    assert_close(out.cpu(), F.gelu(x.cpu() @ weight.T + bias.cpu()), tolerance=1e-5)


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
@pytest.mark.parametrize("count", [1, 3])
def test_gate(activation, count):
    columns, rows = 64, 24
    words, weight = packed(2 * rows, columns, 4, 32, False)
    form, epilogue = WeightForm(FP32, 4, 32), Epilogue(has_bias=True, activation=activation, is_gated=True)
    x, bias, out = 10 * normal(count, columns), normal(2 * rows, seed=1), normal(count, rows)
    if count == 1:
        Launcher(Gemv(form, columns, rows, FP32, epilogue=epilogue))(x, *words.tensors, bias, out, sizes={})
    else:
        kernel = Gemm(form, columns, rows, FP32, True, epilogue)
        Launcher(kernel)(x, *words.tensors, bias, out, sizes={"M": count})
    gate, up = (x.cpu() @ weight.T + bias.cpu()).split(rows, -1)
    assert_close(out.cpu(), ACTIVATIONS[activation](gate) * up, tolerance=1e-5)


@pytest.mark.parametrize("bits", [8, 4, 2])
def test_codes_of_a_table(bits):
    columns, rows, group = 160, 24, 64
    generator = torch.Generator().manual_seed(bits)
    blocks = -(-columns // group)
    codes = torch.randint(0, 2**bits, (rows, blocks, group), dtype=torch.uint8, generator=generator)
    scales, table = torch.rand(rows, blocks, generator=generator), torch.randn(1, 2**bits, generator=generator)
    packed_codes = pack_codes(codes, bits)
    weight = look_up_reference(packed_codes, table, scales, bits, group, columns)
    words = to_words(packed_codes, scales, None, bits, group, FP32, DEVICE, table.flatten())
    form = WeightForm(FP32, bits, group, has_table=True)
    x, out = normal(1, columns), normal(rows)
    Launcher(Gemv(form, columns, rows, FP32))(x, *words.tensors, out, sizes={})
    assert_close(out.cpu(), (x.cpu() @ weight.T)[0], tolerance=1e-5)
    x, out = normal(5, columns), normal(5, rows)
    Launcher(Gemm(form, columns, rows, FP32, True))(x, *words.tensors, out, sizes={"M": 5})
    assert_close(out.cpu(), x.cpu() @ weight.T, tolerance=1e-5)
    out, indices = normal(3, columns), torch.tensor([5, 0, 23], device=DEVICE)
    Launcher(Embedding(form, columns, FP32))(indices, *words.tensors, out, sizes={"M": 3})
    assert_close(out.cpu(), weight[indices.cpu()], tolerance=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 4])
def test_half_precision(dtype, count):
    columns, rows = 64, 32
    words, weight = packed(rows, columns, 4, 32, True)
    form = WeightForm(FP32, 4, 32, True)
    x, out = normal(count, columns).to(dtype), normal(count, rows).to(dtype)
    kernel = Gemv(form, columns, rows, dtype) if count == 1 else Gemm(form, columns, rows, dtype, True)
    Launcher(kernel)(x, *words.tensors, out, sizes={"M": count})
    found, expected = out.cpu().float(), x.cpu().float() @ weight.T
    assert (found - expected).abs().max() < 3 * torch.finfo(dtype).eps * expected.abs().max()


def test_a_kernel_rejects_another_weight():
    """The comparisons of this file can fail."""
    words, weight = packed(48, 64, 4, 32, False)
    x, out = normal(1, 64), normal(48)
    Launcher(Gemv(WeightForm(FP32, 4, 32), 64, 48, FP32))(x, *words.tensors, out, sizes={})
    weight[3, 5] += 0.05
    with pytest.raises(AssertionError):
        assert_close(out.cpu(), (x.cpu() @ weight.T)[0], tolerance=1e-5)


@pytest.mark.parametrize(("bits", "group", "reason"), [
    (4, 96, "groups of 96 columns do not fill"), (4, 4096, "groups of 4096"), (5, 32, "not 5"),
])  # fmt: skip
def test_what_does_not_divide_is_refused(bits, group, reason):
    assert reason in refusal(bits, group)
    assert refusal(4, 128) is None


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_embedding(bits):
    words, table = packed(50, 100, bits, 32, True)
    indices = torch.tensor([[3, 49, 0], [7, 7, 1]], device=DEVICE)
    out = normal(2, 3, 100)
    Launcher(Embedding(WeightForm(FP32, bits, 32, True), 100, FP32))(indices, *words.tensors, out, sizes={"M": 6})
    assert_close(out.cpu(), table[indices.cpu()], tolerance=1e-6)


@pytest.mark.parametrize("has_residual", [True, False])
def test_norm(has_residual):
    x, residual, weight = normal(3, 100), normal(3, 100, seed=1), normal(100, seed=2)
    out, added = normal(3, 100), normal(3, 100)
    given = [x, residual, added, weight, out] if has_residual else [x, weight, out]
    Launcher(RmsNorm(100, FP32, 1e-6, has_residual))(*given, sizes={"M": 3})
    expected = x + residual if has_residual else x
    assert_close(out.cpu(), F.rms_norm(expected, (100,), weight, 1e-6).cpu(), tolerance=1e-6)
    if has_residual:
        assert_close(added.cpu(), expected.cpu(), tolerance=1e-6)


@pytest.mark.parametrize("rotated", [0, 16, 24])
@pytest.mark.parametrize("is_interleaved", [False, True])
def test_rotary_write(rotated, is_interleaved):
    rows, tokens, heads, kv_heads, dim, capacity = 2, 3, 4, 2, 24, 8
    together = normal(rows, tokens, (heads + 2 * kv_heads) * dim)
    query, key, value = together.split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
    cos, sin = normal(rows, tokens, max(rotated // 2, 1), seed=1), normal(rows, tokens, max(rotated // 2, 1), seed=2)
    slots = torch.tensor([[2, 3, 4], [0, -1, 7]], device=DEVICE)
    caches = [normal(rows, kv_heads, capacity, dim, seed=seed) for seed in (3, 4)]
    split = [part.unflatten(-1, (-1, dim)).transpose(1, 2) for part in (query, key, value)]
    if rotated:
        turned = [ops.rotary_embedding(part.contiguous(), cos, sin, is_interleaved) for part in split[:2]]
    else:
        turned = split[:2]
    expected = [ops.write_slots(cache, new, slots) for cache, new in zip(caches, (turned[1], split[2]), strict=True)]
    stride = together.shape[-1]
    kernel = RotaryWrite(heads, kv_heads, dim, rotated, is_interleaved, FP32, FP32)
    out = normal(rows, heads, tokens, dim)
    angles = [cos, sin] if rotated else []
    sizes = {"B": rows, "S": tokens, "C": capacity} | dict.fromkeys(("QUERY_ROW", "KEY_ROW", "VALUE_ROW"), stride)
    Launcher(kernel)(query, key, value, *angles, slots, out, *caches, sizes=sizes)
    assert_close(out.cpu(), turned[0].contiguous().cpu(), tolerance=1e-6)
    for cache, written in zip(caches, expected, strict=True):
        assert_close(cache.cpu(), written.cpu(), tolerance=1e-6)


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 2, 32), (6, 6, 24), (20, 1, 16)])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (20, 0.0), (0, 5.0)])
def test_decode_attention(heads, kv_heads, dim, window, softcap, splits):
    capacity, positions = 96, torch.tensor([[0], [70]], device=DEVICE)
    query = normal(2, heads, 1, dim)
    key, value = normal(2, kv_heads, capacity, dim, seed=1), normal(2, kv_heads, capacity, dim, seed=2)
    kernel = DecodeAttention(heads, kv_heads, dim, dim**-0.5, window, softcap, FP32, FP32)
    tuning = kernel.tunings()[0].of(SPLITS=splits, BLOCK_T=16)
    shared = heads // kv_heads
    parts = normal(2 * kv_heads, splits, shared, dim)
    stats, counters = normal(2 * kv_heads, splits, shared, 2), torch.zeros(2 * kv_heads, dtype=torch.int32).to(DEVICE)
    for _ in range(2):  # the counters are zero again
        out = normal(2, 1, heads * dim)
        sizes = {"B": 2, "C": capacity}
        Launcher(kernel, tuning)(query, key, value, positions, parts, stats, counters, out, sizes=sizes)
        slots = torch.arange(capacity, device=DEVICE)[None]
        expected = ops.attention(
            query, key, value, positions, slots, None, None, dim**-0.5, True, window, softcap
        )  # fmt: skip
        assert_close(out.cpu(), expected.transpose(1, 2).flatten(2).cpu(), tolerance=1e-5)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("columns", [64, 100])
def test_layer_norm(columns, has_bias):
    x, weight, bias = 3 + normal(5, columns), normal(columns, seed=1), normal(columns, seed=2) if has_bias else None
    out = torch.empty_like(x)
    given = [x, weight] if bias is None else [x, weight, bias]
    Launcher(LayerNorm(columns, FP32, 1e-5, has_bias))(*given, out, sizes={"M": 5})
    assert_close(out.cpu(), F.layer_norm(x, (columns,), weight, bias, 1e-5).cpu(), tolerance=1e-5)


@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("count", "columns"), [(1, 97), (5, 97), (51, 300), (64, 64), (7, 1)])
def test_top_k(count, columns, dtype):
    count = min(count, columns)
    logits = normal(3, columns, seed=columns).to(dtype)
    logits[1] = logits[1].round()  # ties, and zeros of both signs
    kernel = TopK(count, columns, dtype)
    for tuning in (kernel.widest(), Tuning.of(BLOCK_V=64)):
        found = torch.empty(3, kernel.blocks(tuning), kernel.padded, dtype=torch.int64, device=DEVICE)
        counters = torch.zeros(3, dtype=torch.int32, device=DEVICE)
        values = torch.empty(3, count, device=DEVICE)
        tokens = torch.empty(3, count, dtype=torch.int64, device=DEVICE)
        Launcher(kernel, tuning)(logits, found, counters, values, tokens, sizes={"B": 3})
        best = (logits.float() + 0.0).sort(dim=1, descending=True, stable=True)  # of zeros there is one now
        assert torch.equal(values, best.values[:, :count])
        assert torch.equal(tokens, best.indices[:, :count])
        assert not counters.any()


def test_what_is_no_number_comes_first():
    logits = torch.tensor([[1.0, -torch.nan, torch.inf, 3.0]], device=DEVICE)
    kernel = TopK(1, 4, FP32)
    found = torch.empty(1, kernel.blocks(kernel.widest()), 1, dtype=torch.int64, device=DEVICE)
    value, token = torch.empty(1, 1, device=DEVICE), torch.empty(1, 1, dtype=torch.int64, device=DEVICE)
    counters = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    Launcher(kernel)(logits, found, counters, value, token, sizes={"B": 1})
    assert (value.item(), token.item()) == (torch.inf, 1)


# Of a slot: tokens, groups of keys, groups of values.
KIVI, PER_TOKEN, SMALL = (32, (1, 32), (32, 2)), (1, (1, 2), (1, 1)), (8, (1, 32), (8, 4))


@pytest.mark.parametrize("form", [KIVI, PER_TOKEN, SMALL], ids=["kivi", "tokens", "slots of 8"])
@pytest.mark.parametrize("bits", [8, 4, 2])
def test_joint_attention(bits, form):
    tokens, key_groups, value_groups = form
    heads, kv_heads, dim, capacity = 4, 2, 32, 40
    slots = -(-96 // tokens)
    stored = {name: normal(2, kv_heads, slots, tokens, dim, seed=seed) for name, seed in (("key", 1), ("value", 2))}
    groups = {"key": key_groups, "value": value_groups}
    parts = {name: ops.quantize_slots(stored[name], bits, *groups[name]) for name in stored}
    wide = [ops.dequantize_slots(*parts[name], bits, tokens, groups[name][0]) for name in stored]
    key, value = normal(2, kv_heads, capacity, dim, seed=3), normal(2, kv_heads, capacity, dim, seed=4)
    query, positions = normal(2, heads, 1, dim), torch.tensor([[4], [39]], device=DEVICE)
    scale = dim**-0.5
    kernel = JointAttention(
        heads, kv_heads, dim, scale, tokens, Ranges(bits, *key_groups), Ranges(bits, *value_groups), FP32, FP32
    )
    tuning = kernel.widest()
    scratch = normal(2 * kv_heads, 2, 2, dim), normal(2 * kv_heads, 2, 2, 2)
    counters = torch.zeros(2 * kv_heads, dtype=torch.int32, device=DEVICE)
    for counts in ([slots * tokens, 2 * tokens], [0, tokens]):
        count, out = torch.tensor(counts, device=DEVICE), normal(2, 1, heads * dim)
        Launcher(kernel, tuning)(
            query, *parts["key"], *parts["value"], count, key, value, positions, *scratch, counters, out,
            sizes={"B": 2, "SLOTS": slots, "C": capacity},
        )  # fmt: skip
        expected = ops.joint_attention(query, *wide, count, key, value, positions, scale)
        assert_close(out.cpu(), expected.transpose(1, 2).flatten(2).cpu(), tolerance=1e-5)
