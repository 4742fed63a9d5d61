"""What only a GPU can show; run by `make gpu`."""

from __future__ import annotations

import pytest
import torch

from jettison.api import parse_passes
from jettison.codegen.triton.kernels.gemv import Gemv
from jettison.codegen.triton.kernels.low_rank_attention import Masks
from jettison.codegen.triton.kernels.weight_form import WeightForm
from jettison.codegen.triton.launch import Launcher, choose_device
from jettison.codegen.triton.word_layout import to_words
from jettison.ir.compare import assert_close
from jettison.ir.ops.quantized_linear import dequantize_rows, pack_codes
from jettison.passes.approximate_lm_head import ApproximateLmHead
from jettison.passes.cache_kv import CacheKV
from jettison.passes.fuse_low_rank import FuseLowRank
from jettison.passes.pipeline import apply
from jettison.passes.policies import Full, Kivi, SnapKV
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime import tunings
from jettison.runtime.session import Session
from jettison.runtime.torch_executor import TorchExecutor
from jettison.runtime.triton_executor import TritonExecutor
from tests.codegen.test_gather_kernels import BF16, HALF, Case, Layer, check
from tests.codegen.test_low_rank_kernels import (
    AttentionCase,
    MlpCase,
    MlpLayer,
    attention_kernel,
    check_attention,
    check_mlp,
)
from tests.models.tiny_low_rank import MLPS, NEURONS, Mlp, encoder
from tests.models.tiny_programs import tiny_program
from tests.runtime.test_low_rank_triton import decoder as factored_decoder
from tests.runtime.test_triton_executor import SPARSE, calibrated, wide_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU on this machine"),
]


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_every_tuning_computes_the_same(bits):
    columns, rows, group = 4096, 1024, 128
    codes = pack_codes(torch.randint(0, 2**bits, (rows, columns // group, group), dtype=torch.uint8), bits)
    scales = torch.rand(rows, columns // group) * 0.02
    words = to_words(codes, scales, None, bits, group, torch.float16, choose_device())
    weight = dequantize_rows(codes, scales.half(), None, bits, group, columns)
    kernel = Gemv(WeightForm(torch.float16, bits, group), columns, rows, torch.bfloat16)
    x = torch.randn(1, columns, dtype=torch.bfloat16)
    expected = (x.double() @ weight.double().T)[0]
    for tuning in kernel.tunings():
        out = torch.empty(rows, dtype=torch.bfloat16, device="cuda")
        Launcher(kernel, tuning)(x.cuda(), *words.tensors, out, sizes={})
        error = (out.cpu().double() - expected).abs().max() / expected.abs().max()
        assert error < 2**-8, tuning


@pytest.mark.parametrize("policy", [Full(), SnapKV(budget=16, window=4), Kivi(bits=4, group=8, residual=16)], ids=str)
def test_steps_are_replayed_and_right(policy):
    program = tiny_program("llama", QuantizeWeights(bits=4, group=32), CacheKV(policy))
    executor = TritonExecutor(program)
    ours, theirs = Session(executor, 1, 128), Session(TorchExecutor(program, kernels="reference"), 1, 128)
    prompt = list(range(3, 40))
    wanted, found = theirs.prefill([prompt]), ours.prefill([prompt])
    for _ in range(20):
        assert_close(found, wanted)
        tokens = wanted.argmax(-1).tolist()
        wanted, found = theirs.decode(tokens), ours.decode(tokens)
    assert executor.recorded is not None
    assert executor.recorded.refusal is None
    values, tokens = ours.decode_best([5], 3)
    expected = theirs.decode([5]).topk(3, 1)
    assert torch.equal(tokens, expected.indices)
    assert_close(values, expected.values)


def test_candidates_of_replayed_steps_are_those_of_the_whole_head():
    program = tiny_program("llama", ApproximateLmHead(candidates=4), CacheKV())
    executor = TritonExecutor(program)
    ours, theirs = Session(executor, 1, 128), Session(TorchExecutor(program, kernels="reference"), 1, 128)
    prompt = list(range(3, 40))
    tokens = theirs.prefill([prompt]).argmax(-1).tolist()
    ours.prefill([prompt])
    for _ in range(10):
        expected = theirs.decode(tokens).topk(3, 1)
        values, found = ours.decode_best(tokens, 3)
        assert torch.equal(found, expected.indices)
        assert_close(values, expected.values)
        tokens = expected.indices[:, 0].tolist()


@pytest.mark.parametrize("bits", [8, 4, None])
def test_sparse_layers_are_replayed_and_right(bits):
    quantized = [QuantizeWeights(bits=bits, group=32)] if bits else []
    program = calibrated(wide_model("llama"), *quantized, *parse_passes(SPARSE), CacheKV(Full()))
    executor = TritonExecutor(program)
    ours, theirs = Session(executor, 2, 64), Session(TorchExecutor(program, kernels="reference"), 2, 64)
    prompts = [[5, 10, 20, 7], [9, 3]]
    wanted, found = theirs.prefill(prompts), ours.prefill(prompts)
    for _ in range(10):
        assert_close(found, wanted)
        tokens = wanted.argmax(-1).tolist()
        wanted, found = theirs.decode(tokens), ours.decode(tokens)
    assert executor.recorded is not None
    assert executor.recorded.refusal is None


@pytest.mark.parametrize("case", [
    Case(2, 3, 128, 4096, "silu", True, True, BF16),
    Case(2, 3, 128, 4096, "silu", True, True, BF16, (4, 4), 128),
    Case(1, 4, 32, 4100, "relu", False, True, HALF, (8, 8)),
], ids=str)  # fmt: skip
def test_every_tuning_of_the_kernels_over_slabs_computes_the_same(case):
    layer = Layer(case)
    first, second = layer.kernels()
    for tuning in first.tunings():
        check(layer, tuning)
    for tuning in second.tunings():
        check(layer, None, tuning)


@pytest.mark.parametrize("case", [
    MlpCase(300, 307, 3072, 307, "gelu", has_bias=True, dtype=BF16),
    MlpCase(70, 819, 2048, 819, "silu", 819, has_rest=True, dtype=BF16),
    MlpCase(130, 64, 1000, 1100, "relu", dtype=HALF),
], ids=str)  # fmt: skip
def test_every_tuning_of_the_kernel_over_factored_layers_computes_the_same(case):
    for tuning in MlpLayer(case).kernel().tunings():
        check_mlp(case, tuning)


@pytest.mark.parametrize("case", [
    AttentionCase(300, 300, (12, 12), (64, 64), (192, 192, 192), masks=Masks(has_valid=True), dtype=BF16),
    AttentionCase(200, 200, (8, 2), (128, 128), (307, 100, 100), 128, masks=Masks(causal=True), dtype=BF16),
    AttentionCase(90, 90, (4, 4), (40, 24), (9, 64, 5), 16, True, Masks(True, 20, True, True, True), 5.0, True),
], ids=str)  # fmt: skip
def test_every_tuning_of_the_kernel_over_factored_attention_computes_the_same(case):
    for tuning in attention_kernel(case).tunings():
        check_attention(case, tuning)


@pytest.mark.parametrize("name", ["gelu", "silu_gated", "gelu_tanh_gated", "dense_down"])
def test_factored_layers_take_no_memory_for_their_neurons(name):
    """As the allocator of the device counts it."""
    layer, tokens = Mlp(**MLPS[name]), (64, 64)
    inputs = {"input_ids": torch.arange(tokens[0] * tokens[1]).reshape(tokens) % 61}
    peaks = []
    for passes in ([FuseLowRank()], []):
        program = encoder(layer)
        apply(program, passes)
        executor = TritonExecutor(program)
        executor.run("forward", inputs, {})  # compiled, and weights are there
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        executor.run("forward", inputs, {})
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[1] - peaks[0] > tokens[0] * tokens[1] * NEURONS * 4 / 2


def test_factored_decoders_are_replayed_and_right():
    program = factored_decoder(FuseLowRank())
    executor = TritonExecutor(program)
    ours, theirs = Session(executor, 1, 64), Session(TorchExecutor(program, kernels="reference"), 1, 64)
    wanted, found = theirs.prefill([list(range(3, 40))]), ours.prefill([list(range(3, 40))])
    for _ in range(10):
        assert_close(found, wanted)
        tokens = wanted.argmax(-1).tolist()
        wanted, found = theirs.decode(tokens), ours.decode(tokens)
    assert executor.recorded is not None
    assert executor.recorded.refusal is None


def test_tunings_are_measured_and_used(monkeypatch, tmp_path):
    monkeypatch.setenv("JETTISON_CACHE", str(tmp_path))
    program = tiny_program("llama", QuantizeWeights(bits=4, group=32), CacheKV(Full()))
    document = tunings.measure(TritonExecutor(program), tunings.stopwatch())
    assert all(each["microseconds"] > 0 for each in document["kernels"].values())
    tunings.keep(document)
    known = tunings.known_tunings(tunings.cached_tunings())
    assert set(known) == set(document["kernels"])
    session = Session(TritonExecutor(program, tunings=known), 1, 64)
    expected = Session(TorchExecutor(program, kernels="reference"), 1, 64)
    assert_close(session.prefill([[1, 2, 3]]), expected.prefill([[1, 2, 3]]))
    assert_close(session.decode([4]), expected.decode([4]))
