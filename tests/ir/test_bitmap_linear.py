"""`jettison::bitmap_linear`: layout, reference, refusals, export."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from jettison.ir.ops.bitmap_linear import (
    SLAB,
    bitmap_linear,
    bitmap_linear_reference,
    expand_reference,
    expand_rows,
    kept_of,
    pack_bits,
    pack_values,
    row_sizes,
    slab_chunks,
    unpack_bits,
    values_of_rows,
)

MODULE = importlib.import_module("jettison.ir.ops.bitmap_linear")
DTYPES = {4: torch.int8, 8: torch.int8, 16: torch.bfloat16, 32: torch.float32}


def random_weight(rows: int, columns: int, bits: int, density: float = 0.5, group: int = 128) -> dict[str, Any]:
    """Operands of a random weight, in the order of the operator."""
    generator = torch.Generator().manual_seed(rows * columns + bits)
    kept = torch.rand(rows, columns, generator=generator) < density
    if bits <= 8:
        low = -(1 << (bits - 1))
        numbers = torch.randint(low, -low, (rows, columns), generator=generator).to(torch.float32)
    else:
        numbers = torch.randn(rows, columns, generator=generator)
    by_block = kept_of(kept.to(torch.float32))
    padded = torch.zeros(by_block.shape).flatten(1)
    padded[:, :columns] = numbers
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), row_sizes(by_block, bits).cumsum(0)])
    starts = ends[[*range(0, rows, SLAB), rows]]
    values = pack_values(padded.view(by_block.shape).to(DTYPES[bits]), by_block, bits)
    scales = torch.rand(rows, -(-columns // group), generator=generator) if bits <= 8 else None
    return {"bitmap": pack_bits(by_block), "starts": starts, "values": values, "scales": scales}


def test_layout_by_hand():
    # Two rows of 65 columns: three weights and one; a block without any takes no byte.
    bitmap = torch.zeros(2, 16, dtype=torch.uint8)
    bitmap[0, 0], bitmap[0, 1], bitmap[1, 8] = 0b1000_0001, 0b10, 0b1
    values = torch.tensor([0x71, 0x0F, 0x08], dtype=torch.uint8)
    scales = torch.tensor([[1.0, 1.0], [1.0, 0.5]])
    expected = torch.zeros(2, 65)
    expected[0, 0], expected[0, 7], expected[0, 9], expected[1, 64] = 1, 7, -1, -4
    assert torch.equal(expand_reference(bitmap, values, scales, 4, 64, 65), expected)
    assert torch.equal(expand_rows(bitmap, values, scales, 4, 64, 65), expected)
    wide = torch.tensor([1.5, -2.0, 3.0, 4.0], dtype=torch.bfloat16)
    assert expand_rows(bitmap, wide, None, 16, 64, 65)[expected != 0].tolist() == wide.tolist()


@settings(deadline=None, max_examples=40)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 200),
    bits=st.sampled_from([4, 8, 16, 32]),
    density=st.sampled_from([0.0, 1 / 32, 0.5, 1.0]),
    group=st.sampled_from([64, 128]),
)
def test_rows_equal_the_reference_exactly(rows: int, columns: int, bits: int, density: float, group: int):
    weight = random_weight(rows, columns, bits, density, group)
    read = weight["bitmap"], weight["values"], weight["scales"], bits, group, columns
    assert torch.equal(expand_rows(*read), expand_reference(*read))


def test_the_rank_of_a_value_is_the_number_of_bits_before_it():
    weight = random_weight(3, 130, 32)
    kept = unpack_bits(weight["bitmap"]).flatten()
    dense = torch.zeros(kept.shape)
    for place in kept.nonzero().flatten().tolist():
        dense[place] = weight["values"][int(kept[:place].sum())]
    expected = expand_rows(weight["bitmap"], weight["values"], None, 32, 64, 130)
    assert torch.equal(dense.view(3, -1)[:, :130], expected)
    assert not kept.view(3, -1)[:, 130:].any()


@pytest.mark.parametrize("m", [1, 7])
@pytest.mark.parametrize("bits", [4, 8, 16, 32])
@pytest.mark.parametrize("columns", [64, 150])
def test_linear_matches_the_reference_over_many_chunks(
    monkeypatch: pytest.MonkeyPatch, m: int, bits: int, columns: int
):
    monkeypatch.setattr(MODULE, "CHUNK_WEIGHTS", 1000)
    assert len(slab_chunks(150, columns)) == 3
    weight = random_weight(150, columns, bits)
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(m))
    bias = torch.linspace(-1, 1, 150) if m == 7 else None
    y = bitmap_linear(x, **weight, bias=bias, bits=bits, group=128, in_features=columns)
    expected = bitmap_linear_reference(x, **weight, bias=bias, bits=bits, group=128, in_features=columns)
    assert y.is_contiguous()
    assert float((y - expected).abs().max()) <= 2e-6 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96,), (2, 3, 96), (2, 0, 96)])
def test_linear_keeps_dtype_and_leading_shape(dtype: torch.dtype, shape: tuple[int, ...]):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.ones(11, dtype=dtype)
    y = bitmap_linear(x, **random_weight(11, 96, 4), bias=bias, bits=4, group=128, in_features=96)
    assert (y.shape, y.dtype) == ((*shape[:-1], 11), dtype)


def test_slabs_are_self_contained():
    weight = random_weight(200, 100, 4)
    whole = expand_rows(weight["bitmap"], weight["values"], weight["scales"], 4, 128, 100)
    for rows in (slice(0, 64), slice(64, 192), slice(128, 200)):
        own = weight["values"][values_of_rows(weight["starts"], rows)]
        assert torch.equal(expand_rows(weight["bitmap"][rows], own, weight["scales"][rows], 4, 128, 100), whole[rows])


def test_linear_refuses_operands_of_another_layout():
    good = {"x": torch.randn(2, 96), **random_weight(6, 96, 4), "bias": None}
    good |= {"bits": 4, "group": 128, "in_features": 96}
    for bad, message in [
        ({"bits": 3}, "bits must be one of"),
        ({"group": 96}, "whole blocks of 64"),
        ({"bitmap": good["bitmap"][:, :8]}, r"bitmap must be u8\[N, 16\]"),
        ({"bitmap": good["bitmap"].to(torch.int8)}, "bitmap must be u8"),
        ({"starts": good["starts"][:1]}, r"starts must be i64\[2\]"),
        ({"starts": good["starts"].to(torch.int32)}, r"starts must be i64\[2\]"),
        ({"values": good["values"].to(torch.float32)}, "values must be a vector of"),
        ({"values": good["values"][None]}, "values must be a vector of"),
        ({"scales": None}, "scales belong to 4 and 8 bits"),
        ({"scales": good["scales"].repeat(1, 2)}, r"scales must be floating point \[6, 1\]"),
        ({"bias": torch.zeros(5)}, r"bias must be floating point \[6\]"),
        ({"x": torch.randn(2, 95)}, "last dimension of x must be 96"),
    ]:
        operands = {**good, **bad}
        with pytest.raises(RuntimeError, match=message):
            bitmap_linear(**operands)
        mode = FakeTensorMode()
        fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in operands.items()}
        with pytest.raises(RuntimeError, match=message):
            bitmap_linear(**fakes)
    with pytest.raises(RuntimeError, match=r"the bitmap counts \d+ values, found \d+"):
        bitmap_linear(**{**good, "bitmap": good["bitmap"].roll(1, 1) | 1})


@pytest.mark.parametrize("shape", [(96,), (2, 3, 96)])
@pytest.mark.parametrize("bits", [4, 16])
def test_schema_and_fake_rule_hold(shape: tuple[int, ...], bits: int):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    weight = tuple(random_weight(11, 96, bits).values())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(bitmap_linear, (x, *weight, torch.ones(11), bits, 128, 96), test_utils=checks)
