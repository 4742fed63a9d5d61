"""Artifacts and model folders that the tests of the command line share, and a way to run it in this process."""

from __future__ import annotations

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
def onnx_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model at 4 bits, for ONNX Runtime. Not to be changed: see `copied`."""
    return optimized(MODEL, tmp_path_factory.mktemp("onnx") / "int4", "--passes", INT4)


@pytest.fixture(scope="session")
def torch_artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundled model at 8 bits with a windowed cache, for torch. Not to be changed."""
    out = tmp_path_factory.mktemp("torch") / "int8"
    return optimized(MODEL, out, "--passes", INT8_WINDOW, "--target", "torch", "--seed", "3")


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random model of one layer and the tokenizer of the bundled one: fast to capture."""
    folder = tmp_path_factory.mktemp("small") / "small-llama"
    save_small_model(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


@pytest.fixture(scope="session")
def small_artifact(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random model for torch, unquantised. Not to be changed."""
    return optimized(small_model, tmp_path_factory.mktemp("small-artifact") / "out", "--target", "torch")


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
