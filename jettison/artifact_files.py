"""An optimised model to an artifact folder and back."""

from __future__ import annotations

import tempfile
import weakref
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from jettison.codegen.onnx.emit import EmittedGraph, emit_program, weight_bytes
from jettison.codegen.triton.emit import EmittedProgram, emit
from jettison.ir.errors import ArtifactError
from jettison.ir.program import ModelInfo, Program, Retention, State, Storage
from jettison.ir.progress import track
from jettison.ir.serialize import load_program, save_program
from jettison.ir.text import dtype_text
from jettison.kernel_files import kernels_executor, write_kernels
from jettison.optimized_model import OptimizedModel
from jettison.report import Report
from jettison.runtime.artifact import Artifact, ArtifactWriter, check_requirements, library_versions
from jettison.runtime.device_store import (
    DeviceStore,
    device_table_as_dict,
    device_table_from_dict,
    write_device_store,
)
from jettison.runtime.executor import Executor
from jettison.runtime.onnx_executor import OnnxExecutor, OnnxGraph, multiplies_int8
from jettison.runtime.prepared import find_prepared
from jettison.runtime.streamed_reads import constants_on_disk, streamed_reads
from jettison.runtime.streamed_weight import WeightStore
from jettison.runtime.tokenizer import load_tokenizer
from jettison.runtime.torch_executor import TorchExecutor
from jettison.runtime.triton_executor import TritonExecutor
from jettison.runtime.weight_store import table_as_dict, table_from_dict, write_store
from jettison.segment_files import open_segments, segments_dict
from jettison.source import ModelSource

DATA_FILE = "model.onnx.data"
SCORES_FILE = "scores.onnx"
PROGRAM_FILE = "program.json"
WEIGHTS_FILE = "weights.safetensors"
STREAM_FILE = "weights.stream"
STREAM_TABLE_FILE = "stream.json"


@dataclass
class ArtifactContents:
    """Everything an artifact is written from.

    `emitted` are its ONNX graphs in the temporary folder of its executor, which may be gone.
    """

    source: ModelSource
    program: Program
    report: Report
    graph_before: str
    graph_after: str
    seed: int
    archs: tuple[str, ...] = ()
    tune: bool = False
    emitted: list[EmittedGraph] = field(default_factory=list)


def save_artifact(contents: ArtifactContents, out: Path, *, overwrite: bool = False) -> None:
    """Write an artifact folder, whole or not at all.

    Args:
        contents: What to write.
        out: Destination.
        overwrite: Replace an artifact that is there.

    Raises:
        OptionError: `out` exists.
        ArtifactError: It cannot be written.
    """
    source, program = contents.source, contents.program
    with ArtifactWriter(out, overwrite=overwrite) as writer:
        manifest = _manifest(contents)
        if contents.report.target == "onnx":
            _write_onnx(contents, writer, manifest)
        else:
            emitted = emit(program) if contents.report.target == "triton" else None
            _write_program(program, emitted, writer)
            manifest["weight_bytes"] = program.weight_bytes()
            if emitted is not None:
                manifest |= write_kernels(program, emitted, writer, contents.archs, contents.tune)
        contents.report.weight_bytes = manifest["weight_bytes"]
        writer.write_text("graph/before.txt", contents.graph_before)
        writer.write_text("graph/after.txt", contents.graph_after)
        if source.config:
            writer.write_json("config.json", source.config)
        if source.generation_config:
            writer.write_json("generation_config.json", source.generation_config)
        for path, relative in source.tokenizer_files:
            writer.copy(path, relative)
        report = contents.report.as_dict()
        del report["seconds"]  # the artifact holds nothing that differs from run to run
        for record in report["passes"]:
            record["seconds"] = 0.0
        writer.write_json("report.json", {**report, "seconds": 0.0})
        writer.finish(manifest)


