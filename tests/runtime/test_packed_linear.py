"""Packed weights: what their kernels compute, what they hold, and where there is no kernel."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from jettison.ir.compare import assert_close, difference
from jettison.ir.ops.quantized_linear import dequantize_reference, quantized_linear_reference
from jettison.passes.formats.int_groups import IntGroups
from jettison.runtime import packed_linear
from jettison.runtime.packed_linear import BAG_MANY_ROWS, INT4_MANY_ROWS, PackedWeight, pack_weight
from tests.runtime.allocations import Allocations

# x, scales, offsets and results are each rounded to bf16: four times up to 2**-8, measured 6e-3 at most.
INT4_TOLERANCE = 1e-2
ROWS = (1, 2, 3, 4, 5, 15, 16, 17, 33, 63, 64)

needs_int4 = pytest.mark.skipif(not packed_linear._has_int4_kernel(), reason="no int4 kernel for this processor")
needs_bags = pytest.mark.skipif(not packed_linear._has_bag_kernel(), reason="no bag kernel for this processor")
BITS = [pytest.param(4, marks=needs_int4), *(pytest.param(bits, marks=needs_bags) for bits in (8, 2))]


def packed(bits: int, group: int, symmetric: bool, rows: int, columns: int) -> tuple[PackedWeight, tuple]:
    """A packed weight, and the operands of the reference."""
    generator = torch.Generator().manual_seed(rows * columns)
    parts = IntGroups(bits, group, symmetric).encode(torch.randn(rows, columns, generator=generator))
    operands = parts["codes"], parts["scales"], parts.get("zeros")
    weight = pack_weight(*operands, bits, group, columns, is_table=True)
    assert weight is not None
    return weight, operands


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(61, 64), (64, 100), (600, 256), (1333, 301)])
def test_linear_computes_the_reference(bits: int, group: int, symmetric: bool, rows: int, columns: int) -> None:
    weight, operands = packed(bits, group, symmetric, rows, columns)
    bias = random(rows)
    tolerance = {"tolerance": INT4_TOLERANCE, "reason": "bf16 operands"} if bits == 4 else {}
    for steps in ROWS:
        x = random(steps, columns, seed=steps)
        expected = quantized_linear_reference(x, *operands, None, bits, group, columns)
        result = weight.linear(x, None)
        assert result.is_contiguous()
        assert_close(result, expected, what=f"{steps} rows", **tolerance)
        assert_close(weight.linear(x, bias), expected + bias, what=f"{steps} rows and a bias", **tolerance)


@needs_int4
@pytest.mark.parametrize(("rows", "columns"), [(61, 64), (600, 256), (70, 301)])
def test_int4_with_zero_points_between_the_codes(rows: int, columns: int) -> None:
    weight_format = IntGroups(4, 64, float_zeros=True)
    parts = weight_format.encode(random(rows, columns) + 0.5)
    operands = parts["codes"], parts["scales"], parts["zeros"]
    weight = pack_weight(*operands, 4, 64, columns, is_table=True)
    assert weight is not None
    for steps in ROWS:
        x = random(steps, columns, seed=steps)
        expected = quantized_linear_reference(x, *operands, None, 4, 64, columns)
        assert_close(weight.linear(x, None), expected, tolerance=INT4_TOLERANCE, reason="bf16 operands")
    indices = torch.tensor([0, rows - 1, 3])
    assert torch.equal(weight.lookup(indices), dequantize_reference(*operands, 4, 64, columns)[indices])


@pytest.mark.parametrize(("bits", "float_zeros"), [(2, True), (3, False), (3, True), (8, True)])
def test_no_kernel_reads_other_layouts(bits: int, float_zeros: bool) -> None:
    parts = IntGroups(bits, 32, float_zeros=float_zeros).encode(random(64, 64))
    assert pack_weight(parts["codes"], parts["scales"], parts["zeros"], bits, 32, 64, is_table=False) is None


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_shapes_and_dtypes_of_the_operator(bits: int, symmetric: bool) -> None:
    weight, operands = packed(bits, 32, symmetric, 40, 70)
    for shape in ((70,), (2, 3, 70), (2, 50, 70)):
        x = random(*shape)
        expected = quantized_linear_reference(x, *operands, None, bits, 32, 70)
        assert_close(weight.linear(x, None), expected, tolerance=INT4_TOLERANCE, reason="bf16 operands")
        strided = torch.stack([x, x], -1)[..., 0]
        assert torch.equal(weight.linear(strided, None), weight.linear(x, None))
    for rows in (2, max(INT4_MANY_ROWS.values())):  # one by one, and blocks of the weight decoded first
        assert weight.linear(random(rows, 70).bfloat16(), random(40).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(61, 64), (600, 256), (1333, 301)])
def test_lookup_is_exact(bits: int, group: int, symmetric: bool, rows: int, columns: int) -> None:
    weight, operands = packed(bits, group, symmetric, rows, columns)
    table = dequantize_reference(*operands, bits, group, columns)
    indices = torch.randint(rows, (2, 7), generator=torch.Generator().manual_seed(0))
    indices[0, :2] = torch.tensor([0, rows - 1])
    assert torch.equal(weight.lookup(indices), table[indices])
    for outside in (rows, -1):
        with pytest.raises(IndexError):
            weight.lookup(torch.tensor([0, outside]))


@needs_int4
@pytest.mark.parametrize("dtype", list(INT4_MANY_ROWS))
def test_int4_with_and_without_a_bf16_product(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    monkeypatch.setattr(packed_linear, "_product_dtype", lambda: dtype)
    weight, operands = packed(4, 64, False, 200, 300)
    for steps in (INT4_MANY_ROWS[dtype] - 1, INT4_MANY_ROWS[dtype]):
        x = random(steps, 300)
        expected = quantized_linear_reference(x, *operands, None, 4, 64, 300)
        assert_close(weight.linear(x, None), expected, tolerance=INT4_TOLERANCE, reason="bf16 operands")


@needs_int4
def test_int4_is_closer_than_8_bit_activations() -> None:
    """What the ONNX target does to x (each group on its own scale) moves a result twice as far."""
    weight, operands = packed(4, 128, False, 512, 2048)
    x = random(32, 2048)
    expected = quantized_linear_reference(x, *operands, None, 4, 128, 2048)
    groups = x.view(32, -1, 128)
    scale = groups.abs().amax(-1, keepdim=True) / 127
    rounded = ((groups / scale).round() * scale).view(32, 2048)
    onnx = quantized_linear_reference(rounded, *operands, None, 4, 128, 2048)
    ours = (weight.linear(x, None) - expected).norm()
    assert 1.5 * ours < (onnx - expected).norm()
    assert ours < 5e-3 * expected.norm()


@needs_bags
def test_int8_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few strips at a time give what all at once give."""
    weight, _ = packed(8, 32, False, 1600, 96)
    x = random(5, 96)
    whole = weight.linear(x, None)
    monkeypatch.setattr(packed_linear, "_SUMS_BYTES", 1)
    assert torch.equal(weight.linear(x, None), whole)
    assert len(x) < BAG_MANY_ROWS


