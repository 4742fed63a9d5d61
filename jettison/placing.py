"""Place the weights of an artifact within some memory: what `jettison plan` predicts, carried out."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

from jettison.api import pipeline_text
from jettison.artifact_files import PROGRAM_FILE, WEIGHTS_FILE, ArtifactContents, save_artifact, temporary_executor
from jettison.ir.errors import OptionError, UnsupportedError
from jettison.ir.program import Program
from jettison.ir.serialize import load_program
from jettison.ir.text import program_text
from jettison.ir.tokenizer_files import tokenizer_files
from jettison.optimized_model import OptimizedModel
from jettison.passes.options import parse_bytes
from jettison.passes.place_weights import PlaceWeights
from jettison.report import Report
from jettison.runtime.artifact import Artifact, check_requirements
from jettison.runtime.machine import process_bytes
from jettison.runtime.tokenizer import load_tokenizer
from jettison.source import ModelSource


def place(
    folder: str | Path,
    host: int | str,
    *,
    disk: int | str | None = None,
    context: int | None = None,
    prompt: int = 512,
    batch: int = 1,
    reserve: int | None = None,
) -> OptimizedModel:
    """Say which weights of an artifact stay in memory; those that do not are streamed from the artifact that is saved.

    Args:
        folder: An artifact for the torch target whose weights are all in memory. It is not changed, and is read as long
            as the model is used.
        host: Most bytes of resident memory, the process included; also as text, such as `2GiB`.
        disk: Most bytes of streamed weights on disk, likewise; None for no limit.
        context: Tokens of a sequence that must fit; None for the model's context.
        prompt: Tokens that come at once.
        batch: Sequences at once.
        reserve: Bytes of a process without a model; None to measure them, which takes some seconds.

    Returns:
        The model, with `place-weights` as its last pass. `save_pretrained` writes the artifact that is streamed; until
        then streamed weights lie in a temporary file.

    Raises:
        ArtifactError: The folder is no artifact, or is damaged.
        OptionError: A size is out of range, it does not fit, or weights were placed before.
        UnsupportedError: An artifact for another target.
    """
    most_host, most_disk = (parse_bytes(size) if isinstance(size, str) else size for size in (host, disk))
    artifact = Artifact.open(folder)
    manifest = artifact.manifest
    check_requirements(manifest)
    target = str(manifest["target"])
    if target != "torch":
        raise UnsupportedError(
            f"[place] {folder}: found an artifact for target {target}; needed torch, whose weights can be laid out "
            "again. For onnx, run `jettison optimize` on the model that it was made from, with --passes "
            + shlex.quote(",".join(text for text in (manifest["pipeline"], "place-weights{host=SIZE}") if text))
            + "."
        )
    program = load_program(artifact.path(PROGRAM_FILE), artifact.path(WEIGHTS_FILE))
    if program.placement is not None and program.placement.tiers:
        raise OptionError(
            f"[place] {folder}: found an artifact whose weights were placed before; needed one that holds them all in "
            "memory. Place the artifact that it was made from."
        )
    program.target = target
    reserve = process_bytes() if reserve is None else reserve
    placing = PlaceWeights(host=most_host, disk=most_disk, context=context, prompt=prompt, batch=batch, reserve=reserve)
    record = placing.run(program)
    program.pipeline = ",".join(text for text in (program.pipeline, pipeline_text([placing])) if text)
    before = Report.from_dict(artifact.read_json("report.json"))
    report = replace(before, pipeline=program.pipeline, passes=[*before.passes, record])
    before_text, seed = artifact.path("graph/before.txt").read_text(), int(manifest["seed"])
    contents = ArtifactContents(_source(artifact, program), program, report, before_text, program_text(program), seed)
    return OptimizedModel(
        program.info,
        report,
        contents.graph_before,
        contents.graph_after,
        open_executor=lambda: temporary_executor(contents),
        save=lambda out, overwrite: save_artifact(contents, out, overwrite=overwrite),
        tokenizer=lambda: load_tokenizer(Path(folder)),
        generation_config=contents.source.generation_config,
    )


def _source(artifact: Artifact, program: Program) -> ModelSource:
    """What an artifact says of the model that it was made from, and the files that go along."""
    manifest, folder = artifact.manifest, artifact.folder
    config, generation_config = (
        artifact.read_json(name) if name in manifest["files"] else {}
        for name in ("config.json", "generation_config.json")
    )
    return ModelSource(
        manifest["source"]["name"], program, config, generation_config,
        tokenizer_files=[(path, path.relative_to(folder)) for path in tokenizer_files(folder)],
        content_hash=manifest["source"]["sha256"], calibration_sha256=manifest["calibration"],
    )  # fmt: skip
