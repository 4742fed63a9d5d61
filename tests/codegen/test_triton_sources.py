"""Golden sources: what a kernel of each kind reads like, as an artifact holds it."""

from __future__ import annotations

import pytest
import torch

from jettison.codegen.triton.emit import emit
from jettison.codegen.triton.kernels.base import Kernel
from jettison.codegen.triton.kernels.bitmap_gemm import BitmapGemm
from jettison.codegen.triton.kernels.bitmap_gemv import BitmapGemv
from jettison.codegen.triton.kernels.bitmap_tile import BitmapForm
from jettison.codegen.triton.kernels.decode_attention import DecodeAttention
from jettison.codegen.triton.kernels.embedding import Embedding
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.kernels.gather_down import GatherDown
from jettison.codegen.triton.kernels.gather_packed_down import GatherPackedDown
from jettison.codegen.triton.kernels.gather_up import GatherUp
from jettison.codegen.triton.kernels.gemm import Gemm
from jettison.codegen.triton.kernels.gemv import Gemv
from jettison.codegen.triton.kernels.joint_attention import JointAttention, Ranges
from jettison.codegen.triton.kernels.layer_norm import LayerNorm
from jettison.codegen.triton.kernels.low_rank_attention import LowRankAttention, Masks
from jettison.codegen.triton.kernels.low_rank_mlp import LowRankMlp
from jettison.codegen.triton.kernels.norm import RmsNorm
from jettison.codegen.triton.kernels.rotary_write import RotaryWrite
from jettison.codegen.triton.kernels.top_k import TopK
from jettison.codegen.triton.kernels.weight_form import WeightForm
from jettison.passes.cache_kv import CacheKV
from jettison.passes.policies import Full
from jettison.passes.quantize_weights import QuantizeWeights
from tests.models.tiny_programs import tiny_program