def _write_program(program: Program, emitted: EmittedProgram | None, writer: ArtifactWriter) -> None:
    """Write graphs and weights; those that are streamed to the weight store alone (of a GPU, if `emitted`)."""
    streamed = constants_on_disk(program)
    reads = streamed_reads(program) if emitted is None else []
    # A packed table of which rows are looked up lies there twice, as its kernel reads it and row by row.
    twice = {name for read in reads if read.is_table and read.is_multiplied and read.packed for name in read.constants}
    total = program.weight_bytes() + sum(program.constants[name].stored_bytes for name in twice)
    writer.require_space(total)
    with track("write weights", total) as advance:
        save_program(program, writer.path(PROGRAM_FILE), writer.path(WEIGHTS_FILE), on_bytes=advance, without=streamed)
        if not streamed:
            return
        with writer.path(STREAM_FILE).open("wb") as file:
            table = (
                table_as_dict(write_store(program, file, advance))
                if emitted is None else device_table_as_dict(write_device_store(program, emitted, file, advance))
            )  # fmt: skip
        writer.write_json(STREAM_TABLE_FILE, table)


def _manifest(contents: ArtifactContents) -> dict[str, Any]:
    source, program = contents.source, contents.program
    return {
        "target": contents.report.target,
        "pipeline": program.pipeline,
        "source": {"name": source.name, "sha256": source.content_hash},
        "libraries": library_versions(),
        "calibration": source.calibration_sha256,
        "seed": contents.seed,
        "model": asdict(program.info),
        "states": [
            {"name": state.name, "shape": list(state.shape), "dtype": dtype_text(state.dtype)}
            for state in program.states.values()
        ],
        "retentions": [asdict(kept) for kept in program.retentions.values()],
        "storages": [asdict(storage) for storage in program.storages.values()],
        "requires": {},
    }


def _write_onnx(contents: ArtifactContents, writer: ArtifactWriter, manifest: dict[str, Any]) -> None:
    """Emit the graphs, or copy them: exporting takes longer than reading them."""
    program = contents.program
    total = weight_bytes(program)
    everything = total + contents.report.prefill_bytes
    writer.require_space(everything)
    with track("write weights", everything) as advance:
        if contents.emitted and contents.emitted[0].path.exists():
            folder = contents.emitted[0].path.parent
            for name in (*(graph.path.name for graph in contents.emitted), DATA_FILE):
                writer.copy(folder / name)
            advance(everything)
            emitted = contents.emitted
        else:
            emitted = emit_program(program, writer.folder, prefill=contents.report.prefill, on_bytes=advance)
            contents.emitted = emitted
    manifest["graphs"] = [_graph_dict(graph) for graph in emitted if not graph.segments]
    if len(manifest["graphs"]) < len(emitted):
        manifest |= segments_dict([graph for graph in emitted if graph.segments], program)
    manifest["requires"] = {"onnxruntime": max((g.minimum_ort for g in emitted), key=_version)}
    manifest["weight_bytes"] = total
    if len(emitted[0].entries) == 2 and not program.retentions and not emitted[0].segments:
        from jettison.codegen.onnx.genai_config import genai_config
        from jettison.codegen.onnx.scoring_graph import write_scoring_graph

        described = genai_config(contents.source.config, contents.source.generation_config, program)
        if described is not None:
            writer.write_json("genai_config.json", described)
            write_scoring_graph(writer.folder / emitted[0].path.name, writer.path(SCORES_FILE))


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split("."))


def _graph_dict(graph: EmittedGraph) -> dict[str, Any]:
    return {
        "file": graph.path.name,
        "entries": list(graph.entries),
        "inputs": [name for name in graph.inputs if name not in graph.states],
        "outputs": [name for name in graph.outputs if name not in {out for _, out in graph.states.values()}],
        "states": {name: list(pair) for name, pair in graph.states.items()},
        "is_fast": graph.is_fast,
        "is_mapped": graph.is_mapped,
    }


def temporary_executor(contents: ArtifactContents, *, allow_spinning: bool = True) -> Executor:
    """Run a model that was not saved: an ONNX target is written to a temporary folder that lives as long as it does."""
    if contents.report.target == "torch":
        return TorchExecutor(contents.program)
    if contents.report.target == "triton":
        return TritonExecutor(contents.program)
    folder = tempfile.TemporaryDirectory(prefix="jettison-")
    path = Path(folder.name) / "artifact"
    save_artifact(contents, path)
    contents.emitted = [replace(graph, path=path / graph.path.name) for graph in contents.emitted]
    executor = _onnx_executor(Artifact.open(path), None, allow_spinning, path.with_name("prepared"))
    weakref.finalize(executor, folder.cleanup)
    return executor


