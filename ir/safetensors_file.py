"""safetensors files of a program's constants: written as a stream, read as mapped tensors.

`safetensors.torch.save_file` turns every tensor into bytes before it writes the first one, which would hold a mapped
checkpoint twice; here a constant passes through a buffer of a few megabytes.

Format: https://huggingface.co/docs/safetensors (eight bytes of header length, a JSON header, the tensors back to back).
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from torch import Tensor

from jettison.ir.constants import Constant
from jettison.ir.errors import ArtifactError, UnsupportedError, VerifyError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "C64": torch.complex64,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_CODES = {dtype: code for code, dtype in DTYPES.items()}

# Tensors begin at multiples of this, counted from the start of the file, as long as the format lets them: a cache line,
# and the widest vector a kernel loads from a mapped weight.
ALIGNMENT = 64
# The safetensors library refuses larger headers too, so that a damaged length cannot make a reader allocate gigabytes.
MAX_HEADER_BYTES = 100_000_000
_WRITE_BYTES = 4 << 20
_METADATA = "__metadata__"
_AGAIN = "The artifact is damaged: copy it again, or write it again with `jettison optimize`."


@dataclass(frozen=True)
class _Extent:
    """Where one tensor lies; offsets count from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def write_constants(
    path: str | Path, constants: Mapping[str, Constant], on_bytes: Callable[[int], object] | None = None
) -> None:
    """Write the stored form of constants: blocks concatenated along the first axis, in the stored dtype.

    A few megabytes of anonymous memory, whatever the size. Constants whose size is a multiple of 64 bytes come first,
    in the order given, so that each of them begins at such a multiple (offsets have to be contiguous); the others
    follow by falling element size, so that each begins at a multiple of its element size.

    Args:
        path: The file; overwritten. A failed write leaves it incomplete.
        constants: By the name the tensor gets in the file.
        on_bytes: Called with the number of bytes after each write, for a progress bar.

    Raises:
        UnsupportedError: The format has no such dtype, or reserves the name.
        OSError: The file cannot be written.
    """
    order = sorted(constants, key=lambda name: _rank(constants[name]))
    header: dict[str, Any] = {_METADATA: {"format": "pt"}}
    offset = 0
    for name in order:
        constant = constants[name]
        _check_storable(name, constant)
        end = offset + constant.stored_bytes
        header[name] = {
            "dtype": _CODES[constant.stored_dtype],
            "shape": list(constant.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with Path(path).open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for name in order:
            for block in constants[name].blocks:
                _write_tensor(file, block.detach(), on_bytes)


def _rank(constant: Constant) -> tuple[bool, int]:
    is_odd = constant.stored_bytes % ALIGNMENT != 0
    return is_odd, -constant.stored_dtype.itemsize if is_odd else 0


def _check_storable(name: str, constant: Constant) -> None:
    if name == _METADATA:
        raise UnsupportedError(f"[{name}] safetensors reserves this name. Rename the parameter of the model.")
    if constant.stored_dtype not in _CODES:
        raise UnsupportedError(
            f"[{name}] has the dtype {constant.stored_dtype}; needed one of {', '.join(map(str, _CODES))}, because the "
            "weight file is a safetensors file. Convert the parameter before the model is optimised."
        )
    if any(block.dtype != constant.stored_dtype for block in constant.blocks):
        raise VerifyError(f"[{name}] its blocks have different dtypes: {[block.dtype for block in constant.blocks]}")


def _write_tensor(file: BinaryIO, tensor: Tensor, on_bytes: Callable[[int], object] | None) -> None:
    for piece in _pieces(tensor):
        count = file.write(memoryview(piece.view(torch.uint8).numpy()))
        if on_bytes is not None:
            on_bytes(count)


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """The elements in row-major order, as flat contiguous pieces of a few megabytes."""
    if tensor.is_contiguous():
        flat, step = tensor.reshape(-1), max(1, _WRITE_BYTES // tensor.itemsize)
        for start in range(0, flat.numel(), step):
            yield flat[start : start + step].cpu().resolve_conj().resolve_neg()
        return
    # A view such as a transpose: only the rows of one piece at a time are laid out anew.
    step = _WRITE_BYTES * tensor.shape[0] // max(1, tensor.nbytes)
    for start in range(0, tensor.shape[0], max(1, step)):
        rows = tensor[start : start + max(1, step)]
        if rows.nbytes > _WRITE_BYTES and rows.dim() > 1:
            yield from _pieces(rows[0])
        else:
            yield rows.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)


def read_constants(path: str | Path) -> dict[str, Tensor]:
    """Map a safetensors file.

    Args:
        path: The file.

    Returns:
        A view of the mapping for each name, in the order of the data: pages are read when they are touched and take no
        anonymous memory. Not to be written to.

    Raises:
        ArtifactError: The file is missing, damaged, or not what its header says.
    """
    file = Path(path)
    extents, data_start, file_bytes = _read_header(file)
    try:
        storage = torch.UntypedStorage.from_file(str(file), shared=False, nbytes=file_bytes)
    except (RuntimeError, OSError) as error:
        reason = str(error).partition("\n")[0]
        _refuse(file, f"a file that cannot be mapped ({reason})", "room in the address space", "Check `ulimit -v`.")
    mapped = torch.empty(0, dtype=torch.uint8).set_(storage)
    tensors = {}
    for name, extent in extents.items():
        begin, end = data_start + extent.begin, data_start + extent.end
        if begin == end:
            tensors[name] = torch.empty(extent.shape, dtype=extent.dtype)
            continue
        if begin % extent.dtype.itemsize:
            _refuse(file, f"tensor {name!r} at byte {begin:,}", f"a multiple of {extent.dtype.itemsize}")
        tensors[name] = mapped[begin:end].view(extent.dtype).view(extent.shape)
    return tensors


def _read_header(file: Path) -> tuple[dict[str, _Extent], int, int]:
    """Extents in the order of the data, the offset of the data, and the size of the file."""
    try:
        status = file.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe could wait for ever
            _refuse(file, "something that is not a file", "a safetensors file")
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            header = stream.read(length) if length <= MAX_HEADER_BYTES else b""
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = getattr(error, "strerror", None) or error
        _refuse(file, f"a file that cannot be read ({reason})", "the weights of the program", cause=error)
    if len(prefix) < 8 or len(header) < length:
        _refuse(file, f"{status.st_size:,} bytes and a header length of {length:,}", "a whole safetensors header")
    try:
        table = json.loads(header.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        _refuse(file, f"a header of {length:,} bytes that is not JSON", "a safetensors header", cause=error)
    if not isinstance(table, dict):
        _refuse(file, f"a header of type {type(table).__name__}", "a table of tensors")
    table.pop(_METADATA, None)
    extents = {name: _extent(file, name, fields) for name, fields in table.items()}
    extents = dict(sorted(extents.items(), key=lambda item: (item[1].begin, item[1].end)))
    cursor = 0
    for name, extent in extents.items():
        if extent.begin != cursor:
            _refuse(file, f"tensor {name!r} at byte {extent.begin:,} of the data", f"{cursor:,}: they lie back to back")
        cursor = extent.end
    if status.st_size != 8 + length + cursor:
        _refuse(file, f"{status.st_size:,} bytes", f"{8 + length + cursor:,}, by its header")
    return extents, 8 + length, status.st_size


def _extent(file: Path, name: str, fields: object) -> _Extent:
    fields = fields if isinstance(fields, dict) else {}
    code, shape, offsets = fields.get("dtype"), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    dtype = DTYPES.get(code) if isinstance(code, str) else None
    if dtype is None or shape is None or offsets is None or len(offsets) != 2:
        _refuse(file, f"tensor {name!r} {fields}", f"a shape, two offsets and one of the dtypes {', '.join(DTYPES)}")
    begin, end = offsets
    # torch multiplies sizes in 64 bits even where a zero makes the tensor empty.
    is_too_large = math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63
    if end - begin != math.prod(shape) * dtype.itemsize or is_too_large:
        _refuse(file, f"tensor {name!r} {code}{list(shape)} in {end - begin:,} bytes", "as many as the shape takes")
    return _Extent(dtype, shape, begin, end)


def _sizes(value: object) -> tuple[int, ...] | None:
    """A list of sizes or offsets as a tuple; None if it is anything else (`type`, because `true` is an int, too)."""
    if isinstance(value, list) and len(value) <= 64 and all(type(item) is int and 0 <= item < 2**63 for item in value):
        return tuple(value)
    return None


def _refuse(file: Path, found: str, needed: str, action: str = _AGAIN, cause: BaseException | None = None) -> NoReturn:
    """Raise in the house's four parts: where, found, needed, what to do."""
    # What a damaged file holds may be long.
    raise ArtifactError(f"[{file}] found {found[:300]}; needed {needed}. {action}") from cause
