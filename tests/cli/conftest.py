"""Artifacts and model folders that the tests of the command line share, and a way to run it in this process."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.cli.running")

from tests.cli.running import INT4, INT8_WINDOW, MODEL, Run, optimized, save_small_model  # noqa: E402


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """Run `jettison ARGUMENTS` in this process."""
    from jettison.cli import main

    def call(*arguments: object) -> Run:
        capsys.readouterr()
        code = main([str(argument) for argument in arguments])
        return Run(code, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Make a folder once for all processes of a parallel run."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def make(name: str, fill: Callable[[Path], object]) -> Path:
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the file is closed
            if not (root / f"{name}.done").exists():
                fill(root / name)
                (root / f"{name}.done").touch()
        return root / name

    return make


@pytest.fixture(scope="session")
def onnx_artifact(once: Callable[..., Path]) -> Path:
    """The bundled model at 4 bits, for ONNX Runtime. Not to be changed: see `copied`."""
    return once("onnx-int4", lambda out: optimized(MODEL, out, "--passes", INT4))


@pytest.fixture(scope="session")
def torch_artifact(once: Callable[..., Path]) -> Path:
    """The bundled model at 8 bits with a windowed cache, for torch. Not to be changed."""
    options = ("--passes", INT8_WINDOW, "--target", "torch", "--seed", "3")
    return once("torch-int8", lambda out: optimized(MODEL, out, *options))


@pytest.fixture(scope="session")
def small_model(once: Callable[..., Path]) -> Path:
    """A folder with a random model of one layer and the tokenizer of the bundled one: fast to capture."""

    def fill(folder: Path) -> None:
        save_small_model(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(MODEL / name, folder)

    return once("small-llama", fill)


@pytest.fixture(scope="session")
def small_artifact(once: Callable[..., Path], small_model: Path) -> Path:
    """The random model for torch, unquantised. Not to be changed."""
    return once("small-torch", lambda out: optimized(small_model, out, "--target", "torch"))


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    """A copy of a folder, to damage."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / "copy"))

    return copy


@pytest.fixture
def is_left_clean(tmp_path: Path) -> Iterator[Path]:
    """A folder for `--out`; whatever the test did, nothing may be left in it."""
    folder = tmp_path / "place"
    folder.mkdir()
    yield folder
    assert os.listdir(folder) == []
