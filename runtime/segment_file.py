"""Reads segments of a weight store past the page cache, and checks what it reads.

The first read of a segment is hashed. The file's size and time of change are compared with those at opening whenever a
step begins: a file that was changed in between would mix two sets of weights in one result.
"""

from __future__ import annotations

import errno
import hashlib
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from jettison.ir.errors import ArtifactError
from jettison.runtime.segment_file_writer import BLOCK, Segment

_AGAIN = "The artifact is damaged: copy it again, or write it again with `jettison optimize`."
_HASHED_BYTES = 1 << 20


class SegmentFile:
    """A store, open for reading; closed when nobody refers to it any more.

    Args:
        source: Its path, or the descriptor of a temporary file, which is closed with this object.
        segments: What it holds.
        direct: Whether to read past the page cache where the file system can do it.

    Attributes:
        shown: What messages call it.
        is_direct: Whether reads go past the page cache.

    Raises:
        ArtifactError: It cannot be opened, or is shorter than its segments.
    """

    def __init__(self, source: Path | int, segments: Sequence[Segment], *, direct: bool = True) -> None:
        self.shown = str(source) if isinstance(source, Path) else "the temporary file of streamed weights"
        self.segments = segments
        self._is_checked = bytearray(len(segments))
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
        self.is_direct = direct and hasattr(os, "O_DIRECT")
        path = source if isinstance(source, Path) else Path(f"/proc/self/fd/{source}")
        try:
            self._file = self._opened(path, flags)
        except OSError as error:
            raise ArtifactError(f"[{self.shown}] cannot be opened ({error.strerror}). {_AGAIN}") from error
        finally:
            if isinstance(source, int):
                os.close(source)
        weakref.finalize(self, os.close, self._file)
        self._opened_as = self._status()
        needed = max((segment.offset + segment.padded for segment in segments), default=0)
        if self._opened_as[0] < needed:
            raise ArtifactError(f"[{self.shown}] found {self._opened_as[0]:,} bytes; needed {needed:,}. {_AGAIN}")

    def _opened(self, path: Path, flags: int) -> int:
        if not self.is_direct:
            return os.open(path, flags)
        try:
            file = os.open(path, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise
            self.is_direct = False
            return os.open(path, flags)
        try:  # some file systems take the flag and refuse the read
            os.preadv(file, [memoryview(mmap.mmap(-1, BLOCK))], 0)
        except OSError as error:
            os.close(file)
            if error.errno != errno.EINVAL:
                raise
            self.is_direct = False
            return os.open(path, flags)
        return file

    def _status(self) -> tuple[int, int]:
        found = os.fstat(self._file)
        return found.st_size, found.st_mtime_ns

    def check_unchanged(self) -> None:
        """Compare the file with what it was.

        Raises:
            ArtifactError: It was changed since it was opened.
        """
        if self._status() != self._opened_as:
            raise ArtifactError(
                f"[{self.shown}] was changed while weights were streamed from it; needed the file as it was opened. "
                "Load the artifact again."
            )

    def read(self, number: int, into: memoryview) -> None:
        """Read a segment.

        Args:
            number: Which.
            into: As many bytes as the segment has with padding, aligned to blocks.

        Raises:
            ArtifactError: It cannot be read whole, or is not what was written.
        """
        segment = self.segments[number]
        self.read_blocks(segment.offset, into)
        if not self._is_checked[number]:
            self._check(number, hashlib.sha256(into[: segment.bytes]).hexdigest())

    def check(self, number: int, buffer: memoryview) -> None:
        """Make sure that a segment is what was written, before some of its rows are read; costs nothing later.

        Args:
            number: Which.
            buffer: Some whole blocks to read into, aligned.

        Raises:
            ArtifactError: As `read`.
        """
        if self._is_checked[number]:
            return
        segment, sha = self.segments[number], hashlib.sha256()
        for done in range(0, segment.padded, len(buffer)):
            size = min(len(buffer), segment.padded - done)
            self.read_blocks(segment.offset + done, buffer[:size])
            sha.update(buffer[: min(size, segment.bytes - done)])
        self._check(number, sha.hexdigest())

    def _check(self, number: int, found: str) -> None:
        wanted = self.segments[number].sha256
        if found != wanted:
            raise ArtifactError(
                f"[{self.shown}] segment {number}: found SHA-256 {found[:12]}; needed {wanted[:12]}. {_AGAIN}"
            )
        self._is_checked[number] = 1

    def read_blocks(self, offset: int, into: memoryview) -> None:
        """Read whole blocks.

        Args:
            offset: Where they begin.
            into: Where to; aligned.

        Raises:
            ArtifactError: They cannot be read.
        """
        done = 0
        try:
            while done < len(into):
                read = os.preadv(self._file, [into[done:]], offset + done)
                if not read:
                    self._refuse_short(offset + done)
                done += read
            if not self.is_direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(self._file, offset, len(into), os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise ArtifactError(
                f"[{self.shown}] cannot be read at byte {offset + done:,} ({error.strerror}). If the disk is sound, "
                "load the artifact again."
            ) from error

    def _refuse_short(self, offset: int) -> NoReturn:
        raise ArtifactError(f"[{self.shown}] ends at byte {offset:,}, within what it should hold. {_AGAIN}")
