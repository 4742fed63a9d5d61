"""Bad input: one clear error on stderr, the right exit code, no traceback, and no half-written artifact."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import safetensors.torch
import torch

import jettison
from jettison.ir.errors import OptionError
from tests.cli.running import INT4, MODEL, forge, optimized, save_small_model


@pytest.fixture
def model(small_model, tmp_path):
    """A copy of the small model, to damage."""
    return shutil.copytree(small_model, tmp_path / "model")


@pytest.fixture
def refuse(run, is_left_clean):
    """`jettison optimize FOLDER` fails with exit code 1, names all parts, and leaves nothing."""

    def check(folder, *parts, code=1, arguments=()):
        return run("optimize", folder, *arguments, "--out", is_left_clean / "out").fails(code, *parts)

    return check


def edit_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_missing_folder(refuse, tmp_path):
    refuse(tmp_path / "nowhere", "nowhere", "no such folder")


def test_folder_that_is_not_a_model(refuse, tmp_path):
    (tmp_path / "photos").mkdir()
    refuse(tmp_path / "photos", "photos", "config.json", "empty")
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    refuse(tmp_path / "photos", "cat.jpg", "config.json")


def test_file_instead_of_a_folder(refuse, model):
    refuse(model / "model.safetensors", "Pass its folder")


@pytest.mark.parametrize("text", ["", "{", "[1]", "{}", '{"model_type": "llama"}'])
def test_damaged_config(refuse, model, text):
    (model / "config.json").write_text(text)
    refuse(model, "config.json" if text in ("", "{", "[1]") else "model_type" if text == "{}" else "")


def test_missing_weights(refuse, model):
    (model / "model.safetensors").unlink()
    refuse(model, "model.safetensors")


@pytest.mark.parametrize("keep", [0, 4, 100, -1])
def test_truncated_weights(refuse, model, keep):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refuse(model, "model.safetensors", "damaged or incomplete")


@pytest.fixture
def sharded(tmp_path):
    """The small model in several files."""
    save_small_model(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    return tmp_path / "sharded"


def test_sharded_models_work(run, sharded):
    result = run("optimize", sharded, "--target", "torch", "--dry-run", "--json")
    assert result.code == 0, result.err


def test_missing_shard(refuse, sharded):
    shard = sorted(sharded.glob("model-*.safetensors"))[-1]
    shard.unlink()
    refuse(sharded, shard.name)


def test_weights_in_bin_files_only(refuse, model):
    tensors = safetensors.torch.load_file(model / "model.safetensors")
    torch.save(tensors, model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    refuse(model, "pytorch_model.bin", "safetensors")


def test_already_quantised_checkpoint(refuse, model):
    edit_config(model, quantization_config={"quant_method": "fp8"})
    refuse(model, "already quantised", "fp8")


def test_remote_code_is_not_run(refuse, model):
    (model / "modeling.py").write_text("raise SystemExit('this code was run')")
    edit_config(model, model_type="mystery", auto_map={"AutoModelForCausalLM": "modeling.Mystery"})
    refuse(model, "auto_map", "mystery")


def test_artifact_instead_of_a_model(refuse, small_artifact):
    refuse(small_artifact, "an artifact that jettison made")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers(refuse, model, value):
    path = model / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name][3, 5] = value
    safetensors.torch.save_file(tensors, path, {"format": "pt"})
    refuse(model, name, "[3, 5]")


def test_model_without_tokenizer_can_be_optimised_but_not_prompted(run, model, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    out = optimized(model, tmp_path / "out", "--target", "torch")
    run("generate", out, "--prompt", "Hello").fails(1, "no tokenizer files")
    (tmp_path / "text.txt").write_text("Hello")
    run("eval", out, "--text", tmp_path / "text.txt").fails(1, "no tokenizer files")


@pytest.mark.parametrize(
    ("passes", "parts"),
    [
        ("quantise-weights", ("unknown pass", "Did you mean quantize-weights", "^")),
        ("quantize-weights{bit=4}", ("no option 'bit'", "bits", "column 18")),
        ("quantize-weights{bits=5}", ("'bits' needs 8|4", "found 5", "column 23")),
        ("quantize-weights{bits=4", ("column 24", "'}'", "^")),
        ("quantize-weights{bits=4}}", ("column 25", "^")),
        ("quantize-weights,,cache-kv", ("column 18", "a pass name", "^")),
        ("cache-kv{policy=ful}", ("unknown policy", "full")),
        ("quantize-weights{skip='['}", ("regular expression",)),
    ],
)
def test_pipeline_that_does_not_parse(refuse, small_model, passes, parts):
    refuse(small_model, *parts, code=2, arguments=("--passes", passes))


def test_syntax_error_points_at_its_column(run):
    lines = run("optimize", MODEL, "--dry-run", "--passes", "quantize-weights{bits=4").err.splitlines()
    assert lines[1].index("{") + len("{bits=4") == lines[2].index("^")


@pytest.mark.parametrize(
    ("passes", "right"),
    [
        ("quantize-weights,merge-qkv-projections", "merge-qkv-projections,quantize-weights"),
        ("cache-kv,cache-kv", "once"),
    ],
)
def test_wrong_order_of_passes_names_the_right_one(refuse, small_model, passes, right):
    refuse(small_model, right, code=2, arguments=("--passes", passes, "--target", "torch"))


def test_tokens_out_of_range(run, small_artifact):
    run("generate", small_artifact, "--prompt-ids", "5,4096").fails(2, "4096", "needs 0 to 4095")
    run("generate", small_artifact, "--prompt-ids=-1,5").fails(2, "-1")
    run("generate", small_artifact, "--prompt-ids", "").fails(2, "no tokens")


def test_prompt_longer_than_the_context(run, small_artifact):
    prompt = "captain " * 2000
    result = run("generate", small_artifact, "--prompt", prompt)
    result.fails(2, "at most 1023", "Shorten the prompt")


def test_generation_ends_at_the_context(run, small_artifact):
    ids = ",".join(["5"] * 1020)
    document = run("generate", small_artifact, "--prompt-ids", ids, "--max-new-tokens", 100, "--json").json
    assert (document["new_tokens"], document["finish_reason"]) == (4, "length")


def test_empty_prompt_and_text(run, small_artifact, tmp_path):
    run("generate", small_artifact, "--prompt", "").fails(2, "no tokens")
    text = tmp_path / "text.txt"
    for content, part in (("", "no text"), (" \n", "no text"), ("Hello.", "needs at least 1024")):
        text.write_text(content)
        run("eval", small_artifact, "--text", text).fails(2, part)
    text.write_bytes(b"\xff\xfe\x00")
    run("eval", small_artifact, "--text", text).fails(2, "UTF-8")
    run("eval", small_artifact, "--text", tmp_path).fails(2, "cannot be read")
    run("eval", small_artifact, "--text", tmp_path / "none").fails(2, "no such file")


def test_prompt_that_is_not_text(run, small_artifact):
    run("generate", small_artifact, "--prompt", "\udcff").fails(2, "UTF-8")


@pytest.fixture(scope="session")
def encoder_artifact(tmp_path_factory):
    """A random BERT, which generates nothing."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64,
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("encoder")
    transformers.BertModel(config).save_pretrained(folder / "model")
    return optimized(folder / "model", folder / "out", "--target", "torch")


