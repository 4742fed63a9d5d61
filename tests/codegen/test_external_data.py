"""The weight file: streamed, aligned, each tensor once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch
from torch import nn

from jettison.codegen.onnx import external_data
from jettison.codegen.onnx.emit import emit_program
from jettison.codegen.onnx.external_data import (
    ALIGNMENT,
    SMALLEST_EXTERNAL_BYTES,
    ComputedConstant,
    ExternalDataWriter,
    TransposedConstant,
)
from jettison.ir import constants
from jettison.ir.constants import Constant
from jettison.ir.errors import UnsupportedError
from tests.codegen.running import cached_program


def random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def read(tensor: Any) -> torch.Tensor:
    return torch.from_numpy(tensor.numpy().copy())


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks per tensor."""
    monkeypatch.setattr(constants, "CHUNK_BYTES", 1000)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.int32, torch.uint8, torch.int8])
def test_values_survive_in_every_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    value = (random(90, 70) * 50).to(dtype)
    with ExternalDataWriter(tmp_path / "w.data") as writer:
        tensor = writer.tensor("w", (90, 70), Constant("w", value))
    assert isinstance(tensor, onnx_ir.ExternalTensor)
    assert tensor.location == "w.data", "relative"
    assert torch.equal(read(tensor), value)


@pytest.mark.usefixtures("small_chunks")
def test_stored_dtype_is_widened_and_blocks_are_joined_while_writing(tmp_path: Path) -> None:
    blocks = [random(60, 33, dtype=torch.bfloat16), random(1, 33, dtype=torch.bfloat16), random(40, 33).bfloat16()]
    constant = Constant("qkv", blocks, torch.float32)
    with ExternalDataWriter(tmp_path / "w.data") as writer:
        plain = writer.tensor("qkv", (101, 33), constant)
        transposed = writer.tensor("qkv.T", (33, 101), TransposedConstant("qkv.T", constant))
    assert torch.equal(read(plain), torch.cat(blocks).float())
    assert torch.equal(read(transposed), torch.cat(blocks).float().t())


def test_transposed_constant_is_the_transposed_matrix() -> None:
    matrix = Constant("w", [random(5, 7), random(2, 7)])
    transposed = TransposedConstant("w.T", matrix)
    assert transposed.shape == (7, 7)
    assert torch.equal(transposed.value(), matrix.value().t())
    assert torch.equal(transposed.rows(2, 5), matrix.value().t()[2:5])
    assert transposed.nbytes == matrix.nbytes


def test_blocks_are_page_aligned_and_the_file_holds_nothing_else(tmp_path: Path) -> None:
    sizes = [(300, 3), (7, 1000), (4096,)]
    with ExternalDataWriter(tmp_path / "w.data") as writer:
        tensors = [writer.tensor(str(size), size, Constant(str(size), random(*size))) for size in sizes]
    end = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        assert tensor.offset == -(-end // ALIGNMENT) * ALIGNMENT
        assert tensor.length == 4 * torch.Size(size).numel()
        end = tensor.offset + tensor.length
    assert (tmp_path / "w.data").stat().st_size == end


def test_one_constant_under_two_shapes_is_stored_once(tmp_path: Path) -> None:
    constant = Constant("codes", torch.randint(0, 255, (64, 4, 16), dtype=torch.uint8))
    with ExternalDataWriter(tmp_path / "w.data") as writer:
        first = writer.tensor("codes", (64, 4, 16), constant)
        second = writer.tensor("codes.rows", (64, 64), constant)
    assert (first.offset, first.length) == (second.offset, second.length)
    assert torch.equal(read(first).reshape(64, 64), read(second))
    assert (tmp_path / "w.data").stat().st_size == 64 * 64


def test_two_graphs_that_transpose_one_matrix_share_the_result(tmp_path: Path) -> None:
    matrix = Constant("w", random(40, 30))
    with ExternalDataWriter(tmp_path / "w.data") as writer:
        plain = writer.tensor("w", (40, 30), matrix)
        first, second = (writer.tensor("w.T", (30, 40), TransposedConstant("w.T", matrix)) for _ in range(2))
    assert first.offset == second.offset != plain.offset


def test_computed_tables_are_shared_by_content(tmp_path: Path) -> None:
    table = random(64, 16)
    with ExternalDataWriter(tmp_path / "w.data") as writer:
        first, second = (writer.tensor(name, (64, 16), ComputedConstant(name, table.clone())) for name in "ab")
        other = writer.tensor("c", (64, 16), ComputedConstant("c", table + 1))
        weight = writer.tensor("d", (64, 16), Constant("d", table.clone()))
    assert first.offset == second.offset
    assert len({first.offset, other.offset, weight.offset}) == 3


def test_small_tensors_stay_in_the_model(tmp_path: Path) -> None:
    edge = SMALLEST_EXTERNAL_BYTES // 4
    with ExternalDataWriter(tmp_path / "w.data") as writer:
        inside = writer.tensor("small", (edge - 1,), Constant("small", random(edge - 1)))
        outside = writer.tensor("large", (edge,), Constant("large", random(edge)))
    assert not isinstance(inside, onnx_ir.ExternalTensor)
    assert isinstance(outside, onnx_ir.ExternalTensor)
    assert torch.equal(read(inside), random(edge - 1))


@pytest.mark.usefixtures("small_chunks")
def test_progress_adds_up_to_what_is_written(tmp_path: Path) -> None:
    told: list[int] = []
    with ExternalDataWriter(tmp_path / "w.data", told.append) as writer:
        constant = Constant("a", random(50, 50))
        writer.tensor("a", (50, 50), constant)
        writer.tensor("again", (2500,), constant)
        writer.tensor("b", (1000, 3), Constant("b", random(1000, 3)))
    assert len(told) > 10
    assert sum(told) == 4 * (2500 + 3000)


def test_every_dtype_of_a_program_has_an_onnx_type() -> None:
    from jettison.ir.text import _DTYPES

    assert set(external_data.DTYPES) == set(_DTYPES)


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    class Turned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(61, 8)
            self.register_buffer("turns", torch.polar(torch.ones(4), torch.arange(4.0)))

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            pairs = torch.view_as_complex(self.embed(input_ids).unflatten(-1, (4, 2)))
            return torch.view_as_real(pairs * self.turns).flatten(-2)

    program = cached_program(Turned().eval(), context=64)
    with pytest.raises(UnsupportedError, match=r'turns: ONNX holds no torch.complex64 weights. Use target="torch"'):
        emit_program(program, tmp_path)
