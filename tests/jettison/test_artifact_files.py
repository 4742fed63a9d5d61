"""Artifact folders of optimised models: the same bytes every time, and back to the same model."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

import jettison
from jettison import artifact_files
from jettison.artifact_files import DATA_FILE
from jettison.codegen.onnx.emit import emit_program
from jettison.ir.errors import ArtifactError
from jettison.optimized_model import OptimizedModel
from tests.cli.running import forge
from tests.models.tiny_models import tiny_model

INT4_WINDOW = "quantize-weights{bits=4,group=32},cache-kv{policy=window{size=16}}"
ROWS = [[5, 6, 7, 8], [9]]


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
    return jettison.optimize(live, INT4_WINDOW, target=request.param, allow_spinning=False)


@pytest.fixture(scope="module")
def predicted_bytes(model: OptimizedModel) -> int:
    """What the report says of the weights before anything is written."""
    return model.report.weight_bytes


@pytest.fixture(scope="module")
def written(model: OptimizedModel, predicted_bytes: int) -> list[list[int]]:
    """Tokens of the model, which runs before it is saved: it is emitted then, and copied later."""
    return tokens(model)


@pytest.fixture(scope="module")
def saved(model: OptimizedModel, written: list[list[int]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed."""
    return model.save_pretrained(tmp_path_factory.mktemp("saved") / model.report.target)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }  # fmt: skip


def tokens(model: OptimizedModel) -> list[list[int]]:
    return model.generate(ROWS, max_new_tokens=24, eos_token_id=[])


# --- the same bytes -------------------------------------------------------------------------------------------------


def test_optimising_again_gives_the_same_bytes(
    model: OptimizedModel, written: list[list[int]], saved: Path, live: nn.Module, tmp_path: Path
) -> None:
    """Names, serials and times of another run are in no file; nor does it show that one ran before it was saved."""
    first = contents(saved)
    assert {"jettison.json", "report.json", "graph/before.txt", "graph/after.txt", "config.json"} <= set(first)
    assert len(written[0]) == 24
    again = jettison.optimize(live, INT4_WINDOW, target=model.report.target)
    assert contents(again.save_pretrained(tmp_path / "again")) == first
    if model.report.target == "torch":  # to run the other, it was written to a folder before it was saved
        assert contents(model.save_pretrained(tmp_path / "twice")) == first


