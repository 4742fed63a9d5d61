"""Fixtures of the whole suite."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch  # (sets its loggers up, see below)
from syrupy.assertion import SnapshotAssertion

# `--import-mode=importlib` leaves sys.path alone; the tests share `tests.helpers`.
sys.path.insert(0, str(Path(__file__).parents[1]))
# Without a GPU, kernels run in Triton's interpreter, which is chosen when Triton is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Its assertions are asserted for the tests: a failure must show both sides.
pytest.register_assert_rewrite("tests.helpers")

# In the background of a shell, Ctrl-C is ignored, also by children. Some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# pytest attaches a handler to every logger that does not propagate, and torch.export writes its trace as soon as this
# one has a handler: hundreds of empty lines under every failure, and time in every capture.
logging.getLogger("torch.__trace").propagate = True

# Tracing makes garbage all the time, and a full collection walks all of torch: a tenth of the suite with the default.
gc.set_threshold(700, 10, 100)


def pytest_collection_finish() -> None:
    """What is there before the first test stays: no collection has to look at it."""
    gc.freeze()


with contextlib.suppress(ImportError, AttributeError):  # inside torch: without it the suite is slower
    from torch.onnx._internal.exporter import _decomp
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    _table = functools.cache(_decomp.create_onnx_friendly_decomposition_table)
    _decomp.create_onnx_friendly_decomposition_table = lambda operators: dict(_table(frozenset(operators)))

    # Every export makes the same list of what the exporter knows, and none of ours adds to it.
    ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))

# A folder is captured once in a process, whoever opens it; before anything takes `open_source` from its module.
import jettison.source  # noqa: E402
from tests.models.captured import remembered  # noqa: E402

jettison.source.open_source = remembered(jettison.source.open_source)

TINY_LLAMA = Path(__file__).parents[1] / "examples" / "models" / "tiny-llama"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what the user prepared, or leaves something in the user's cache."""
    monkeypatch.setenv("JETTISON_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def snapshot(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    """Golden text files in `golden/<test file without test_>/<case>.txt` beside the test."""
    from tests.helpers import GoldenText

    return snapshot.use_extension(GoldenText)


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
def small_model(once: Callable[..., Path]) -> Path:
    """A folder with a random model of one layer and the tokenizer of the bundled one: fast to capture."""
    from tests.cli.running import save_small_model

    def fill(folder: Path) -> None:
        save_small_model(folder)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(TINY_LLAMA / name, folder)

    return once("small-llama", fill)


@pytest.fixture(scope="module")
def captured_once() -> Iterator[None]:
    """`optimize` captures a module at its first call, too: for files about what comes after it, which change none."""
    from tests.models import captured

    captured.remembers_modules = True
    yield
    captured.remembers_modules = False
    captured.forget_modules()


@pytest.fixture(scope="session")
def two_layers(once: Callable[..., Path]) -> Path:
    """The first two of the six layers of the bundled model: trained weights in a third of the time. Not to be changed.

    `tests/test_examples.py` has the whole of it.
    """
    from tests.models.shortened import shortened

    return once("tiny-llama", lambda out: shortened("tiny-llama", 2, out))


def _optimized(folder: Path, out: Path, passes: str) -> object:
    import jettison

    return jettison.optimize(folder, passes).save_pretrained(out)


@pytest.fixture(scope="session")
def onnx_artifact(once: Callable[..., Path], two_layers: Path) -> Path:
    """Two layers of the bundled model at 4 bits, for ONNX Runtime. Not to be changed."""
    return once("onnx-int4", lambda out: _optimized(two_layers, out, "quantize-weights{bits=4,group=32}"))


@pytest.fixture(scope="session")
def onnx_fp32_artifact(once: Callable[..., Path], two_layers: Path) -> Path:
    """Two layers of the bundled model, unquantised, for ONNX Runtime. Not to be changed."""
    return once("onnx-fp32", lambda out: _optimized(two_layers, out, ""))