BF16, HALF = torch.bfloat16, torch.float16
GATED = Epilogue(activation="silu", is_gated=True)
RESIDUAL = Epilogue(has_bias=True, has_residual=True)
FACTOR = Epilogue(activation="silu", has_factor=True)
# Sizes of BERT, and of a model of a billion weights, at half of the weights.
BERT = LowRankAttention(
    12, 12, 64, 64, (192, 192, 192), (True,) * 3, 0, False, 0.125, 0.0, False, Masks(has_valid=True), BF16
)  # fmt: skip
LLAMA = LowRankAttention(
    32, 8, 64, 64, (512, 204, 204), (False,) * 3, 64, False, 0.125, 0.0, False, Masks(causal=True), BF16
)  # fmt: skip
LLAMA_8B = LowRankAttention(
    32, 8, 128, 128, (1024, 409, 409), (True,) * 3, 128, False, 128**-0.5, 0.0, False, Masks(True, has_valid=True), BF16
)  # fmt: skip
WIDE = LowRankAttention(
    8, 4, 128, 128, (320, 320, 320), (False,) * 3, 96, True, 0.0625, 50.0, True, Masks(True, 4096, True, True, True),
    HALF, BF16,
)  # fmt: skip
BERT_FP32 = LowRankAttention(
    12, 12, 64, 64, (192, 192, 192), (True,) * 3, 0, False, 0.125, 0.0, False, Masks(has_valid=True), torch.float32
)  # fmt: skip
# Sizes of Llama-3.1-8B.
KERNELS: dict[str, Kernel] = {
    "gemv_dense": Gemv(WeightForm(BF16), 4096, 6144, BF16, 1e-5),
    "gemv_int4_gated": Gemv(WeightForm(HALF, 4, 128, True), 4096, 14336, BF16, 1e-5, GATED),
    "gemv_int8_residual": Gemv(WeightForm(HALF, 8, 128, False), 14336, 4096, BF16, None, RESIDUAL),
    "gemv_int3": Gemv(WeightForm(HALF, 3, 64, True), 4096, 6144, BF16),
    "gemv_int2_odd": Gemv(WeightForm(HALF, 2, 32, True), 100, 37, BF16),
    "few_rows_int4": Gemm(WeightForm(HALF, 4, 128, True), 4096, 6144, BF16, is_decode=True),
    "gemm_int4_gated": Gemm(WeightForm(HALF, 4, 128, True), 4096, 14336, BF16, False, GATED),
    "gemm_dense": Gemm(WeightForm(BF16), 4096, 6144, BF16),
    "embedding_int4": Embedding(WeightForm(HALF, 4, 128, True), 4096, BF16),
    "layer_norm": LayerNorm(4096, BF16, 1e-5),
    "norm_residual": RmsNorm(4096, BF16, 1e-5, True),
    "rotary_write": RotaryWrite(32, 8, 128, 128, False, BF16, BF16),
    "decode_attention": DecodeAttention(32, 8, 128, 128**-0.5, 0, 0.0, BF16, BF16),
    "joint_attention_kivi2": JointAttention(32, 8, 128, 128**-0.5, 32, Ranges(2, 1, 128), Ranges(2, 32, 4), BF16, BF16),
    "joint_attention_int8": JointAttention(32, 8, 128, 128**-0.5, 1, Ranges(8, 1, 1), Ranges(8, 1, 1), BF16, BF16),
    "gemv_nf4": Gemv(WeightForm(HALF, 4, 64, has_table=True), 4096, 6144, BF16),
    # A fifth of the neurons.
    "gather_up_dense": GatherUp(WeightForm(BF16), 4096, 14336, 89, 32, BF16, "relu", has_bias=True),
    "gather_up_dense_gated": GatherUp(WeightForm(BF16), 4096, 14336, 89, 32, BF16, "silu", True),
    "gather_up_int4_gated": GatherUp(WeightForm(HALF, 4, 128, True), 4096, 14336, 22, 128, BF16, "silu", True),
    "gather_up_int8": GatherUp(WeightForm(HALF, 8, 32, False), 4096, 14336, 89, 32, BF16, "relu", has_bias=True),
    "gather_down": GatherDown(4096, 14336, 89, 32, BF16, True, RESIDUAL),
    "gather_down_fp32": GatherDown(4100, 14336, 89, 32, torch.float32, True),
    "gather_down_int4": GatherPackedDown(WeightForm(HALF, 4, 128, True), 4096, 14336, 22, 128, BF16, True, RESIDUAL),
    "gather_down_int8_odd": GatherPackedDown(WeightForm(HALF, 8, 32, False), 100, 96, 1, 32, BF16),
    "gather_down_int2": GatherPackedDown(WeightForm(HALF, 2, 32, True), 4096, 14336, 89, 32, BF16, True),
    "gemv_dense_factor": Gemv(WeightForm(BF16), 819, 8192, BF16, epilogue=FACTOR),
    "few_rows_dense_factor": Gemm(WeightForm(BF16), 819, 8192, BF16, True, FACTOR),
    "low_rank_mlp_gelu": LowRankMlp(307, 0, 3072, 307, BF16, "gelu", has_up_bias=True),
    "low_rank_mlp_gated": LowRankMlp(819, 819, 8192, 819, BF16, "silu"),
    "low_rank_mlp_narrow": LowRankMlp(64, 48, 3072, 64, HALF, "gelu_tanh", True, True),
    "low_rank_mlp_whole_down": LowRankMlp(307, 0, 3072, 2048, BF16, "relu", True, False, RESIDUAL),
    "low_rank_mlp_fp32": LowRankMlp(307, 307, 3072, 307, torch.float32, "sigmoid"),
    "low_rank_attention": BERT,
    "low_rank_attention_rotary": LLAMA,
    "low_rank_attention_wide": LLAMA_8B,
    "low_rank_attention_masks": WIDE,
    "low_rank_attention_fp32": BERT_FP32,
    "bitmap_gemv_int4": BitmapGemv(BitmapForm(4, 128), 4096, 6144, BF16),
    "bitmap_gemv_int8_residual": BitmapGemv(BitmapForm(8, 128), 14336, 4096, BF16, RESIDUAL),
    "bitmap_gemv_bf16_odd": BitmapGemv(BitmapForm(16, 128, BF16), 100, 37, BF16),
    "bitmap_few_rows_int4": BitmapGemm(BitmapForm(4, 128), 4096, 6144, BF16, True, RESIDUAL),
    "bitmap_gemm_int4": BitmapGemm(BitmapForm(4, 128), 4096, 6144, BF16),
    "bitmap_gemm_fp16": BitmapGemm(BitmapForm(16, 128, HALF), 4096, 6144, HALF),
    "bitmap_gemm_fp32": BitmapGemm(BitmapForm(8, 64), 4096, 6144, torch.float32),
    "top_1": TopK(1, 128256, BF16),
    "top_51": TopK(51, 128256, BF16),
    "decode_attention_window": DecodeAttention(8, 4, 256, 0.0625, 4096, 50.0, BF16, BF16),
}


@pytest.mark.parametrize("name", KERNELS)
def test_source(name, snapshot):
    assert KERNELS[name].source() == snapshot(name=name)


@pytest.mark.parametrize("name", KERNELS)
def test_sources_are_modules_of_lines_that_fit(name):
    text = KERNELS[name].source()
    compile(text, name, "exec")
    assert max(len(line) for line in text.splitlines()) <= 120


def test_files_name_the_nodes_that_they_implement(snapshot):
    program = tiny_program("llama", QuantizeWeights(bits=4, group=32), CacheKV(Full()))
    emitted = emit(program)
    file = next(name for name in emitted.sources() if "gemv_int4_g32_gated" in name)
    assert emitted.sources()[file] == snapshot(name="file_of_an_artifact")


def test_names_are_unique_to_their_sources():
    by_name: dict[str, str] = {}
    for family in ("llama", "gemma2"):
        for each in emit(tiny_program(family, CacheKV(Full()))).kernels.values():
            known = by_name.setdefault(each.kernel.name, each.kernel.source())
            assert known == each.kernel.source()
