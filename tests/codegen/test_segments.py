"""Graphs cut into segments: where, how large, what each of them needs, and what cannot be cut."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper

from jettison.api import parse_passes
from jettison.codegen.onnx.emit import EmittedGraph, emit_program
from jettison.codegen.onnx.segments import _cuts, _describe, _submodel, _types
from jettison.codegen.onnx.split_products import Streamed
from jettison.ir.constants import Constant
from jettison.ir.errors import UnsupportedError
from jettison.ir.program import Program
from jettison.passes.pipeline import apply, prepare
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.source import open_source
from tests.models.tiny_mixture import mixture_program
from tests.runtime.placing import on_disk


@functools.cache
def prepared(folder: Path) -> Program:
    program = open_source(folder).program
    prepare(program)
    return program


def bundled(folder: Path, passes: str) -> Program:
    """A model of a folder, captured once; may be changed."""
    program = prepared(folder).copy()
    apply(program, parse_passes(passes))
    return program


def emitted(program: Program, folder: Path, ring_bytes: int, **placed: object) -> EmittedGraph:
    on_disk(ring_bytes, **placed)(None, None, program)  # type: ignore[arg-type]
    folder.mkdir(parents=True, exist_ok=True)
    return emit_program(program, folder)[0]


def loaded(folder: Path, graph: EmittedGraph) -> list[onnx.ModelProto]:
    return [onnx.load(str(folder / each.file), load_external_data=False) for each in graph.segments]


def locations(model: onnx.ModelProto) -> dict[str, tuple[str, int, int]]:
    """File, offset and length of each initializer that is outside of a model."""
    found = {}
    for each in model.graph.initializer:
        entries = {entry.key: entry.value for entry in each.external_data}
        if entries:
            found[each.name] = entries["location"], int(entries["offset"]), int(entries["length"])
    return found


def test_layers_are_cut_where_only_the_residual_and_its_norm_cross(two_layers, tmp_path):
    graph = emitted(bundled(two_layers, "cache-kv"), tmp_path, 7_000_000)
    models = dict(zip(graph.segments, loaded(tmp_path, graph), strict=True))
    inner = [each for each in graph.segments if any(name.startswith("past") for name in each.inputs)]
    assert len(inner) == 2
    made = {name for each in graph.segments for name in each.outputs if not name.startswith("present")}
    crossing = [value for value in models[inner[1]].graph.input if value.name in made]
    hidden = [value.name for value in crossing if value.type.tensor_type.elem_type == TensorProto.FLOAT]
    assert len(hidden) == 2, "hidden states and their norm"
    for each in graph.segments:
        past = {name.removeprefix("past_key_values") for name in each.inputs if name.startswith("past")}
        present = {name.removeprefix("present") for name in each.outputs if name.startswith("present")}
        assert past == present, "a state is read and written in one segment"


@pytest.mark.parametrize("passes", ["cache-kv", "quantize-weights{bits=4,group=32},cache-kv"])
@pytest.mark.parametrize("ring_bytes", [600_000, 2_000_000, 100_000_000])
def test_segments_stay_below_half_of_the_ring_and_every_byte_is_stored_once(two_layers, passes, ring_bytes, tmp_path):
    program = bundled(two_layers, passes)
    graph = emitted(program, tmp_path, ring_bytes)
    files: dict[str, set[tuple[int, int]]] = {}
    for model in loaded(tmp_path, graph):
        gathered = {name for node in model.graph.node if "Gather" in node.op_type for name in node.input}
        streamed = {name: place for name, place in locations(model).items() if place[0] != "model.onnx.data"}
        assert sum(length for name, (_, _, length) in streamed.items() if name not in gathered) <= ring_bytes // 2
        for location, offset, length in streamed.values():
            files.setdefault(location, set()).add((offset, length))
            assert (tmp_path / location).stat().st_size >= offset + length
    on_disk_bytes = sum(program.constants[name].nbytes for name in program.placement.tiers)
    written = sum((tmp_path / name).stat().st_size for name in files)
    padding = 4096 * len(program.placement.tiers)
    assert on_disk_bytes <= written <= on_disk_bytes + padding
    assert len(graph.segments) == (1 if ring_bytes > 50_000_000 and "quantize" not in passes else len(graph.segments))


def test_files_hold_the_weights(two_layers, tmp_path):
    program = bundled(two_layers, "cache-kv")
    graph = emitted(program, tmp_path, 3_000_000)
    seen = set()
    for model in loaded(tmp_path, graph):
        for name, (location, offset, length) in locations(model).items():
            stored = (tmp_path / location).read_bytes()[offset : offset + length]
            weight, _, start = name.partition(".weight")
            constant = program.constants.get(f"{weight}.weight")
            if constant is None or location == "model.onnx.data":
                continue
            dims = next(list(each.dims) for each in model.graph.initializer if each.name == name)
            values = torch.frombuffer(bytearray(stored), dtype=torch.float32).reshape(dims)
            first = int(start.rpartition(".")[2]) if start.rpartition(".")[2].isdigit() else 0
            if start.startswith(".T"):
                assert torch.equal(values, constant.value()[first : first + dims[1]].T)
            else:
                assert torch.equal(values, constant.value()[first : first + dims[0]])
            seen.add(name)
    assert any(".weight." in name and name.rpartition(".")[2].isdigit() for name in seen), "slabs of the head"
    assert any(name.endswith("down_proj.weight.T") for name in seen)


def test_pinned_weights_and_tables_are_in_the_file_of_all(two_layers, tmp_path):
    graph = emitted(bundled(two_layers, "cache-kv"), tmp_path, 9_000_000, pinned="mlp|embed")
    pinned = {name for model in loaded(tmp_path, graph) for name, place in locations(model).items()
              if place[0] == "model.onnx.data"}  # fmt: skip
    assert any("mlp" in name for name in pinned)
    assert any("cos_cache" in name for name in pinned)
    assert not any("self_attn" in name for name in pinned)


def test_nothing_on_disk_is_one_graph(two_layers, tmp_path):
    graph = emitted(bundled(two_layers, "cache-kv"), tmp_path, 9_000_000, share=0.0)
    assert graph.segments == []
    assert graph.path.is_file()


def test_what_is_larger_than_the_ring_and_cannot_be_split(two_layers, tmp_path):
    """Slabs are whole tiles of 64 outputs."""
    with pytest.raises(UnsupportedError, match=r"reads a weight as a whole, here [\d,]+ bytes, and the ring has 9,000"):
        emitted(bundled(two_layers, "cache-kv"), tmp_path, 9_000)


def test_formats_that_are_decoded_at_load_are_refused(two_layers, tmp_path):
    program = bundled(two_layers, "quantize-weights{format=nf4{group=64}},cache-kv")
    with pytest.raises(UnsupportedError, match="decodes this format when it loads a model"):
        emitted(program, tmp_path, 9_000_000)


def test_quantised_experts_are_pinned_or_refused(tmp_path):
    program = mixture_program(128)
    QuantizeWeights(4, 32, skip="embed").run(program)
    with pytest.raises(UnsupportedError, match="quantised experts"):
        emitted(program.copy(), tmp_path / "a", 9_000_000, smallest=100)
    graph = emitted(program, tmp_path / "b", 9_000_000, smallest=100, pinned="gate_up|down")
    models = loaded(tmp_path / "b", graph)
    streamed = [each.is_streamed for each in graph.segments]
    has_experts = [any(node.op_type == "QMoE" for node in model.graph.node) for model in models]
    assert any(has_experts)
    assert not any(both for both in zip(streamed, has_experts, strict=True) if all(both))


def toy(nodes: Sequence[onnx.NodeProto], weights: dict[str, int], outputs: Sequence[str] = ("y",)) -> onnx.ModelProto:
    """A model of `x [4] f32`; weights are vectors of that many floats."""
    tensors = [helper.make_tensor(name, TensorProto.FLOAT, [4], [float(size)] * 4) for name, size in weights.items()]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [4]) for name in outputs]
    given = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])]
    return helper.make_model(
        helper.make_graph(nodes, "toy", given, ends, tensors),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )


def cut(model: onnx.ModelProto, weights: dict[str, int], most_bytes: int) -> list[onnx.ModelProto]:
    streamed = {name: Streamed(Constant(name, torch.zeros(1)), 0, size) for name, size in weights.items()}
    nodes, constants = _describe(model, streamed)
    types = _types(model)
    return [_submodel(model, nodes, constants, span, types) for span in _cuts(nodes, most_bytes)]


def run_chain(models: Sequence[onnx.ModelProto], x: numpy.ndarray) -> dict[str, numpy.ndarray]:
    values = {"x": x}
    for model in models:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        names = [value.name for value in session.get_outputs()]
        values |= dict(
            zip(names, session.run(None, {v.name: values[v.name] for v in session.get_inputs()}), strict=True)
        )
    return values


def node(operator: str, inputs: Sequence[str], output: str, **attributes: object) -> onnx.NodeProto:
    return helper.make_node(operator, inputs, [output], **attributes)


def test_the_place_that_the_fewest_values_cross_is_taken():
    """After `c` one value crosses, after `d` and `e` more do; all three have room."""
    weights = {"w0": 100, "w1": 100, "w2": 100}
    nodes = [
        node("Mul", ["x", "w0"], "a"), node("Add", ["a", "w1"], "c"), node("Neg", ["c"], "d"), node("Abs", ["c"], "e"),
        node("Sub", ["d", "e"], "f"), node("Mul", ["f", "w2"], "g"), node("Add", ["g", "c"], "y"),
    ]  # fmt: skip
    models = cut(toy(nodes, weights), weights, 200)
    assert [[each.output[0] for each in model.graph.node] for model in models] == [
        ["a", "c"],
        ["d", "e", "f", "g", "y"],
    ]
    x = numpy.arange(4, dtype=numpy.float32) - 2
    assert (run_chain(models, x)["y"] == run_chain([toy(nodes, weights)], x)["y"]).all()


def test_subgraphs_read_what_is_outside_of_them_and_constants_are_copied():
    weights = {"w0": 100, "w1": 100}
    branch = [
        helper.make_graph([node(operator, ["a", "two"], f"{operator}.out")], operator, [],
                          [helper.make_tensor_value_info(f"{operator}.out", TensorProto.FLOAT, [4])])
        for operator in ("Add", "Mul")
    ]  # fmt: skip
    nodes = [
        node("Constant", [], "two", value_float=2.0), node("Mul", ["x", "w0"], "a"), node("ReduceSum", ["x"], "s"),
        node("Cast", ["s"], "is", to=TensorProto.BOOL), node("Add", ["a", "w1"], "b"),
        node("If", ["is"], "d", then_branch=branch[0], else_branch=branch[1]), node("Add", ["b", "d"], "c"),
        node("Mul", ["c", "two"], "y"),
    ]  # fmt: skip
    nodes[2].attribute.add(name="keepdims", type=onnx.AttributeProto.INT, i=0)
    models = cut(toy(nodes, weights), weights, 100)
    assert len(models) == 2
    assert "a" in {value.name for value in models[1].graph.input}
    x = numpy.arange(4, dtype=numpy.float32)
    assert (run_chain(models, x)["y"] == run_chain([toy(nodes, weights)], x)["y"]).all()
