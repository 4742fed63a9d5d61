"""Reads a Hugging Face model folder without copying its weights: what tensors are there, and a mapped view of each.

A `Checkpoint` is opened once, checks everything that can be checked without touching the weights (configuration, index,
safetensors headers, file sizes), and then hands out tensors that are views of the memory-mapped files. Nothing here
imports transformers, unpickles anything or runs code from the folder.

Format: https://huggingface.co/docs/safetensors (eight bytes of header length, a JSON header, the tensors back to back).
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import re
import stat
from collections.abc import Callable, Container, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from jettison.ir.errors import CaptureError, JettisonError, UnsupportedError
from jettison.ir.packing_config import PACKED_SUFFIXES, Packing, read_packing, refuse_quantized
from jettison.ir.tokenizer_files import tokenizer_files

CONFIG_FILE = "config.json"
GENERATION_CONFIG_FILE = "generation_config.json"
SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# The safetensors library refuses larger headers too, so that a damaged length cannot make a reader allocate gigabytes.
MAX_HEADER_BYTES = 100_000_000

# 1 Mi elements: 4 MB of fp32, small enough for the last-level cache, large enough to be split over the threads.
_SCAN_ELEMENTS = 1 << 20

# fmt: off
_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}
# fmt: on

_MODEL_FOLDER = f"a model folder with {CONFIG_FILE} and safetensors weights"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class _TensorEntry:
    """Where one tensor lies: its file, type and extent (offsets count from the end of the header)."""

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


_Entries = dict[str, _TensorEntry]
_Json = dict[str, Any]
_Progress = Callable[[int, int], None] | None


class Checkpoint:
    """A Hugging Face model folder, opened for reading; make one with `Checkpoint.open`.

    Attributes:
        folder: The folder that was opened (for a hub id, its snapshot in the local cache).
        config: `config.json`, parsed.
        generation_config: `generation_config.json`, parsed; empty when the folder has none.
        packing: How linears are packed, or None where all weights are dense.
        names: Tensor names in the order they are stored, so that reading them in turn reads the files front to back.
    """

    def __init__(
        self,
        folder: Path,
        config: _Json,
        generation_config: _Json,
        entries: _Entries,
        packing: Packing | None,
        allow_remote_code: bool,
    ) -> None:
        self.folder = folder
        self.config = config
        self.generation_config = generation_config
        self.packing = packing
        self.names: tuple[str, ...] = tuple(entries)
        self._entries = entries
        self._allow_remote_code = allow_remote_code
        self._weight_files = sorted({entry.file for entry in entries.values()})
        self._mapped = {file: _map_file(file) for file in self._weight_files}
        self._content_hash: str | None = None

    @classmethod
    def open(cls, folder: str | os.PathLike[str], *, allow_remote_code: bool = False) -> Checkpoint:
        """Open a model folder and check everything that can be checked without reading weights.

        Args:
            folder: A folder with `config.json` and `model.safetensors`, or `model.safetensors.index.json` and its
                shards; or a hub id (`org/name`) whose snapshot is already in the local Hugging Face cache.
            allow_remote_code: The user trusts the Python files of this model; makes `refuse_remote_code` pass.

        Returns:
            The checkpoint; its weights are mapped, none has been read.

        Raises:
            CaptureError: The folder or a file in it is missing, damaged or not what its name says.
            UnsupportedError: The folder is fine, but quantised in a way that is not read, or without safetensors
                weights.
        """
        root = _find_folder(os.fsdecode(folder))
        _refuse_other_folders(root)
        config = _read_json_object(root / CONFIG_FILE)
        packing = read_packing(root / CONFIG_FILE, config)
        generation_path = root / GENERATION_CONFIG_FILE
        generation_config = _read_json_object(generation_path) if os.path.lexists(generation_path) else {}
        entries = _read_entries(root, config, packing)
        return cls(root, config, generation_config, entries, packing, allow_remote_code)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    @property
    def total_bytes(self) -> int:
        """Bytes of all tensors; headers, and tensors a config ties to another, are not counted."""
        return sum(entry.end - entry.begin for entry in self._entries.values())

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, from the header.

        Raises:
            CaptureError: The checkpoint has no tensor of that name.
        """
        return self._entry(name).shape

    def dtype(self, name: str) -> torch.dtype:
        """Type a tensor is stored in, from the header.

        Raises:
            CaptureError: The checkpoint has no tensor of that name.
        """
        return self._entry(name).dtype

    def nbytes(self, name: str) -> int:
        """Bytes a tensor takes in its file.

        Raises:
            CaptureError: The checkpoint has no tensor of that name.
        """
        return self._entry(name).end - self._entry(name).begin

    def tensor(self, name: str) -> torch.Tensor:
        """A view of the mapped file: no copy, no anonymous memory, pages are read when touched.

        Treat it as read-only. The mapping is private, so writing into the tensor would not change the file, but every
        page written becomes anonymous memory. The view keeps the mapping alive after the checkpoint is gone.

        Returns:
            A contiguous tensor of the stored shape and dtype, on the CPU.

        Raises:
            CaptureError: The checkpoint has no tensor of that name.
        """
        view: torch.Tensor = self._mapped[self._entry(name).file].get_tensor(name)
        return view

    def file(self, name: str) -> Path:
        """The file that holds a tensor.

        Raises:
            CaptureError: The checkpoint has no tensor of that name.
        """
        return self._entry(name).file

    def require_finite(self, names: Iterable[str] | None = None, on_progress: _Progress = None) -> None:
        """Read every floating-point tensor once and refuse NaN and infinity.

        Costs one pass at memory or disk bandwidth (the pages stay in the page cache for what follows) and a few MB.

        Args:
            names: Tensors to read; all when None. Integer and boolean ones are skipped.
            on_progress: Called as `on_progress(done_bytes, total_bytes)` after every few MB.

        Raises:
            CaptureError: A tensor has such values: names it, how many, and the index of the first.
        """
        chosen = self.names if names is None else tuple(names)
        floating = [name for name in chosen if self.dtype(name).is_floating_point]
        total_bytes = sum(self.nbytes(name) for name in floating)
        done_bytes = 0
        for name in floating:
            for chunk in _chunks(self.tensor(name)):
                # One vectorised pass without temporaries; both ends are NaN if any element is. (A sum would be as fast,
                # but large fp16 values overflow it.)
                low, high = torch.aminmax(chunk)
                if not (math.isfinite(low.item()) and math.isfinite(high.item())):
                    self._refuse_nonfinite(name)
                done_bytes += chunk.nbytes
                if on_progress is not None:
                    on_progress(done_bytes, total_bytes)

    def content_hash(self, on_progress: _Progress = None) -> str:
        """SHA-256 that identifies the model by content: `config.json` and the weight files, wherever the folder lies.

        Streams every byte once: 1.3 GiB/s on a processor with SHA instructions, or what the disk gives on a first read.
        Computed once per `Checkpoint`. It is the hash of lines `name NUL sha256 LF`, where a file's own hash is the one
        that `sha256sum` and the hub show.

        Args:
            on_progress: Called as `on_progress(done_bytes, total_bytes)` after every few MB.

        Returns:
            64 hexadecimal digits.

        Raises:
            CaptureError: A file cannot be read any more.
        """
        if self._content_hash is None:
            files = [self.folder / CONFIG_FILE, *self._weight_files]
            total_bytes, done_bytes = sum(_stat_file(file).st_size for file in files), 0
            combined = hashlib.sha256()
            for file in files:
                digest = hashlib.sha256()
                for block in _file_blocks(file):
                    digest.update(block)
                    done_bytes += len(block)
                    if on_progress is not None:
                        on_progress(done_bytes, total_bytes)
                combined.update(f"{file.relative_to(self.folder).as_posix()}\0{digest.hexdigest()}\n".encode())
            self._content_hash = combined.hexdigest()
        return self._content_hash

    def tokenizer_files(self) -> list[Path]:
        """Files of the folder that an artifact must carry for its tokenizer and chat templates to work.

        Returns:
            Existing files, sorted; copy each to its place relative to `folder`. Never code, never weights.
        """
        return tokenizer_files(self.folder)

    @property
    def requires_remote_code(self) -> bool:
        """Whether `config.json` names Python files (`auto_map`) to build the model with.

        Many official models carry such names although transformers has known their type for long; only
        `refuse_remote_code`, told which types are native, decides.
        """
        return bool(self.config.get("auto_map"))

    def refuse_remote_code(self, native_model_types: Container[str]) -> None:
        """Refuse a model that could only be built by running Python files from its folder.

        Args:
            native_model_types: Values of `model_type` that the caller can build by itself.

        Raises:
            CaptureError: `auto_map` is present, the type is not native, and `allow_remote_code` was not given.
        """
        model_type = str(self.config.get("model_type"))
        if not self.requires_remote_code or self._allow_remote_code or model_type in native_model_types:
            return
        found = f"auto_map, which asks to run Python files from the folder for model_type {model_type!r}"
        needed = "a model_type that transformers builds itself, because jettison does not run downloaded code"
        do = "Upgrade transformers, choose a model it knows, or pass allow_remote_code=True after reading that code."
        _refuse(self.folder / CONFIG_FILE, found, needed, do)

    def _entry(self, name: str) -> _TensorEntry:
        entry = self._entries.get(name)
        if entry is None:
            close = difflib.get_close_matches(name, self.names, n=3)
            found = f"no tensor {name!r} among {len(self.names)}" + (f" (close: {_listed(close)})" if close else "")
            needed = "that tensor, because the configuration calls for it"
            do = "Check that config.json and the weights belong to the same model, or download both again."
            _refuse(self.folder, found, needed, do)
        return entry

    def _refuse_nonfinite(self, name: str) -> NoReturn:
        n_bad = n_nan = first = 0
        for number, chunk in enumerate(_chunks(self.tensor(name))):
            bad = chunk.isfinite().logical_not_()
            if n_bad == 0:
                first = number * _SCAN_ELEMENTS + int(bad.to(torch.uint8).argmax())
            n_bad += int(bad.sum())
            n_nan += int(chunk.isnan().sum())
        entry = self._entry(name)
        index = [int(i) for i in np.unravel_index(first, entry.shape)] if entry.shape else []
        where = f"{entry.file}: tensor {name!r} {str(entry.dtype).removeprefix('torch.')}{list(entry.shape)}"
        found = f"{n_nan:,} NaN and {n_bad - n_nan:,} infinite values, the first at index {index}"
        needed = "finite weights, because one such value spreads to every logit"
        do = "The file is damaged or the training diverged: download it again, or use another checkpoint."
        _refuse(where, found, needed, do)


