"""Kernels in an artifact folder: sources to read, machine code where it was asked for, and what they stand for."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jettison.codegen.triton.ahead_of_time import compile_ahead
from jettison.codegen.triton.emit import FOLDER, EmittedProgram, emit, fallbacks, plan_text
from jettison.codegen.triton.kernels.base import Tuning
from jettison.codegen.triton.machine_code import StoredKernel, architecture, restore
from jettison.codegen.triton.source import source_hash
from jettison.ir.errors import ArtifactError, KernelsNotUsed
from jettison.ir.program import Program
from jettison.ir.progress import track
from jettison.runtime.artifact import Artifact, ArtifactWriter
from jettison.runtime.device_store import DeviceStore
from jettison.runtime.triton_executor import TritonExecutor
from jettison.runtime.tunings import cached_tunings, keep, known_tunings, measure, stopwatch

PLAN_FILE = "graph/launches.txt"
TUNINGS_FILE = f"{FOLDER}/tunings.json"


def write_kernels(
    program: Program, emitted: EmittedProgram, writer: ArtifactWriter, archs: Sequence[str], tune: bool
) -> dict[str, Any]:
    """Write the sources, the plan of launches, tunings and the machine code.

    Args:
        program: What was optimised.
        emitted: What `emit` made of it.
        writer: Of its artifact.
        archs: GPUs to compile for, none to leave that to the first run.
        tune: Whether to measure which tile sizes are fastest on the GPU here.

    Returns:
        What the manifest says of them.

    Raises:
        CodegenError: A kernel does not compile.
        UnsupportedError: `tune`, and there is no GPU.
    """
    tunings: dict[str, Tuning] = {}
    if tune:
        document = measure(TritonExecutor(program, emitted=emitted), stopwatch())
        keep(document)
        writer.write_text(TUNINGS_FILE, json.dumps(document, indent=1) + "\n")
        tunings = known_tunings(document)
    for file, text in emitted.sources().items():
        writer.write_text(file, text)
    writer.write_text(PLAN_FILE, plan_text(program, emitted))
    kernels = [
        (each.kernel, tunings.get(each.kernel.name, each.kernel.tunings()[0])) for each in emitted.kernels.values()
    ]
    listed: list[dict[str, Any]] = []
    with track("compile kernels", len(kernels) * len(archs)) as advance:
        for compiled in compile_ahead(kernels, archs):
            writer.path(f"{FOLDER}/{compiled.arch}/{compiled.name}.cubin").write_bytes(compiled.cubin)
            writer.write_text(f"{FOLDER}/{compiled.arch}/{compiled.name}.json", compiled.metadata)
            listed.append(compiled.as_dict())
            advance(1)
    unknown = {"arch": None, "registers": None, "shared_bytes": None, "spill_bytes": None}
    return {
        "kernels": listed or [{"name": name, **unknown} for name in emitted.kernels],
        "run_by_torch": {entry: fallbacks(emitted, entry) for entry in emitted.steps},
    }


def kernels_executor(
    artifact: Artifact, program: Program, trust_kernels: bool, store: DeviceStore | None
) -> TritonExecutor:
    """What runs an artifact. Sources are made anew and must be those that are stored.

    Args:
        artifact: The folder.
        program: That it holds, with metadata.
        trust_kernels: Whether the machine code in it may run; else no file of it is executed.
        store: With its weights on disk.

    Raises:
        ArtifactError: A stored source is another one.
    """
    emitted = emit(program)
    stored = [name for name in artifact.manifest["files"] if name.startswith(f"{FOLDER}/") and name.endswith(".py")]
    made = emitted.hashes()
    wrong = [
        name for name in {*stored, *made}
        if name not in stored or source_hash(artifact.path(name).read_text()) != made.get(name)
    ]  # fmt: skip
    if wrong:
        raise ArtifactError(
            f"[load] {min(wrong)}: the artifact holds another kernel than this version of jettison writes for its "
            "program, so what you reviewed is not what would run. Write it again with `jettison optimize`."
        )
    stored_tunings = None
    if TUNINGS_FILE in artifact.manifest["files"]:
        stored_tunings = artifact.read_json(TUNINGS_FILE)
    if trust_kernels:
        reason = _restore(artifact)
        if reason is not None:
            warnings.warn(f"the stored machine code is not used: {reason}; kernels are compiled", KernelsNotUsed, 2)
    tunings = known_tunings(stored_tunings, cached_tunings())
    return TritonExecutor(program, emitted=emitted, tunings=tunings, store=store)


def _restore(artifact: Artifact) -> str | None:
    """Hand Triton the machine code for the GPU that is here; why not, if not."""
    arch, suffix = architecture(), ".cubin"
    if arch is None:
        return "there is no GPU"
    names = [
        name[: -len(suffix)] for name in artifact.manifest["files"]
        if name.startswith(f"{FOLDER}/{arch}/") and name.endswith(suffix)
    ]  # fmt: skip
    if not names:
        return f"there is none for {arch} in it"
    return restore(
        StoredKernel(Path(name).name, artifact.path(f"{name}{suffix}"), artifact.path(f"{name}.json")) for name in names
    )
