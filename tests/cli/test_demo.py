"""`jettison demo`: the bundled model before and after, offline."""

from __future__ import annotations

import pytest

import jettison
import jettison.cli.demo as demo
from jettison.api import parse_passes, pipeline_text

KEYS = {"pipeline", "target", "diff", "source_bytes", "prompt", "original", "optimized"}
COLUMN_KEYS = {
    "weight_bytes", "state_bytes", "decode_tokens_per_s", "perplexity", "kl", "top1_agreement", "tokens", "text",
}  # fmt: skip


@pytest.fixture
def made_before(onnx_fp32_artifact, onnx_artifact, two_layers, monkeypatch):
    """What the demo asks for is there already, made by the same calls: emitting it anew takes most of its time."""

    def optimize(folder, passes, *, target, seed, allow_spinning):
        assert (folder, target, seed) == (two_layers, "onnx", 0)
        pipeline = pipeline_text(parse_passes(passes))
        loaded = (jettison.load(path, allow_spinning=allow_spinning) for path in (onnx_fp32_artifact, onnx_artifact))
        (found,) = [model for model in loaded if model.report.pipeline == pipeline]
        return found

    monkeypatch.setattr(jettison, "optimize", optimize)
    monkeypatch.setattr(demo, "bundled_model", lambda: two_layers)


def test_demo_compares_a_model_with_itself_at_4_bits(run, monkeypatch, made_before):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    documents, print_document = [], demo._print

    def spy(document, terminal):
        documents.append(document)
        print_document(document, terminal)

    monkeypatch.setattr(demo, "_print", spy)
    result = run("demo")
    assert (result.code, result.err) == (0, "")
    document = documents[0]
    assert set(document) == KEYS
    original, optimized = document["original"], document["optimized"]
    assert set(original) == set(optimized) == COLUMN_KEYS
    assert original["weight_bytes"] > 6 * optimized["weight_bytes"]
    assert original["state_bytes"] == optimized["state_bytes"] == 4 * 4 * 1024 * 32 * 4
    assert original["kl"] < 1e-6
    assert 1e-4 < optimized["kl"] < 0.03
    assert original["top1_agreement"] > 0.999
    assert 0.8 < optimized["top1_agreement"] < 1
    assert original["perplexity"] < optimized["perplexity"] < 1.1 * original["perplexity"]
    assert original["text"] != optimized["text"]
    for part in (
        "quantize-weights{bits=4,group=32,symmetric=false,method=rtn},cache-kv{policy=full}",
        "jettison.quantized_linear",
        "weight bytes", "state bytes at 1024 tokens", "decode tokens/s", "perplexity", "KL (nats/token)",
        "top-1 agreement", original["text"], optimized["text"],
    ):  # fmt: skip
        assert part in result.out


def test_json_is_one_document_about_the_users_text(run, small_model, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "bundled_model", lambda: small_model)  # the same in a tenth of the time
    text = tmp_path / "text.txt"
    text.write_text("The captain looked out over the sea, and the sea looked back at him. " * 40)
    result = run("demo", "--json", "--target", "torch", "--text", text, "--prompt", "Hello")
    assert (result.code, result.err) == (0, "")
    document = result.json
    assert set(document) == KEYS
    assert (document["target"], document["prompt"]) == ("torch", "Hello")
    assert document["original"]["tokens"] % 255 == 0


def test_text_that_is_too_short_is_refused_at_once(run, tmp_path):
    (tmp_path / "text.txt").write_text("Too short.")
    run("demo", "--text", tmp_path / "text.txt").fails(2, "needs at least 256")


def test_without_the_repository_the_error_says_what_to_do(run, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "__file__", str(tmp_path / "site-packages" / "jettison" / "cli" / "demo.py"))
    run("demo").fails(1, "Clone the repository")
