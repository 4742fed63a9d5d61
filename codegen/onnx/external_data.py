"""The weight file of an ONNX artifact: streamed, page-aligned, and every tensor stored once.

Two initializers may name one tensor in two shapes (a tied embedding under `GatherBlockQuantized` and `MatMulNBits`):
both point at the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx_ir
import torch

from jettison.ir.constants import Constant

# Aligned to pages so that a runtime can map them; small ones stay inside the model file.
ALIGNMENT = 4096
SMALLEST_EXTERNAL_BYTES = 1024
DTYPES = {
    torch.float64: onnx_ir.DataType.DOUBLE,
    torch.float32: onnx_ir.DataType.FLOAT,
    torch.float16: onnx_ir.DataType.FLOAT16,
    torch.bfloat16: onnx_ir.DataType.BFLOAT16,
    torch.int64: onnx_ir.DataType.INT64,
    torch.int32: onnx_ir.DataType.INT32,
    torch.int16: onnx_ir.DataType.INT16,
    torch.uint8: onnx_ir.DataType.UINT8,
    torch.int8: onnx_ir.DataType.INT8,
    torch.bool: onnx_ir.DataType.BOOL,
}


class TransposedConstant(Constant):
    """A matrix `[N, K]` seen as `[K, N]`, transposed a few rows at a time.

    Args:
        name: Of the transposed constant.
        constant: The matrix; equal ones are stored once (the serial is the matrix's own).
    """

    def __init__(self, name: str, constant: Constant) -> None:
        super().__init__(name, constant.blocks, constant.dtype)
        self.shape = (constant.shape[1], constant.shape[0])
        self.serial = constant.serial

    def value(self) -> torch.Tensor:
        """See `Constant.value`."""
        return self.rows(0, self.shape[0])

    def rows(self, start: int, stop: int) -> torch.Tensor:
        """See `Constant.rows`."""
        return torch.cat([block[:, start:stop].t() for block in self.blocks], 1).to(self.dtype)


class ComputedConstant(Constant):
    """A table that the emitter computed: two graphs compute it anew, so equal ones are known by their contents."""


class ExternalDataWriter:
    """Appends constants to one data file.

    Args:
        path: The `.data` file; written from its start.
        on_bytes: Called with the number of bytes after each write, for a progress bar.
    """

    def __init__(self, path: Path, on_bytes: Callable[[int], None] | None = None) -> None:
        self.path = path
        self._on_bytes = on_bytes or (lambda count: None)
        self._where: dict[tuple[type[Constant], int | str], tuple[int, int]] = {}
        self._file: io.BufferedWriter | None = None

    def __enter__(self) -> ExternalDataWriter:
        self._file = self.path.open("wb")
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._file is not None, "entered"
        self._file.close()

    def tensor(self, name: str, shape: tuple[int, ...], constant: Constant) -> onnx_ir.TensorProtocol:
        """Store a constant (once) and describe it as an ONNX tensor.

        Args:
            name: Name of the initializer.
            shape: Its shape; the same elements in the same order as the constant's.
            constant: What to store, in the graph's dtype.

        Returns:
            An external tensor, or an embedded one below `SMALLEST_EXTERNAL_BYTES`.
        """
        if constant.nbytes < SMALLEST_EXTERNAL_BYTES:
            return onnx_ir.tensor(constant.value().reshape(shape).contiguous().numpy(), name=name)
        identity = constant.digest if isinstance(constant, ComputedConstant) else constant.serial
        key = (type(constant), identity)
        if key not in self._where:
            self._where[key] = self.append(constant)
        offset, length = self._where[key]
        return onnx_ir.ExternalTensor(
            self.path.name,
            offset,
            length,
            DTYPES[constant.dtype],
            shape=onnx_ir.Shape(shape),
            name=name,
            base_dir=str(self.path.parent),
        )

    def save(self, model: onnx_ir.Model, path: Path) -> list[Any]:
        """Write a graph whose tensors are from here; returns the segments that it was cut into, none."""
        onnx_ir.save(model, path)
        return []

    def append(self, constant: Constant) -> tuple[int, int]:
        """Write a constant, also one that is there; returns its offset and its bytes."""
        assert self._file is not None, "entered"
        self._file.write(b"\0" * (-self._file.tell() % ALIGNMENT))
        offset = self._file.tell()
        for start, stop in constant.row_chunks():
            rows = constant.rows(start, stop).contiguous().reshape(-1).view(torch.uint8)
            self._file.write(memoryview(rows.numpy()))
            self._on_bytes(rows.numel())
        return offset, self._file.tell() - offset
