"""Artifacts and model folders that the tests of the command line share, and a way to run it in this process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytest.register_assert_rewrite("tests.cli.running")

from tests.cli.running import INT8_WINDOW, Run, optimized  # noqa: E402


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
def torch_artifact(once: Callable[..., Path], two_layers: Path) -> Path:
    """Two layers of the bundled model at 8 bits with a windowed cache, for torch. Not to be changed."""
    options = ("--passes", INT8_WINDOW, "--target", "torch", "--seed", "3")
    return once("torch-int8", lambda out: optimized(two_layers, out, *options))


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
