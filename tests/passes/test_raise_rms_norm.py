from __future__ import annotations

import pytest
import torch

from jettison.passes.raise_rms_norm import RaiseRmsNorm
from tests.helpers import (
    assert_declines,
    assert_golden,
    assert_idempotent,
    assert_same_numbers,
    export_body,
    run_pass,
)


def rms_norm(self, x):
    return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def norm_of_square(square, epsilon=1e-6):
    return torch.rsqrt(square.mean(-1, keepdim=True) + epsilon)


def test_golden_weighted(snapshot):
    before = export_body(rms_norm, weight=(8,))
    after, record = assert_golden(snapshot, RaiseRmsNorm(), before, "weighted")
    assert record.rewrites == 1
    assert_same_numbers(before, after)


def test_golden_spellings(snapshot):
    """x*x for the square, the last axis by its number, the weight on the right; no weight; a norm read twice."""

    def spellings(self, x):
        first = x * torch.rsqrt((x * x).mean(2, keepdim=True) + 1) * self.weight
        y = x.sin()
        second = y * norm_of_square(y**2, 1e-5)
        return first + second * second

    before = export_body(spellings, weight=(8,))
    after, record = assert_golden(snapshot, RaiseRmsNorm(), before, "spellings")
    assert record.rewrites == 2
    assert_same_numbers(before, after)


def test_runs_twice_like_once():
    assert_idempotent(RaiseRmsNorm(), export_body(rms_norm, weight=(8,)))


def test_a_weight_of_one_element_stays_outside():
    before = export_body(rms_norm, weight=(1,))
    after, record = run_pass(RaiseRmsNorm(), before)
    assert record.rewrites == 1
    assert "body.weight" in after.used_constants()
    assert_same_numbers(before, after)


def test_declines_when_epsilon_is_a_tensor():
    program = export_body(lambda self, x: x * norm_of_square(x * x, self.epsilon.abs()), epsilon=())
    assert_declines(RaiseRmsNorm(), program, reason="epsilon is not a number in the graph")


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: (lambda root: x * root + root)(norm_of_square(x.pow(2))),
        lambda self, x: (x + 1) * norm_of_square(x.pow(2)),
        lambda self, x: norm_of_square(x.pow(2)) + x,
    ],
    ids=["read_twice", "another_value", "added"],
)
def test_declines_when_the_root_scales_something_else(function):
    reason = "the reciprocal root does not multiply the value it normalises"
    assert_declines(RaiseRmsNorm(), export_body(function), reason=reason)


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x * torch.rsqrt(x.exp()),
        lambda self, x: x * torch.rsqrt(x.exp() + 1),
        lambda self, x: x * torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1),
        lambda self, x: x * torch.rsqrt(x.pow(2).mean((1, 2), keepdim=True) + 1),
        lambda self, x: x * torch.rsqrt(x.pow(4).mean(-1, keepdim=True) + 1),
        lambda self, x: x * torch.rsqrt((x * x.sin()).mean(-1, keepdim=True) + 2),
    ],
    ids=["no_mean", "no_epsilon", "other_axis", "two_axes", "fourth_power", "no_square"],
)
def test_is_not_interested_in_other_roots(function):
    assert_declines(RaiseRmsNorm(), export_body(function), reason=None)


def test_declines_when_epsilon_has_a_factor():
    program = export_body(lambda self, x: x * torch.rsqrt(torch.add(x.pow(2).mean(-1, keepdim=True), 0.1, alpha=3)))
    assert_declines(RaiseRmsNorm(), program, reason="epsilon has a factor")


def test_a_mean_in_another_dtype_stays():
    program = export_body(lambda self, x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True, dtype=torch.float64) + 1e-6))
    assert_declines(RaiseRmsNorm(), program, reason=None)
