"""`jettison::quantized_linear` and `jettison::quantized_embedding`: layout, reference, export, ONNX Runtime."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from jettison.ir.ops.quantized_embedding import quantized_embedding, quantized_embedding_reference
from jettison.ir.ops.quantized_linear import (
    dequantize_reference,
    dequantize_rows,
    pack_codes,
    pack_zeros,
    quantized_linear,
    quantized_linear_reference,
    row_chunks,
    unpack_codes,
    unpack_zeros,
)

# The package exports the operator under the name of its module, so attribute access would find the operator.
LINEAR_MODULE = importlib.import_module("jettison.ir.ops.quantized_linear")


@dataclass
class Packed:
    """A random packed weight: every byte pattern is legal, so all codes, zero points and signs of scales occur."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group: int
    in_features: int

    @property
    def layout(self) -> tuple[int, int, int]:
        return self.bits, self.group, self.in_features


def random_packed(
    rows: int,
    columns: int,
    bits: int,
    group: int,
    has_zeros: bool | str = True,
    dtype: torch.dtype = torch.float32,
) -> Packed:
    generator = torch.Generator().manual_seed(rows * columns + bits * group)
    k_blocks = -(-columns // group)

    def packed_bytes(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    codes = packed_bytes(rows, k_blocks, group * bits // 8)
    zeros = packed_bytes(rows, -(-k_blocks * bits // 8)) if has_zeros else None
    if has_zeros == "float":
        zeros = torch.rand(rows, k_blocks, generator=generator) * (2**bits - 1)
    scales = (torch.randn(rows, k_blocks, generator=generator) / 2**bits).to(dtype)
    return Packed(codes, scales, zeros, bits, group, columns)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude of `expected`; infinite for NaN or another shape."""
    if actual.shape != expected.shape or not bool(torch.isfinite(actual).all()):
        return float("inf")
    difference = (actual.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max())


def test_relative_error_rejects_sign_flip_nan_and_shape():
    value = torch.tensor([1.0, -2.0])
    assert relative_error(value, value) == 0
    assert relative_error(value + 2e-5 * 2, value) > 1e-5
    assert relative_error(-value, value) == 2
    assert relative_error(torch.tensor([1.0, float("nan")]), value) == float("inf")
    assert relative_error(value[:1], value) == float("inf")


# ------------------------------------------------------------------------------------------------------------ layout


def test_pack_puts_the_first_code_in_the_low_bits():
    assert pack_codes(torch.arange(16, dtype=torch.uint8), 4).tolist() == [
        0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE,
    ]  # fmt: skip
    assert pack_codes(torch.tensor([0, 1, 2, 3, 3, 0, 0, 1], dtype=torch.uint8), 2).tolist() == [0xE4, 0x43]
    assert pack_codes(torch.tensor([7, 255], dtype=torch.uint8), 8).tolist() == [7, 255]
    # 24 bits, code i from bit 3 i on: 0b111_110_101_100_011_010_001_000.
    assert pack_codes(torch.arange(8, dtype=torch.uint8), 3).tolist() == [0b10001000, 0b11000110, 0b11111010]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_unpack_inverts_pack_for_every_byte(bits: int):
    # Every byte in each of the three places that a byte has among 3-bit codes.
    every_byte = torch.arange(256, dtype=torch.uint8).repeat(3).view(4, 192)
    codes = unpack_codes(every_byte, bits)
    assert codes.shape == (4, 192 * 8 // bits)
    assert int(codes.max()) == 2**bits - 1
    assert torch.equal(pack_codes(codes, bits), every_byte)
    assert torch.equal(codes, LINEAR_MODULE._codes_reference(every_byte, bits))
    # A slice of a row is not contiguous; the wider reading must not see the neighbours.
    assert torch.equal(unpack_codes(every_byte[:, 3:9], bits), codes[:, 3 * 8 // bits : 9 * 8 // bits])


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_packed_zero_points_of_a_row_end_on_a_byte(bits: int):
    for k_blocks in range(1, 20):
        zeros = torch.randint(2**bits, (3, k_blocks), generator=torch.Generator().manual_seed(k_blocks))
        packed = pack_zeros(zeros, bits)
        assert packed.shape == (3, -(-k_blocks * bits // 8))
        assert packed.is_contiguous()
        assert torch.equal(unpack_zeros(packed, bits, k_blocks), zeros.to(torch.float32))


def test_reference_by_hand_with_an_odd_number_of_groups():
    # One row, 3 groups of 2 four-bit codes (a group fills one byte); zero points 1, 2, 3 need a second byte per row.
    codes = torch.tensor([[[0x51], [0x02], [0xF0]]], dtype=torch.uint8)
    zeros = torch.tensor([[0x21, 0x03]], dtype=torch.uint8)
    scales = torch.tensor([[0.5, -1.0, 2.0]])
    weight = dequantize_reference(codes, scales, zeros, bits=4, group=2, in_features=5)
    assert weight.tolist() == [[0.0, 2.0, 0.0, 2.0, -6.0]]
    assert dequantize_reference(codes, scales, None, 4, 2, 6).tolist() == [[-3.5, -1.5, 6.0, 8.0, -16.0, 14.0]]


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 300),
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([16, 32, 64, 128]),
    has_zeros=st.sampled_from([False, True, "float"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_dequantize_rows_equals_the_reference_exactly(
    rows: int, columns: int, bits: int, group: int, has_zeros: bool | str, dtype: torch.dtype
):
    packed = random_packed(rows, columns, bits, group, has_zeros, dtype)
    parts = (packed.codes, packed.scales, packed.zeros)
    fast = dequantize_rows(*parts, *packed.layout)
    assert fast.shape == (rows, columns)
    assert torch.equal(fast, dequantize_reference(*parts, *packed.layout))


def test_row_chunks_cover_every_row_once_and_never_stall():
    assert [rows for chunk in row_chunks(1000, 5000) for rows in range(chunk.start, chunk.stop)] == list(range(1000))
    assert row_chunks(2, 10 * LINEAR_MODULE.CHUNK_WEIGHTS) == [slice(0, 1), slice(1, 2)]
    assert row_chunks(0, 8) == []


# ----------------------------------------------------------------------------------------- operators and references


@pytest.mark.parametrize("m", [1, 7, 64])
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 128), (8, 32), (8, 64), (2, 64), (3, 32), (3, 128)])
@pytest.mark.parametrize(
    ("columns", "has_zeros", "has_bias"),
    [(256, True, False), (193, True, True), (65, False, True), (100, "float", False)],
)
def test_linear_matches_the_reference_over_many_chunks(
    monkeypatch: pytest.MonkeyPatch, m: int, bits: int, group: int, columns: int, has_zeros: bool | str, has_bias: bool
):
    monkeypatch.setattr(LINEAR_MODULE, "CHUNK_WEIGHTS", 2000)  # a handful of rows, so that the last chunk is short
    packed = random_packed(37, columns, bits, group, has_zeros)
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(m))
    bias = torch.linspace(-1, 1, 37) if has_bias else None
    arguments = (x, packed.codes, packed.scales, packed.zeros, bias, *packed.layout)
    y = quantized_linear(*arguments)
    assert y.is_contiguous()
    assert relative_error(y, quantized_linear_reference(*arguments)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 3, 96), (2, 0, 96)])
def test_linear_keeps_dtype_and_leading_shape(dtype: torch.dtype, shape: tuple[int, ...]):
    packed = random_packed(11, 96, 4, 32)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    arguments = (x, packed.codes, packed.scales, packed.zeros, torch.ones(11, dtype=dtype), *packed.layout)
    y = quantized_linear(*arguments)
    assert (y.shape, y.dtype) == ((*shape[:-1], 11), dtype)
    # Both round an fp32 sum to the dtype of x once, so they differ by at most one unit in the last place.
    assert torch.allclose(y, quantized_linear_reference(*arguments), rtol=torch.finfo(dtype).eps * 2, atol=1e-6)


def test_linear_reads_x_of_any_strides():
    packed = random_packed(5, 64, 4, 32)
    x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
    rest = (packed.codes, packed.scales, packed.zeros, None, *packed.layout)
    # The matrix product may sum in another order for another stride, so equal within rounding only.
    assert relative_error(quantized_linear(x.t(), *rest), quantized_linear(x.t().contiguous(), *rest)) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bits", "columns", "has_zeros"), [(4, 96, True), (8, 75, True), (2, 33, False), (3, 75, True), (4, 75, "float")]
)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("shape", [(), (1,), (3, 7), (0,)])
def test_embedding_equals_the_reference_exactly(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    bits: int,
    columns: int,
    has_zeros: bool | str,
    index_dtype: torch.dtype,
    shape: tuple[int, ...],
):
    monkeypatch.setattr(LINEAR_MODULE, "CHUNK_WEIGHTS", 500)
    packed = random_packed(50, columns, bits, 32, has_zeros, dtype)
    indices = torch.randint(0, 50, shape, dtype=index_dtype, generator=torch.Generator().manual_seed(1))
    arguments = (indices, packed.codes, packed.scales, packed.zeros, *packed.layout)
    rows = quantized_embedding(*arguments)
    assert rows.is_contiguous()
    assert (rows.shape, rows.dtype) == ((*shape, columns), dtype)
    assert torch.equal(rows, quantized_embedding_reference(*arguments))


@pytest.mark.parametrize("index", [50, -1])
def test_embedding_refuses_an_index_outside_the_table(index: int):
    packed = random_packed(50, 64, 4, 32)
    with pytest.raises((IndexError, RuntimeError), match=r"out of range|index"):
        quantized_embedding(torch.tensor([index]), packed.codes, packed.scales, packed.zeros, *packed.layout)


class LargestTensor(TorchDispatchMode):
    """Records the bytes of the largest tensor any operator returns, views of `known` storages aside."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self.known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.untyped_storage().data_ptr() not in self.known:
            self.nbytes = max(self.nbytes, result.untyped_storage().nbytes())
        return result


def test_linear_never_holds_the_whole_dequantised_weight():
    packed = random_packed(16384, 512, 4, 32)  # 32 MiB dequantised, 4 MiB of codes
    x = torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    arguments = (packed.codes, packed.scales, packed.zeros, None, *packed.layout)
    known = [packed.codes, packed.scales, packed.zeros]
    with LargestTensor(known) as watched:  # the operator itself is opaque to the mode: watch the function under it
        LINEAR_MODULE._quantized_linear(x, *arguments)
    assert 2**20 < watched.nbytes <= 4 * LINEAR_MODULE.CHUNK_WEIGHTS
    with LargestTensor(known) as watched:
        quantized_linear_reference(x, *arguments)
    assert watched.nbytes >= 4 * 16384 * 512


# --------------------------------------------------------------------------------------------- bad operands


def test_linear_refuses_operands_of_another_layout():
    good = random_packed(6, 96, 4, 32)
    x = torch.randn(2, 96)
    for bad, message in [
        ({"bits": 5}, "bits must be one of"),
        ({"group": 0}, "fill whole bytes"),
        ({"group": 64}, r"codes must be u8\[N, 2, 32\]"),
        ({"in_features": 100}, r"codes must be u8\[N, 4, 16\]"),
        ({"codes": good.codes.to(torch.int8)}, "codes must be u8"),
        ({"codes": good.codes.flatten(1)}, "codes must be u8"),
        ({"scales": good.scales[:, :2]}, r"scales must be floating point \[6, 3\]"),
        ({"scales": good.scales.to(torch.int32)}, "scales must be floating point"),
        ({"zeros": good.scales[:, :2]}, r"zeros must be u8\[6, 2\] or floating point \[6, 3\]"),
        ({"zeros": good.zeros[:, :1]}, r"zeros must be u8\[6, 2\] or floating point \[6, 3\]"),
        ({"bias": torch.zeros(5)}, r"bias must be floating point \[6\]"),
        ({"x": x[:, :95]}, "last dimension of x must be 96"),
        ({"x": x.double()}, "x must be float32, bfloat16 or float16"),
    ]:
        arguments = {"x": x, "bias": None, **vars(good), **bad}
        with pytest.raises(RuntimeError, match=message):
            quantized_linear(**arguments)
        mode = FakeTensorMode()
        fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        with pytest.raises(RuntimeError, match=message):
            quantized_linear(**fakes)


def test_embedding_refuses_operands_of_another_layout():
    good = random_packed(6, 96, 4, 32)
    with pytest.raises(RuntimeError, match="indices must be int32 or int64"):
        quantized_embedding(torch.zeros(2), good.codes, good.scales, good.zeros, *good.layout)
    with pytest.raises(RuntimeError, match="codes must be u8"):
        quantized_embedding(torch.zeros(2, dtype=torch.int64), good.codes, good.scales, good.zeros, 4, 32, 97)


# --------------------------------------------------------------------------------------- fake rule, export, interpreter


@pytest.mark.parametrize("shape", [(96,), (5, 96), (2, 3, 96)])
@pytest.mark.parametrize("has_zeros", [True, False, "float"])
def test_schema_and_fake_rule_hold(shape: tuple[int, ...], has_zeros: bool | str):
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    packed = random_packed(11, 96, 4, 32, has_zeros)
    parts = (packed.codes, packed.scales, packed.zeros)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    torch.library.opcheck(quantized_linear, (x, *parts, torch.ones(11), *packed.layout), test_utils=checks)
    transposed_x = x.transpose(0, -1).contiguous().transpose(0, -1)
    torch.library.opcheck(quantized_linear, (transposed_x, *parts, None, *packed.layout), test_utils=checks)
    indices = torch.zeros(shape[:-1], dtype=torch.int64)
    torch.library.opcheck(quantized_embedding, (indices, *parts, *packed.layout), test_utils=checks)


class TiedModel(torch.nn.Module):
    """Embedding and head over one packed table; the views depend on the strides of the fake rules."""

    def __init__(self, packed: Packed) -> None:
        super().__init__()
        self.register_buffer("codes", packed.codes)
        self.register_buffer("scales", packed.scales)
        self.register_buffer("zeros", packed.zeros)
        self.layout = packed.layout

    def forward(self, input_ids: Tensor) -> Tensor:
        hidden = quantized_embedding(input_ids, self.codes, self.scales, self.zeros, *self.layout)
        hidden = hidden.view(hidden.shape[0], hidden.shape[1], 3, 24).transpose(1, 2).tanh()
        hidden = hidden.transpose(1, 2).flatten(2)
        logits = quantized_linear(hidden, self.codes, self.scales, self.zeros, None, *self.layout)
        return logits.view(-1, logits.shape[-1])


@pytest.mark.parametrize("bits", [4, 8, 3])
def test_export_keeps_both_operators_with_dynamic_batch_and_length(bits: int):
    model = TiedModel(random_packed(40, 72, bits, 32))
    batch, length = torch.export.Dim("batch", max=64), torch.export.Dim("length", max=128)
    exported = torch.export.export(
        model, (torch.zeros(2, 5, dtype=torch.int64),), dynamic_shapes=({0: batch, 1: length},), strict=False
    )
    targets = [node.target for node in exported.graph.nodes if node.op == "call_function"]
    assert targets.count(quantized_linear) == targets.count(quantized_embedding) == 1
    graph_module = exported.module()
    for shape in [(1, 1), (3, 7), (2, 64)]:
        input_ids = torch.randint(0, 40, shape, generator=torch.Generator().manual_seed(7))
        expected = model(input_ids)
        assert torch.equal(graph_module(input_ids), expected)
        assert torch.equal(fx.Interpreter(graph_module).run(input_ids), expected)


# ----------------------------------------------------------------------------------------------------- ONNX Runtime


def run_contrib_node(op_type: str, operand: Tensor, inputs: dict[str, Tensor | None], **attributes: int) -> Tensor:
    """Run one `com.microsoft` node on the CPU; `inputs` are initialisers, None is an empty optional slot."""
    initializers = [numpy_helper.from_array(t.numpy(), name) for name, t in inputs.items() if t is not None]
    names = [name if t is not None else "" for name, t in inputs.items()]
    if op_type == "GatherBlockQuantized":
        names.insert(1, "operand")
    else:
        names.insert(0, "operand")
    node = helper.make_node(op_type, names, ["y"], domain="com.microsoft", **attributes)
    operand_type = helper.np_dtype_to_tensor_dtype(operand.numpy().dtype)
    graph = helper.make_graph(
        [node],
        "one_node",
        [helper.make_tensor_value_info("operand", operand_type, list(operand.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        initializers,
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return torch.from_numpy(np.asarray(session.run(["y"], {"operand": operand.numpy()})[0]))


@pytest.mark.parametrize("m", [1, 7, 64])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(
    ("columns", "has_zeros", "has_bias"), [(384, True, True), (200, True, False), (33, False, True)]
)
def test_linear_matches_matmulnbits(m: int, bits: int, group: int, columns: int, has_zeros: bool, has_bias: bool):
    packed = random_packed(19, columns, bits, group, has_zeros)
    x = torch.randn(m, columns, generator=torch.Generator().manual_seed(m))
    bias = torch.linspace(-1, 1, 19) if has_bias else None
    inputs = {"codes": packed.codes, "scales": packed.scales, "zeros": packed.zeros, "g_idx": None, "bias": bias}
    while inputs and list(inputs.values())[-1] is None:
        inputs.popitem()
    onnx_y = run_contrib_node("MatMulNBits", x, inputs, K=columns, N=19, bits=bits, block_size=group, accuracy_level=0)
    y = quantized_linear(x, packed.codes, packed.scales, packed.zeros, bias, *packed.layout)
    assert relative_error(y, onnx_y) < 1e-5


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize(("columns", "has_zeros"), [(384, True), (200, True), (33, False)])
def test_embedding_equals_gather_block_quantized_exactly(bits: int, group: int, columns: int, has_zeros: bool):
    packed = random_packed(19, columns, bits, group, has_zeros)
    indices = torch.tensor([[0, 18, 3], [7, 7, 1]])
    inputs = {"codes": packed.codes.flatten(1), "scales": packed.scales, "zeros": packed.zeros}
    if packed.zeros is None:
        del inputs["zeros"]
    rows = run_contrib_node(
        "GatherBlockQuantized", indices, inputs, bits=bits, block_size=group, gather_axis=0, quantize_axis=1
    )
    assert rows.shape[-1] == -(-columns // group) * group  # ONNX Runtime returns the padding of the last group too
    ours = quantized_embedding(indices, packed.codes, packed.scales, packed.zeros, *packed.layout)
    assert torch.equal(ours, rows[..., :columns])
