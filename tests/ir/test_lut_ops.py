"""`jettison::lut_linear` and `jettison::lut_embedding`: layout, reference, refusals, export."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from jettison.ir.ops.lut_embedding import lut_embedding, lut_embedding_reference
from jettison.ir.ops.lut_linear import (
    group_scales,
    look_up_reference,
    look_up_rows,
    lut_linear,
    lut_linear_reference,
    table_of_rows,
)

LINEAR_MODULE = importlib.import_module("jettison.ir.ops.lut_linear")
QUANTIZED_MODULE = importlib.import_module("jettison.ir.ops.quantized_linear")
SCALES = ("none", "float", "codes")


def random_weight(rows: int, columns: int, bits: int, group: int, tables: int = 1, scales: str = "float") -> dict:
    """Operands of a random weight; every byte is legal."""
    generator = torch.Generator().manual_seed(rows * columns + bits * group)
    k_blocks = -(-columns // group)
    codes = torch.randint(0, 256, (rows, k_blocks, group * bits // 8), dtype=torch.uint8, generator=generator)
    found: dict[str, Any] = {"codes": codes, "lut": torch.randn(tables, 2**bits, generator=generator)}
    found |= {"scales": None, "steps": None}
    if scales == "float":
        found["scales"] = torch.rand(rows, k_blocks, generator=generator)
    elif scales == "codes":
        found["scales"] = torch.randint(0, 256, (rows, k_blocks), dtype=torch.uint8, generator=generator)
        found["steps"] = torch.rand(rows, 1, generator=generator) / 255
    return found


def test_reference_by_hand():
    # Two rows with a table each, one group of four 2-bit codes, of which three are columns.
    codes = torch.tensor([[[0b11_10_01_00]], [[0b00_00_11_01]]], dtype=torch.uint8)
    lut = torch.tensor([[1.0, 2.0, 3.0, 4.0], [-1.0, -2.0, -3.0, -4.0]])
    assert look_up_reference(codes, lut, None, 2, 4, 3).tolist() == [[1.0, 2.0, 3.0], [-2.0, -4.0, -1.0]]
    assert look_up_reference(codes, lut[:1], torch.tensor([[1.0], [0.5]]), 2, 4, 2).tolist() == [[1.0, 2.0], [1.0, 2.0]]
    scales = group_scales(torch.tensor([[4], [0]], dtype=torch.uint8), torch.tensor([[0.5], [1.0]]))
    assert scales is not None
    assert scales.tolist() == [[4.0], [0.0]]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.sampled_from([1, 6, 12]),
    columns=st.integers(1, 200),
    bits=st.sampled_from([2, 4, 8]),
    group=st.sampled_from([8, 32, 64]),
    tables=st.sampled_from([1, 2, 6]),
    has_scales=st.booleans(),
)
def test_rows_equal_the_reference_exactly(
    rows: int, columns: int, bits: int, group: int, tables: int, has_scales: bool
):
    tables = tables if rows % tables == 0 else 1
    weight = random_weight(rows, columns, bits, group, tables, "float" if has_scales else "none")
    codes, lut, scales = weight["codes"], weight["lut"], weight["scales"]
    fast = look_up_rows(codes, lut, table_of_rows(rows, tables, codes.device), scales, bits, columns)
    assert torch.equal(fast, look_up_reference(codes, lut, scales, bits, group, columns))


@pytest.mark.parametrize("m", [1, 7])
@pytest.mark.parametrize(("bits", "tables"), [(4, 1), (4, 36), (2, 4), (8, 1), (8, 36)])
@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("columns", [128, 65])
def test_linear_matches_the_reference_over_many_chunks(
    monkeypatch: pytest.MonkeyPatch, m: int, bits: int, tables: int, scales: str, columns: int
):
    monkeypatch.setattr(QUANTIZED_MODULE, "CHUNK_WEIGHTS", 1000)
    weight = random_weight(36, columns, bits, 32, tables, scales)
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(m))
    bias = torch.linspace(-1, 1, 36) if m == 7 else None
    y = lut_linear(x, **weight, bias=bias, bits=bits, group=32, in_features=columns)
    expected = lut_linear_reference(x, **weight, bias=bias, bits=bits, group=32, in_features=columns)
    assert y.is_contiguous()
    assert float((y - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96,), (2, 3, 96), (2, 0, 96)])
def test_linear_keeps_dtype_and_leading_shape(dtype: torch.dtype, shape: tuple[int, ...]):
    weight = random_weight(11, 96, 4, 32)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    y = lut_linear(x, **weight, bias=torch.ones(11, dtype=dtype), bits=4, group=32, in_features=96)
    assert (y.shape, y.dtype) == ((*shape[:-1], 11), dtype)


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize(("bits", "tables"), [(4, 1), (4, 50), (2, 5), (8, 1)])
@pytest.mark.parametrize("shape", [(), (3, 7), (0,)])
def test_embedding_equals_the_reference_exactly(
    monkeypatch: pytest.MonkeyPatch, scales: str, bits: int, tables: int, shape: tuple[int, ...]
):
    monkeypatch.setattr(QUANTIZED_MODULE, "CHUNK_WEIGHTS", 300)
    weight = random_weight(50, 75, bits, 32, tables, scales)
    indices = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1))
    rows = lut_embedding(indices, **weight, bits=bits, group=32, embedding_dim=75)
    assert rows.shape == (*shape, 75)
    expected = lut_embedding_reference(indices, **weight, bits=bits, group=32, embedding_dim=75)
    assert torch.equal(rows, expected)


@pytest.mark.parametrize("index", [50, -1])
def test_embedding_refuses_an_index_outside_the_table(index: int):
    weight = random_weight(50, 64, 4, 32)
    with pytest.raises((IndexError, RuntimeError), match=r"out of range|index"):
        lut_embedding(torch.tensor([index]), **weight, bits=4, group=32, embedding_dim=64)


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor any operator returns."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.nbytes = max(self.nbytes, result.numel() * result.element_size())
        return result


def test_linear_never_holds_the_whole_weight():
    weight = random_weight(16384, 512, 4, 32)  # 32 MiB, 4 MiB of codes
    with LargestTensor() as watched:
        LINEAR_MODULE._lut_linear(torch.ones(1, 512), *weight.values(), None, 4, 32, 512)
    assert 2**20 < watched.nbytes <= 4 * QUANTIZED_MODULE.CHUNK_WEIGHTS


def test_linear_refuses_operands_of_another_layout():
    good = {"x": torch.randn(2, 96), **random_weight(6, 96, 4, 32), "bias": None}
    good |= {"bits": 4, "group": 32, "in_features": 96}
    coded = random_weight(6, 96, 4, 32, scales="codes")
    for bad, message in [
        ({"bits": 3}, "bits must be one of"),
        ({"group": 0}, "fill whole bytes"),
        ({"group": 64}, r"codes must be u8\[N, 2, 32\]"),
        ({"codes": good["codes"].to(torch.int8)}, "codes must be u8"),
        ({"lut": good["lut"][:, :8]}, r"lut must be floating point \[T, 16\], T dividing 6"),
        ({"lut": good["lut"].repeat(4, 1)}, r"lut must be floating point \[T, 16\], T dividing 6"),
        ({"lut": good["lut"].to(torch.int32)}, "lut must be floating point"),
        ({"scales": good["scales"][:, :2]}, r"scales must be floating point \[6, 3\]"),
        ({"scales": coded["scales"]}, r"scales must be floating point \[6, 3\]"),
        ({"steps": coded["steps"]}, r"scales must be u8 \[6, 3\]"),
        ({"scales": None, "steps": coded["steps"]}, r"steps must be floating point \[6, 1\] beside scales"),
        ({"scales": coded["scales"], "steps": coded["steps"][:3]}, r"steps must be floating point \[6, 1\]"),
        ({"bias": torch.zeros(5)}, r"bias must be floating point \[6\]"),
        ({"x": torch.randn(2, 95)}, "last dimension of x must be 96"),
    ]:
        operands = {**good, **bad}
        with pytest.raises(RuntimeError, match=message):
            lut_linear(**operands)
        mode = FakeTensorMode()
        fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in operands.items()}
        with pytest.raises(RuntimeError, match=message):
            lut_linear(**fakes)
    with pytest.raises(RuntimeError, match="indices must be int32 or int64"):
        lut_embedding(torch.zeros(2), **random_weight(6, 96, 4, 32), bits=4, group=32, embedding_dim=96)


@pytest.mark.parametrize("shape", [(96,), (2, 3, 96)])
@pytest.mark.parametrize("scales", SCALES)
def test_schema_and_fake_rule_hold(shape: tuple[int, ...], scales: str):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    weight = tuple(random_weight(11, 96, 4, 32, scales=scales).values())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(lut_linear, (x, *weight, torch.ones(11), 4, 32, 96), test_utils=checks)
    indices = torch.zeros(shape[:-1], dtype=torch.int64)
    torch.library.opcheck(lut_embedding, (indices, *weight, 4, 32, 96), test_utils=checks)
