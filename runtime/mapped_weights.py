"""Weights of a session that are mapped from files: found, read ahead, and dropped again.

ONNX Runtime maps initializers that no kernel copies, privately, and never writes to them. Their pages are those of the
file: they can be read before the session needs them and given back afterwards, and the session notices neither. Linux
says in `/proc/self/maps` where they are; on other systems nothing is found, and the system decides what is in memory.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import mmap
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from jettison.ir.errors import ArtifactError
from jettison.runtime.mounts import has_large_folios

# Read, hashed and dropped this many bytes at a time.
PIECE_BYTES = 8 << 20
HUGE_PAGE = 2 << 20
_POPULATE_READ = 22  # Linux 5.14
WRITE_AGAIN = "Copy the artifact again, or write it again with `jettison optimize`."


@dataclass(frozen=True)
class Piece:
    """A part of a file that is mapped.

    Attributes:
        file: The file.
        offset: In the file, a multiple of the page size.
        address: In memory.
        length: Bytes.
    """

    file: MappedFile
    offset: int
    address: int
    length: int

    def request(self) -> None:
        """Have it read into the page cache, without waiting."""
        if self.file.has_huge_pages:
            return  # what is asked for this way comes in small pages, which takes longer than to wait for huge ones
        os.posix_fadvise(self.file.descriptor, self.offset, self.length, os.POSIX_FADV_WILLNEED)

    def read(self) -> None:
        """Have it in memory and mapped, so that no kernel waits for a page of it.

        Raises:
            ArtifactError: It cannot be read, or the file has been changed.
        """
        self.file.check()
        if _madvise(self.address, self.length, _POPULATE_READ) == errno.EINVAL:
            self._read_by_copy()
        elif ctypes.get_errno():
            # What would have ended the process when a kernel reads it: the disk failed, or the file has become shorter.
            raise ArtifactError(
                f"[onnx] {self.file.path}: {self.length:,} bytes at {self.offset:,} cannot be read: the disk failed, "
                f"or the file has been cut off. {self.file.advice}"
            )

    def _read_by_copy(self) -> None:
        """The same where the kernel is too old: pages come into the cache, and are mapped when they are touched."""
        buffer = memoryview(bytearray(min(self.length, 1 << 20)))
        done = 0
        while done < self.length:
            try:
                count = os.preadv(self.file.descriptor, [buffer[: self.length - done]], self.offset + done)
            except OSError as error:
                raise ArtifactError(
                    f"[onnx] {self.file.path}: cannot be read: {error.strerror}. {self.file.advice}"
                ) from error
            if count == 0:
                raise ArtifactError(f"[onnx] {self.file.path}: ends at {self.offset + done:,}. {self.file.advice}")
            done += count

    def drop(self) -> None:
        """Give its memory back; a kernel that reads it all the same reads it from the file."""
        _madvise(self.address, self.length, mmap.MADV_DONTNEED)
        self.file.forget(self.offset, self.length)


class MappedFile:
    """A file of weights as it was when it was opened.

    Args:
        path: The file.
        size: Bytes that it must have.
        advice: What to do if it is damaged.

    Attributes:
        descriptor: Of the open file.
        advice: As given.
        has_huge_pages: Whether it comes into memory in huge pages, or as good as.
        owner: Who mapped it: as long as a piece is known, its memory is that of the file.

    Raises:
        ArtifactError: It cannot be opened, or has another size.
    """

    def __init__(self, path: Path, size: int, advice: str = WRITE_AGAIN) -> None:
        self.path, self.advice = path, advice
        self.owner: Any = None
        self.has_huge_pages = has_large_folios(path)
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise ArtifactError(f"[onnx] {path}: cannot be opened: {error.strerror}. {self.advice}") from error
        weakref.finalize(self, os.close, self.descriptor).atexit = False
        status = os.fstat(self.descriptor)
        self._size, self._changed = size, status.st_mtime_ns
        self.check()

    def check(self) -> None:
        """Raise ArtifactError if the file has changed: a mapping that is longer than it ends the process."""
        status = os.fstat(self.descriptor)
        if status.st_size != self._size:
            raise ArtifactError(f"[onnx] {self.path}: {status.st_size:,} bytes, needed {self._size:,}. {self.advice}")
        if status.st_mtime_ns != self._changed:
            raise ArtifactError(
                f"[onnx] {self.path}: was written to after it was opened, and its weights are read while the model "
                f"runs. {self.advice}"
            )

    def check_contents(self, sha256: str) -> None:
        """Read all of it once, a piece at a time, and compare its hash.

        Raises:
            ArtifactError: It is not what was written.
        """
        digest, buffer, offset = hashlib.sha256(), memoryview(bytearray(1 << 20)), 0
        try:
            while count := os.preadv(self.descriptor, [buffer], offset):
                digest.update(buffer[:count])
                offset += count
                if offset % PIECE_BYTES == 0:
                    self.forget(offset - PIECE_BYTES, PIECE_BYTES)
        except OSError as error:
            raise ArtifactError(f"[onnx] {self.path}: cannot be read: {error.strerror}. {self.advice}") from error
        self.forget(0, 0)
        if digest.hexdigest() != sha256:
            raise ArtifactError(f"[onnx] {self.path}: its contents are not what was written (SHA-256). {self.advice}")

    def forget(self, offset: int, length: int) -> None:
        """Drop a part of it from the page cache; a length of 0 means to its end."""
        if self.has_huge_pages and length:  # only whole ones are dropped; what is still mapped of them stays
            end = -(-(offset + length) // HUGE_PAGE) * HUGE_PAGE
            offset = offset // HUGE_PAGE * HUGE_PAGE
            length = end - offset
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.descriptor, offset, length, os.POSIX_FADV_DONTNEED)

    def pieces(self, ranges: Sequence[tuple[int, int]], mapped: Sequence[Mapping], *, is_whole: bool) -> list[Piece]:
        """What is mapped of some ranges of it, in their order.

        Args:
            ranges: Offset and length of each.
            mapped: Mappings of it.
            is_whole: Whether they are read from end to end, not a row here and there.
        """
        found: list[Piece] = []
        for offset, length in ranges:
            for each in mapped:
                low = max(offset & -mmap.PAGESIZE, each.offset)
                high = min(offset + length, each.offset + each.length)
                if low >= high:
                    continue
                moved = each.address - each.offset
                if is_whole and self.has_huge_pages:
                    self._ask_for_huge_pages(low + moved, high - low)
                # Cut where huge pages are.
                edges = [low, *range((low // PIECE_BYTES + 1) * PIECE_BYTES, high, PIECE_BYTES), high]
                found += [Piece(self, first, first + moved, last - first) for first, last in pairwise(edges)]
        return found

    def _ask_for_huge_pages(self, address: int, length: int) -> None:
        if _madvise(address, length, mmap.MADV_HUGEPAGE):
            self.has_huge_pages = False  # a kernel without them
            return
        # Or what lies behind is read with them, which no segment may need.
        _madvise(address, length, mmap.MADV_RANDOM)

    def mappings(self) -> list[Mapping]:
        """Where it is mapped in this process, but for what was written to."""
        # What is written to takes long to find out, and longer the more memory the process has.
        return self._listed("smaps") if self._listed("maps") else []

    def _listed(self, table: str) -> list[Mapping]:
        found: list[Mapping] = []
        inode, is_ours = str(os.fstat(self.descriptor).st_ino), False
        try:
            lines = Path(f"/proc/self/{table}").read_text(errors="replace").splitlines()
        except OSError:
            return []
        for line in lines:
            fields = line.split(maxsplit=5)
            if not fields[0].endswith(":"):
                is_ours = len(fields) == 6 and fields[4] == inode
                # Numbers of files are unique within a file system only.
                is_ours = is_ours and fields[5].removesuffix(" (deleted)").endswith(self.path.name)
                if is_ours:
                    first, last = (int(end, 16) for end in fields[0].split("-"))
                    found.append(Mapping(int(fields[2], 16), first, last - first))
            elif fields[0] == "Anonymous:" and is_ours and fields[1] != "0":
                found.pop()  # what was written would be dropped with it
        return sorted(found)


class Mapping(NamedTuple):
    """A part of a file in memory.

    Attributes:
        offset: In the file.
        address: In memory.
        length: Bytes.
    """

    offset: int
    address: int
    length: int


def added(before: Sequence[Mapping], after: Sequence[Mapping]) -> list[Mapping]:
    """What was mapped in between; what lies side by side in file and memory may have become one."""
    new = list(after)
    for old in before:
        start, stop = old.address, old.address + old.length
        cut: list[Mapping] = []
        for each in new:
            end = each.address + each.length
            for low, high in ((each.address, min(end, start)), (max(each.address, stop), end)):
                if low < high:
                    cut.append(Mapping(each.offset + low - each.address, low, high - low))
        new = cut
    return sorted(new)


def _madvise(address: int, length: int, advice: int) -> int:
    """`madvise` of whole pages; returns errno, which `ctypes.get_errno` says as well, or 0."""
    library = ctypes.CDLL(None, use_errno=True)
    ctypes.set_errno(0)
    failed = library.madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), ctypes.c_int(advice))
    return ctypes.get_errno() if failed else 0
