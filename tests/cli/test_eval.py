"""`jettison eval`: the measures, and budgets on them."""

from __future__ import annotations

import math

import pytest

KEYS = {
    "perplexity", "bits_per_byte", "kl", "top1_agreement", "tokens", "weight_bytes", "state_bytes",
    "certified_fraction",
}  # fmt: skip
TEXT = "The captain looked out over the sea, and the sea looked back at him, as it had done for forty years. "
WINDOW = 48


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT * 12)
    return path


def test_json_against_a_reference(run, onnx_artifact, two_layers, text):
    result = run("eval", onnx_artifact, "--text", text, "--reference", two_layers, "--context", WINDOW, "--json")
    assert (result.code, result.err) == (0, "")
    document = result.json
    assert set(document) == KEYS
    assert 2 < document["perplexity"] < 500
    assert 0.3 < document["bits_per_byte"] < 4
    assert 1e-5 < document["kl"] < 0.03
    assert 0.8 < document["top1_agreement"] <= 1
    assert document["tokens"] % (WINDOW - 1) == 0
    assert document["certified_fraction"] is None
    assert document["state_bytes"] == 4 * 4 * 64 * 32 * 4  # a window of 48 tokens rounded up to 64 slots


def test_unquantised_small_model_has_no_divergence(run, small_artifact, small_model, text):
    arguments = ("eval", small_artifact, "--text", text, "--reference", small_model, "--context", WINDOW, "--json")
    whole = run(*arguments).json
    decoded = run(*arguments, "--prefill", 16).json
    assert whole["kl"] < 1e-6
    assert decoded["kl"] < 1e-6
    assert decoded["tokens"] == whole["tokens"] // (WINDOW - 1) * (WINDOW - 16)


def test_without_reference_there_is_no_kl(run, small_artifact, text):
    document = run("eval", small_artifact, "--text", text, "--context", WINDOW, "--json").json
    assert (document["kl"], document["top1_agreement"]) == (None, None)
    assert math.isfinite(document["perplexity"])


def test_default_text_is_sampled_and_follows_the_seed(run, small_artifact):
    def perplexity(*arguments):
        return run("eval", small_artifact, "--context", 16, "--json", *arguments).json["perplexity"]

    assert perplexity() == perplexity("--seed", 0) != perplexity("--seed", 1)


def test_table_names_measures_and_units(run, small_artifact, small_model, text):
    result = run("eval", small_artifact, "--text", text, "--reference", small_model, "--context", WINDOW)
    assert (result.code, result.err) == (0, "")
    for part in ("perplexity", "nats/token", "top1_agreement", "tokens scored", str(text)):
        assert part in result.out


def test_missed_budget_reports_and_exits_3(run, onnx_artifact, two_layers, text):
    arguments = ("eval", onnx_artifact, "--text", text, "--reference", two_layers, "--context", WINDOW, "--json")
    result = run(*arguments, "--max-kl", "1e-9")
    assert result.code == 3
    assert set(result.json) == KEYS
    assert result.err.startswith("error: [eval] KL ")
    assert "1e-09" in result.err
    assert run(*arguments, "--max-kl", "0.03").code == 0


def test_usage_errors(run, small_artifact, text):
    for arguments, named in (
        (("--max-kl", "0.1"), "--reference"),
        (("--context", "4096"), "context=4096"),
        (("--context", "1"), "context=1"),
        (("--prefill", "1024"), "prefill=1024"),
    ):
        run("eval", small_artifact, "--text", text, *arguments).fails(2, named)


def test_says_that_prompts_are_dense(run, small_model, tmp_path, text):
    made = tmp_path / "sparse"
    passes = "predict-mlp-sparsity{keep=0.5,group=8,force=true}"
    assert run("optimize", small_model, "--passes", passes, "--calibration-size", "2x16", "--target", "torch", "--out",
               made).code == 0  # fmt: skip
    asked = ("eval", made, "--text", text, "--context", WINDOW, "-v")
    hint = "add --prefill P"
    assert hint in run(*asked).err
    assert hint not in run(*asked, "--prefill", 16).err
