"""`jettison prepare`: packed weights in the cache, found by every load."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import onnx
import onnxruntime
import pytest

import jettison
from jettison.ir.errors import UnsupportedError
from jettison.runtime import prepared
from jettison.runtime.artifact import Artifact

PROMPT = [[1, 40, 7, 300, 12]]
# Anonymous bytes that opening the executor adds, in a process of its own.
MEASURE = """
import sys, jettison
def anonymous():
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith("RssAnon"))
import torch, onnxruntime, onnxruntime.capi.onnxruntime_pybind11_state
model = jettison.load(sys.argv[1], threads=1)
before = anonymous()
executor = model.executor
print(anonymous() - before, executor.is_prepared)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JETTISON_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def tokens(folder: Path) -> tuple[list[list[int]], bool]:
    model = jettison.load(folder, threads=1)
    rows = model.generate(PROMPT, max_new_tokens=12)
    return rows, model.executor.is_prepared


def test_a_prepared_artifact_gives_the_same_tokens(run, onnx_artifact, cache):
    plain, is_prepared = tokens(onnx_artifact)
    assert not is_prepared
    document = run("prepare", onnx_artifact, "--json").json
    assert Path(document["folder"]).parent == cache / "prepared"
    files = list(Path(document["folder"]).iterdir())
    assert document["bytes"] == sum(path.stat().st_size for path in files)
    assert [path.name for path in (cache / "prepared").iterdir()] == [Path(document["folder"]).name], "nothing aside"
    assert tokens(onnx_artifact) == (plain, True)
    assert "removed" in run("prepare", onnx_artifact, "--remove").out
    assert not Path(document["folder"]).exists()
    assert tokens(onnx_artifact) == (plain, False)
    assert "was not prepared" in run("prepare", onnx_artifact, "--remove").out


@pytest.fixture(scope="module")
def wide_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer of 55 M weights, next to which what a session holds anyway, a few megabytes more or less, is small."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=2048, intermediate_size=6144, num_hidden_layers=1, num_attention_heads=16,
        max_position_embeddings=64,
    )  # fmt: skip
    model = jettison.optimize(transformers.LlamaForCausalLM(config), "quantize-weights{bits=4,group=32}")
    return model.save_pretrained(tmp_path_factory.mktemp("wide") / "out")


def test_prepared_weights_are_mapped(run, wide_artifact, cache):
    def added_bytes() -> tuple[int, bool]:
        done = subprocess.run(
            [sys.executable, "-c", MEASURE, wide_artifact], capture_output=True, text=True, check=True
        )
        number, is_prepared = done.stdout.split()
        return int(number), is_prepared == "True"

    weights = (wide_artifact / "model.onnx.data").stat().st_size
    plain, was_prepared = added_bytes()
    assert not was_prepared
    assert run("prepare", wide_artifact).code == 0
    mapped, is_prepared = added_bytes()
    assert is_prepared
    # A session has tables and a graph of its own; what must be gone is the copy of the weights.
    assert plain - mapped > 0.7 * weights, (plain, mapped, weights)


def test_an_entry_of_another_runtime_or_machine_is_not_used(run, onnx_artifact, cache, monkeypatch):
    run("prepare", onnx_artifact)
    artifact = Artifact.open(onnx_artifact)
    assert prepared.find_prepared(artifact)
    with monkeypatch.context() as patch:
        patch.setattr(onnxruntime, "__version__", "99.0")
        assert prepared.find_prepared(artifact) == {}
    monkeypatch.setattr(prepared, "_cpu", lambda: ["another"])
    assert prepared.find_prepared(artifact) == {}


@pytest.mark.parametrize("damage", ["shorter", "gone", "no listing", "listing of nonsense"])
def test_a_damaged_entry_is_not_used(run, onnx_artifact, cache, damage):
    folder = Path(run("prepare", onnx_artifact, "--json").json["folder"])
    data, listing = folder / "model.onnx.data", folder / "prepared.json"
    if damage == "shorter":
        data.write_bytes(data.read_bytes()[:-4096])
    elif damage == "gone":
        data.unlink()
    elif damage == "no listing":
        listing.unlink()
    else:
        listing.write_text(json.dumps(["model.onnx"]))
    assert prepared.find_prepared(Artifact.open(onnx_artifact)) == {}
    assert not tokens(onnx_artifact)[1]
    assert run("prepare", onnx_artifact).code == 0
    assert tokens(onnx_artifact)[1]


def test_a_cache_that_cannot_be_written(run, onnx_artifact, cache):
    cache.write_text("a file")
    run("prepare", onnx_artifact).fails(1, str(cache), "JETTISON_CACHE")


def test_a_full_disk(run, onnx_artifact, cache, monkeypatch):
    monkeypatch.setattr(prepared.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000})())
    run("prepare", onnx_artifact).fails(1, "are needed", "JETTISON_CACHE")
    assert not any((cache / "prepared").iterdir())


def test_ctrl_c_leaves_nothing(run, onnx_artifact, cache, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(prepared, "_save_packed", interrupted)
    assert run("prepare", onnx_artifact).code == 130
    assert not any((cache / "prepared").iterdir())


def test_a_torch_artifact_has_nothing_to_prepare(run, torch_artifact):
    run("prepare", torch_artifact).fails(2, "its target is torch")


def test_quantised_experts_are_refused(tmp_path: Path, cache: Path):
    """With them, a session on prepared weights ends the process."""
    node = onnx.helper.make_node("QMoE", ["x"], ["y"], domain="com.microsoft")
    graph = onnx.helper.make_graph([node], "g", [], [])
    (tmp_path / "model.onnx").write_bytes(onnx.helper.make_model(graph).SerializeToString())
    artifact = SimpleNamespace(path=lambda name: tmp_path / name)
    with pytest.raises(UnsupportedError, match="quantised experts"):
        prepared.prepare(artifact, ["model.onnx"])
    assert not cache.exists()