def test_generating_with_an_encoder(run, encoder_artifact):
    run("generate", encoder_artifact, "--prompt-ids", "5,6").fails(2, "is an encoder")
    run("eval", encoder_artifact).fails(2, "is an encoder")
    run("bench", encoder_artifact).fails(2, "is an encoder")


def test_out_that_exists_is_refused_before_the_work(run, model, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")

    def too_late(*arguments, **options):
        raise AssertionError("the model was read before the destination was checked")

    monkeypatch.setattr(jettison, "optimize", too_late)
    run("optimize", model, "--out", tmp_path / "out").fails(2, "exists already")
    run("optimize", model, "--out", model / "config.json" / "out").fails(1, "lies inside", "a file")
    assert os.listdir(tmp_path / "out") == ["mine.txt"]


def test_damaged_artifact(run, onnx_artifact, copied):
    artifact = copied(onnx_artifact)
    with open(artifact / "model.onnx", "r+b") as file:
        file.truncate(1000)
    for command in (("generate", "--prompt", "Hello"), ("inspect",), ("explain",), ("diff",), ("verify",), ("bench",)):
        run(command[0], artifact, *command[1:]).fails(1, "model.onnx", "1,000 bytes")
    (artifact / "model.onnx").unlink()
    run("generate", artifact, "--prompt", "Hello").fails(1, "model.onnx", "missing")


def test_artifact_of_a_newer_format(run, small_artifact, copied):
    artifact = copied(small_artifact)
    forge(artifact, format_version=2)
    run("generate", artifact, "--prompt", "Hello").fails(1, "newer jettison", "pip install -U jettison")


def test_onnx_runtime_too_old(run, onnx_artifact, copied):
    artifact = copied(onnx_artifact)
    forge(artifact, requires={"onnxruntime": "99.1"})
    run("generate", artifact, "--prompt", "Hello").fails(1, "onnxruntime", "99.1", "pip install -U")


def test_folder_that_is_no_artifact(run, tmp_path):
    run("generate", tmp_path, "--prompt", "Hello").fails(1, "jettison.json")
    run("generate", MODEL, "--prompt", "Hello").fails(1, f"jettison optimize {MODEL}")


def test_reference_of_another_vocabulary(run, small_artifact, tmp_path):
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    run("eval", small_artifact, "--context", 16, "--reference", tmp_path / "other").fails(2, "vocab")
    run("eval", small_artifact, "--context", 16, "--reference", tmp_path / "none").fails(1, "no such folder")


@pytest.fixture
def full_disk():
    """No file may grow beyond 100 kB, until the test has ended."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("target", ["onnx", "torch"])
def test_full_disk_while_saving(run, small_model, is_left_clean, full_disk, target):
    result = run("optimize", small_model, "--target", target, "--out", is_left_clean / "out")
    assert result.fails(1, "largest size allowed", "ulimit").err.count("\n") == 1


def test_ctrl_c_while_saving(small_model, is_left_clean):
    command = [
        sys.executable,
        "-m",
        "jettison",
        "optimize",
        small_model,
        "--passes",
        INT4,
        "--out",
        is_left_clean / "out",
    ]
    process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 150
    while not os.listdir(is_left_clean) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [name.startswith(".out.jettison-new-") for name in os.listdir(is_left_clean)] == [True]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out, err) == (130, "", "error: interrupted\n")


def test_library_refuses_the_same_way(small_artifact):
    with pytest.raises(OptionError, match="needs 0 to 4095"):
        jettison.load(small_artifact).generate([[4096]])
