"""The report: its numbers against numbers computed from the module, its two written forms."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import jettison
from jettison.ir.program import MissRecord, PassRecord
from jettison.optimized_model import OptimizedModel
from jettison.report import Report
from tests.models.tiny_models import CONTEXT, LAYERS, tiny_model

QUANTIZE = "quantize-weights{bits=4,group=32,symmetric=false,method=rtn,skip='o_proj|nothing'}"
PIPELINE = f"{QUANTIZE},cache-kv{{policy=window}}"
# Rotary frequencies: one per pair of a head's 8 channels, fp32.
FREQUENCY_BYTES = 4 * 4


pytestmark = pytest.mark.usefixtures("captured_once")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Threads that wait for a busy core cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def live() -> nn.Module:
    pytest.importorskip("transformers")
    return tiny_model("llama")


@pytest.fixture(scope="module", params=["onnx", "torch"])
def model(request: pytest.FixtureRequest, live: nn.Module) -> OptimizedModel:
    return jettison.optimize(live, PIPELINE, target=request.param)


def int4_bytes(weight: torch.Tensor) -> int:
    """Codes and zero points of half a byte, scales in fp32; rows are padded to whole groups and bytes."""
    rows, columns = weight.shape
    groups = -(-columns // 32)
    return rows * (groups * 16 + groups * 4 + -(-groups // 2))


def is_quantized(name: str, weight: torch.Tensor) -> bool:
    return weight.dim() == 2 and "o_proj" not in name


def parameter_bytes(live: nn.Module) -> int:
    return sum(weight.numel() * 4 for weight in live.parameters())


def test_bytes_before_and_after_are_those_of_the_weights(model: OptimizedModel, live: nn.Module) -> None:
    quantized, cached = model.report.passes
    assert quantized.bytes_before == parameter_bytes(live) + FREQUENCY_BYTES
    after = FREQUENCY_BYTES + sum(
        int4_bytes(weight) if is_quantized(name, weight) else weight.numel() * 4
        for name, weight in live.named_parameters()
    )
    assert quantized.bytes_after == after
    assert after < 0.4 * quantized.bytes_before
    assert (cached.bytes_before, cached.bytes_after) == (after, after)
    assert model.report.weight_bytes == after
    buffers = sum(buffer.numel() * 4 for buffer in live.buffers())
    assert model.report.source_bytes == parameter_bytes(live) + buffers


def test_passes_say_where_they_fired_and_where_not(model: OptimizedModel, live: nn.Module) -> None:
    quantized, cached = model.report.passes
    assert (quantized.name, cached.name) == ("quantize-weights", "cache-kv")
    names = {name for name, weight in live.named_parameters() if is_quantized(name, weight)}
    assert len(names) == LAYERS * 6 + 2
    assert set(quantized.where) == names
    assert quantized.rewrites == len(names)
    assert quantized.misses == []
    layers = [f"model.layers.{layer}.self_attn" for layer in range(LAYERS)]
    assert cached.rewrites == LAYERS
    assert cached.where == layers
    assert [miss.node for miss in cached.misses] == layers
    assert {miss.reason for miss in cached.misses} == {
        "kept full: the layer has no sliding window and no size was given"
    }
    assert model.report.raised == []


def test_facts_about_the_model(model: OptimizedModel) -> None:
    report = model.report
    assert (report.model, report.source, report.pipeline) == ("LlamaForCausalLM", "LlamaForCausalLM", PIPELINE)
    # Keys and values of two heads of 8 channels in fp32, at every position.
    assert report.state_bytes == 2 * LAYERS * 2 * 8 * 4 * CONTEXT
    assert report.context == CONTEXT
    passes = sum(record.seconds for record in report.passes)
    assert 0 < passes < report.seconds < 300
    assert all(record.seconds > 0 for record in report.passes)
    assert {record.kl for record in report.passes} == {None}, "nothing was checked"


def test_unquantised_onnx_weights_are_fp32_whatever_the_source(live: nn.Module) -> None:
    narrow = tiny_model("llama").bfloat16()
    on_onnx, on_torch = (jettison.optimize(narrow, target=target).report for target in ("onnx", "torch"))
    assert on_onnx.weight_bytes == parameter_bytes(live) + FREQUENCY_BYTES
    assert on_onnx.source_bytes == on_torch.source_bytes < 0.51 * on_onnx.weight_bytes
    assert on_torch.weight_bytes == parameter_bytes(live) // 2 + FREQUENCY_BYTES // 2


REPORT = Report(
    "Toy", "folder", "quantize-weights{bits=4}", "onnx",
    [
        PassRecord(
            "quantize-weights", 3, [MissRecord("layers.0[a]", "found [bold] in the name")], 1.5, 4000, 1250, 0.0125,
            0.5, 0.75, ["a", "b", "c"],
        )
    ],
    [MissRecord("layers.1", "not a norm")], 2000, 1250, 640, 64, 2.75,
)  # fmt: skip


def test_dictionary_is_json_and_comes_back() -> None:
    values = json.loads(json.dumps(REPORT.as_dict()))
    assert Report.from_dict(values) == REPORT
    assert values["passes"][0]["misses"] == [{"node": "layers.0[a]", "reason": "found [bold] in the name"}]
    assert values["not_recognised"] == [{"node": "layers.1", "reason": "not a norm"}]


def test_text_has_every_number_and_every_miss() -> None:
    text = str(REPORT)
    row = next(line for line in text.splitlines() if "│" in line)
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "quantize-weights", "3", "1", "1.50", "4,000", "1,250", "1.25e-02",
    ]  # fmt: skip
    assert "weights 2,000 -> 1,250 bytes; states of one sequence of 64 tokens 640 bytes; 2.8 s" in text
    # What reads like markup is text.
    assert "quantize-weights did not fire at layers.0[a]: found [bold] in the name" in text
    assert "not recognised: layers.1: not a norm" in text
