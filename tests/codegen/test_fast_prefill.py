"""`prefill=fast`: what it emits, what its weights are, and that only prompts are rounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy
import onnx
import onnx.numpy_helper
import pytest
import torch

import jettison
from jettison import artifact_files
from jettison.codegen.onnx.emit import EmittedGraph, emit_program
from jettison.codegen.onnx.fast_prefill import Int8Weight, fast_bytes, weight_operands
from jettison.codegen.onnx.packed_projections import pack_projections
from jettison.ir.errors import OptionError
from jettison.ir.interpret import run_entry
from jettison.ir.program import Program
from jettison.passes.policies import Full
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime.executor import allocate_states
from jettison.runtime.onnx_executor import multiplies_int8
from jettison.runtime.session import Session
from tests.codegen.running import cached_program, open_graphs
from tests.models.tiny_models import TINY_MODELS, VOCAB_SIZE, randomize

pytestmark = pytest.mark.skipif(not multiplies_int8(), reason="this CPU runs no 8-bit prefill")
LAYERS, WIDTH = 1, 128
# Of the largest logit, with random weights: 8 bits for weights, 8 bits for a tensor of activations.
COARSE = 0.1


def small_model() -> Any:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": LAYERS}
    return randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**TINY_MODELS["llama"].options | sizes)))


@pytest.fixture(scope="module")
def model() -> Any:
    return small_model().eval()


@pytest.fixture(scope="module")
def int4(model: Any) -> Program:
    return cached_program(model, Full(), QuantizeWeights(bits=4, group=32))


@pytest.fixture(scope="module")
def int4_graphs(int4: Program, tmp_path_factory: pytest.TempPathFactory) -> list[EmittedGraph]:
    return emit_program(int4, tmp_path_factory.mktemp("int4"), prefill="fast")


@pytest.fixture(scope="module", params=["int4", "dense"])
def case(
    request: pytest.FixtureRequest, model: Any, int4: Program, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Program, list[EmittedGraph]]:
    if request.param == "int4":
        return int4, request.getfixturevalue("int4_graphs")
    program = cached_program(model, Full())
    return program, emit_program(program, tmp_path_factory.mktemp("dense"), prefill="fast")


def operators(path: Path) -> list[str]:
    return [node.op_type for node in onnx.load(str(path), load_external_data=False).graph.node]


def test_linears_over_all_tokens_are_fast_and_the_head_is_not(case):
    _, (exact, fast) = case
    assert (exact.path.name, exact.entries, exact.is_fast) == ("model.onnx", ("prefill", "decode"), False)
    assert (fast.path.name, fast.entries, fast.is_fast) == ("prefill.fast.onnx", ("prefill",), True)
    # Joint projections, output, gate, up and down.
    assert operators(fast.path).count("DynamicQuantizeMatMul") == 5 * LAYERS
    products = [name for name in operators(fast.path) if name in ("MatMulNBits", "MatMul", "Gemm")]
    assert len(products) == 1
    assert "DynamicQuantizeMatMul" not in operators(exact.path)


def test_weights_are_the_nearest_of_255_values_by_output(case):
    program, (_, fast) = case
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(str(fast.path)).graph.initializer}
    packed = pack_projections(program)
    nodes = [node for node in packed.entries["prefill"].graph.nodes if weight_operands(node)]
    assert len(nodes) == 5 * LAYERS
    for node in nodes:
        name = Int8Weight(node, packed).name
        codes, scales = stored[f"{name}.codes"].astype(numpy.float64), stored[f"{name}.scales"]
        features = codes.shape[0]
        # The program's own operator on the unit vectors gives the weight.
        operands = [program_value(packed, operand) for operand in node.args[1:]]
        weight = node.target(torch.eye(features), *operands).double().numpy()
        assert codes.shape == weight.shape
        assert numpy.abs(codes).max() == 127
        assert numpy.allclose(scales, numpy.abs(weight).max(0) / 127, rtol=1e-5)
        assert (numpy.abs(codes * scales - weight) <= scales * 0.5001).all()


def program_value(program, operand):
    is_constant = hasattr(operand, "meta") and "constant" in operand.meta
    return program.constants[operand.meta["constant"]].value() if is_constant else operand


def test_bytes_are_those_of_the_file(case):
    program, graphs = case
    sizes = [external_bytes(graph.path, ".prefill.") for graph in graphs]
    assert sizes == [0, fast_bytes(program)]


def external_bytes(path, part):
    tensors = [t for t in onnx.load(str(path)).graph.initializer if part in t.name]
    return sum(onnx.numpy_helper.to_array(tensor).nbytes for tensor in tensors)


@pytest.mark.parametrize("length", [1, 7, 64])
def test_prompts_are_close_and_steps_read_the_same_cache(case, length):
    program, graphs = case
    executor = open_graphs(program, graphs)
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(0, VOCAB_SIZE, (2, length), generator=generator)
    columns = torch.arange(length)[None].repeat(2, 1)
    inputs = {"input_ids": ids, "position_ids": columns, "attention_mask": torch.ones_like(ids)}
    inputs["logits_positions"] = columns
    expected, states = allocate_states(program.states, 2, 128), allocate_states(program.states, 2, 128)
    wanted, *new = run_entry(program, "prefill", {**expected, **inputs})
    found = executor.run("prefill", inputs, states)["logits"]
    error = ((found - wanted).abs().max() / wanted.abs().max()).item()
    assert 1e-6 < error < COARSE, "rounded, and not by much"
    for name, value in zip(program.states, new, strict=True):
        assert (states[name] - value).abs().max() < COARSE * value.abs().max()


def test_decode_is_exact(case, model):
    program, graphs = case
    executor = open_graphs(program, graphs)
    first = {"input_ids": torch.tensor([[5]]), "position_ids": torch.tensor([[0]])}
    inputs = {**first, "attention_mask": torch.ones(1, 1, dtype=torch.int64), "logits_positions": torch.tensor([[0]])}
    states = allocate_states(program.states, 1, 64)
    exact = open_graphs(program, graphs[:1]).run("decode", inputs, allocate_states(program.states, 1, 64))["logits"]
    assert torch.equal(executor.run("decode", inputs, states)["logits"], exact)


def test_a_cpu_without_wide_sums_runs_prompts_exactly(model, int4, int4_graphs, tmp_path, monkeypatch):
    pipeline = "quantize-weights{bits=4,group=32}"
    prompt = [torch.randint(0, VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(1)).tolist()]
    exact = jettison.optimize(model, pipeline)
    fast = jettison.optimize(model, pipeline, prefill="fast")
    assert (exact.report.prefill, exact.report.prefill_bytes) == ("exact", 0)
    assert fast.report.prefill_bytes == fast_bytes(int4)
    assert "8-bit copy" in str(fast.report)
    fast.save_pretrained(tmp_path / "fast")
    rounded = jettison.load(tmp_path / "fast", threads=1).session(1, 64).prefill(prompt)
    # The graph that the same program has without the fast one.
    wanted = Session(open_graphs(int4, int4_graphs[:1]), 1, 64).prefill(prompt)
    assert not torch.equal(rounded, wanted)
    monkeypatch.setattr(artifact_files, "multiplies_int8", lambda: False)
    assert torch.allclose(jettison.load(tmp_path / "fast", threads=1).session(1, 64).prefill(prompt), wanted, atol=1e-4)


@pytest.mark.parametrize(("settings"), [{"prefill": "quick"}, {"prefill": "fast", "target": "torch"}])
def test_bad_settings(model, settings):
    with pytest.raises(OptionError, match="fast needs the ONNX target"):
        jettison.optimize(model, **settings)
