"""Runs an ONNX artifact with ONNX Runtime; past and present are one buffer, so no operator copies the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy
import torch
from torch import Tensor

from jettison.ir.errors import ArtifactError, UnsupportedError
from jettison.ir.program import ModelInfo, State
from jettison.runtime.executor import EntrySignature

_NUMPY_DTYPES = {
    torch.float32: numpy.float32, torch.float16: numpy.float16, torch.int64: numpy.int64, torch.int32: numpy.int32,
    torch.int8: numpy.int8, torch.uint8: numpy.uint8, torch.bool: numpy.bool_,
}  # fmt: skip


@dataclass(frozen=True)
class OnnxGraph:
    """One ONNX file of an artifact.

    Attributes:
        path: The file.
        entries: Entries it serves.
        inputs: Names of run-time inputs, states not included.
        outputs: Names of outputs, new states not included.
        states: State name to (input name, output name).
    """

    path: Path
    entries: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    states: Mapping[str, tuple[str, str]]


class OnnxExecutor:
    """See `Executor`.

    Args:
        graphs: The artifact's ONNX files.
        info: Facts about the model.
        states: Declaration of each state.
        weight_bytes: Bytes of the weight file.
        threads: Threads within an operator; default ONNX Runtime's own choice.
        allow_spinning: Whether idle worker threads spin. Faster steps, but they slow torch code in this process.

    Raises:
        ArtifactError: A file cannot be loaded.
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
    ) -> None:
        import onnxruntime

        self.info, self.states, self.weight_bytes = info, dict(states), weight_bytes
        self.entries: dict[str, EntrySignature] = {}
        self._sessions: dict[str, tuple[onnxruntime.InferenceSession, OnnxGraph]] = {}
        self._bindings: dict[str, onnxruntime.IOBinding] = {}
        for graph in graphs:
            session = _open(graph.path, threads, allow_spinning)
            for entry in graph.entries:
                self._sessions[entry] = (session, graph)
                self.entries[entry] = EntrySignature(graph.inputs, tuple(graph.states), graph.outputs)

    def run(self, entry: str, inputs: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `Executor.run`."""
        session, graph = self._sessions[entry]
        binding = session.io_binding()
        for name in graph.inputs:
            _bind_input(binding, name, inputs[name])
        for state, (past, present) in graph.states.items():
            tensor = states[state]
            _bind_input(binding, past, tensor)
            binding.bind_output(present, "cpu", 0, _NUMPY_DTYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())
        for name in graph.outputs:
            binding.bind_output(name, "cpu")
        session.run_with_iobinding(binding)
        # The outputs come first or last depending on the file; ask by position of binding.
        values = binding.get_outputs()[len(graph.states) :]
        return {name: torch.from_numpy(value.numpy()) for name, value in zip(graph.outputs, values, strict=True)}


def _bind_input(binding: object, name: str, tensor: Tensor) -> None:
    binding.bind_input(name, "cpu", 0, _NUMPY_DTYPES[tensor.dtype], tuple(tensor.shape), tensor.data_ptr())  # type: ignore[attr-defined]


def _open(path: Path, threads: int | None, allow_spinning: bool) -> object:
    import onnxruntime
    from onnxruntime.capi import onnxruntime_pybind11_state as ort_errors

    options = onnxruntime.SessionOptions()
    # Warnings name internals, one of them the default of `logits_positions`, which is meant.
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    if not allow_spinning:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except (ort_errors.NotImplemented, ort_errors.InvalidGraph) as error:
        raise UnsupportedError(
            f"[onnx] {path.name}: onnxruntime {onnxruntime.__version__} cannot run it: {_first_line(error)}\n"
            "Upgrade with: pip install -U onnxruntime"
        ) from error
    except (ort_errors.Fail, ort_errors.InvalidProtobuf, ort_errors.NoSuchFile, ort_errors.RuntimeException) as error:
        raise ArtifactError(
            f"[onnx] {path}: cannot be loaded: {_first_line(error)}\nRun `jettison verify` on the folder to find the "
            "damaged file."
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0][:300]
