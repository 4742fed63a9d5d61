"""Kernels for bitmap weights, as they are compiled for this processor and for others that it can stand for."""

from __future__ import annotations

import ctypes
import functools
import mmap

import pytest
import torch
from torch import Tensor

from jettison.codegen.cpu.bitmap_source import BitmapKernel, best_form, bitmap_source
from jettison.codegen.cpu.compiled import compile_source, host_features
from jettison.passes.formats import Bitmap

KINDS = {"int4": "int4", "int8": "int8", "bf16": "float", "f16": "float", "f32": "float"}
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
VBMI2 = frozenset({"avx512f", "avx512bw", "avx512vl", "avx512vbmi2", "bmi2"})
BMI2 = frozenset({"avx2", "fma", "bmi2"})
# A form, and the features it is compiled with: those of this processor, or few.
FORMS = {
    "vbmi2": ("vbmi2", None),
    "bmi2": ("bmi2", None),
    "bmi2_alone": ("bmi2", BMI2),
    "portable": ("portable", None),
    "portable_alone": ("portable", frozenset[str]()),
}


def sparse(rows: int, columns: int, density: float, kind: str) -> Tensor:
    generator = torch.Generator().manual_seed(rows + columns)
    kept = torch.rand(rows, columns, generator=generator) < density
    weight = torch.randn(rows, columns, generator=generator) * kept
    weight = weight.to(DTYPES.get(kind, torch.float32)).float()
    if kind in DTYPES and density:
        # One that the narrower dtypes do not hold, where there is one, and the smallest that this one has.
        weight[0, 0] = {"bf16": 2.0**-120, "f16": 2.0**-24, "f32": 1 + 2.0**-20}[kind]
        weight[0, 1:2] = {"bf16": -(2.0**100), "f16": -(1 + 2.0**-10), "f32": -(2.0**100)}[kind]
    return weight


def needs(form: str, kind: str) -> None:
    """Skip what this processor cannot run."""
    needed = {"vbmi2": VBMI2, "bmi2": BMI2, "portable": frozenset()}[FORMS[form][0]]
    if not needed <= host_features():
        pytest.skip(f"this processor has no {', '.join(sorted(needed - host_features()))}")
    if FORMS[form][0] == "bmi2" and kind in DTYPES:
        pytest.skip("the form is for codes")


@functools.cache
def compiled(kind: str, group: int, form: str, inputs: int = 1, dense: str = "f32"):
    form_name, features = FORMS[form]
    has_bf16 = form == "vbmi2" and "avx512bf16" in host_features()
    kernel = BitmapKernel(kind, group, form_name, (inputs,), dense, has_bf16)
    return compile_source(bitmap_source(kernel), features)


