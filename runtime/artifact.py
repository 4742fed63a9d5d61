"""The artifact folder as a container: written whole or not at all, hashed, and checked when it is opened.

1. *Whole or absent.* `ArtifactWriter` fills a hidden folder beside the destination (same file system) and renames it
   into place as its last step, so no crash, full disk or Ctrl-C leaves half an artifact at the destination.
2. *Every byte accounted for.* `jettison.json` lists the size and SHA-256 of every other file, and its own SHA-256 over
   its canonical JSON. The hashes find damage; they are no signature, since whoever edits a file can edit them too.
3. *Nothing outside.* Names that leave the folder are refused, be it by `..`, an absolute path or a symbolic link.

The same files and manifest give the same bytes of `jettison.json`: nothing here adds a time, a host or a path.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import shutil
import signal
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from jettison.ir.errors import ArtifactError, BugError, OptionError, UnsupportedError

if sys.platform != "win32":
    import fcntl

FORMAT_VERSION = 1
MANIFEST_NAME = "jettison.json"
SMALL_FILE_BYTES = 1 << 20  # smaller files are hashed at every open; larger ones on request: they take seconds
Progress = Callable[[str, int, int], None]  # (file name, bytes done over all files, bytes in total), while hashing
_LIBRARIES = "jettison numpy onnx onnx-ir onnxruntime onnxscript safetensors scipy tokenizers torch transformers triton"
_AGAIN = "The artifact is damaged: copy it again, or write it again with `jettison optimize`"
_ELSEWHERE = "Choose another folder for the artifact"
_OUT_OF_SPACE = {
    errno.ENOSPC: ("the disk is full", "Free some space, or choose a folder on another disk"),
    errno.EDQUOT: ("your disk quota is used up", "Free some space, or choose a folder on another disk"),
    errno.EFBIG: ("a file grew past the largest size allowed here", "Raise the limit (`ulimit -f unlimited`)"),
}
# Two libraries lose errno: safetensors puts the number in the text, numpy's tofile reports a short write.
_OS_ERROR_IN_TEXT = re.compile(r"\(os error (\d+)\)")
_SHORT_WRITE = re.compile(r"\d+ requested and \d+ written")


def library_versions() -> dict[str, str]:
    """Return the version of Python and of every installed library that can change an artifact, sorted by name."""
    found = {name: version for name in _LIBRARIES.split() if (version := _installed(name)[1]) is not None}
    return dict(sorted({**found, "python": platform.python_version()}.items()))


def check_requirements(manifest: dict[str, Any]) -> None:
    """Check the minimum versions in `manifest["requires"]`, such as `{"onnxruntime": "1.24"}`, against this machine.

    Versions compare as tuples of their leading numbers, shorter ones padded with zeros: `1.24` equals `1.24.0`, and
    suffixes (`rc1`, `.dev0`, `+cpu`) count for nothing. This is exact for releases, which is all jettison asks for.

    Raises:
        UnsupportedError: A library is missing or too old.
        ArtifactError: `requires` is not a table of versions.
    """
    requires = manifest.get("requires", {})
    if not isinstance(requires, dict):
        raise _error(MANIFEST_NAME, f'"requires" is {requires!r}, needed a table of library versions', _AGAIN)
    for library, needed in requires.items():
        if not isinstance(needed, str) or not _version_numbers(needed):
            raise _error(MANIFEST_NAME, f'"requires" asks for {library} {needed!r}, which is no version', _AGAIN)
        distribution, found = _installed(library)
        if found is None or _version_numbers(found) < _version_numbers(needed):
            state = "is not installed" if found is None else f"found version {found}"
            raise UnsupportedError(
                f"[{library}] {state}, and this artifact needs {needed} or newer, because it uses operators that older "
                f'versions lack. Run: pip install -U "{distribution}>={needed}"'
            )


def _installed(library: str) -> tuple[str, str | None]:
    """Return (distribution, version or None) of a library given by distribution or import name."""
    try:
        return library, importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        # `import onnxruntime` is also provided by onnxruntime-gpu, onnxruntime-directml and nightly builds.
        providers = importlib.metadata.packages_distributions().get(library.replace("-", "_"), [])
        return (providers[0], importlib.metadata.version(providers[0])) if providers else (library, None)


def _version_numbers(version: str) -> tuple[int, ...]:
    """Return the leading numbers padded with zeros to six, or () for what is no version."""
    release = re.match(r"\d{1,9}(\.\d{1,9}){0,5}", version.strip())
    numbers = tuple(int(part) for part in release.group().split(".")) if release else ()
    return numbers + (0,) * (6 - len(numbers)) if numbers else ()


def check_destination(out: str | Path, *, overwrite: bool = False) -> None:
    """Check that an artifact can be written at `out`, changing nothing: call it before hours of work, not after.

    Raises:
        OptionError: `out` exists and `overwrite` is off, or it holds something that jettison did not write.
        ArtifactError: `out` cannot be created: it lies in a file or in a folder that is not writable.
    """
    try:
        target = Path(os.path.realpath(out))
        if target.exists() and not overwrite:
            choices = "Choose another folder, remove this one, or replace it with overwrite=True (--overwrite)"
            raise OptionError(f"[{out}] exists already, and the artifact needs a folder of its own. {choices}.")
        is_replaceable = (target / MANIFEST_NAME).is_file() or (target.is_dir() and not any(target.iterdir()))
        if target.exists() and not is_replaceable:
            found = f"is no folder with {MANIFEST_NAME}, and only an earlier artifact is overwritten"
            raise OptionError(f"[{out}] {found}, for you may need the data. {_ELSEWHERE}, or remove it yourself.")
        parent = target.parent
        while not parent.exists() and parent != parent.parent:
            parent = parent.parent
        if not parent.is_dir():
            raise _error(out, f"lies inside {parent}, which is a file; needed a folder", _ELSEWHERE)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise _error(out, f"cannot be created: no permission to write in {parent}", f"{_ELSEWHERE}, or permit it")
    except (OSError, ValueError) as error:  # no permission to look, a loop of links, a name too long, a null byte
        raise _error(out, f"cannot be used ({error})", _ELSEWHERE) from error


def _error(where: object, found: str, action: str) -> ArtifactError:
    return ArtifactError(f"[{where}] {found}. {action}.")


def _size_text(n_bytes: int) -> str:
    return f"{n_bytes / 1e6:,.2f} MB" if n_bytes >= 10_000 else f"{n_bytes} bytes"


def _json_text(value: Any) -> str:
    """Return JSON with sorted keys, two spaces and a final newline: the one form of every JSON file we write."""
    plain = json.loads(json.dumps(value, allow_nan=False))  # int keys become strings before they are sorted
    return json.dumps(plain, sort_keys=True, indent=2) + "\n"


def _manifest_hash(manifest: dict[str, Any]) -> str:
    body = {key: value for key, value in manifest.items() if key != "manifest_sha256"}
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _file_name(relative: str | Path) -> str:
    """Return `relative` in its one portable form (forward slashes), or raise ArtifactError if it leaves the folder."""
    text = relative.as_posix() if isinstance(relative, Path) else relative
    name = PurePosixPath(text)
    if not name.parts or name.is_absolute() or ".." in name.parts or re.search(r"[\\\0]|^[A-Za-z]:", text):
        needed = "needed a relative path with forward slashes and without `..`, for nothing may lie outside the folder"
        raise _error(repr(text), f"is not the name of a file in an artifact; {needed}", "Name a file inside it")
    return str(name)


def _hash_files(folder: Path, sizes: dict[str, int], tell: Progress | None) -> Iterator[tuple[str, str | OSError]]:
    """Yield (name, SHA-256, or why it cannot be read) for each of `sizes`, in order of name."""
    total, before = sum(sizes.values()), 0
    buffer = memoryview(bytearray(1 << 20))
    for name in sorted(sizes):
        digest, done = hashlib.sha256(), before
        try:
            with open(folder / name, "rb", buffering=0) as file:
                while n_bytes := file.readinto(buffer):
                    digest.update(buffer[:n_bytes])
                    done += n_bytes
                    if tell is not None:
                        tell(name, done, total)
            yield name, digest.hexdigest()
        except OSError as error:
            yield name, error
        before += sizes[name]


class ArtifactWriter:
    """Fills a folder beside `out` and renames it to `out` in `finish`; anything short of that leaves nothing behind.

    Leaving the block by an exception, Ctrl-C, SIGTERM or SIGHUP removes the temporary folder. SIGKILL cannot be caught:
    that leftover goes with the next write to the same `out`. A full disk becomes an `ArtifactError`, whichever library
    met it. An earlier artifact is replaced as a whole, files that others put into it included, and in one step where
    the system can exchange two folders (Linux).

    Args:
        out: Folder that the artifact becomes; missing parents are created.
        overwrite: Replace an earlier artifact at `out`; anything that is no artifact is refused all the same.
        on_progress: Told about the hashing in `finish`.

    Attributes:
        out: Destination, absolute and with symbolic links followed.
        folder: Where to write, `.NAME.jettison-new-PID-TOKEN` beside `out`; exists inside the block.
    """

    def __init__(self, out: str | Path, *, overwrite: bool = False, on_progress: Progress | None = None) -> None:
        """Check the destination as `check_destination` does; nothing is created yet."""
        check_destination(out, overwrite=overwrite)
        self.out = Path(os.path.realpath(out))
        self.folder = self.out.with_name(f".{self.out.name}.jettison-new-{os.getpid()}-{secrets.token_hex(4)}")
        self._shown = out
        self._overwrite = overwrite
        self._on_progress = on_progress
        self._bytes_needed: int | None = None
        self._stack: ExitStack | None = None  # set while the block is open
        self._is_finished = False

    def __enter__(self) -> ArtifactWriter:
        with ExitStack() as stack, self._writing("the folder"):
            stack.enter_context(_ending_signals_raise())
            for _ in range(2):  # twice, should an impatient second Ctrl-C cut the first removal short
                stack.callback(shutil.rmtree, self.folder, ignore_errors=True)
            self.out.parent.mkdir(parents=True, exist_ok=True)
            _clean_leftovers(self.out)
            check_destination(self._shown, overwrite=self._overwrite)  # cleaning may have restored an artifact
            self.folder.mkdir()
            lock = _lock(self.folder)
            if lock is not None:
                stack.callback(os.close, lock)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        stack, self._stack = self._stack, None
        with stack or ExitStack():  # closed after the message, whose free bytes would else count what was removed
            is_mute = isinstance(error, Exception) and not isinstance(error, ArtifactError)
            explained = self._explain_full_disk(error) if is_mute else None
        if explained is not None:
            raise explained from error
        if error is None and not self._is_finished:
            raise BugError(f"[{self._shown}] ArtifactWriter was closed without finish(), so no artifact was written.")

    def path(self, relative: str | Path) -> Path:
        """Return where to write `relative`, parents made; ArtifactError if it leaves the folder or is reserved."""
        self._require_open()
        name = _file_name(relative)
        if name == MANIFEST_NAME:
            raise _error(MANIFEST_NAME, "is written by finish() from its manifest", "Use another file name")
        with self._writing(name):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        return self.folder / name

    def copy(self, source: str | Path, relative: str | Path | None = None) -> Path:
        """Copy the content of `source` (links followed), by default under its own name; ArtifactError if it fails."""
        source = Path(source)
        if not source.is_file():  # a pipe would block for ever
            raise _error(source, f"is missing or not a file, and {self._shown} needs a copy", "Restore it")
        path = self.path(source.name if relative is None else relative)
        with self._writing(f"{path.name} (from {source})"):
            shutil.copyfile(source, path)
        return path

    def write_text(self, relative: str | Path, text: str) -> Path:
        r"""Write `text` as UTF-8 with `\n` line ends on every system."""
        path = self.path(relative)
        with self._writing(path.name):
            path.write_bytes(text.encode())
        return path

    def write_json(self, relative: str | Path, value: Any) -> Path:
        """Write `value` as JSON with sorted keys and a final newline; NaN and infinity are not JSON (ValueError)."""
        return self.write_text(relative, _json_text(value))

    def require_space(self, n_bytes: int) -> None:
        """Raise ArtifactError unless `n_bytes` more fit; the number is also named should the disk fill up later."""
        self._require_open()
        self._bytes_needed = n_bytes
        free = shutil.disk_usage(self.folder).free
        if free < n_bytes:
            found = f"the artifact needs {_size_text(n_bytes)}, and {_size_text(free)} are free in {self.out.parent}"
            raise _error(self._shown, found, _OUT_OF_SPACE[errno.ENOSPC][1])

    def finish(self, manifest: dict[str, Any]) -> None:
        """Hash every file, write `jettison.json`, make it all durable, and rename the folder to `out`.

        Args:
            manifest: What the artifact is, as plain JSON values without times or hosts; `format_version`, `files` and
                `manifest_sha256` are set here, whatever it holds under these keys.

        Raises:
            ArtifactError, OptionError: A file cannot be written or is no regular file, or `out` has appeared since.
        """
        self._require_open()
        with self._writing("the artifact"):
            files = self._record_files()
            document = json.loads(_json_text({**manifest, "format_version": FORMAT_VERSION, "files": files}))
            document["manifest_sha256"] = _manifest_hash(document)
            (self.folder / MANIFEST_NAME).write_bytes(_json_text(document).encode())
            for path in (*self.folder.rglob("*"), self.folder):
                _sync(path)
            check_destination(self._shown, overwrite=self._overwrite)  # minutes may have passed since the first check
            _replace(self.folder, self.out)
            self._is_finished = True
            _sync(self.out.parent)

    def _require_open(self) -> None:
        if self._stack is None or self._is_finished:
            raise BugError(f"[{self._shown}] ArtifactWriter is used outside its `with` block or after finish().")

    def _record_files(self) -> dict[str, dict[str, Any]]:
        sizes: dict[str, int] = {}
        for path in self.folder.rglob("*"):
            status = path.lstat()
            if stat.S_ISREG(status.st_mode):
                sizes[_file_name(path.relative_to(self.folder))] = status.st_size
            elif not stat.S_ISDIR(status.st_mode):
                raise _error(path.name, "is a link or a special file", "Write a regular file, so that it can be copied")
        sizes.pop(MANIFEST_NAME, None)  # of a finish that failed and is tried again
        files: dict[str, dict[str, Any]] = {}
        for name, digest in _hash_files(self.folder, sizes, self._on_progress):
            if isinstance(digest, OSError):
                raise digest
            files[name] = {"bytes": sizes[name], "sha256": digest}
        return files

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = f"{what} cannot be written: {error.strerror or error}"
            action = f"{_ELSEWHERE}, or mend its permissions or disk"
            raise self._explain_full_disk(error) or _error(self._shown, reason, action) from error

    def _explain_full_disk(self, error: BaseException | None) -> ArtifactError | None:
        """Return what to tell the user if `error`, or an error behind it, is a disk, quota or file-size limit."""
        number = _out_of_space(error)
        if number is None:
            return None
        found, action = _OUT_OF_SPACE[number]
        written = sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file())
        free = shutil.disk_usage(self.out.parent).free if self.out.parent.is_dir() else 0
        needed = "" if self._bytes_needed is None else f" of the {_size_text(self._bytes_needed)} needed"
        state = f"{_size_text(written)}{needed} were written, {_size_text(free)} are free in {self.out.parent}"
        return _error(self._shown, f"{found} ({error}): {state}. The unfinished artifact was removed", action)


def _out_of_space(error: BaseException | None) -> int | None:
    """Return the number of `_OUT_OF_SPACE` that stands in the chain of `error`, if one does."""
    for _ in range(16):  # chains can be circular
        in_text = _OS_ERROR_IN_TEXT.search(str(error))
        number = error.errno if isinstance(error, OSError) else int(in_text.group(1)) if in_text else None
        if isinstance(error, OSError) and number is None and _SHORT_WRITE.fullmatch(str(error)):
            return errno.ENOSPC
        if number in _OUT_OF_SPACE or error is None:
            return number
        error = error.__cause__ or error.__context__
    return None


@contextmanager
def _ending_signals_raise() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into SystemExit for the time of the block, unless the program handles them already."""
    is_main = threading.current_thread() is threading.main_thread()  # Python lets no other thread set handlers
    ending = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if is_main and hasattr(signal, name)]
    caught = [number for number in ending if signal.getsignal(number) is signal.SIG_DFL]

    def leave(number: int, frame: object) -> None:
        raise SystemExit(128 + number)  # what a shell reports for a program that the signal ended

    for number in caught:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)