@pytest.mark.parametrize("bits", BITS)
def test_many_rows_never_decode_the_whole_weight(monkeypatch: pytest.MonkeyPatch, bits: int) -> None:
    monkeypatch.setattr(packed_linear, "BLOCK_WEIGHTS", 1 << 16)
    rows, columns, steps = 2048, 512, 64
    weight, _ = packed(bits, 128, False, rows, columns)
    x = random(steps, columns)
    with Allocations() as seen:
        weight.linear(x, None)
    # A strip of 512 rows in fp32 for 8 bits; the result and x are smaller.
    assert seen.largest <= 512 * columns * 4, f"{seen.operator} made {seen.largest} bytes"


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("is_table", [False, True])
def test_bytes_held(bits: int, is_table: bool) -> None:
    parts = IntGroups(bits, 128, False).encode(random(2048, 1024))
    weight = pack_weight(parts["codes"], parts["scales"], parts["zeros"], bits, 128, 1024, is_table=is_table)
    held: dict[int, int] = {}
    for value in vars(weight).values():
        for part in value if isinstance(value, tuple) else (value,):
            if isinstance(part, Tensor):
                held[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
    assert weight.nbytes == sum(held.values())
    stored = sum(part.nbytes for part in parts.values())
    # Besides the codes 4 bytes a group where 4.5 were stored, and 4.5 more for exact lookups; or 8 in 520 bytes,
    # or 4 in 132.
    most = {(4, False): 1.0, (4, True): 1.07, (8, False): 1.02, (8, True): 1.02}
    most |= {(2, False): 1.04, (2, True): 1.04}
    assert 0.98 * stored < weight.nbytes <= most[bits, is_table] * stored


def test_what_no_kernel_reads_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = IntGroups(3, 32, True).encode(random(8, 64))
    assert pack_weight(parts["codes"], parts["scales"], None, 3, 32, 64, is_table=False) is None
    parts = IntGroups(4, 32, True).encode(random(8, 64))
    half = parts["scales"].half()
    assert pack_weight(parts["codes"], half, None, 4, 32, 64, is_table=False) is None
    codes = parts["codes"].view(8, 4, 8)
    assert pack_weight(codes, parts["scales"].repeat_interleave(2, 1), None, 4, 16, 64, is_table=False) is None
    for bits, kernel in ((4, "_has_int4_kernel"), (8, "_has_bag_kernel"), (2, "_has_bag_kernel")):
        monkeypatch.setattr(packed_linear, kernel, lambda: False)
        parts = IntGroups(bits, 32, True).encode(random(8, 64))
        assert pack_weight(parts["codes"], parts["scales"], None, bits, 32, 64, is_table=False) is None


@needs_int4
def test_the_kernel_interleaves_rows_as_assumed() -> None:
    """Row j in the low and row j + half in the high bits of byte j; decoding and lookups rely on it."""
    rows = torch.arange(64, dtype=torch.int32)[:, None].expand(-1, 4)
    half = packed_linear.int4_interleave() // 2
    low, high = (
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(value.contiguous(), 2).view(-1, 4, half)
        for value in (rows % 16, rows // 16)
    )
    found = torch.cat([(high & 15).int() * 16 + (low & 15), (high >> 4).int() * 16 + (low >> 4)], -1)
    assert found.tolist() == [[block.tolist()] * 4 for block in torch.arange(64).split(2 * half)]


@needs_int4
def test_error_does_not_grow_with_the_rows() -> None:
    """Where the kernel changes, results stay those of one weight."""
    weight, _ = packed(4, 32, False, 256, 256)
    x = random(100, 256)
    calls = [weight.linear(x[:steps], None)[0] for steps in (1, 2, 5, 63, 64, 100)]
    assert all(difference(later, earlier).relative < INT4_TOLERANCE for earlier, later in pairwise(calls))
