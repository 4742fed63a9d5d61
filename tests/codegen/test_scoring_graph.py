"""`scores.onnx`: the logits of every token, without an input that asks for them."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch

from jettison.codegen.onnx.scoring_graph import write_scoring_graph
from jettison.ir.interpret import run_entry
from jettison.passes.policies import Full, Policy, Window
from tests.codegen.running import REASON, TOLERANCE, assert_close, cached_program, emit
from tests.codegen.test_genai_config import Plain
from tests.models.tiny_models import CONTEXT, VOCAB_SIZE, WINDOW, random_ids, randomize


@pytest.mark.parametrize(("policy", "slots"), [(Full(), 0), (Window(size=WINDOW), WINDOW + 64)])
def test_a_call_without_a_past_returns_every_logit(tmp_path: Path, policy: Policy, slots: int) -> None:
    """As lm-eval calls it: one row, an empty cache of no slots, or of as many as the graph declares."""
    emitted = emit(cached_program(randomize(Plain()).eval(), policy, context=CONTEXT), tmp_path)
    assert write_scoring_graph(tmp_path / "model.onnx", tmp_path / "scores.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "scores.onnx"), providers=["CPUExecutionProvider"])
    assert not session.get_overridable_initializers()
    length = WINDOW + 80
    ids, columns = random_ids(1, length), torch.arange(length)[None]
    inputs = {"input_ids": ids, "position_ids": columns, "attention_mask": torch.ones_like(ids)}
    past = {name: torch.zeros(1, 2, slots, 8) for name in emitted.program.states}
    assert [value.name for value in session.get_inputs()] == [*inputs, *past]
    (logits,) = session.run(["logits"], {name: value.numpy() for name, value in {**inputs, **past}.items()})
    states = {name: torch.zeros(1, 2, slots or CONTEXT, 8) for name in past}
    expected = run_entry(emitted.program, "prefill", {**inputs, **states, "logits_positions": columns})[0]
    assert_close(torch.from_numpy(logits), expected, tolerance=TOLERANCE, reason=REASON)

    assert_description(tmp_path)


def assert_description(folder: Path) -> None:
    """It declares what it returns, and has no weights of its own."""
    assert sorted(path.name for path in folder.iterdir()) == ["model.onnx", "model.onnx.data", "scores.onnx"]
    onnx.checker.check_model(str(folder / "scores.onnx"))
    graphs = [onnx.load(str(folder / name), load_external_data=False).graph for name in ("model.onnx", "scores.onnx")]
    shape = [dim.dim_param or dim.dim_value for dim in graphs[1].output[0].type.tensor_type.shape.dim]
    assert shape == ["batch_size", "sequence_length", VOCAB_SIZE]
    weights = [[tensor for tensor in graph.initializer if tensor.external_data] for graph in graphs]
    assert weights[0] == weights[1] != []


def test_a_graph_that_asks_for_no_positions_needs_no_other(tmp_path: Path) -> None:
    kinds = {"elem_type": onnx.TensorProto.FLOAT, "shape": [1]}
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    ends = [onnx.helper.make_tensor_value_info(name, **kinds) for name in ("x", "y")]
    onnx.save(
        onnx.helper.make_model(onnx.helper.make_graph([node], "g", ends[:1], ends[1:])), str(tmp_path / "model.onnx")
    )
    assert not write_scoring_graph(tmp_path / "model.onnx", tmp_path / "scores.onnx")
    assert not (tmp_path / "scores.onnx").exists()