def _sync(path: Path) -> None:
    """Make a file or folder durable, so that a power cut after the rename cannot leave a named but empty artifact."""
    if sys.platform == "win32":
        return  # needs a handle with write access there, and folders have none
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in {errno.EINVAL, errno.ENOTSUP}:  # file systems that cannot sync a folder
            raise
    finally:
        os.close(descriptor)


def _replace(folder: Path, out: Path) -> None:
    """Rename `folder` to `out`; an earlier `out` ends up at `folder`, and stays where it was if anything fails."""
    if not os.path.lexists(out):
        os.rename(folder, out)
    elif not _exchange(folder, out):
        backup = folder.with_name(folder.name.replace(".jettison-new-", ".jettison-old-"))
        os.rename(out, backup)
        try:
            os.rename(folder, out)
        except BaseException:
            if not os.path.lexists(out):
                os.rename(backup, out)
            raise
        os.rename(backup, folder)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one atomic step (renameat2, Linux 3.15); False where system or file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError, TypeError):  # another system, or a C library older than glibc 2.28
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(first), here, os.fsencode(second), exchange) == 0)


def _lock(folder: Path) -> int | None:
    """Lock `folder` until the returned descriptor is closed or the process dies; None where it is held or cannot be.

    A pid alone would not do: it means nothing in another container, and a restarted one often gets the same pid 1.
    """
    if sys.platform == "win32":
        return None
    descriptor = None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        if descriptor is not None:
            os.close(descriptor)
        return None
    return descriptor


