"""Named tensors of a program: mapped from files, shared by every entry, never held twice."""

from __future__ import annotations

import hashlib
import itertools
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from jettison.ir.errors import ArtifactError

# Rows of a large constant are converted this many bytes at a time.
CHUNK_BYTES = 16 << 20
# Results of a pass that are smaller are ordinary tensors.
SMALLEST_SCRATCH = 1 << 20
_serials = itertools.count()


class Constant:
    """A named tensor as the graph sees it, and the stored tensors it is made of.

    The stored form may have another floating dtype than the graph (a bf16 checkpoint under an fp32 graph) and may lie
    in several blocks that are concatenated along the first axis (merged projections). Both are resolved when a value
    is asked for, so a memory-mapped checkpoint stays mapped.

    Attributes:
        name: Unique in its program.
        dtype: What the graph sees.
        blocks: Stored tensors; not to be written to.
        serial: Unique per object; two constants with the same serial have the same value.
    """

    def __init__(self, name: str, blocks: Tensor | Sequence[Tensor], dtype: torch.dtype | None = None) -> None:
        self.name = name
        self.blocks = (blocks,) if isinstance(blocks, Tensor) else tuple(blocks)
        self.dtype = dtype or self.blocks[0].dtype
        first = self.blocks[0].shape
        self.shape = first if len(self.blocks) == 1 else (sum(b.shape[0] for b in self.blocks), *first[1:])
        self.shape = tuple(self.shape)
        self.serial = next(_serials)
        self._digest: str | None = None
        self._zeros: float | None = None

    @property
    def stored_dtype(self) -> torch.dtype:
        """Dtype of the stored tensors."""
        return self.blocks[0].dtype

    @property
    def stored_bytes(self) -> int:
        """Bytes of the stored form."""
        return sum(block.numel() * block.element_size() for block in self.blocks)

    @property
    def nbytes(self) -> int:
        """Bytes of the value in the dtype the graph sees."""
        return math.prod(self.shape) * self.dtype.itemsize

    def value(self) -> Tensor:
        """The tensor in the graph's dtype: the stored tensor itself where that already fits, else a temporary."""
        stored = self.blocks[0] if len(self.blocks) == 1 else torch.cat(self.blocks)
        return stored.to(self.dtype)

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `[start, stop)` of the first axis, in the graph's dtype, converting no other row."""
        return self.stored_rows(start, stop).to(self.dtype)

    def stored_rows(self, start: int, stop: int) -> Tensor:
        """The same rows in the stored dtype: a view of the stored tensor where they lie in one block."""
        pieces, offset = [], 0
        for block in self.blocks:
            low, high = max(start - offset, 0), min(stop - offset, block.shape[0])
            if low < high:
                pieces.append(block[low:high])
            offset += block.shape[0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def row_chunks(self) -> Iterator[tuple[int, int]]:
        """Ranges of rows whose value takes about `CHUNK_BYTES` each."""
        row_bytes = max(1, self.nbytes // max(1, self.shape[0]))
        step = max(1, CHUNK_BYTES // row_bytes)
        for start in range(0, self.shape[0], step):
            yield start, min(start + step, self.shape[0])

    @property
    def digest(self) -> str:
        """Eight hex digits of SHA-256 over the stored bytes, read once."""
        if self._digest is None:
            sha = hashlib.sha256()
            for block in self.blocks:
                flat = block.detach().contiguous().reshape(-1).view(torch.uint8)
                for start in range(0, flat.numel(), CHUNK_BYTES):
                    sha.update(memoryview(flat[start : start + CHUNK_BYTES].numpy()))
            self._digest = sha.hexdigest()[:8]
        return self._digest

    @property
    def zeros(self) -> float:
        """The share of zeros among the elements, read once."""
        if self._zeros is None:
            found = sum(int((self.rows(start, stop) == 0).sum()) for start, stop in self.row_chunks())
            self._zeros = found / max(1, math.prod(self.shape))
        return self._zeros

    def renamed(self, name: str) -> Constant:
        """The same stored tensors under another name."""
        return Constant(name, self.blocks, self.dtype)

    def __repr__(self) -> str:
        return f"Constant({self.name!r}, {list(self.shape)}, {self.dtype})"


class StreamedConstant(Constant):
    """A constant of an artifact whose values are in the weight store alone, in the layout of a kernel.

    Name, sizes and dtypes are known; asking for values is an error.

    Args:
        name: Unique in its program.
        shape: Sizes.
        stored_dtype: Of the constant as it was before it was stored.
        dtype: What the graph sees.
    """

    def __init__(self, name: str, shape: Sequence[int], stored_dtype: torch.dtype, dtype: torch.dtype) -> None:
        super().__init__(name, torch.empty(tuple(shape), dtype=stored_dtype, device="meta"), dtype)

    def value(self) -> Tensor:
        """Refuses.

        Raises:
            ArtifactError: Always.
        """
        self._refuse()

    def stored_rows(self, start: int, stop: int) -> Tensor:
        """Refuses, as `value`."""
        self._refuse()

    @property
    def digest(self) -> str:
        """Refuses, as `value`."""
        self._refuse()

    def renamed(self, name: str) -> Constant:
        """The same constant under another name."""
        return StreamedConstant(name, self.shape, self.stored_dtype, self.dtype)

    def _refuse(self) -> NoReturn:
        raise ArtifactError(
            f"[{self.name}] its values were asked for; this artifact streams it from disk and holds it only in the "
            "layout of its kernel. Run `jettison optimize` without a placement for an artifact that holds values."
        )


def joined_constant(names: Sequence[str], name: str, constants: Mapping[str, Constant]) -> Constant:
    """Constants as one, block behind block along the first axis; no byte is copied.

    Args:
        names: Which, in order; of one dtype, and of one shape but for the first axis.
        name: Name of the result within the path that the names have in common, e.g. `qkv_proj.weight`.
        constants: Where they are; the result's name is none of theirs.

    Returns:
        The joint constant.
    """
    paths = [each.split(".") for each in names]
    common = [parts[0] for parts in itertools.takewhile(lambda parts: len(set(parts)) == 1, zip(*paths, strict=False))]
    stem, _, part = name.partition(".")
    # Attentions in one module may have no path of their own.
    candidates = (".".join([*common, f"{stem}{number or ''}", part]) for number in itertools.count())
    blocks = [block for each in names for block in constants[each].blocks]
    return Constant(next(each for each in candidates if each not in constants), blocks, constants[names[0]].dtype)


@dataclass(frozen=True)
class Packed:
    """A weight in a compressed format: which constants hold its parts.

    Attributes:
        format: Canonical text of the weight format, e.g. `int4{group=32,symmetric=false}`.
        shape: Shape of the dense weight, `(N, K)`.
        parts: Part name (`codes`, `scales`, ...) to name of the constant that holds it.
    """

    format: str
    shape: tuple[int, ...]
    parts: dict[str, str]


def scratch_tensor(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A zeroed tensor in an unlinked temporary file, so that large results of a pass take no anonymous memory.

    Small tensors are ordinary ones. The file lies in Python's temporary directory (`TMPDIR`) and vanishes with the
    process.

    Args:
        shape: Sizes.
        dtype: Element type.

    Returns:
        A writable tensor of that shape.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < SMALLEST_SCRATCH:
        return torch.zeros(tuple(shape), dtype=dtype)
    handle, path = tempfile.mkstemp(prefix="jettison-", suffix=".scratch")
    try:
        # Reserve the blocks now: a full disk must be an error here, not a SIGBUS at the first write.
        os.posix_fallocate(handle, 0, nbytes)
    except OSError as error:
        os.unlink(path)
        os.close(handle)
        raise ArtifactError(
            f"[scratch] {tempfile.gettempdir()}: {nbytes:,} bytes for a weight cannot be reserved: {error.strerror}. "
            "Free some space there, or set TMPDIR to a folder on another disk."
        ) from error
    try:
        storage = torch.UntypedStorage.from_file(path, shared=True, nbytes=nbytes)
    finally:
        os.close(handle)
        os.unlink(path)
    return torch.empty(0, dtype=dtype).set_(storage).reshape(tuple(shape))


def transposed_constant(constant: Constant, name: str) -> Constant:
    """A matrix as its transpose, stored in the dtype it was, a few rows at a time."""
    rows, columns = constant.shape
    made = scratch_tensor((columns, rows), constant.stored_dtype)
    for start, stop in constant.row_chunks():
        made[:, start:stop] = constant.rows(start, stop).to(constant.stored_dtype).T
    return Constant(name, made, constant.dtype)
