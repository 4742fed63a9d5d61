"""Chains of segments in the manifest of an artifact: what is written, checked and opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from jettison.codegen.onnx.emit import EmittedGraph
from jettison.codegen.onnx.segments import Segment
from jettison.ir.errors import ArtifactError
from jettison.ir.placement import Placement
from jettison.ir.program import ModelInfo, Program, State
from jettison.ir.progress import track
from jettison.runtime.artifact import Artifact
from jettison.runtime.onnx_executor import OnnxGraph
from jettison.runtime.prepared import KnownFile, find_prepared, known_files, prepare, prepared_folder
from jettison.runtime.segmented_onnx import OnnxChain, SegmentedOnnxExecutor

_PLANNED = ("batch", "context", "prompt")


def segments_dict(cut: Sequence[EmittedGraph], program: Program) -> dict[str, Any]:
    """What the manifest says about graphs that were cut."""
    assert program.placement is not None, "or nothing would have been cut"
    chains = [
        {
            "entries": list(graph.entries),
            "inputs": [name for name in graph.inputs if name not in graph.states],
            "outputs": [name for name in graph.outputs if name not in {out for _, out in graph.states.values()}],
            "states": {name: list(pair) for name, pair in graph.states.items()},
            "segments": [asdict(segment) for segment in graph.segments],
        }
        for graph in cut
    ]
    placement = program.placement
    planned = {"limits": placement.limits, **{key: getattr(placement, key) for key in _PLANNED}}
    return {"chains": chains, "ring_bytes": placement.ring_bytes, "planned": planned}


def packed_segments(artifact: Artifact) -> list[str]:
    """Graphs of an artifact that have to be prepared, because they read packed weights from disk."""
    return [
        segment.file
        for chain in _chains(artifact)
        for segment in chain.segments
        if segment.is_packed and segment.is_streamed
    ]


def open_segments(
    artifact: Artifact,
    graphs: Sequence[OnnxGraph],
    states: Mapping[str, State],
    threads: int | None,
    prepared: Path | None,
    moved: Mapping[str, Any],
) -> SegmentedOnnxExecutor:
    """Open an artifact whose graphs were cut.

    Args:
        artifact: The artifact.
        graphs: Those of it that were not cut.
        states: Its states.
        threads: See `OnnxExecutor`.
        prepared: Where packed weights are, or are written; None for the user's cache.
        moved: `retentions` and `storages` of the executor.

    Raises:
        ArtifactError: The manifest does not say what it must, or a file is damaged.
    """
    chains, packed = _chains(artifact), packed_segments(artifact)
    folder = prepared or prepared_folder(artifact)
    found = find_prepared(artifact, folder)
    if not set(packed) <= set(found):
        with track("pack weights", len(packed)) as advance:
            prepare(artifact, packed, advance, folder)
        found = find_prepared(artifact, folder)
    listed = artifact.manifest["files"]
    files = {artifact.folder / name: KnownFile(each["bytes"], each["sha256"]) for name, each in listed.items()}
    ring_bytes = artifact.manifest.get("ring_bytes")
    if not isinstance(ring_bytes, int) or ring_bytes < 0:
        raise _damaged(artifact, f"ring_bytes is {ring_bytes!r}, needed a size")
    return SegmentedOnnxExecutor(
        chains, graphs, ModelInfo(**artifact.manifest["model"]), states, artifact.manifest["weight_bytes"],
        ring_bytes=ring_bytes, files={**files, **(known_files(folder) if packed else {})},
        prepared={name: path for name, path in found.items() if name in packed}, threads=threads,
        placement=_planned(artifact, ring_bytes), **moved,
    )  # fmt: skip


def _planned(artifact: Artifact, ring_bytes: int) -> Placement:
    """What the memory has room for; which weights are streamed is in the chains."""
    planned = artifact.manifest.get("planned", {})
    try:
        limits = {_text(tier): _size(bytes_) for tier, bytes_ in planned.get("limits", {}).items()}
        batch, context, prompt = (_size(planned.get(key, 0)) for key in _PLANNED)
        return Placement({}, limits, ring_bytes, batch=batch, context=context, prompt=prompt)
    except (TypeError, ValueError, AttributeError) as error:
        raise _damaged(artifact, f"planned is not described as it must be: {error!r}") from error


def _size(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is no size")
    return value


def _damaged(artifact: Artifact, found: str) -> ArtifactError:
    return ArtifactError(
        f"[load] {artifact.folder}: jettison.json: {found}. Write the artifact again with `jettison optimize`."
    )


def _chains(artifact: Artifact) -> list[OnnxChain]:
    """The chains of a manifest, checked: every value that a segment reads is made before it, and all files exist."""
    try:
        chains = [_chain(artifact, each) for each in artifact.manifest["chains"]]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(artifact, f"chains are not described as they must be: {error!r}") from error
    for chain in chains:
        known = {*chain.inputs, *(past for past, _ in chain.states.values())}
        for segment in chain.segments:
            artifact.path(segment.file)
            if not set(segment.inputs) <= known:
                missing = ", ".join(sorted(set(segment.inputs) - known))
                raise _damaged(artifact, f"{segment.file} reads {missing}, which nothing before it makes")
            known |= set(segment.outputs)
        ends = {*chain.outputs, *(present for _, present in chain.states.values() if present is not None)}
        if not ends <= known:
            raise _damaged(artifact, f"no segment makes {', '.join(sorted(ends - known))}")
    return chains


def _chain(artifact: Artifact, described: Mapping[str, Any]) -> OnnxChain:
    entries, inputs, outputs = (tuple(map(_text, described[key])) for key in ("entries", "inputs", "outputs"))
    states = {_text(name): (_text(past), present) for name, (past, present) in described["states"].items()}
    if any(present is not None and not isinstance(present, str) for _, present in states.values()):
        raise ValueError("states are pairs of names")
    return OnnxChain(artifact.folder, entries, inputs, outputs, states, tuple(map(_segment, described["segments"])))


def _segment(described: Mapping[str, Any]) -> Segment:
    given = {each.name: described[each.name] for each in fields(Segment)}
    for key in ("inputs", "outputs"):
        given[key] = tuple(map(_text, given[key]))
    if not isinstance(given["is_streamed"], bool) or not isinstance(given["is_packed"], bool):
        raise ValueError("is_streamed and is_packed are true or false")
    return Segment(**{**given, "file": _text(given["file"])})


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no name")
    return value