def pointers(parts: dict[str, Tensor]) -> list[int]:
    return [parts[name].data_ptr() if name in parts else 0 for name in ("bitmap", "starts", "values", "scales")]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_expands_what_the_format_stores(kind, form):
    needs(form, kind)
    for rows, columns, density in ((1, 1, 1.0), (70, 150, 0.5), (3, 64, 0.0), (64, 300, 1 / 32), (130, 257, 1.0)):
        for group, dense, dtype in ((64, "f32", torch.float32), (128, "bf16", torch.bfloat16)):
            stored = Bitmap(KINDS[kind], group)
            weight = sparse(rows, columns, density, kind)
            parts = stored.encode(weight)
            if kind in DTYPES:
                parts["values"] = parts["values"].to(DTYPES[kind])
            blocks = -(-columns // 64)
            made = torch.full((rows, blocks * 64), torch.nan, dtype=dtype)
            expand = compiled(kind, group, form, dense=dense)("expand", 9)
            expand(*pointers(parts), made.data_ptr(), 0, 0, rows, blocks)
            expected = stored.decode(parts, (rows, columns)).to(dtype)
            assert torch.equal(made[:, :columns], expected), (rows, columns, density, group, dense)
            assert not made[:, columns:].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inputs", [1, 4])
def test_multiplies_slabs_of_rows(kind, form, inputs):
    needs(form, kind)
    rows, columns, blocks = 200, 300, 5
    stored = Bitmap(KINDS[kind], 128)
    parts = stored.encode(sparse(rows, columns, 0.5, kind).clamp(-9, 9))
    if kind in DTYPES:
        parts["values"] = parts["values"].to(DTYPES[kind])
    x = torch.zeros(inputs, blocks * 64)
    x[:, :columns] = torch.randn(inputs, columns, generator=torch.Generator().manual_seed(1))
    out = torch.full((inputs, rows), torch.nan)
    multiply = compiled(kind, 128, form, inputs)(f"multiply_{inputs}", 10)
    for first, last in ((64, 192), (192, 200), (0, 64)):
        assert out[:, first:last].isnan().all()
        multiply(*pointers(parts), x.data_ptr(), out.data_ptr(), first, last, rows, blocks)
    expected = x[:, :columns].double() @ stored.decode(parts, (rows, columns)).double().T
    assert float((out - expected).abs().max()) < 1e-5 * float(expected.abs().max())


class GuardedMemory:
    """Tensors that end where memory ends: a read of one byte behind them is a fault."""

    def __init__(self) -> None:
        self._held: list[mmap.mmap] = []
        self._libc = ctypes.CDLL(None, use_errno=True)

    def copy(self, tensor: Tensor) -> Tensor:
        page, size = mmap.PAGESIZE, tensor.nbytes
        pages = -(-max(1, size) // page)
        memory = mmap.mmap(-1, (pages + 1) * page)
        self._held.append(memory)
        everything = torch.frombuffer(memory, dtype=torch.uint8)
        behind = everything.data_ptr() + pages * page
        assert self._libc.mprotect(ctypes.c_void_p(behind), page, 0) == 0
        begin = pages * page - size
        copy = everything[begin : begin + size].view(tensor.dtype).view(tensor.shape) if size else tensor
        return copy.copy_(tensor) if size else tensor

    def close(self) -> None:
        for memory in self._held:
            address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
            self._libc.mprotect(ctypes.c_void_p(address), len(memory), mmap.PROT_READ | mmap.PROT_WRITE)


@pytest.mark.skipif(not hasattr(mmap, "MAP_ANONYMOUS"), reason="memory is not protected this way")
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_reads_no_byte_behind_the_weight(kind, form):
    needs(form, kind)
    memory = GuardedMemory()
    for columns, density in ((64, 0.02), (130, 0.5), (64, 1.0), (192, 0.97)):
        parts = Bitmap(KINDS[kind], 64).encode(sparse(66, columns, density, kind).clamp(-9, 9))
        if kind in DTYPES:
            parts["values"] = parts["values"].to(DTYPES[kind])
        blocks = -(-columns // 64)
        guarded = {name: memory.copy(part) for name, part in parts.items()}
        x, out = memory.copy(torch.ones(1, blocks * 64)), memory.copy(torch.zeros(1, 66))
        multiply = compiled(kind, 64, form)("multiply_1", 10)
        multiply(*pointers(guarded), x.data_ptr(), out.data_ptr(), 0, 66, 66, blocks)
        expected = Bitmap(KINDS[kind], 64).decode(parts, (66, columns)).sum(1)
        assert torch.allclose(out[0], expected, atol=1e-4)
    memory.close()


def test_the_best_form_of_a_processor():
    assert best_form("int4", VBMI2) == "vbmi2"
    assert best_form("bf16", VBMI2 | BMI2) == "vbmi2"
    assert best_form("int8", BMI2) == "bmi2"
    assert best_form("bf16", BMI2) == "portable"
    assert best_form("int4", frozenset()) == "portable"


def test_the_vector_form_moves_values_apart_in_one_instruction():
    """What makes it fast; and the portable one asks for nothing that a processor may lack."""
    text = bitmap_source(BitmapKernel("int4", 128, "vbmi2"))
    assert text.count("call <64 x i8> @llvm.x86.avx512.mask.expand.v64i8") == 2
    assert "llvm.x86" not in bitmap_source(BitmapKernel("f16", 128, "portable", dense="bf16"))


def test_source_is_the_same_every_time():
    kernel = BitmapKernel("int8", 64, "bmi2", (1, 4))
    assert bitmap_source(kernel) == bitmap_source(kernel)
