from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jettison.ir.compare import assert_close, example_input_ids, run_program
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.passes.select_logits import SelectLogits
from tests.helpers import (
    SHAPES,
    assert_declines,
    assert_golden,
    assert_idempotent,
    assert_same_numbers,
    export_body,
    export_tiny,
    run_pass,
)


def plain_head(self, x):
    return F.linear(x.sin(), self.head)


def capped_head(self, x):
    """Gemma-2 caps its logits, Cohere scales them by a number, some by a stored one."""
    return torch.tanh(F.linear(x, self.head) / 3.0) * 3.0 * self.scale


def test_golden_plain_head(snapshot):
    before = export_body(plain_head, head=(11, 8))
    after, record = assert_golden(snapshot, SelectLogits(), before, "plain_head")
    assert record.rewrites == 1
    assert_same_numbers(before, after)


def test_golden_capped_head(snapshot):
    before = export_body(capped_head, head=(11, 8), scale=())
    after, record = assert_golden(snapshot, SelectLogits(), before, "capped_head")
    assert record.rewrites == 1
    assert_same_numbers(before, after)


@pytest.mark.parametrize("head", ["plain", "packed"])
@pytest.mark.parametrize(("batch", "length"), SHAPES)
def test_computes_only_the_positions_asked_for(batch, length, head):
    before = export_body(plain_head, head=(11, 8))
    if head == "packed":
        QuantizeWeights(bits=8, only="head").run(before)
    after, record = run_pass(SelectLogits(), before)
    assert record.rewrites == 1
    input_ids = example_input_ids(before, batch, length)
    full = run_program(before, input_ids)[0]
    wanted = torch.tensor([[length - 1, 0, length // 2]]).repeat(batch, 1)
    selected = run_program(after, input_ids, inputs={"logits_positions": wanted})[0]
    assert selected.shape == (batch, 3, 11)
    assert_close(selected, full[:, wanted[0]])


def test_positions_below_zero_count_from_the_end_of_each_row():
    before = export_body(plain_head, head=(11, 8))
    after, _ = run_pass(SelectLogits(), before)
    input_ids = example_input_ids(before, 3, 7)
    lengths = [7, 4, 1]
    mask = torch.tensor([[1] * length + [0] * (7 - length) for length in lengths])
    inputs = {"attention_mask": mask, "logits_positions": torch.full((3, 1), -1)}
    last = run_program(after, input_ids, inputs=inputs)[0]
    full = run_program(before, input_ids)[0]
    assert_close(last[:, 0], torch.stack([full[row, length - 1] for row, length in enumerate(lengths)]))


def test_uses_the_mask_that_the_model_takes():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(61, 8), nn.Linear(8, 61)

        def forward(self, input_ids, attention_mask):
            return self.head(self.embed(input_ids) * attention_mask[:, :, None])

    before = export_tiny(Masked())
    after, _ = run_pass(SelectLogits(), before)
    assert str(after).splitlines()[4].count("attention_mask") == 1
    assert_same_numbers(before, after)


def test_runs_twice_like_once():
    assert_idempotent(SelectLogits(), export_body(plain_head, head=(11, 8)))


def test_leaves_encoders_alone():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(61, 8), nn.Linear(8, 61)

        def forward(self, input_ids):
            return self.head(self.embed(input_ids))

    assert_declines(SelectLogits(), export_tiny(Encoder(), kind="encoder"), reason=None)


@pytest.mark.parametrize(
    "function",
    [
        lambda self, x: x.exp(),
        lambda self, x: F.linear(x, self.head).cumsum(1),
        lambda self, x: F.linear(x, self.head) + F.linear(x.sin(), self.head),
        lambda self, x: F.linear(x, self.head).softmax(-1),
    ],
    ids=["no_head", "mixes_positions", "two_heads", "softmax"],
)
def test_declines_when_the_head_is_not_a_linear(function):
    program = export_body(function, head=(11, 8))
    assert_declines(SelectLogits(), program, reason="the language-model head is not a linear")


def test_declines_when_the_head_does_not_keep_the_positions():
    """A classifier over the mean of a sequence has no position to select."""
    program = export_body(lambda self, x: F.linear(x.mean(1), self.head), head=(11, 8))
    program.info = replace(program.info, kind="decoder")  # capture takes it for an encoder
    assert_declines(SelectLogits(), program, reason="the head does not see one row per position")
