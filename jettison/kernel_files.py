"""Kernels in an artifact folder: sources to read, machine code where it was asked for, and what they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jettison.codegen.triton.ahead_of_time import compile_ahead
from jettison.codegen.triton.emit import FOLDER, emit, fallbacks, plan_text
from jettison.codegen.triton.source import source_hash
from jettison.ir.errors import ArtifactError
from jettison.ir.program import Program
from jettison.ir.progress import track
from jettison.runtime.artifact import Artifact, ArtifactWriter
from jettison.runtime.triton_executor import TritonExecutor

PLAN_FILE = "graph/launches.txt"


def write_kernels(program: Program, writer: ArtifactWriter, archs: Sequence[str]) -> dict[str, Any]:
    """Write the sources, the plan of launches and the machine code.

    Args:
        program: What was optimised.
        writer: Of its artifact.
        archs: GPUs to compile for, none to leave that to the first run.

    Returns:
        What the manifest says of them.

    Raises:
        CodegenError: A kernel does not compile.
    """
    emitted = emit(program)
    for file, text in emitted.sources().items():
        writer.write_text(file, text)
    writer.write_text(PLAN_FILE, plan_text(program, emitted))
    kernels = [(each.kernel, each.kernel.tunings()[0]) for each in emitted.kernels.values()]
    listed: list[dict[str, Any]] = []
    with track("compile kernels", len(kernels) * len(archs)) as advance:
        for compiled in compile_ahead(kernels, archs):
            writer.path(f"{FOLDER}/{compiled.arch}/{compiled.name}.cubin").write_bytes(compiled.cubin)
            listed.append(compiled.as_dict())
            advance(1)
    unknown = {"arch": None, "registers": None, "shared_bytes": None, "spill_bytes": None}
    return {
        "kernels": listed or [{"name": name, **unknown} for name in emitted.kernels],
        "run_by_torch": {entry: fallbacks(emitted, entry) for entry in emitted.steps},
    }


def kernels_executor(artifact: Artifact, program: Program) -> TritonExecutor:
    """What runs an artifact. No file of it is executed: sources are made anew and must be those that are stored.

    Args:
        artifact: The folder.
        program: That it holds, with metadata.

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
    return TritonExecutor(program, emitted=emitted)
