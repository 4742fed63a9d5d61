"""Runs an ONNX artifact whose weights are larger than memory: a session per segment, weights read ahead and dropped.

Weights that kernels read as they are stored are mapped as they are; packed ones are mapped from the prepared form of
the segment (`prepared.py`), which is written when the artifact is opened first. A thread reads what comes next while a
segment runs (`read_ahead.py`), and what has run is dropped, so that streamed weights never take more than the ring.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from jettison.codegen.onnx.segments import GATHERS, PINNED_FILE, Segment
from jettison.ir.allocator import give_back
from jettison.ir.errors import ArtifactError, OptionError
from jettison.ir.placement import Placement
from jettison.ir.program import ModelInfo, Retention, State, Storage
from jettison.runtime.executor import CPU, EntrySignature
from jettison.runtime.mapped_weights import WRITE_AGAIN, MappedFile, Piece, added
from jettison.runtime.onnx_executor import (
    NUMPY_DTYPES,
    OnnxExecutor,
    OnnxGraph,
    bind_input,
    first_line,
    open_session,
    session_options,
)
from jettison.runtime.prepared import KnownFile
from jettison.runtime.read_ahead import ReadAhead, ReadStatistics

_PREPARE_AGAIN = "Run `jettison prepare` on the artifact: it writes its packed weights again."


@dataclass(frozen=True)
class OnnxChain:
    """A graph of an artifact that was cut into segments.

    Attributes:
        folder: Where its files are.
        entries: Entries it serves.
        inputs: Names of run-time inputs, states not included.
        outputs: Names of outputs, new states not included.
        states: State name to (input name, output name); no output for a state that is only read.
        segments: In the order in which they run.
    """

    folder: Path
    entries: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    states: Mapping[str, tuple[str, str | None]]
    segments: tuple[Segment, ...]


class _OpenSegment:
    """A segment with its session.

    Args:
        chain: What it belongs to.
        segment: Which.
        path: Of the graph to load, its own or the prepared one.
        known: Every file of weights that it may map, by path.
        read: Those of them whose contents were checked; what it checks is added.
        threads: See `SegmentedOnnxExecutor`.

    Attributes:
        pieces: What is read before it runs, in order.
        on_demand: What its kernels read some pages of, and is dropped with the others.
        over: Values that nobody reads after it.
    """

    def __init__(
        self,
        chain: OnnxChain,
        segment: Segment,
        path: Path,
        known: Mapping[Path, KnownFile],
        read: set[Path],
        threads: int | None,
    ) -> None:
        import onnxruntime

        self.segment, self.path, own = segment, path, chain.folder / segment.file
        self.inputs, self.outputs = segment.inputs, segment.outputs
        self.over: tuple[str, ...] = ()
        options = session_options(threads, allow_spinning=False)
        # Every session would keep what its largest run needed.
        options.enable_cpu_mem_arena = options.enable_mem_pattern = False
        if path != own:  # optimised when it was prepared
            options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        elif segment.is_streamed:
            options.add_session_config_entry("session.disable_prepacking", "1")
        ranges = _streamed_ranges(own, path) if segment.is_streamed else {}
        self._files: list[MappedFile] = []
        for each in ranges:
            if each not in known:
                raise ArtifactError(f"[onnx] {path}: names weights in {each.name}, which is not part of the artifact.")
            self._files.append(MappedFile(each, known[each].size, WRITE_AGAIN if path == own else _PREPARE_AGAIN))
            if each not in read:
                self._files[-1].check_contents(known[each].sha256)
                read.add(each)
        # Another session may have mapped a part of the same file: a table, and slabs of it.
        before = [file.mappings() for file in self._files]
        self.session = open_session(path, options)
        self.pieces: list[Piece] = []
        self.on_demand: list[Piece] = []
        for file, old in zip(self._files, before, strict=True):
            file.owner = self.session
            mapped, (whole, some) = added(old, file.mappings()), ranges[file.path]
            self.pieces += file.pieces(whole, mapped, is_whole=True)
            self.on_demand += file.pieces(some, mapped, is_whole=False)
        for piece in (*self.pieces, *self.on_demand):
            piece.drop()
        for file in self._files:
            file.forget(0, 0)
        # ONNX Runtime has packed every weight once more, to compare.
        give_back()

    def check(self) -> None:
        """Raise ArtifactError if a file that it maps has changed."""
        for file in self._files:
            file.check()


def _streamed_ranges(own: Path, loaded: Path) -> dict[Path, tuple[list[tuple[int, int]], list[tuple[int, int]]]]:
    """By file, offset and length of what is read as a whole, and of what is read in parts.

    Args:
        own: The graph of the segment, which knows what is pinned.
        loaded: The same, or its prepared form.
    """
    graph = onnx.load(str(own), load_external_data=False).graph
    pinned = {each.name for each in graph.initializer if _external(each).get("location", PINNED_FILE) == PINNED_FILE}
    if loaded != own:
        graph = onnx.load(str(loaded), load_external_data=False).graph
    external = {each.name: _external(each) for each in graph.initializer if each.external_data}
    partly = _read_in_parts(graph, external)
    ranges: dict[Path, tuple[list[tuple[int, int]], list[tuple[int, int]]]] = {}
    for name, entries in external.items():
        if name in pinned:
            continue
        whole, some = ranges.setdefault(loaded.parent / entries["location"], ([], []))
        packed = [value for key, value in entries.items() if key.startswith("prepacked_")]
        # `OPERATOR+HASH|OFFSET;BYTES;...`, any number of buffers behind each other.
        for text in packed:
            numbers = [int(number) for number in text.rpartition("|")[2].split(";")]
            whole += [(offset, length) for offset, length in zip(numbers[::3], numbers[1::3], strict=False)]
        if not packed:
            (some if name in partly else whole).append((int(entries["offset"]), int(entries["length"])))
    return ranges


def _external(tensor: onnx.TensorProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in tensor.external_data}


def _read_in_parts(graph: onnx.GraphProto, external: Mapping[str, Mapping[str, str]]) -> set[str]:
    """Tables that rows are looked up in, and what was packed together with codes: scales and zero points."""
    names, others = set(), set()
    for node in graph.node:
        is_packed = any(key.startswith("prepacked_") for name in node.input for key in external.get(name, {}))
        part = node.input if node.op_type in GATHERS else node.input[2:] if is_packed else ()
        names |= set(part)
        others |= set(node.input) - set(part)
    return names - others


class SegmentedOnnxExecutor:
    """See `Executor`.

    Args:
        chains: Graphs that were cut.
        graphs: Those that were not, such as the ones that move tokens.
        info: Facts about the model.
        states: Declaration of each state.
        weight_bytes: Bytes of the weights.
        ring_bytes: That streamed weights may take at once; as many as the largest segment has, if those are more.
        files: What each file of weights must be, by path.
        prepared: Prepared graphs of the segments that have packed weights, by file name.
        threads: Threads within an operator, at least 1; default ONNX Runtime's own choice.
        retentions: Of the states that drop tokens.
        storages: Of the states that compress tokens.
        placement: What the memory has room for, which sessions keep to; None if nobody said.

    Raises:
        ArtifactError: A file cannot be loaded, or is not what it must be.
        OptionError: `threads` is below 1.
        UnsupportedError: The installed ONNX Runtime lacks an operator.
    """

    def __init__(
        self,
        chains: Sequence[OnnxChain],
        graphs: Sequence[OnnxGraph],
        info: ModelInfo,
        states: Mapping[str, State],
        weight_bytes: int,
        *,
        ring_bytes: int,
        files: Mapping[Path, KnownFile],
        prepared: Mapping[str, Path],
        threads: int | None = None,
        retentions: Sequence[Retention] = (),
        storages: Sequence[Storage] = (),
        placement: Placement | None = None,
    ) -> None:
        self.info, self.states, self.weight_bytes, self.device = info, dict(states), weight_bytes, CPU
        self.placement = placement
        self.retentions = {each.name: each for each in retentions}
        self.storages = {each.name: each for each in storages}
        self.threads, self.is_prepared = threads, bool(prepared)
        self._whole = OnnxExecutor(graphs, info, states, weight_bytes, threads=threads, allow_spinning=False)
        self.entries = dict(self._whole.entries)
        self._chains: dict[str, tuple[OnnxChain, list[_OpenSegment], list[list[Piece]]]] = {}
        read: set[Path] = set()
        for chain in chains:
            paths = [prepared.get(each.file, chain.folder / each.file) for each in chain.segments]
            opened = [
                _OpenSegment(chain, segment, path, files, read, threads)
                for segment, path in zip(chain.segments, paths, strict=True)
            ]
            _note_last_readers(opened, chain)
            pieces = [each.pieces for each in opened]
            for entry in chain.entries:
                self._chains[entry] = chain, opened, pieces
                self.entries[entry] = EntrySignature(chain.inputs, tuple(chain.states), chain.outputs)
        sizes = [
            sum(piece.length for piece in each.pieces) for _, opened, _ in self._chains.values() for each in opened
        ]
        self.ring_bytes = max([ring_bytes, *sizes])
        self._reader = ReadAhead(self.ring_bytes)
        self._turn = threading.Lock()

    @property
    def statistics(self) -> ReadStatistics:
        """What was read of streamed weights so far."""
        return self._reader.statistics

    def close(self) -> None:
        """End the thread that reads. What runs afterwards waits for every page that it touches."""
        self._reader.close()

    def run(self, entry: str, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Executor.run`."""
        if entry not in self._chains:
            if entry not in self.entries:
                raise OptionError(f"[onnx] no entry {entry!r}: this artifact has {', '.join(self.entries)}.")
            return self._whole.run(entry, inputs, states)
        with self._turn:  # the weights of one step at a time
            return self._run(entry, inputs, states)

    def _run(self, entry: str, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        chain, opened, pieces = self._chains[entry]
        # Tensors are bound by address: kept until the step is over.
        values: dict[str, Any] = {name: inputs[name].contiguous() for name in chain.inputs}
        for state, (past, present) in chain.states.items():
            values[past] = states[state]
            if present is not None:
                values[present] = states[state]
        written = {present for _, present in chain.states.values() if present is not None}
        try:
            for index, segment in enumerate(opened):
                self._reader.wait(pieces, index)
                _run_segment(segment, values, written)
                for piece in segment.on_demand:
                    piece.drop()
                self._reader.release()
        except BaseException:
            self._reader.restart()
            raise
        return {name: torch.from_numpy(values[name].numpy()) for name in chain.outputs}


def _note_last_readers(opened: Sequence[_OpenSegment], chain: OnnxChain) -> None:
    """Tell each segment which of the values that cross from one to another nobody reads after it."""
    last = {name: index for index, each in enumerate(opened) for name in each.inputs}
    made = {name for each in opened for name in each.outputs}
    kept = {*chain.outputs, *(present for _, present in chain.states.values() if present is not None)}
    for index, each in enumerate(opened):
        each.over = tuple(name for name in each.inputs if last[name] == index and name in made - kept)


def _run_segment(segment: _OpenSegment, values: dict[str, Any], written: set[str]) -> None:
    """Run a segment; what it makes is added to the values, and what nobody reads any more is taken from them."""
    segment.check()
    binding = segment.session.io_binding()
    for name in segment.inputs:
        value = values[name]
        if isinstance(value, Tensor):
            bind_input(binding, name, value)
        else:
            binding.bind_ortvalue_input(name, value)
    for name in segment.outputs:
        if name in written:
            state = values[name]
            binding.bind_output(name, "cpu", 0, NUMPY_DTYPES[state.dtype], tuple(state.shape), state.data_ptr())
        else:
            binding.bind_output(name, "cpu")
    try:
        segment.session.run_with_iobinding(binding)
    except RuntimeError as error:
        raise ArtifactError(
            f"[onnx] {segment.path}: failed: {first_line(error)}\nRun `jettison verify` on the folder; if it finds "
            "nothing, this is a bug in jettison."
        ) from error
    for name, value in _made(segment, binding):
        if name not in written:
            values[name] = value
    for name in segment.over:
        del values[name]


def _made(segment: _OpenSegment, binding: Any) -> Iterator[tuple[str, Any]]:
    return zip(segment.outputs, binding.get_outputs(), strict=True)
