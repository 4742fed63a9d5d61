"""Rules of the repository: layering, registry, budgets, names, orphaned golden files."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ("ir", "passes", "codegen", "runtime", "jettison")
# What each package may import of ours, besides itself.
MAY_IMPORT = {
    "ir": set(),
    "passes": {"ir"},
    "codegen": {"ir"},
    "runtime": {"ir", "codegen"},
    "jettison": {"ir", "passes", "codegen", "runtime"},
}
SMALL_BUDGET_FOLDERS = ("passes", "examples")
SMALL_BUDGET, BUDGET, FUNCTION_BUDGET = 400, 600, 60
FORBIDDEN_NAMES = {"utils.py", "helpers.py", "misc.py", "manager.py"}
# Spelled in pieces, so that this file does not contain what it forbids.
_PIECES = (("/wo", "rk/"), ("/ro", "ot/"), ("/opt/py", "pi"), (".libr", "ary/"))
MACHINE_TRACES = tuple("".join(pieces) for pieces in _PIECES)


def tracked_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [ROOT / name for name in listed.stdout.splitlines() if (ROOT / name).is_file()]


def python_files(*folders: str) -> list[Path]:
    return [path for path in tracked_files() if path.suffix == ".py" and path.relative_to(ROOT).parts[0] in folders]


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {path.parent.relative_to(ROOT) for path in python_files(*SOURCES)}
    assert {name.removeprefix("jettison.").replace(".", "/") for name in listed} == {
        "/".join(folder.parts[1:] if len(folder.parts) > 1 and folder.parts[0] == "jettison" else folder.parts)
        for folder in folders
    }


def imports_of(path: Path) -> set[str]:
    """Our packages that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules = [node.module or ""]
            if node.module == "jettison":
                modules = [f"jettison.{alias.name}" for alias in node.names]
        for module in modules:
            parts = module.split(".")
            if parts[0] == "jettison":
                found.add(parts[1] if len(parts) > 1 and parts[1] in MAY_IMPORT else "jettison")
    return found


@pytest.mark.parametrize("path", python_files(*SOURCES), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(ROOT).parts[0]
    extra = imports_of(path) - MAY_IMPORT[package] - {package}
    assert not extra, f"{package} may import {sorted(MAY_IMPORT[package])}, this file imports {sorted(extra)}"


@pytest.mark.parametrize("path", python_files(*SOURCES, "examples"), ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_stay_in_budget(path: Path) -> None:
    text = path.read_text()
    is_small = path.relative_to(ROOT).parts[0] in SMALL_BUDGET_FOLDERS
    budget = SMALL_BUDGET if is_small else BUDGET
    assert len(text.splitlines()) <= budget, f"over {budget} lines: split it by meaning"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            # A docstring with shapes and errors is not what makes a function long.
            documented = len((ast.get_docstring(node, clean=False) or "").splitlines())
            lines = (node.end_lineno or 0) - node.lineno + 1 - documented
            assert lines <= FUNCTION_BUDGET, f"{node.name} has {lines} lines, the budget is {FUNCTION_BUDGET}"


def test_no_file_is_named_for_nothing() -> None:
    named = [path for path in tracked_files() if path.name in FORBIDDEN_NAMES and "tests" not in path.parts]
    assert not named


def test_every_pass_documents_itself() -> None:
    from jettison.passes import PASSES

    for pass_ in PASSES:
        text = ast.get_docstring(ast.parse((ROOT / "passes" / f"{pass_.name.replace('-', '_')}.py").read_text())) or ""
        for label in ("Before:", "After:", "Fires when:", "Declines when:", "Numerics:", "Saves:"):
            assert label in text, f"{pass_.name} says nothing under {label!r}"


def test_every_pass_has_golden_graphs_and_tests() -> None:
    from jettison.passes import PASSES

    for pass_ in PASSES:
        file = pass_.name.replace("-", "_")
        assert (ROOT / "tests" / "passes" / f"test_{file}.py").is_file(), f"{pass_.name} has no test file"
        golden = ROOT / "tests" / "passes" / "golden" / file
        assert any(golden.glob("*.txt")), f"{pass_.name} has no golden graph"


def test_no_golden_file_is_an_orphan() -> None:
    for folder in (ROOT / "tests" / "passes" / "golden").iterdir():
        test = ROOT / "tests" / "passes" / f"test_{folder.name}.py"
        assert test.is_file(), f"golden files of {folder.name}, but no test file"
        text = test.read_text()
        for golden in folder.glob("*.txt"):
            assert f'"{golden.stem}"' in text, f"{golden.relative_to(ROOT)} is named in no test"


def test_every_policy_is_registered_under_its_file_name() -> None:
    from jettison.passes.policies import POLICIES

    files = {path.stem for path in (ROOT / "passes" / "policies").glob("*.py")}
    assert files - {"__init__", "base", "cache", "evicting", "storing"} == set(POLICIES)


def test_every_op_has_a_reference_and_a_lowering_to_onnx() -> None:
    from jettison.codegen.onnx.lowerings import LOWERINGS
    from jettison.ir import ops

    # Lowered together with the attention that reads them, in codegen/onnx/cached_attention.py, and with the same layer
    # of the prompt, in codegen/onnx/sparse_mlp.py.
    fused = {"write_slots", "windowed_attention", "quantized_sparse_mlp"}
    # No operator of ONNX puts values where a bitmap has bits: the format refuses the target (passes/formats/bitmap.py).
    refused = {"bitmap_linear"}
    for name in ops.__all__:
        op = getattr(ops, name)
        assert (ROOT / "ir" / "ops" / f"{name}.py").is_file()
        assert op in LOWERINGS or name in fused | refused, f"{name} has no lowering"


def test_nothing_names_a_machine() -> None:
    for path in tracked_files():
        if path.suffix in {".safetensors", ".png"} or path.name == "tokenizer.json":
            continue
        text = path.read_text(errors="replace")
        for trace in MACHINE_TRACES:
            assert trace not in text, f"{path.relative_to(ROOT)} contains {trace!r}"


def test_passes_table_is_complete() -> None:
    from jettison.passes import PASSES

    text = (ROOT / "passes" / "README.md").read_text()
    assert re.findall(r"^\| `([a-z-]+)` \|", text, re.MULTILINE) == [pass_.name for pass_ in PASSES]


def test_design_decisions_are_dated() -> None:
    text = (ROOT / "DESIGN.md").read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert headings
    assert all(re.match(r"\d{4}-\d{2}-\d{2} ", heading) for heading in headings), headings
