"""`jettison optimize`: the report, what it writes, and what it does not."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json

import pytest

import jettison
from jettison.runtime.onnx_executor import multiplies_int8
from tests.cli.running import INT4, MODEL

KEYS = {
    "model", "source", "pipeline", "target", "passes", "not_recognised", "source_bytes", "weight_bytes", "state_bytes",
    "prefill", "prefill_bytes", "prefill_kl", "calibration",
    "context", "seconds", "artifact", "dry_run",
}  # fmt: skip
# What design.md promises; a record may say more.
PASS_KEYS = {"name", "rewrites", "misses", "seconds", "bytes_before", "bytes_after", "kl"}


pytestmark = pytest.mark.usefixtures("captured_once")


def test_dry_run_reports_and_writes_nothing(run, small_model, is_left_clean, monkeypatch):
    monkeypatch.chdir(is_left_clean)
    result = run("optimize", small_model, "--passes", INT4, "--dry-run", "--json")
    assert (result.code, result.err) == (0, "")
    report = result.json
    assert set(report) == KEYS
    assert (report["artifact"], report["dry_run"], report["target"]) == (None, True, "onnx")
    assert [record["name"] for record in report["passes"]] == ["quantize-weights", "cache-kv"]
    quantized, cached = report["passes"]
    assert set(quantized) >= PASS_KEYS
    assert quantized["rewrites"] == 9  # seven linears of the layer, the embedding, the head tied to it
    assert quantized["bytes_after"] < 0.4 * quantized["bytes_before"]
    assert report["source_bytes"] == (4096 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 64 + 3 * 32) * 2
    assert (quantized["kl"], quantized["misses"]) == (None, [])
    assert cached["rewrites"] == 1
    assert report["pipeline"] == "quantize-weights{bits=4,group=32,symmetric=false,method=rtn},cache-kv{policy=full}"
    assert report["state_bytes"] == 2 * 2 * 1024 * 8 * 4


def test_dry_run_tells_people_what_happened(run, small_model):
    result = run("optimize", small_model, "--passes", "quantize-weights{skip='nothing'}", "--dry-run")
    assert result.code == 0
    assert "quantize-weights" in result.out
    assert "found in the name of no weight" in result.out  # the miss and its reason
    assert "dry run" in result.out
    assert "…" not in result.out
    assert max(map(len, result.out.splitlines())) > 80  # not wrapped to some terminal's width


def test_dry_run_reports_the_bytes_that_the_artifact_would_have(run, small_model, tmp_path):
    for target in ("onnx", "torch"):
        dry = run("optimize", small_model, "--target", target, "--dry-run", "--json").json
        written = run("optimize", small_model, "--target", target, "--out", tmp_path / target, "--json").json
        assert dry["weight_bytes"] == written["weight_bytes"]


def test_artifact_is_written_and_named(run, small_model, tmp_path):
    out = tmp_path / "deep" / "er" / "out"
    result = run("optimize", small_model, "--target", "torch", "--out", out, "--seed", "7", "--json")
    assert (result.code, result.err) == (0, "")
    assert result.json["artifact"] == str(out)
    assert result.json["dry_run"] is False
    assert json.loads((out / "jettison.json").read_text())["seed"] == 7
    assert run("verify", out).code == 0


def test_context_is_the_most_that_a_session_may_hold(run, small_model, tmp_path):
    result = run("optimize", small_model, "--target", "torch", "--context", 64, "--out", tmp_path / "out", "--json")
    assert result.code == 0, result.err
    assert result.json["context"] == 64
    assert run("inspect", tmp_path / "out", "--json").json["model"]["context"] == 64


def test_overwrite_replaces_an_artifact_and_only_that(run, small_artifact, small_model, copied, tmp_path):
    out = copied(small_artifact)
    (out / "jettison.json").read_text()
    arguments = ("optimize", small_model, "--target", "torch", "--passes", INT4, "--out", out)
    run(*arguments).fails(2, "exists already", "--overwrite")
    result = run(*arguments, "--overwrite", "--json")
    assert result.code == 0, result.err
    assert run("inspect", out, "--json").json["pipeline"].startswith("quantize-weights")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    run("optimize", small_model, "--out", tmp_path / "mine", "--overwrite").fails(2, "only an earlier artifact")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


@pytest.fixture(scope="module")
def checked(small_model):
    """The report of a run with a budget that is easy to keep; a budget implies --check."""
    from jettison.cli import main

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["optimize", str(small_model), "--passes", INT4, "--max-kl", "1", "--dry-run", "--json"]) == 0
    return json.loads(out.getvalue())


def test_check_measures_the_drift_of_every_pass(checked):
    quantized, cached = checked["passes"]
    assert 0 < quantized["kl"] < 1
    assert quantized["max_error"] > 0
    assert 0 < quantized["top1_agreement"] <= 1
    assert abs(cached["kl"] - quantized["kl"]) < 1e-6  # exact


def test_budget_that_is_missed_exits_3_and_writes_nothing(run, small_model, is_left_clean):
    arguments = ("--passes", INT4, "--target", "torch", "--max-kl", "1e-12", "--out", is_left_clean / "out")
    run("optimize", small_model, *arguments).fails(3, "quantize-weights", "1e-12")


def test_calibration_text_is_used_and_recorded(run, small_model, checked, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The captain looked out over the sea, and the sea looked back. " * 200)
    arguments = ("optimize", small_model, "--passes", INT4, "--target", "torch", "--check", "--json")
    mine = run(*arguments, "--calibration", text, "--out", tmp_path / "mine")
    assert mine.code == 0, mine.err
    assert mine.json["passes"][0]["kl"] != checked["passes"][0]["kl"]
    assert json.loads((tmp_path / "mine" / "jettison.json").read_text())["calibration"] == sha256(text)


def test_calibration_text_that_nothing_reads_is_refused(run, small_model, tmp_path):
    arguments = ("optimize", small_model, "--dry-run", "--calibration", tmp_path / "none.txt")
    run(*arguments).fails(2, "--check")
    run(*arguments, "--check").fails(2, "none.txt", "no such file")
    run(*arguments, "--passes", "quantize-weights{method=gptq}").fails(2, "none.txt", "no such file")


@pytest.mark.parametrize("size", ["64", "0x512", "64x", "ax9"])
def test_calibration_size_is_windows_and_tokens(run, small_model, size):
    run("optimize", small_model, "--dry-run", "--calibration-size", size).fails(2, "such as 64x512", size)


def test_what_is_finished_goes_when_the_artifact_is_there(run, small_model, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The captain looked out over the sea, and the sea looked back. " * 20)
    arguments = ("--target", "torch", "--calibration", text, "--calibration-size", "2x16", "--out", tmp_path / "out")
    found = run("optimize", small_model, "--passes", "quantize-weights{method=gptq}", *arguments, "--json")
    assert found.code == 0, found.err
    assert found.json["calibration"]["windows"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "text.txt"]


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_strict_makes_a_miss_an_error(run, small_model, is_left_clean):
    passes = "quantize-weights{skip='nothing'}"
    run("optimize", small_model, "--passes", passes, "--strict", "--out", is_left_clean / "out").fails(
        1, "strict mode", "found in the name of no weight"
    )


def test_nowhere_to_write_is_a_usage_error(run):
    run("optimize", MODEL).fails(2, "--out DIR", "--dry-run")


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "much"])
def test_max_kl_must_be_a_divergence(run, value):
    run("optimize", MODEL, "--dry-run", f"--max-kl={value}").fails(2, "--max-kl", "at least 0")


def test_fast_prefill_says_what_it_adds_and_costs(run, small_model, tmp_path, monkeypatch):
    arguments = ("optimize", small_model, "--passes", "quantize-weights{bits=4,group=32}", "--prefill", "fast")
    plain = run(*arguments[:-2], "--dry-run", "--json").json
    fast = run(*arguments, "--dry-run", "--json").json
    assert (plain["prefill"], plain["prefill_bytes"]) == ("exact", 0)
    assert (fast["prefill"], fast["prefill_kl"]) == ("fast", None)
    assert fast["weight_bytes"] == plain["weight_bytes"]
    made, optimize = [], jettison.optimize
    monkeypatch.setattr(jettison, "optimize", lambda *given, **named: made.append(optimize(*given, **named)) or made[0])
    result = run(*arguments, "--check", "--out", tmp_path / "out")
    assert "fast: an 8-bit copy of the weights" in result.out
    assert ("; KL of its prompts" in result.out) == multiplies_int8()
    assert (tmp_path / "out" / "prefill.fast.onnx").is_file()
    run(*arguments, "--target", "torch", "--dry-run").fails(2, "fast needs the ONNX target")
    checked = made[0].report.as_dict()
    if not multiplies_int8():
        assert checked["prefill_kl"] is None
        return
    assert f"{checked['prefill_kl']:.2e} nats per token" in result.out
    # More than what rounding the weights costs by itself, and of its order.
    weights = checked["passes"][-1]["kl"]
    assert weights < checked["prefill_kl"] < 20 * weights