_DTYPES = {dtype_text(dtype): dtype for dtype in (torch.float32, torch.float16, torch.int64, torch.int32, torch.int8,
                                                 torch.uint8, torch.bool, torch.bfloat16)}  # fmt: skip


def _onnx_executor(
    artifact: Artifact, threads: int | None, allow_spinning: bool, prepared: Path | None = None
) -> Executor:
    """Open the graphs of an artifact; `prepared` is where packed weights go, if not to the user's cache."""
    manifest = artifact.manifest
    states = {
        entry["name"]: State(entry["name"], tuple(entry["shape"]), _DTYPES[entry["dtype"]])
        for entry in manifest["states"]
    }
    graphs = [
        OnnxGraph(
            artifact.path(graph["file"]), tuple(graph["entries"]), tuple(graph["inputs"]), tuple(graph["outputs"]),
            {name: (past, present) for name, (past, present) in graph["states"].items()}, graph.get("is_mapped", False),
        )
        for graph in manifest["graphs"]
        if not graph.get("is_fast") or multiplies_int8()
    ]  # fmt: skip
    artifact.path(DATA_FILE)  # listed and inside the folder
    moved: dict[str, Any] = {
        "retentions": [
            Retention(**{**each, "layers": tuple(each["layers"])}) for each in manifest.get("retentions", [])
        ],
        "storages": [Storage(**each) for each in manifest.get("storages", [])],
    }
    if "chains" in manifest:
        return open_segments(artifact, graphs, states, threads, prepared, moved)
    return OnnxExecutor(
        graphs, ModelInfo(**manifest["model"]), states, manifest["weight_bytes"], threads=threads,
        allow_spinning=allow_spinning, prepared=find_prepared(artifact),
        **moved,
    )  # fmt: skip


def _store(artifact: Artifact) -> WeightStore:
    path = artifact.path(STREAM_FILE)
    return WeightStore(table_from_dict(artifact.read_json(STREAM_TABLE_FILE), path), path)


def _device_store(artifact: Artifact) -> DeviceStore:
    path = artifact.path(STREAM_FILE)
    return DeviceStore(device_table_from_dict(artifact.read_json(STREAM_TABLE_FILE), path), path)


def load_artifact(
    folder: Path,
    *,
    verify: bool = False,
    threads: int | None = None,
    allow_spinning: bool = True,
    trust_kernels: bool = False,
) -> OptimizedModel:
    """Open an artifact folder; see `jettison.load`."""
    artifact = Artifact.open(folder, verify=verify)
    manifest = artifact.manifest
    check_requirements(manifest)
    try:
        info = ModelInfo(**manifest["model"])
        report = Report.from_dict(artifact.read_json("report.json"))
        target = manifest["target"]
    except (KeyError, TypeError) as error:
        raise ArtifactError(
            f"[load] {folder}: jettison.json or report.json does not say what it must: {error!r}. Write the artifact "
            "again with `jettison optimize`."
        ) from error

    def open_executor() -> Executor:
        if target == "triton":
            program = load_program(artifact.path(PROGRAM_FILE), artifact.path(WEIGHTS_FILE))
            store = _device_store(artifact) if constants_on_disk(program) else None
            return kernels_executor(artifact, program, trust_kernels, store)
        if target == "torch":
            program = load_program(artifact.path(PROGRAM_FILE), artifact.path(WEIGHTS_FILE), metadata=False)
            if threads is not None:
                torch.set_num_threads(threads)
            return TorchExecutor(program, store=_store(artifact) if constants_on_disk(program) else None)
        return _onnx_executor(artifact, threads, allow_spinning)

    def save(out: Path, overwrite: bool) -> None:
        with ArtifactWriter(out, overwrite=overwrite) as writer:
            for name in manifest["files"]:
                writer.copy(artifact.path(name), name)
            kept = {key: value for key, value in manifest.items() if key not in ("files", "manifest_sha256")}
            writer.finish(kept)

    has_generation_config = "generation_config.json" in manifest["files"]
    return OptimizedModel(
        info,
        report,
        artifact.path("graph/before.txt").read_text(),
        artifact.path("graph/after.txt").read_text(),
        open_executor=open_executor,
        save=save,
        tokenizer=lambda: load_tokenizer(folder),
        generation_config=artifact.read_json("generation_config.json") if has_generation_config else {},
        folder=folder,
    )
