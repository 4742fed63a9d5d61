"""Triton kernels for bitmap weights: numbers, in Triton's interpreter where there is no GPU, steps, and programs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jettison.codegen.triton.bitmap_step import BitmapStep
from jettison.codegen.triton.fuse import fuse
from jettison.codegen.triton.kernels.bitmap_gemm import BitmapGemm
from jettison.codegen.triton.kernels.bitmap_gemv import BitmapGemv
from jettison.codegen.triton.kernels.bitmap_tile import BitmapForm
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.launch import Launcher, choose_device
from jettison.codegen.triton.steps import TorchStep
from jettison.ir.compare import assert_close, example_input_ids
from jettison.ir.constants import Constant
from jettison.ir.errors import ArtifactError
from jettison.ir.match import is_call
from jettison.ir.ops import bitmap_linear
from jettison.passes.cache_kv import CacheKV
from jettison.passes.formats import Bitmap
from jettison.passes.prune_weights import PruneWeights
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime.bitmap_weight import row_begins
from jettison.runtime.session import Session
from jettison.runtime.torch_executor import TorchExecutor
from jettison.runtime.triton_executor import TritonExecutor
from tests.helpers import run_pass
from tests.passes.test_prune_weights import family_program

FP32 = torch.float32
DEVICE = choose_device()
STORED = {"int4": ("int4", 4), "int8": ("int8", 8), "bf16": ("float", 16), "f16": ("float", 16), "f32": ("float", 32)}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": FP32}


def stored(kind: str, rows: int, columns: int, group: int, density: float = 0.5):
    """A weight as kernels read it, its form, and expanded."""
    of, bits = STORED[kind]
    generator = torch.Generator().manual_seed(rows + columns)
    kept = torch.rand(rows, columns, generator=generator) < density
    weight = torch.randn(rows, columns, generator=generator) * kept
    parts = Bitmap(of, group).encode(weight.to(DTYPES.get(kind, FP32)).float())
    if kind in DTYPES:
        parts["values"] = parts["values"].to(DTYPES[kind])
    begins = row_begins(parts["bitmap"], parts["starts"], parts["values"], bits)[:-1]
    held = [parts["bitmap"].view(torch.int32), begins, parts["values"], *([parts["scales"]] if bits <= 8 else [])]
    form = BitmapForm(bits, group, parts["values"].dtype)
    return [each.to(DEVICE).contiguous() for each in held], form, Bitmap(of, group).decode(parts, (rows, columns))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize(("rows", "columns", "density"), [(48, 256, 0.5), (70, 130, 0.5), (3, 64, 1.0), (5, 65, 0.0)])
def test_one_row(kind, rows, columns, density):
    for group in (64, 128):
        tensors, form, weight = stored(kind, rows, columns, group, density)
        x, bias, residual, out = normal(1, columns), normal(rows, seed=1), normal(rows, seed=2), normal(rows)
        kernel = BitmapGemv(form, columns, rows, FP32, Epilogue(has_bias=True, has_residual=True))
        Launcher(kernel)(x, *tensors, bias, residual, out, sizes={})
        expected = (x.cpu() @ weight.T)[0] + bias.cpu() + residual.cpu()
        assert_close(out.cpu(), expected, tolerance=1e-5)


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("count", [2, 16, 70])
def test_several_rows(kind, count):
    rows, columns = 70, 130
    tensors, form, weight = stored(kind, rows, columns, 64)
    x, bias, out = normal(count, columns), normal(rows, seed=1), normal(count, rows)
    kernel = BitmapGemm(form, columns, rows, FP32, count <= 16, Epilogue(has_bias=True))
    Launcher(kernel)(x, *tensors, bias, out, sizes={"M": count})
    assert_close(out.cpu(), x.cpu() @ weight.T + bias.cpu(), tolerance=1e-5)


@pytest.mark.parametrize("tile", [BitmapGemv, BitmapGemm])
def test_every_tuning_gives_the_same(tile):
    rows, columns = 37, 130
    tensors, form, weight = stored("int4", rows, columns, 64)
    x = normal(1, columns)
    kernel = tile(form, columns, rows, FP32)
    for tuning in kernel.tunings():
        out = normal(1, rows)
        Launcher(kernel, tuning)(x, *tensors, out, sizes={"M": 1})
        assert_close(out.cpu(), x.cpu() @ weight.T, tolerance=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    tensors, form, weight = stored("int4", 32, 128, 64)
    for count in (1, 4):
        x, out = normal(count, 128).to(dtype), normal(count, 32).to(dtype)
        kernel = BitmapGemv(form, 128, 32, dtype) if count == 1 else BitmapGemm(form, 128, 32, dtype, True)
        Launcher(kernel)(x, *tensors, out, sizes={"M": count})
        expected = x.cpu().float() @ weight.T
        assert (out.cpu().float() - expected).abs().max() < 3 * torch.finfo(dtype).eps * expected.abs().max()


def test_a_kernel_rejects_another_weight():
    """The comparisons of this file can fail."""
    tensors, form, weight = stored("int4", 32, 128, 64)
    x, out = normal(1, 128), normal(32)
    tensors[0][3, 0] ^= 1
    Launcher(BitmapGemv(form, 128, 32, FP32))(x, *tensors, out, sizes={})
    with pytest.raises(AssertionError):
        assert_close(out.cpu(), (x.cpu() @ weight.T)[0], tolerance=1e-5)


def small(of: str, family: str = "llama"):
    pruned, _ = run_pass(PruneWeights(), family_program(family))
    return run_pass(QuantizeWeights(format=Bitmap(of)), pruned, CacheKV())[0]


def test_steps_take_bias_and_residual():
    steps = [step for step in fuse(small("int4", "opt"), "decode") if isinstance(step, BitmapStep)]
    assert len(steps) == len(small("int4", "opt").packed)
    assert {step.kernel.epilogue.has_bias for step in steps} == {True}
    # Behind attention, and behind the feed-forward layer.
    assert sum(step.kernel.epilogue.has_residual for step in steps) == 4
    assert {step.reason for step in steps} == {"the weight is expanded in registers"}


@pytest.mark.parametrize("of", ["int4", "float"])
def test_a_session_gives_what_the_torch_target_gives(of):
    program = small(of)
    executor = TritonExecutor(program)
    ids = example_input_ids(program, 2, 8)
    found, expected = (
        [session.prefill(ids[:, :5].tolist()), *(session.decode(ids[:, at].tolist()) for at in range(5, 8))]
        for session in (Session(each, 2, 64) for each in (executor, TorchExecutor(program, kernels="reference")))
    )
    for one, other in zip(found, expected, strict=True):
        assert_close(one.cpu().float(), other, tolerance=1e-4, reason="sums in another order")


def test_what_has_no_kernel_runs_in_pytorch():
    program = small("int4").copy()
    for packed in program.packed.values():
        scales = packed.parts["scales"]
        program.constants[scales] = Constant(scales, program.constants[scales].value().float())
    steps = [step for step in fuse(program, "decode") if any(is_call(node, bitmap_linear) for node in step.nodes)]
    assert {(type(step), step.reason) for step in steps} == {(TorchStep, "scales of bitmap weights are read in bf16")}


def test_damaged_weights_are_refused_before_a_launch():
    program = small("int4").copy()
    name = next(packed.parts["bitmap"] for packed in program.packed.values())
    program.constants[name] = Constant(name, program.constants[name].value() | 1)
    with pytest.raises(ArtifactError, match=r"the bitmap counts \d+ values"):
        TritonExecutor(program)