def test_a_model_that_ran_is_not_exported_again(live: nn.Module, monkeypatch, tmp_path: Path) -> None:
    exported: list[Path] = []

    def counted(program, folder, **options):
        exported.append(folder)
        return emit_program(program, folder, **options)

    monkeypatch.setattr(artifact_files, "emit_program", counted)
    model = jettison.optimize(live, INT4_WINDOW, allow_spinning=False)
    expected = tokens(model)
    model.save_pretrained(tmp_path / "first")
    assert len(exported) == 1
    del model._executor  # and its temporary folder
    model.save_pretrained(tmp_path / "second")
    assert len(exported) == 2
    names = {path.name for path in (tmp_path / "first").iterdir()}
    assert names == {path.name for path in (tmp_path / "second").iterdir()}
    for name in ("model.onnx", DATA_FILE, "jettison.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()
    assert tokens(jettison.load(tmp_path / "first", verify=True, allow_spinning=False)) == expected


def test_a_loaded_artifact_is_saved_as_it_was(saved: Path, tmp_path: Path) -> None:
    assert contents(jettison.load(saved).save_pretrained(tmp_path / "copy")) == contents(saved)


# --- and back -------------------------------------------------------------------------------------------------------


def test_loading_gives_the_same_model(model: OptimizedModel, written: list[list[int]], saved: Path) -> None:
    loaded = jettison.load(saved, verify=True, allow_spinning=False)
    assert tokens(loaded) == written
    assert loaded.info == model.info
    assert (loaded.graph_before, loaded.graph) == (model.graph_before, model.graph)
    assert loaded.config == model.config
    assert (loaded.folder, loaded.source) == (saved, None)
    report = model.report.as_dict()
    assert report["seconds"] > 0
    # An artifact holds nothing that differs from run to run.
    timeless = {"seconds": 0.0, "passes": [{**record, "seconds": 0.0} for record in report["passes"]]}
    assert loaded.report.as_dict() == {**report, **timeless}


def test_tokenizer_travels_with_the_artifact(small_model: Path, tmp_path: Path) -> None:
    model = jettison.optimize(small_model, target="torch")
    expected = model.generate("The captain said", max_new_tokens=16)
    loaded = jettison.load(model.save_pretrained(tmp_path / "out"))
    assert loaded.generate("The captain said", max_new_tokens=16) == expected


def test_overwriting_leaves_nothing_of_the_earlier_artifact(
    small_model: Path, onnx_artifact: Path, saved: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    if json.loads((saved / "jettison.json").read_text())["target"] == "onnx":
        jettison.optimize(small_model, target="torch").save_pretrained(out)
    else:
        shutil.copytree(onnx_artifact, out)
    assert set(contents(out)) - set(contents(saved)), "files that nothing replaces"
    jettison.load(saved).save_pretrained(out, overwrite=True)
    assert contents(out) == contents(saved)


# --- what the files hold --------------------------------------------------------------------------------------------


def test_manifest_describes_the_model(model: OptimizedModel, predicted_bytes: int, saved: Path) -> None:
    manifest = json.loads((saved / "jettison.json").read_text())
    assert (manifest["target"], manifest["pipeline"]) == (model.report.target, model.report.pipeline)
    assert manifest["source"] == {"name": "LlamaForCausalLM", "sha256": None}
    assert (manifest["seed"], manifest["calibration"]) == (0, None)
    assert manifest["model"] == {"kind": "decoder", "name": "LlamaForCausalLM", "context": 128, "vocab_size": 97}
    assert [state["name"] for state in manifest["states"]] == [
        f"past_key_values.{layer}.{kind}" for layer in range(2) for kind in ("key", "value")
    ]
    assert manifest["weight_bytes"] == model.report.weight_bytes == predicted_bytes


def test_bytes_of_the_onnx_weight_file_are_accounted_for(onnx_artifact: Path) -> None:
    """Weights, tables and padding; `weight_bytes` is the first of them."""
    out = onnx_artifact
    manifest = json.loads((out / "jettison.json").read_text())
    assert manifest["weight_bytes"] == jettison.load(out).report.weight_bytes
    external: dict[tuple[int, int], str] = {}
    embedded = 0
    for tensor in onnx.load(str(out / "model.onnx"), load_external_data=False).graph.initializer:
        where = {entry.key: entry.value for entry in tensor.external_data}
        if where:
            external[int(where["offset"]), int(where["length"])] = tensor.name
        elif tensor.name.startswith("model.layers."):
            embedded += len(tensor.raw_data)
    tables = sum(length for (_, length), name in external.items() if name.startswith(("cos_cache", "sin_cache")))
    assert tables == 2 * 1024 * 16 * 4
    angles = 16 * 4  # frequencies, which the tables stand for
    weights = sum(length for _, length in external) - tables
    assert manifest["weight_bytes"] == weights + embedded + angles
    # Every tensor begins on a page.
    ends = sorted((offset, offset + length) for offset, length in external)
    padding = sum(-end % 4096 for _, end in ends[:-1])
    assert all(offset % 4096 == 0 for offset, _ in ends)
    assert (out / DATA_FILE).stat().st_size == weights + tables + padding
    assert manifest["files"][DATA_FILE]["bytes"] == weights + tables + padding


# --- artifacts that lack something ----------------------------------------------------------------------------------


@pytest.mark.parametrize("model_facts", [{}, {"kind": "decoder"}, None])
def test_manifest_without_facts_about_the_model(saved: Path, tmp_path: Path, model_facts: dict | None) -> None:
    out = jettison.load(saved).save_pretrained(tmp_path / "out")
    forge(out, model=model_facts)
    with pytest.raises(ArtifactError, match=r"jettison.json or report.json does not say .*jettison optimize"):
        jettison.load(out)


def test_weight_file_that_is_gone(model: OptimizedModel, saved: Path, tmp_path: Path) -> None:
    out = jettison.load(saved).save_pretrained(tmp_path / "out")
    name = DATA_FILE if model.report.target == "onnx" else "weights.safetensors"
    (out / name).unlink()
    with pytest.raises(ArtifactError, match=rf"{name}: missing"):
        jettison.load(out)
