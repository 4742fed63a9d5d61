"""Weights in a safetensors file: as the library reads and writes them, and what is refused."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jettison.ir.allocator import give_back
from jettison.ir.constants import Constant, scratch_tensor
from jettison.ir.errors import ArtifactError, UnsupportedError
from jettison.ir.safetensors_file import ALIGNMENT, DTYPES, read_constants, write_constants
from tests.ir.saved_programs import Json, needs_proc

# ----------------------------------------------------------------------------------------------------- the weight file


def _constants() -> dict[str, Constant]:
    generator = torch.Generator().manual_seed(0)
    constants = {
        code: Constant(code, torch.randint(0, 2, (3, 5 + number), generator=generator).to(dtype))
        for number, (code, dtype) in enumerate(DTYPES.items())
    }
    large = torch.randn(1500, 1100, generator=generator)
    constants["blocks"] = Constant("blocks", [large[:5].bfloat16(), large[7:20].bfloat16()], torch.float32)
    constants["transposed"] = Constant("transposed", large.T)
    constants["strided"] = Constant("strided", large[::2, ::3])
    constants["wide"] = Constant("wide", torch.randn(2, 3, 1 << 19, generator=generator).transpose(1, 2))
    constants["expanded"] = Constant("expanded", torch.randn(1, 64, generator=generator).expand(32, 64))
    constants["scalar"] = Constant("scalar", torch.tensor(2.5))
    constants["empty"] = Constant("empty", torch.empty(0, 4, dtype=torch.float64))
    return constants


def test_the_library_reads_what_we_write_and_we_read_it_too(tmp_path: Path) -> None:
    constants, file = _constants(), tmp_path / "w.safetensors"
    counts: list[int] = []
    write_constants(file, constants, counts.append)
    theirs, ours = load_file(file), read_constants(file)
    assert set(theirs) == set(ours) == set(constants)
    for name, constant in constants.items():
        expected = torch.cat([block.contiguous() for block in constant.blocks]) if len(constant.blocks) > 1 else None
        expected = constant.blocks[0] if expected is None else expected
        for tensor in (theirs[name], ours[name]):
            assert (tensor.dtype, tuple(tensor.shape)) == (constant.stored_dtype, constant.shape)
            assert (
                tensor.contiguous()
                .reshape(-1)
                .view(torch.uint8)
                .equal(expected.contiguous().reshape(-1).view(torch.uint8))
            )
        assert Constant(name, ours[name], constant.dtype).digest == constant.digest
    assert sum(counts) == sum(constant.stored_bytes for constant in constants.values())
    assert max(counts) <= 4 << 20


def test_tensors_begin_at_cache_lines_where_the_format_allows(tmp_path: Path) -> None:
    constants, file = _constants(), tmp_path / "w.safetensors"
    write_constants(file, constants)
    tensors = read_constants(file)
    base = min(tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel())
    for name, tensor in tensors.items():
        if tensor.numel():
            step = tensor.itemsize if constants[name].stored_bytes % ALIGNMENT else ALIGNMENT
            assert (tensor.data_ptr() - base) % step == 0


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.int8), "c": torch.ones(2).bfloat16()}
    save_file(tensors, tmp_path / "w.safetensors")
    ours = read_constants(tmp_path / "w.safetensors")
    assert {name: tensor.tolist() for name, tensor in ours.items()} == {n: t.tolist() for n, t in tensors.items()}


@needs_proc
def test_writing_takes_a_few_megabytes_whatever_the_size(tmp_path: Path) -> None:
    def anonymous_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    weight = scratch_tensor((6000, 4000), torch.float32)  # 96 MB in a mapped file
    constants = {"plain": Constant("plain", weight), "transposed": Constant("transposed", weight.T)}
    give_back()  # or what is written takes pages that the process has already
    before, most = anonymous_bytes(), 0
    ballast = torch.ones(16 << 20)
    assert anonymous_bytes() - before > 60 << 20  # the measure sees what is allocated
    del ballast
    give_back()
    before = anonymous_bytes()

    def sample(_: int) -> None:
        nonlocal most
        most = max(most, anonymous_bytes() - before)

    write_constants(tmp_path / "w.safetensors", constants, sample)
    assert most < 40 << 20
    read = read_constants(tmp_path / "w.safetensors")
    assert anonymous_bytes() - before < 40 << 20
    assert read["transposed"].shape == (4000, 6000)


@pytest.mark.parametrize(
    ("constant", "message"),
    [
        (Constant("__metadata__", torch.ones(1)), "reserves this name"),
        (Constant("w", torch.ones(2, dtype=torch.complex128)), "has the dtype torch.complex128"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(constant: Constant, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        write_constants(tmp_path / "w.safetensors", {constant.name: constant})
    assert not (tmp_path / "w.safetensors").exists()


def _raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _one(**changes: object) -> Json:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (_raw(b"{}", length=99), "whole safetensors header"),
        (_raw(b"{}", length=1 << 40), "header length of 1,099,511,627,776"),
        (_raw(b"[]"), "header of type list"),
        (_raw(b"\xff{}"), "not JSON"),
        (_raw(b"[" * 200_000), "not JSON"),
        (_raw(_one(), b"\0" * 7), "found 76 bytes; needed 77"),
        (_raw(_one(), b"\0" * 9), "found 78 bytes; needed 77"),
        (_raw(_one(shape=[3]), b"\0" * 8), "as many as the shape takes"),
        (_raw(_one(shape=[0, 2**62, 2**62], data_offsets=[0, 0])), "as many as the shape takes"),
        (_raw(_one(shape=[True, 2]), b"\0" * 8), "a shape, two offsets"),
        (_raw(_one(dtype="F4"), b"\0" * 8), "a shape, two offsets"),
        (_raw(_one(data_offsets=[4, 12]), b"\0" * 12), "back to back"),
        (_raw({"w": None}), "a shape, two offsets"),
        (_raw(b" " + json.dumps(_one()).encode(), b"\0" * 8), "a multiple of 4"),
    ],
)
def test_a_damaged_weight_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=message) as raised:
        read_constants(file)
    assert str(raised.value).startswith(f"[{file}] found ")


def test_a_weight_file_that_is_none_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("missing", "No such file"), (".", "not a file"), ("pipe", "not a file"), ("a\0b", "null")):
        with pytest.raises(ArtifactError, match=message):
            read_constants(f"{tmp_path}/{name}")