def _clean_leftovers(out: Path) -> None:
    """Remove what killed writers of `out` left; if one died between its two renames, put the earlier artifact back."""
    pattern = re.compile(rf"\.{re.escape(out.name)}\.jettison-(new|old)-\d+-[0-9a-f]{{8}}")
    for folder in sorted(out.parent.iterdir()):
        named = pattern.fullmatch(folder.name)
        lock = _lock(folder) if named else None
        if named is None or lock is None:
            continue
        if named.group(1) == "old" and not os.path.lexists(out):
            os.rename(folder, out)
        else:
            shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


@dataclass(frozen=True)
class Problem:
    """What `Artifact.verify` found: `missing`, `size`, `hash`, `unreadable`, `outside` or, as a note only, `extra`."""

    kind: str
    name: str
    found: str
    needed: str

    @property
    def is_note(self) -> bool:
        """Whether the artifact is sound in spite of it."""
        return self.kind == "extra"

    def __str__(self) -> str:
        return f"{self.name}: {self.found}, needed {self.needed}"


@dataclass(frozen=True)
class Artifact:
    """An artifact folder that was checked when it was opened (use `open`); nothing in it is ever executed.

    Attributes:
        folder: The folder as given.
        manifest: Content of `jettison.json`, keys this version does not know included.
    """

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def open(cls, folder: str | Path, *, verify: bool = False, on_progress: Progress | None = None) -> Artifact:
        """Open an artifact: checks `jettison.json`, the size of every file and the hash of files below 1 MiB.

        With `verify` large files are hashed too (about a second per GB), which `on_progress` is told about.

        Raises:
            ArtifactError: No artifact, an artifact of a newer format, or a damaged one.
        """
        artifact = cls(Path(folder), _read_manifest(Path(folder)))
        problems = artifact._check_files(math.inf if verify else SMALL_FILE_BYTES, on_progress)
        if problems:
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise _error(folder, "; ".join(map(str, problems[:5])) + more, _AGAIN)
        return artifact

    def path(self, relative: str | Path) -> Path:
        """Return where the file `relative` is; ArtifactError if it is not listed, gone, or leaves the folder."""
        name = _file_name(relative)
        if name not in self.manifest["files"]:
            raise _error(self.folder, f"lists no file {name}", f"Ask for a file listed in {MANIFEST_NAME}")
        problem = self._check_size(name)
        if problem is not None:
            raise _error(self.folder, str(problem), _AGAIN)
        return self.folder / name

    def read_json(self, relative: str | Path) -> Any:
        """Return the content of the JSON file `relative`; ArtifactError as `path`, or if it is not JSON."""
        return _read_json(self.path(relative))

    def verify(self, on_progress: Progress | None = None) -> list[Problem]:
        """Check `jettison.json` and every file, and note files that are not listed; sound if all of it is notes."""
        found = None
        try:
            stored = _read_manifest(self.folder)
            # Catches what its own hash cannot see, such as white space or a key that stands twice.
            if (self.folder / MANIFEST_NAME).read_bytes() != _json_text(stored).encode() or stored != self.manifest:
                found = "was changed after it was written"
        except (ArtifactError, OSError) as error:
            found = str(error)
        problems = [Problem("hash", MANIFEST_NAME, found, "the file as it was written")] if found else []
        return problems + self._check_files(math.inf, on_progress) + self._extra_files()

    def _check_files(self, hash_below: float, on_progress: Progress | None) -> list[Problem]:
        """Check the sizes of all files, and the hashes of those that are smaller than `hash_below` bytes."""
        files: dict[str, dict[str, Any]] = self.manifest["files"]
        checked = {name: self._check_size(name) for name in sorted(files)}
        sizes = {n: files[n]["bytes"] for n in checked if checked[n] is None and files[n]["bytes"] < hash_below}
        for name, digest in _hash_files(self.folder, sizes, on_progress):
            needed = files[name]["sha256"]
            if isinstance(digest, OSError):
                checked[name] = Problem("unreadable", name, f"cannot be read ({digest.strerror})", "a readable file")
            elif digest != needed:
                found = f"content changed (SHA-256 {digest[:12]}...)"
                checked[name] = Problem("hash", name, found, f"SHA-256 {needed[:12]}...")
        return [problem for problem in checked.values() if problem is not None]

    def _check_size(self, name: str) -> Problem | None:
        path, n_bytes = self.folder / name, self.manifest["files"][name]["bytes"]
        if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.folder)):
            # Also how the Hugging Face cache stores files.
            return Problem("outside", name, "a link that leaves the folder", "a file (copy the folder with `cp -rL`)")
        try:
            status = path.stat()
        except OSError as error:
            kind = "missing" if error.errno in {errno.ENOENT, errno.ENOTDIR} else "unreadable"
            return Problem(kind, name, f"{kind} ({error.strerror})", _size_text(n_bytes))
        if not stat.S_ISREG(status.st_mode):
            return Problem("missing", name, "not a regular file", _size_text(n_bytes))
        if status.st_size != n_bytes:
            return Problem("size", name, f"{status.st_size:,} bytes", f"{n_bytes:,} bytes")
        return None

    def _extra_files(self) -> list[Problem]:
        listed = {MANIFEST_NAME, *self.manifest["files"]}
        known_folders = {str(parent) for name in listed for parent in PurePosixPath(name).parents}
        extra: list[str] = []
        for folder, folders, names in os.walk(self.folder):
            here = PurePosixPath(Path(folder).relative_to(self.folder).as_posix())
            extra += [str(here / name) for name in names if str(here / name) not in listed]
            extra += [f"{here / name}/" for name in folders if str(here / name) not in known_folders]
            folders[:] = [name for name in folders if str(here / name) in known_folders]  # one note for a whole .git
        return [Problem("extra", name, "not part of the artifact", "nothing") for name in sorted(extra)]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise _error(path, f"cannot be read: {error.strerror}", "Mend its permissions, or copy it again") from error
    except (ValueError, RecursionError) as error:
        raise _error(path, f"is not readable JSON ({error})", _AGAIN) from error


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read `jettison.json` and check its version, its own hash, and the names and records in it."""
    path, from_us = folder / MANIFEST_NAME, "Pass the folder that `jettison optimize --out` wrote"
    try:
        if not folder.is_dir():
            raise _error(folder, "is a file, not a folder" if folder.exists() else "does not exist", from_us)
        if not path.exists() and (folder / "config.json").exists():
            found = f"holds no {MANIFEST_NAME}: this looks like a Hugging Face model folder, not an artifact"
            raise _error(folder, found, f"Run `jettison optimize {folder} --out DIR`, and pass DIR")
        if not path.exists():
            raise _error(folder, f"holds no {MANIFEST_NAME}, so it is no artifact", from_us)
        if not path.is_file() or path.stat().st_size > 64 << 20:
            raise _error(path, "is not a small regular file", _AGAIN)
    except (OSError, ValueError) as error:  # no permission on a parent; a null byte in the path
        raise _error(folder, f"cannot be read ({error})", from_us) from error
    manifest: dict[str, Any] = _read_json(path)
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if type(version) is not int or version < 1:
        raise _error(path, f"has format version {version!r}, needed a number from 1 to {FORMAT_VERSION}", _AGAIN)
    if version > FORMAT_VERSION:  # before all else: a newer format may hash and list differently
        found = f"written by a newer jettison (format {version}, this one reads up to {FORMAT_VERSION})"
        raise _error(folder, found, "Upgrade with `pip install -U jettison`")
    if manifest.get("manifest_sha256") != _manifest_hash(manifest):
        raise _error(path, "was changed after it was written: it does not match its own SHA-256", _AGAIN)
    files = manifest.get("files")
    for name, record in files.items() if isinstance(files, dict) else [("files", files)]:
        values = (record.get("bytes"), record.get("sha256")) if isinstance(record, dict) else ()
        if tuple(type(value) for value in values) != (int, str):
            raise _error(path, f"has the entry {name!r}: {record!r}, needed its bytes and sha256", _AGAIN)
        if _file_name(name) != name or name == MANIFEST_NAME:
            raise _error(path, f"lists a file {name!r}, a name that jettison never writes", _AGAIN)
    return manifest
