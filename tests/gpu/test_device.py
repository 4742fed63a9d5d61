"""What only a GPU can show; run by `make gpu`."""

from __future__ import annotations

import pytest
import torch

from jettison.codegen.triton.kernels.gemv import Gemv
from jettison.codegen.triton.kernels.weight_form import WeightForm
from jettison.codegen.triton.launch import Launcher, choose_device
from jettison.codegen.triton.word_layout import to_words
from jettison.ir.ops.quantized_linear import dequantize_rows, pack_codes

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
