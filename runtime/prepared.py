"""Weights packed for this machine's kernels, once: later loads map them instead of packing them again.

ONNX Runtime copies every quantised weight into the order its kernels read. That takes time at each start, and as much
anonymous memory as the weights have bytes. Prepared, the packed form lies in a file of the cache folder: loading maps
it, and the system may drop its pages and read them again.

An entry of the cache belongs to one artifact (by the hashes of its graphs and weights), one version of ONNX Runtime and
one kind of CPU; no other is used.
Its file holds both forms, because ONNX Runtime packs the plain one again, a weight at a time, to see that the packed
one is the same (with the plain one left out it keeps its own packing, made of nothing).
"""

from __future__ import annotations

import hashlib
import json
import platform
import secrets
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from jettison.ir.errors import ArtifactError, UnsupportedError
from jettison.runtime.artifact import Artifact
from jettison.runtime.cache_folder import cache_folder


@dataclass(frozen=True)
class KnownFile:
    """What a file of weights was when it was written.

    Attributes:
        size: Bytes.
        sha256: Of its contents.
    """

    size: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> KnownFile:
        """Of a file as it is now."""
        with path.open("rb") as file:
            return cls(path.stat().st_size, hashlib.file_digest(file, "sha256").hexdigest())


_LISTING = "prepared.json"
# Packed and plain form, with sums and padding between them: 2.25 times the weights was seen for int4 in groups of 128.
_BYTES_PER_WEIGHT_BYTE = 2.5
# ONNX Runtime 1.31 writes the packed weights of this operator, and crashes when it runs on what it reads back.
_UNPREPARABLE = "QMoE"


def prepared_folder(artifact: Artifact) -> Path:
    """Where the prepared form of an artifact is on this machine, be it there or not."""
    import onnxruntime

    files = artifact.manifest["files"]
    parts = {name: files[name]["sha256"] for name in sorted(files) if ".onnx" in name}
    identity = json.dumps([parts, onnxruntime.__version__, _cpu()])
    return cache_folder() / "prepared" / hashlib.sha256(identity.encode()).hexdigest()[:24]


def _cpu() -> list[str]:
    """What decides which kernels, and so which packed form, ONNX Runtime takes."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return [platform.machine(), " ".join(sorted(flags.partition(":")[2].split()))]


def find_prepared(artifact: Artifact, folder: Path | None = None) -> dict[str, Path]:
    """The prepared graphs of an artifact, by the names of its own.

    Args:
        artifact: Of the ONNX target.
        folder: Where they are, if not where every load finds them.

    Returns:
        Empty if there are none, or if a file of them does not have the size it was written with: a mapping that is
        shorter than it should be ends the process.
    """
    folder = folder or prepared_folder(artifact)
    try:
        listed = known_files(folder)
        if any(path.stat().st_size != each.size for path, each in listed.items()):
            return {}
    except (OSError, ValueError, AttributeError, TypeError):
        return {}
    return {path.name: path for path in listed if path.suffix == ".onnx"}


def known_files(folder: Path) -> dict[Path, KnownFile]:
    """What the files of a prepared form were when they were written, by path."""
    listed = json.loads((folder / _LISTING).read_text())
    return {folder / name: KnownFile(**each) for name, each in listed.items()}


def prepare(
    artifact: Artifact,
    graphs: Sequence[str],
    advance: Callable[[float], None] = lambda _: None,
    folder: Path | None = None,
) -> Path:
    """Write the prepared form of an artifact, whole or not at all; one that is there is replaced.

    Args:
        artifact: Of the ONNX target.
        graphs: Names of its graphs.
        advance: Called with 1 after each graph.
        folder: Where to, if it is not to be found by other loads.

    Returns:
        Its folder.

    Raises:
        ArtifactError: The cache cannot be written, or has no space.
        UnsupportedError: The artifact has quantised experts.
    """
    # The name of an operator stands in the file as it is; weights are in another.
    if any(_UNPREPARABLE.encode() in artifact.path(name).read_bytes() for name in graphs):
        raise UnsupportedError(
            f"[prepare] {artifact.path(graphs[0]).parent}: it has quantised experts ({_UNPREPARABLE}), and ONNX "
            "Runtime crashes on their prepared form. Run the artifact as it is: it is packed at every start."
        )
    folder = folder or prepared_folder(artifact)
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")
    needed = int(_BYTES_PER_WEIGHT_BYTE * sum(_weight_bytes(artifact, name) for name in graphs))
    try:
        aside.mkdir(parents=True)
        free = shutil.disk_usage(aside).free
        if free < needed:
            raise ArtifactError(
                f"[prepare] {cache_folder()}: {free / 1e6:,.0f} MB are free, about {needed / 1e6:,.0f} MB are needed. "
                "Free some space there, or set JETTISON_CACHE to a folder on another disk."
            )
        for name in graphs:
            _save_packed(artifact.path(name), aside / name)
            advance(1)
        listed = {path.name: asdict(KnownFile.of(path)) for path in sorted(aside.iterdir())}
        (aside / _LISTING).write_text(json.dumps(listed))
        shutil.rmtree(folder, ignore_errors=True)
        aside.rename(folder)
    except OSError as error:
        raise ArtifactError(
            f"[prepare] {cache_folder()}: cannot be written: {error.strerror or error}. Set JETTISON_CACHE to a folder "
            "that can."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return folder


def _weight_bytes(artifact: Artifact, graph: str) -> int:
    """Bytes of the weight file of a graph: its own if it is a segment, else that of all graphs."""
    own = f"{graph}.data"
    return artifact.path(own if own in artifact.manifest["files"] else "model.onnx.data").stat().st_size


def remove_prepared(artifact: Artifact) -> bool:
    """Delete the prepared form of an artifact for this machine; returns whether there was one."""
    folder = prepared_folder(artifact)
    is_there = folder.is_dir()
    shutil.rmtree(folder, ignore_errors=True)
    return is_there


def _save_packed(source: Path, destination: Path) -> None:
    """Let ONNX Runtime optimise and pack a graph as it would to run it, and write the result."""
    from jettison.runtime.onnx_executor import open_session, session_options

    options = session_options(None, allow_spinning=False)
    options.optimized_model_filepath = str(destination)
    for key, value in {
        "session.save_external_prepacked_constant_initializers": "1",
        "session.optimized_model_external_initializers_file_name": f"{destination.name}.data",
        # Small tensors stay in the graph.
        "session.optimized_model_external_initializers_min_size_in_bytes": "1024",
    }.items():
        options.add_session_config_entry(key, value)
    open_session(source, options)
