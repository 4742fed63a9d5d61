"""Artifacts of the Triton target: sources, machine code, what `inspect` and `explain` say, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from jettison.ir.errors import KernelsNotUsed
from tests.cli.running import forge, optimized, run_process


@pytest.fixture(scope="module")
def triton_artifact(once: Callable[..., Path], small_model: Path) -> Path:
    """The random model for Triton, with machine code for one GPU; dense, which compiles faster. Not to be changed."""
    options = ("--target", "triton", "--dtype", "bfloat16", "--arch", "sm_90")
    return once("small-triton", lambda out: optimized(small_model, out, *options))


def test_inspect_lists_kernels_and_what_they_use(run, triton_artifact):
    kernels = run("inspect", triton_artifact, "--json").json["kernels"]
    assert {each["arch"] for each in kernels} == {"sm_90"}
    assert {each["spill_bytes"] for each in kernels} == {0}
    assert all(each["registers"] > 0 and each["shared_bytes"] >= 0 for each in kernels)
    for each in kernels:
        assert (triton_artifact / "kernels" / f"{each['name']}.py").is_file()
        assert (triton_artifact / "kernels" / "sm_90" / f"{each['name']}.cubin").read_bytes()[:4] == b"\x7fELF"
    shown = run("inspect", triton_artifact).out
    assert "registers" in shown
    assert kernels[0]["name"] in shown


def test_sources_name_the_nodes_of_the_graph(triton_artifact):
    graph = (triton_artifact / "graph" / "after.txt").read_text()
    decode = graph[graph.index("entry decode") :]
    text = next((triton_artifact / "kernels").glob("*gemv_bf16*gated*.py")).read_text()
    assert text.startswith("# prefill: ")
    named = next(line for line in text.splitlines() if "# decode: " in line).removeprefix("# decode: ")
    first, operator = named.split(",")[0].split(" = ")
    assert any(line.strip().startswith(f"{first}: ") and f"= {operator}(" in line for line in decode.splitlines())


def test_plan_of_launches_is_there(triton_artifact):
    plan = (triton_artifact / "graph" / "launches.txt").read_text()
    assert "entry decode: " in plan
    assert "decode_attention_" in plan


def test_explain_says_what_pytorch_runs(run, triton_artifact):
    document = run("explain", triton_artifact, "--json").json
    decode = document["run_by_torch"]["decode"]
    assert {"operator": "aten.cos", "count": 1, "reason": None} in decode
    assert any(
        each["reason"] == "PyTorch's own kernels attend to prompts" for each in document["run_by_torch"]["prefill"]
    )
    assert "run by PyTorch, without a kernel" in run("explain", triton_artifact).out


def test_generates_what_the_torch_target_generates(triton_artifact, small_model, tmp_path):
    import jettison

    twin = optimized(small_model, tmp_path / "twin", "--target", "torch", "--dtype", "bfloat16")
    found, wanted = (jettison.load(each).generate([[5, 9, 3]], max_new_tokens=4) for each in (triton_artifact, twin))
    assert found == wanted


def test_machine_code_is_used_where_it_is_trusted_and_fits(triton_artifact, monkeypatch, tmp_path):
    import jettison

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("jettison.kernel_files.architecture", lambda: None)
    with pytest.warns(KernelsNotUsed, match="there is no GPU"):
        jettison.load(triton_artifact, trust_kernels=True).executor  # noqa: B018
    monkeypatch.setattr("jettison.kernel_files.architecture", lambda: "sm_80")
    with pytest.warns(KernelsNotUsed, match="there is none for sm_80"):
        jettison.load(triton_artifact, trust_kernels=True).executor  # noqa: B018
    monkeypatch.setattr("jettison.kernel_files.architecture", lambda: "sm_90")
    jettison.load(triton_artifact).executor  # noqa: B018
    assert not list(tmp_path.iterdir()), "not without being told"
    jettison.load(triton_artifact, trust_kernels=True).executor  # noqa: B018
    stored = {path.name for path in (triton_artifact / "kernels" / "sm_90").glob("*.cubin")}
    assert {path.name for path in tmp_path.rglob("*.cubin")} == stored


def test_tuning_needs_a_gpu_and_kernels(run, small_model, triton_artifact, tmp_path):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which can be measured")
    out = tmp_path / "out"
    run("optimize", small_model, "--out", out, "--target", "triton", "--tune").fails(1, "no GPU was found")
    run("optimize", small_model, "--out", out, "--tune").fails(2, "only kernels of triton have tile sizes")
    run("prepare", triton_artifact).fails(1, "no GPU was found")
    run("prepare", triton_artifact, "--remove").fails(2, "nothing of it is packed")
    assert not out.exists()


def test_another_source_than_ours_is_not_run(run, triton_artifact, tmp_path):
    """Not even one whose hash fits the manifest: whoever edits a file can edit that, too."""
    folder = tmp_path / "edited"
    shutil.copytree(triton_artifact, folder)
    path = next((folder / "kernels").glob("*.py"))
    path.write_text(path.read_text() + "\nimport os\n")
    files = json.loads((folder / "jettison.json").read_text())["files"]
    name = f"kernels/{path.name}"
    files[name] = {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    forge(folder, files=files)
    run("bench", folder).fails(1, name, "another kernel", "jettison optimize")


def test_architectures_are_for_triton(run, small_model, tmp_path):
    out = tmp_path / "out"
    run("optimize", small_model, "--out", out, "--arch", "sm_90").fails(2, "only triton compiles kernels")
    run("optimize", small_model, "--out", out, "--target", "triton", "--arch", "sm_12").fails(
        2, "sm_12", "from sm_80 on"
    )
    assert not out.exists()


def test_a_cpu_without_the_interpreter_is_told_how(triton_artifact, monkeypatch):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU, which runs it")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    run_process("bench", triton_artifact).fails(1, "no GPU was found", "TRITON_INTERPRET=1")