def _refuse(
    where: Path | str, found: str, needed: str, do: str, family: type[JettisonError] = CaptureError, cause: Any = None
) -> NoReturn:
    """Raise in the house's four parts: where, found, needed (and why), what to do."""
    raise family(f"[checkpoint] {where}: found {found}; needed {needed}. {do}") from cause


def _refuse_damaged(file: Path, found: str, needed: str) -> NoReturn:
    _refuse(file, found, needed, "The file is damaged or incomplete: download or copy it again.")


def _refuse_unreadable(file: Path, error: OSError) -> NoReturn:
    found = f"a file that cannot be read ({error.strerror or type(error).__name__})"
    _refuse(file, found, "a readable file", "Check that it is there, its permissions and the disk.", cause=error)


def _refuse_gguf(file: Path) -> NoReturn:
    found = "GGUF weights, which llama.cpp reads"
    needed = "config.json and safetensors, because jettison quantises from the original weights"
    do = "Download the model the GGUF file was made from, in its Hugging Face form."
    _refuse(file, found, needed, do, UnsupportedError)


def _listed(items: list[str], limit: int = 8) -> str:
    """Items separated by commas, cut after `limit` so that a message stays readable."""
    rest = len(items) - limit
    return ", ".join(items[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _find_folder(given: str) -> Path:
    folder = Path(given)
    try:
        mode = folder.stat().st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: a NUL character in the name
        return _find_cached_snapshot(given)
    except OSError as error:
        _refuse_unreadable(folder, error)
    if stat.S_ISDIR(mode):
        return folder
    if folder.suffix == ".gguf":
        _refuse_gguf(folder)
    do = f"Pass its folder: {folder.parent}." if folder.suffix == ".safetensors" else "Pass the folder that holds it."
    _refuse(folder, "a file", _MODEL_FOLDER, do)


def _find_cached_snapshot(given: str) -> Path:
    """The folder of a hub id in the local cache, found offline; nothing is ever downloaded."""
    if not _HUB_ID.fullmatch(given):
        _refuse(repr(given), "no such folder", _MODEL_FOLDER, "Check the path.")
    try:
        from huggingface_hub import snapshot_download  # optional, it comes with transformers

        snapshot: str | None = snapshot_download(given, local_files_only=True)
    except (ImportError, OSError, ValueError) as error:
        # transformers fetches only the files it needs, which counts as an incomplete snapshot; the checks that follow
        # say what is missing for us.
        snapshot = getattr(error, "snapshot_path", None)
    if snapshot is not None and os.path.isdir(snapshot):
        return Path(snapshot)
    found = "no such folder, and no such model in the local Hugging Face cache"
    _refuse(given, found, _MODEL_FOLDER, f"A hub id must be downloaded first: hf download {given} --local-dir DIR")


def _refuse_other_folders(root: Path) -> None:
    """Name what a folder without `config.json` is, where that can be told; an artifact of ours has one, too."""
    try:
        present = set(os.listdir(root))
    except OSError as error:
        _refuse_unreadable(root, error)
    if "jettison.json" in present:
        found = "an artifact that jettison made (jettison.json)"
        needed = "the original model folder, because an artifact is already rewritten"
        _refuse(root, found, needed, "Run it with jettison.load(), or pass the folder it was made from.")
    if CONFIG_FILE in present:
        return
    gguf = sorted(name for name in present if name.endswith(".gguf"))
    if gguf:
        _refuse_gguf(root / gguf[0])
    if "adapter_config.json" in present:
        found = "a LoRA adapter (adapter_config.json)"
        do = "Merge it into its base model (peft: model.merge_and_unload().save_pretrained(DIR)) and pass that folder."
    else:
        found = f"no {CONFIG_FILE}" + (f" among {_listed(sorted(present))}" if present else ": the folder is empty")
        do = "Pass the folder that from_pretrained would load, or download the model again with all its files."
    _refuse(root, found, _MODEL_FOLDER, do)


def _stat_file(file: Path) -> os.stat_result:
    """Status of a regular file or a link to one; opening anything else, such as a pipe, could wait for ever."""
    try:
        status = file.stat()
    except OSError as error:
        _refuse_unreadable(file, error)
    if not stat.S_ISREG(status.st_mode):
        _refuse(file, "something that is not a file", "a regular file or a link to one", "Replace it.")
    return status


def _read_json_object(file: Path) -> _Json:
    _stat_file(file)
    try:
        text = file.read_bytes()
    except OSError as error:
        _refuse_unreadable(file, error)
    try:
        parsed = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        reason = f"{error.msg} at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else "not UTF-8 JSON"
        _refuse_damaged(file, f"{len(text):,} bytes that do not parse ({reason})", "a JSON object")
    if not isinstance(parsed, dict):
        _refuse_damaged(file, f"JSON of type {type(parsed).__name__}", "a JSON object")
    return parsed


def _read_entries(root: Path, config: _Json, packing: Packing | None) -> _Entries:
    if os.path.lexists(root / SINGLE_FILE):  # transformers prefers it, too, where both are present
        entries = _read_header(root / SINGLE_FILE)
    elif os.path.lexists(root / INDEX_FILE):
        entries = _read_shards(root)
    else:
        _refuse_missing_weights(root, config)
    if not entries:
        _refuse(root, "safetensors weights without tensors", "weights", "Download the model again.")
    packed = [name for name in entries if name.endswith(PACKED_SUFFIXES)]
    if packing is None and packed:
        refuse_quantized(entries[packed[0]].file, f"tensor {packed[0]!r}, of which {CONFIG_FILE} says nothing")
    if packing is not None and not any(name.endswith(packing.suffix) for name in packed):
        found = f"quantization_config of {packing.method} in {CONFIG_FILE}, and no tensor {packing.suffix!r}"
        _refuse(root, found, "packed weights, or no such settings", "Download config.json and the weights again.")
    return entries


def _refuse_missing_weights(root: Path, config: _Json) -> NoReturn:
    present = sorted(name for name in os.listdir(root) if (root / name).is_file())
    needed = f"{SINGLE_FILE}, or {INDEX_FILE} and its shards"
    stray = [name for name in present if name.endswith(".safetensors")]
    pickled = [name for name in present if name.endswith((".bin", ".pt", ".pth")) and name != "training_args.bin"]
    gguf = [name for name in present if name.endswith(".gguf")]
    foreign = [name for name in present if name.endswith((".h5", ".msgpack", ".onnx", ".ckpt"))]
    if stray:
        do = f"Download the index if these are shards; rename a file that holds the whole model to {SINGLE_FILE}."
        _refuse(root, f"only {_listed(stray)}", needed, do)
    if pickled:
        architectures = config.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else None
        model_class = first if isinstance(first, str) and first.isidentifier() else "AutoModel"
        command = f"from transformers import {model_class} as M; M.from_pretrained('.').save_pretrained('.')"
        needed += ", because pickles can run code and cannot be mapped"
        do = f'If you trust the files, convert them once, inside the folder: python -c "{command}"'
        _refuse(root, f"only pickled weights ({_listed(pickled)})", needed, do, UnsupportedError)
    if gguf:
        _refuse_gguf(root / gguf[0])
    if foreign:
        do = "Download the PyTorch form of the model, with safetensors weights."
        _refuse(root, f"only {_listed(foreign)}", needed, do, UnsupportedError)
    _refuse(root, "no weights", needed, "Download the model again with all its files.")


def _read_shards(root: Path) -> _Entries:
    """Entries of every shard that the index names, the index deciding where two shards hold the same name."""
    index = root / INDEX_FILE
    weight_map = _read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        _refuse_damaged(index, "no usable weight_map", "a weight_map from tensor names to shard files")
    shards = sorted(set(weight_map.values()))
    for shard in shards:
        _check_shard_name(index, shard)
    missing = [shard for shard in shards if not (root / shard).exists()]
    if missing:
        found = f"{len(missing)} of {len(shards)} shards missing: {_listed(missing)}"
        _refuse(index, found, "every shard that the index names", "Download the missing files into the folder.")
    headers = {shard: _read_header(root / shard) for shard in shards}
    for name, shard in weight_map.items():
        if name not in headers[shard]:
            found = f"tensor {name!r} assigned to {shard}, which does not hold it"
            _refuse(index, found, "an index and shards of one model", "Download the index and that shard again.")
    entries: _Entries = {}
    for shard, header in headers.items():
        # A name that the index leaves out still counts, as it does for transformers.
        entries |= {name: entry for name, entry in header.items() if weight_map.get(name, shard) == shard}
    return entries


def _check_shard_name(index: Path, shard: str) -> None:
    """Keep an index from pointing outside its folder; links are fine, the hub's cache is made of them."""
    path = PurePosixPath(shard)
    if path.is_absolute() or ".." in path.parts or "\\" in shard or ":" in shard or "\0" in shard:
        found = f"shard {shard!r}, a path that can leave the folder"
        do = "Do not use this checkpoint unless you know where it comes from."
        _refuse(index, found, "shard names relative to the folder, without '..'", do)
    if path.suffix != ".safetensors":
        _refuse_damaged(index, f"shard {shard!r}", "shards whose names end in .safetensors")


def _read_header(file: Path) -> _Entries:
    """Read and check a safetensors header; the library's own messages say neither which file nor what to do."""
    header_bytes, data_start, file_bytes = _header_bytes(file)
    try:
        header = json.loads(header_bytes.decode("utf-8"))
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        _refuse_damaged(file, f"a header of {len(header_bytes):,} bytes that is not a JSON object", "safetensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse_damaged(file, "__metadata__ that does not map names to text", "a valid safetensors header")
    parsed = {name: _parse_entry(file, name, raw) for name, raw in header.items()}
    entries = sorted(parsed.items(), key=lambda item: (item[1].begin, item[1].end))
    cursor = 0
    for name, entry in entries:
        if entry.begin != cursor:
            found = f"tensor {name!r} at byte {entry.begin:,} of the data"
            _refuse_damaged(file, found, f"byte {cursor:,}, because tensors lie back to back")
        cursor = entry.end
    if file_bytes != data_start + cursor:
        _refuse_damaged(file, f"{file_bytes:,} bytes", f"{data_start + cursor:,} bytes, by its header")
    return dict(entries)


def _header_bytes(file: Path) -> tuple[bytes, int, int]:
    """The JSON header, the offset of the data behind it, and the size of the file."""
    file_bytes = _stat_file(file).st_size
    try:
        with file.open("rb") as stream:
            prefix = stream.read(8)
            length = int.from_bytes(prefix, "little")
            header = stream.read(length) if length <= MAX_HEADER_BYTES else b""
    except OSError as error:
        _refuse_unreadable(file, error)
    if prefix == b"version ":
        _refuse(file, "a Git LFS pointer", "the weights it stands for", "Run 'git lfs pull' there, or download it.")
    if len(prefix) < 8:
        _refuse_damaged(file, f"{len(prefix)} bytes", "at least the 8 of a safetensors header")
    if length > MAX_HEADER_BYTES:
        _refuse_damaged(file, f"a header length of {length:,} bytes", f"at most {MAX_HEADER_BYTES:,}")
    if len(header) < length:
        _refuse_damaged(file, f"{file_bytes:,} bytes", f"at least {8 + length:,} for its header")
    return header, 8 + length, file_bytes


def _parse_entry(file: Path, name: str, raw: object) -> _TensorEntry:
    fields = raw if isinstance(raw, dict) else {}
    code, shape, offsets = fields.get("dtype"), _sizes(fields.get("shape")), _sizes(fields.get("data_offsets"))
    if not isinstance(code, str) or shape is None or offsets is None or len(offsets) != 2:
        found = f"tensor {name!r} without a usable dtype, shape and data_offsets"
        _refuse_damaged(file, found, "a valid safetensors header")
    dtype = _DTYPES.get(code)
    if dtype is None:
        do = "Use the checkpoint in bf16, fp16 or fp32; one in other types is usually already quantised."
        _refuse(file, f"tensor {name!r} of type {code}", f"one of {', '.join(_DTYPES)}", do, UnsupportedError)
    begin, end = offsets
    nbytes = math.prod(shape) * dtype.itemsize
    # torch multiplies sizes in 64 bits even where a zero makes the tensor empty.
    is_too_large = math.prod(max(size, 1) for size in shape) * dtype.itemsize >= 2**63
    if end - begin != nbytes or is_too_large:
        found = f"tensor {name!r} {code} {list(shape)} in {end - begin:,} bytes"
        _refuse_damaged(file, found, f"{nbytes:,} bytes for that shape")
    return _TensorEntry(file, dtype, shape, begin, end)


def _sizes(value: object) -> tuple[int, ...] | None:
    """A list of sizes or offsets as a tuple; None if it is anything else (`type`, because `true` is an int, too)."""
    if isinstance(value, list) and all(type(item) is int and 0 <= item < 2**63 for item in value):
        return tuple(value)
    return None


def _map_file(file: Path) -> Any:
    """Map a file whose header passed our checks; the library maps CPU tensors and slices views out of the mapping."""
    try:
        return safe_open(file, framework="pt", device="cpu")
    except (SafetensorError, OSError, RuntimeError) as error:  # RuntimeError: torch could not map it
        found = f"a file that cannot be mapped ({str(error).partition(chr(10))[0]})"
        needed = "a valid safetensors file and room in the address space"
        _refuse(file, found, needed, "Download or copy it again, and check 'ulimit -v'.", cause=error)


def _file_blocks(file: Path) -> Iterator[memoryview]:
    """The content of a file, in blocks that are valid until the next one is asked for."""
    buffer = memoryview(bytearray(4 << 20))
    try:
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                yield buffer[:count]
    except OSError as error:
        _refuse_unreadable(file, error)


def _chunks(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Consecutive pieces of a contiguous tensor, flattened; views, none for an empty tensor."""
    flat = tensor.view(-1)
    for begin in range(0, flat.numel(), _SCAN_ELEMENTS):
        yield flat[begin : begin + _SCAN_ELEMENTS]
