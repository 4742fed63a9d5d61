"""`jettison plan`: bytes, times and memory of a model, and what to stream where it does not fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from jettison.api import parse_passes
from jettison.ir.roofline import TYPICAL_CPU, Rates
from jettison.planner import Wanted, open_program, plan
from tests.cli.running import optimized

KEYS = {
    "model", "fits", "bound_by", "predicted_ms_per_token", "placement", "memory", "phases", "target", "pipeline",
    "batch", "context", "prompt", "rates", "notes",
}  # fmt: skip
PHASE_KEYS = {
    "phase", "tokens", "weight_bytes_pinned", "weight_bytes_streamed", "state_bytes_read", "state_bytes_written",
    "activation_bytes", "operations", "ms", "ms_per_token", "ms_computing", "ms_reading_disk", "ms_copying",
    "ms_by_kind", "bound_by",
}  # fmt: skip
RATES = replace(TYPICAL_CPU, disk=1e8, process_bytes=1_000_000)
WORK = ("--context", "64", "--prompt", "16")


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    """Rates of no machine; how often they were asked for, and how."""
    asked = []

    def rates(folder=None, *, remeasure=False) -> Rates:
        asked.append((folder, remeasure))
        return RATES

    monkeypatch.setattr("jettison.planner.machine_rates", rates)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    return asked


def planned(run, model, *options):
    result = run("plan", model, *WORK, "--json", *options)
    assert (result.code, result.err) == (0, "")
    document = result.json
    assert set(document) - {"throughput"} == KEYS
    assert all(set(phase) == PHASE_KEYS for phase in document["phases"])
    return document


def test_everything_fits_where_nothing_is_limited(run, small_model, measured):
    document = planned(run, small_model, "--dtype", "bfloat16")
    assert document["fits"] is True
    assert document["placement"]["disk"] == {"tensors": 0, "bytes": 0}
    assert document["placement"]["pass"] is None
    assert document["memory"]["limit"] is None
    prefill, decode = document["phases"]
    assert (prefill["phase"], prefill["tokens"], decode["phase"], decode["tokens"]) == ("prefill", 16, "decode", 1)
    assert decode["weight_bytes_streamed"] == 0
    assert document["predicted_ms_per_token"] == decode["ms_per_token"] == decode["ms"]
    assert document["bound_by"] == decode["bound_by"]
    # Two heads of keys and of values, 8 channels in bf16.
    assert decode["state_bytes_read"] == 2 * 2 * 8 * 64 * 2
    assert decode["state_bytes_written"] == 2 * 2 * 8 * 2
    assert document["rates"]["is_measured"] is True
    assert [remeasure for _, remeasure in measured] == [False]
    planned(run, small_model, "--remeasure")
    assert measured[-1][1] is True


def test_a_limit_streams_what_does_not_fit(run, small_model):
    free = planned(run, small_model)
    limit = free["memory"]["total"] - 10_000
    document = planned(run, small_model, "--host-memory", str(limit))
    assert document["fits"] is True
    assert document["memory"]["limit"] == limit
    assert document["memory"]["total"] <= limit
    placement = document["placement"]
    assert placement["disk"]["bytes"] > 0
    held = free["placement"]["pinned"]
    assert placement["pinned"]["bytes"] + placement["disk"]["bytes"] == held["bytes"]
    assert placement["pinned"]["tensors"] + placement["disk"]["tensors"] == held["tensors"]
    decode, before = document["phases"][1], free["phases"][1]
    assert decode["weight_bytes_streamed"] > 0
    both = decode["weight_bytes_pinned"] + decode["weight_bytes_streamed"]
    assert both == before["weight_bytes_pinned"]
    assert decode["ms_reading_disk"] == pytest.approx(1e3 * decode["weight_bytes_streamed"] / RATES.disk)
    assert decode["ms"] > before["ms"]
    # The text can be used as it is.
    (pass_,) = parse_passes(placement["pass"])
    assert (pass_.host, pass_.reserve, pass_.context, pass_.prompt) == (limit, 1_000_000, 64, 16)


def test_the_pass_of_a_plan_places_as_planned(run, small_model, tmp_path):
    free = planned(run, small_model, "--dtype", "float32")
    limit = free["memory"]["total"] - 10_000
    document = planned(run, small_model, "--host-memory", str(limit))
    artifact = optimized(small_model, tmp_path / "out", "--target", "torch", "--passes", document["placement"]["pass"])
    again = planned(run, artifact)
    assert again["placement"]["disk"] == document["placement"]["disk"]
    assert again["placement"]["ring_bytes"] == document["placement"]["ring_bytes"]
    assert again["predicted_ms_per_token"] == pytest.approx(document["predicted_ms_per_token"])
    # An artifact that has its placement can be placed anew.
    whole = planned(run, artifact, "--host-memory", "1GB")
    assert whole["placement"]["disk"]["tensors"] == 0


def test_the_table_says_the_same(run, small_model):
    free = planned(run, small_model)
    limit = free["memory"]["total"] - 10_000
    document = planned(run, small_model, "--host-memory", str(limit))
    result = run("plan", small_model, *WORK, "--host-memory", str(limit))
    assert (result.code, result.err) == (0, "")
    decode = document["phases"][1]
    row = next(line for line in result.out.splitlines() if line.startswith("decode "))
    for key in ("weight_bytes_pinned", "weight_bytes_streamed", "state_bytes_read", "operations"):
        assert f"{decode[key]:,}" in row
    assert row.split()[-1] == decode["bound_by"]
    assert f"pass       {document['placement']['pass']}\n" in result.out
    assert re.search(rf"^limit +{limit:,}$", result.out, re.MULTILINE)
    assert re.search(rf"^disk +{document['placement']['disk']['tensors']} tensors", result.out, re.MULTILINE)


def test_an_infeasible_plan_is_a_usage_error_that_says_what_would_do(run, small_model):
    result = run("plan", small_model, *WORK, "--host-memory", "1MB")
    result.fails(2, "place-weights", "bytes are missing", "Give host=", "quantize-weights")
    found = run("plan", small_model, *WORK, "--host-memory", "1MB", "--json")
    assert found.code == 2
    assert found.json["fits"] is False
    assert {"bound_by", "predicted_ms_per_token", "placement"} <= set(found.json)
    assert "bytes are missing" in found.json["problem"]
    enough = re.search(r"Give host=(\d+)", found.json["problem"])[1]
    assert planned(run, small_model, "--host-memory", enough)["fits"] is True


@pytest.mark.parametrize("flag", ["--host-memory", "--device-memory", "--disk"])
@pytest.mark.parametrize("size", ["2Gib", "much", "-1", "0", "1.5", "", "1e9"])
def test_sizes_that_are_none(run, small_model, flag, size):
    run("plan", small_model, f"{flag}={size}").fails(2, flag)


def test_sizes_have_units(run, small_model):
    for text, limit in (("2GiB", 2 << 30), ("700MB", 700_000_000), ("1.5GB", 1_500_000_000)):
        assert planned(run, small_model, "--host-memory", text)["memory"]["limit"] == limit


def test_main_memory_is_both_for_targets_that_compute_there(run, small_model):
    for options in (("--device-memory", "1GB"), ("--device-memory", "1GB", "--host-memory", "2GB")):
        assert planned(run, small_model, *options)["memory"]["limit"] == 1_000_000_000


def test_a_gpu_that_is_not_there_has_usual_rates(run, small_model):
    document = planned(run, small_model, "--target", "triton", "--device-memory", "3GiB")
    assert document["rates"]["is_measured"] is False
    assert document["memory"]["limit"] == 3 << 30
    assert "usual figures, no GPU was found" in run("plan", small_model, *WORK, "--target", "triton").out


def test_fewer_bits_and_longer_contexts_change_what_is_read(run, small_model):
    dense = planned(run, small_model)["phases"][1]
    packed = planned(run, small_model, "--passes", "quantize-weights{bits=4,group=32}")["phases"][1]
    assert packed["weight_bytes_pinned"] < dense["weight_bytes_pinned"] / 5
    longer = planned(run, small_model, "--context", "1024")["phases"][1]
    assert longer["state_bytes_read"] == 16 * dense["state_bytes_read"]
    assert longer["weight_bytes_pinned"] == dense["weight_bytes_pinned"]


def test_throughput_is_planned_too(run, small_model):
    document = planned(run, small_model, "--objective", "throughput", "--host-memory", "100MB")
    found = document["throughput"]
    assert found["tokens_per_second"] > 1e3 / document["predicted_ms_per_token"]
    assert found["rows"] * found["batches"] > 1
    assert sum(found["weights"]) == pytest.approx(1)
    text = run("plan", small_model, *WORK, "--objective", "throughput", "--host-memory", "100MB").out
    assert f"throughput {found['text']}" in text


def test_an_onnx_artifact_points_to_its_model(run, onnx_artifact):
    run("plan", onnx_artifact).fails(1, "hold no program to plan", "--target onnx", "quantize-weights")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--passes", "quantize-weights"), ("an artifact has its passes and its target (torch) already",)),
        (("--target", "triton"), ("an artifact has its passes",)),
    ],
)
def test_an_artifact_is_what_it_is(run, small_artifact, options, parts):
    run("plan", small_artifact, *options).fails(2, *parts)


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (("--passes", "place-weights{host=1GB}"), ("a plan writes itself", "--host-memory")),
        (("--passes", "no-such-pass"), ("unknown pass",)),
        (("--context", "4096"), ("context=4096", "at most 1024")),
        (("--batch", "0"), ("--batch",)),
        (("--target", "cuda"), ("--target",)),
    ],
)
def test_usage_errors(run, small_model, options, parts):
    run("plan", small_model, *options).fails(2, *parts)


def test_a_model_that_is_none(run, tmp_path):
    run("plan", tmp_path / "missing").fails(1, "missing")


def test_an_unknown_target_is_refused_in_python_too(small_model):
    with pytest.raises(Exception, match="target='cuda': needed one of onnx, torch, triton"):
        open_program(small_model, "", "cuda", "float32")


def test_rates_can_be_given(small_model, measured):
    program, target = open_program(small_model, "", None, "float32")
    fast = plan(program, target, Wanted(context=64, prompt=16), RATES)
    slow = plan(program, target, Wanted(context=64, prompt=16), replace(RATES, call_seconds=1.0))
    assert slow["predicted_ms_per_token"] > 1000 > fast["predicted_ms_per_token"]
    assert slow["bound_by"] == "calls"
    assert measured == []
