"""Fixtures of the whole suite."""

from __future__ import annotations

import gc
import logging
import sys
from pathlib import Path

import pytest
import torch  # noqa: F401  (sets its loggers up, see below)
from syrupy.assertion import SnapshotAssertion

# `--import-mode=importlib` leaves sys.path alone; the tests share `tests.helpers`.
sys.path.insert(0, str(Path(__file__).parents[1]))
# Its assertions are asserted for the tests: a failure must show both sides.
pytest.register_assert_rewrite("tests.helpers")

# pytest attaches a handler to every logger that does not propagate, and torch.export writes its trace as soon as this
# one has a handler: hundreds of empty lines under every failure, and time in every capture.
logging.getLogger("torch.__trace").propagate = True

# Tracing makes garbage all the time, and a full collection walks all of torch: a tenth of the suite with the default.
gc.set_threshold(700, 10, 100)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test finds what the user prepared, or leaves something in the user's cache."""
    monkeypatch.setenv("JETTISON_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def snapshot(snapshot: SnapshotAssertion) -> SnapshotAssertion:
    """Golden text files in `golden/<test file without test_>/<case>.txt` beside the test."""
    from tests.helpers import GoldenText

    return snapshot.use_extension(GoldenText)
