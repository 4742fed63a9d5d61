"""The ONNX executor: shared buffers, results that stay, options, and files that cannot be run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper
from torch import Tensor

from jettison.ir.errors import ArtifactError, OptionError, UnsupportedError
from jettison.ir.program import ModelInfo, State
from jettison.runtime.executor import allocate_states
from jettison.runtime.onnx_executor import OnnxExecutor, OnnxGraph

INFO = ModelInfo("decoder", "Toy", 64, 10)
STATES = {"past_key_values.0.key": State("past_key_values.0.key", ("batch", 1, "capacity", 2), torch.float32)}


def node(operator: str, inputs: list[str], outputs: list[str], domain: str = "", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, outputs, domain=domain, **attributes)


def save(path: Path, *nodes: onnx.NodeProto, opset: int = 21, ir_version: int = 10, external: bool = False) -> Path:
    """A model of `x [n] f32` and a cache: `y = ...`, `present = past` with one slot written."""
    zero = helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0])
    initializers = [zero]
    if external:
        weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[1024], data_location=TensorProto.EXTERNAL)
        for key, value in {"location": "model.onnx.data", "offset": "0", "length": "4096"}.items():
            weight.external_data.add(key=key, value=value)
        initializers.append(weight)
        path.with_name("model.onnx.data").write_bytes(bytes(4096))
    cache = ["batch_size", 1, "past_sequence_length", 2]
    graph = helper.make_graph(
        list(nodes),
        "toy",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"]),
            helper.make_tensor_value_info("at", TensorProto.INT64, [1, 3]),
            helper.make_tensor_value_info("past_key_values.0.key", TensorProto.FLOAT, cache),
        ],
        [
            helper.make_tensor_value_info("present.0.key", TensorProto.FLOAT, cache),
            helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
        ],
        initializers,
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=ir_version), path)
    return path


ADD = node("Add", ["x", "one"], ["y"])
# Values of shape [1, 2] from x, written at one slot.
VALUES = node("Slice", ["x", "zero", "two"], ["values"])
WRITE = node("ScatterND", ["past_key_values.0.key", "at", "update"], ["present.0.key"])


def cached(path: Path, first: onnx.NodeProto = ADD, **settings: Any) -> Path:
    constants = [
        node("Constant", [], ["zero"], value_ints=[0]),
        node("Constant", [], ["two"], value_ints=[2]),
        node("Constant", [], ["shape"], value_ints=[1, 2]),
        node("Reshape", ["values", "shape"], ["update"]),
    ]
    return save(path, first, constants[0], constants[1], VALUES, constants[2], constants[3], WRITE, **settings)


def open_file(path: Path, **settings: Any) -> OnnxExecutor:
    pair = ("past_key_values.0.key", "present.0.key")
    graph = OnnxGraph(path, ("prefill", "decode"), ("x", "at"), ("y",), {"past_key_values.0.key": pair})
    return OnnxExecutor([graph], INFO, STATES, 4096, **{"threads": 1, "allow_spinning": False, **settings})


@pytest.fixture
def executor(tmp_path: Path) -> OnnxExecutor:
    return open_file(cached(tmp_path / "model.onnx"))


def inputs(*values: float, slot: int = 0) -> dict[str, Tensor]:
    return {"x": torch.tensor(values), "at": torch.tensor([[0, 0, slot]])}


def test_past_and_present_are_one_buffer(executor: OnnxExecutor) -> None:
    states = allocate_states(executor.states, 1, 8)
    pointer = states["past_key_values.0.key"].data_ptr()
    for slot in range(3):
        executor.run("decode", inputs(slot + 1.0, slot + 5.0, slot=slot), states)
    assert states["past_key_values.0.key"].data_ptr() == pointer
    expected = [[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], *[[0.0, 0.0]] * 5]
    assert states["past_key_values.0.key"][0, 0].tolist() == expected


def test_results_stay_when_the_next_call_runs(executor: OnnxExecutor) -> None:
    states = allocate_states(executor.states, 1, 8)
    results = [executor.run("decode", inputs(float(step), 0.0, 2.0), states)["y"] for step in range(20)]
    assert [result.tolist() for result in results] == [[step + 1.0, 1.0, 3.0] for step in range(20)]
    results[0].add_(1)  # and belong to the caller
    assert results[1].tolist() == [2.0, 1.0, 3.0]
    del executor
    assert results[2].tolist() == [3.0, 1.0, 3.0], "also after the session is gone"


def test_outputs_are_named_whatever_their_order_in_the_file(executor: OnnxExecutor) -> None:
    """The file lists the state first."""
    returned = executor.run("prefill", inputs(1.0, 2.0, 3.0), allocate_states(executor.states, 1, 8))
    assert list(returned) == ["y"]
    assert returned["y"].tolist() == [2.0, 3.0, 4.0]


def test_inputs_need_not_be_contiguous(executor: OnnxExecutor) -> None:
    strided = {**inputs(), "x": torch.arange(6.0)[::2]}
    returned = executor.run("prefill", strided, allocate_states(executor.states, 1, 8))
    assert returned["y"].tolist() == [1.0, 3.0, 5.0]


def test_one_file_is_opened_once_for_all_its_entries(executor: OnnxExecutor) -> None:
    assert set(executor.entries) == {"prefill", "decode"}
    assert executor._sessions["prefill"][0] is executor._sessions["decode"][0]
    signature = executor.entries["decode"]
    assert (signature.inputs, signature.states, signature.outputs) == (("x", "at"), tuple(STATES), ("y",))


def test_unknown_entry(executor: OnnxExecutor) -> None:
    with pytest.raises(OptionError, match="no entry 'forward': this artifact has prefill, decode"):
        executor.run("forward", {}, {})


def options_of(executor: OnnxExecutor) -> Any:
    return executor._sessions["decode"][0].get_session_options()


def test_threads(tmp_path: Path) -> None:
    path = cached(tmp_path / "model.onnx")
    assert options_of(open_file(path, threads=2)).intra_op_num_threads == 2
    assert options_of(open_file(path, threads=None)).intra_op_num_threads == 0, "the runtime's own choice"
    for threads in (0, -1):
        with pytest.raises(OptionError, match=f"threads={threads}: needed at least 1"):
            open_file(path, threads=threads)


def test_spinning(tmp_path: Path) -> None:
    path, key = cached(tmp_path / "model.onnx"), "session.intra_op.allow_spinning"
    assert options_of(open_file(path, allow_spinning=False)).get_session_config_entry(key) == "0"
    with pytest.raises(RuntimeError, match="does not have configuration"):
        options_of(open_file(path, allow_spinning=True)).get_session_config_entry(key)


# --- files that cannot be run ---------------------------------------------------------------------------------------


def rewritten(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(change(path.read_bytes()))


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "truncated": rewritten(lambda data: data[:-40]),
    "garbage": rewritten(lambda data: bytes(255 - byte for byte in data)),
    "empty": rewritten(lambda data: b""),
    "missing": lambda path: path.unlink(),
    "weights missing": lambda path: path.with_name("model.onnx.data").unlink(),
    "weights short": lambda path: path.with_name("model.onnx.data").write_bytes(bytes(100)),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_file(tmp_path: Path, what: str, capfd: pytest.CaptureFixture[str]) -> None:
    path = cached(tmp_path / "model.onnx", node("Add", ["w", "one"], ["y"]), external=True)
    open_file(path)
    DAMAGE[what](path)
    with pytest.raises(ArtifactError, match=r"model.onnx: cannot be loaded: .*\n?.*jettison verify") as caught:
        open_file(path)
    assert len(str(caught.value).splitlines()) == 2
    assert capfd.readouterr().err == "", "the runtime itself prints nothing"


@pytest.mark.parametrize(
    ("first", "settings"),
    [
        (node("ShinyAttention", ["x"], ["y"], domain="com.microsoft"), {}),
        (node("ShinyAttention", ["x"], ["y"]), {}),
        (node("Gelu", ["x"], ["y"], domain="com.microsoft", shininess=3), {}),
        (ADD, {"opset": 99}),
        (ADD, {"ir_version": 99}),
    ],
    ids=["contrib operator", "standard operator", "attribute", "opset", "file version"],
)
def test_file_of_a_newer_runtime(
    tmp_path: Path, first: onnx.NodeProto, settings: dict[str, int], capfd: pytest.CaptureFixture[str]
) -> None:
    path = cached(tmp_path / "model.onnx", first, **settings)
    with pytest.raises(UnsupportedError, match=r"onnxruntime [\d.]+ cannot run it: .*\n.*pip install -U onnxruntime"):
        open_file(path)
    assert capfd.readouterr().err == ""


def test_failure_while_running_names_the_file(executor: OnnxExecutor, capfd: pytest.CaptureFixture[str]) -> None:
    states = allocate_states(executor.states, 1, 8)
    with pytest.raises(ArtifactError, match=r"model.onnx: decode failed: .*\n.*jettison verify"):
        executor.run("decode", inputs(1.0, 2.0, slot=99), states)
    assert capfd.readouterr().err == ""
