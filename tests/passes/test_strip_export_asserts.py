from __future__ import annotations

import torch

from jettison.passes.strip_export_asserts import StripExportAsserts
from tests.helpers import assert_declines, assert_golden, assert_idempotent, assert_same_numbers, export_body


def cast_there_and_back(self, x):
    """Each cast makes torch.export assert the dtype it saw."""
    return x.to(torch.float64).to(torch.float32) * 2


def test_golden_casts(snapshot):
    before = export_body(cast_there_and_back)
    after, record = assert_golden(snapshot, StripExportAsserts(), before, "casts")
    assert record.rewrites == 2
    assert_same_numbers(before, after)


def test_runs_twice_like_once():
    assert_idempotent(StripExportAsserts(), export_body(cast_there_and_back))


def test_leaves_a_graph_without_assertions_alone():
    assert_declines(StripExportAsserts(), export_body(lambda self, x: x * 2), reason=None)
