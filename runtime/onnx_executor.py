"""Runs an ONNX artifact with ONNX Runtime; past and present are one buffer, so no operator copies the cache."""

from __future__ import annotations

import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from jettison.ir.allocator import give_back
from jettison.ir.errors import ArtifactError, OptionError, UnsupportedError
from jettison.ir.placement import Placement
from jettison.ir.program import ModelInfo, Retention, State, Storage
from jettison.runtime.executor import CPU, EntrySignature

NUMPY_DTYPES = {
    torch.float32: numpy.float32, torch.float16: numpy.float16, torch.int64: numpy.int64, torch.int32: numpy.int32,
    torch.int8: numpy.int8, torch.uint8: numpy.uint8, torch.bool: numpy.bool_,
}  # fmt: skip
# How ONNX Runtime says that a sound file asks for more than it has; the classes of its errors do not tell.
_TOO_OLD = re.compile(
    r"is not a registered function/op|No Op registered|No opset import|Unsupported model IR version|official support"
    r"|Unrecognized attribute|NOT_IMPLEMENTED",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class OnnxGraph:
    """One ONNX file of an artifact.

    Attributes:
        path: The file.
        entries: Entries it serves.
        inputs: Names of run-time inputs, states not included.
        outputs: Names of outputs, new states not included.
        states: State name to (input name, output name); no output for a state that is only read.
        is_mapped: Whether weights are read from the file as they are, and not packed in memory.
    """

    path: Path
    entries: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    states: Mapping[str, tuple[str, str | None]]
    is_mapped: bool = False


class OnnxExecutor:
    """See `Executor`.

    Args:
        graphs: The artifact's ONNX files.
        info: Facts about the model.
        states: Declaration of each state.
        weight_bytes: Bytes of the weights, without the tables and the padding that the weight file has beside them.
        threads: Threads within an operator, at least 1; default ONNX Runtime's own choice.
        allow_spinning: Whether idle worker threads spin. Faster steps, but they slow torch code in this process.
        prepared: Graphs with packed weights to load in place of those, by file name; see `runtime/prepared.py`.
        retentions: Of the states that drop tokens.
        storages: Of the states that compress tokens.

    Raises:
        ArtifactError: A file cannot be loaded.
        OptionError: `threads` is below 1.
        UnsupportedError: The installed ONNX Runtime lacks an operator.
    """

    def __init__(
        self,
        graphs: Sequence[OnnxGraph],
        info: ModelInfo,
        states: Mapping[str, State],
        weight_bytes: int,
        *,
        threads: int | None = None,
        allow_spinning: bool = True,
        prepared: Mapping[str, Path] | None = None,
        retentions: Sequence[Retention] = (),
        storages: Sequence[Storage] = (),
    ) -> None:
        import onnxruntime

        if threads is not None and threads < 1:
            raise OptionError(f"[onnx] threads={threads}: needed at least 1, or None for the runtime's own choice.")
        self.info, self.states, self.weight_bytes, self.device = info, dict(states), weight_bytes, CPU
        self.placement: Placement | None = None
        self.retentions = {each.name: each for each in retentions}
        self.storages = {each.name: each for each in storages}
        self.threads = threads
        self.entries: dict[str, EntrySignature] = {}
        self._sessions: dict[str, tuple[onnxruntime.InferenceSession, OnnxGraph]] = {}
        self.is_prepared = bool(prepared)
        for graph in graphs:
            options = session_options(threads, allow_spinning=allow_spinning)
            path = (prepared or {}).get(graph.path.name, graph.path)
            if path is graph.path and graph.is_mapped:
                options.add_session_config_entry("session.disable_prepacking", "1")
            if path is not graph.path:  # optimised when it was prepared
                options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
            session = open_session(path, options)
            for entry in graph.entries:
                self._sessions[entry] = (session, graph)
                self.entries[entry] = EntrySignature(graph.inputs, tuple(graph.states), graph.outputs)
        if self.is_prepared:  # ONNX Runtime has packed every weight once more, to compare
            give_back()

    def run(self, entry: str, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Executor.run`."""
        if entry not in self._sessions:
            raise OptionError(f"[onnx] no entry {entry!r}: this artifact has {', '.join(self._sessions)}.")
        session, graph = self._sessions[entry]
        binding = session.io_binding()
        # Bound by address: kept until the call is over.
        given = [inputs[name].contiguous() for name in graph.inputs]
        for name, tensor in zip(graph.inputs, given, strict=True):
            bind_input(binding, name, tensor)
        for name in graph.outputs:
            # Without a buffer of ours, so that every call returns tensors of its own.
            binding.bind_output(name, "cpu")
        for state, (past, present) in graph.states.items():
            tensor = states[state]
            bind_input(binding, past, tensor)
            if present is not None:
                dtype = NUMPY_DTYPES[tensor.dtype]
                binding.bind_output(present, "cpu", 0, dtype, tuple(tensor.shape), tensor.data_ptr())
        try:
            session.run_with_iobinding(binding)
        except RuntimeError as error:
            raise ArtifactError(
                f"[onnx] {graph.path}: {entry} failed: {first_line(error)}\nRun `jettison verify` on the "
                "folder; if it finds nothing, this is a bug in jettison."
            ) from error
        # In the order they were bound; the new states are where the caller has them.
        values = binding.get_outputs()[: len(graph.outputs)]
        return {name: torch.from_numpy(value.numpy()) for name, value in zip(graph.outputs, values, strict=True)}


def bind_input(binding: object, name: str, tensor: Tensor) -> None:
    """Give a run the memory of a tensor, which has to be kept until it is over."""
    binding.bind_input(name, "cpu", 0, NUMPY_DTYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())  # type: ignore[attr-defined]


def session_options(threads: int | None, *, allow_spinning: bool) -> Any:
    """`onnxruntime.SessionOptions` as every session of jettison has them."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # Errors are raised; what it would print beside that names internals, and warnings name the default of
    # `logits_positions`, which is meant.
    options.log_severity_level = 4
    # As the nodes stand in the file, where what a layer leaves behind is read at once. The default order reads it last:
    # the probabilities that `h2o` adds up would be held for all layers together.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    if threads is not None:
        options.intra_op_num_threads = threads
    if not allow_spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def open_session(path: Path, options: Any) -> Any:
    """An `onnxruntime.InferenceSession` on the CPU.

    Raises:
        ArtifactError: The file cannot be loaded.
        UnsupportedError: The installed ONNX Runtime lacks an operator.
    """
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (
        ort_errors.EPFail, ort_errors.Fail, ort_errors.InvalidArgument, ort_errors.InvalidGraph,
        ort_errors.InvalidProtobuf, ort_errors.NoModel, ort_errors.NoSuchFile, ort_errors.NotFound,
        ort_errors.NotImplemented, ort_errors.RuntimeException, RuntimeError,
    ) as error:  # fmt: skip
        if _TOO_OLD.search(str(error)):
            raise UnsupportedError(
                f"[onnx] {path.name}: onnxruntime {onnxruntime.__version__} cannot run it: {first_line(error)}\n"
                "Upgrade with: pip install -U onnxruntime"
            ) from error
        raise ArtifactError(
            f"[onnx] {path}: cannot be loaded: {first_line(error)}\nRun `jettison verify` on the folder to find the "
            "damaged file."
        ) from error


def multiplies_int8() -> bool:
    """Whether this CPU adds products of 8-bit integers in 32 bits.

    An x86 without VNNI adds pairs in 16 bits, which overflow: `prefill=fast` would compute nonsense there, so its graph
    is left aside and `prefill` runs as `decode` does.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        return True
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return re.search(r"^flags\b.*\b(avx512_vnni|avx_vnni|amx_int8)\b", flags, re.MULTILINE) is not None


def first_line(error: BaseException) -> str:
    """What ONNX Runtime says first: what follows names its internals."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:500]
