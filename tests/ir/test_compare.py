"""The numeric comparison rejects what it must: this is the guard against a tolerance that accepts everything."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jettison.ir.compare import (
    DEFAULT_TOLERANCE,
    assert_close,
    compare_programs,
    difference,
    example_input_ids,
    logits_drift,
    run_program,
)
from jettison.ir.edit import Edit
from jettison.ir.interpret import run_entry
from jettison.ir.ops import attention, write_slots
from jettison.ir.program import Program, State, copy_graph, input_placeholders, output_node
from tests.helpers import Embedded, export_body, export_tiny, weight_values

DTYPES = pytest.mark.parametrize("dtype", DEFAULT_TOLERANCE, ids=str)


def reference(dtype: torch.dtype) -> torch.Tensor:
    """Values whose largest magnitude is 4, exactly representable in every dtype."""
    values = (weight_values(60, 1) * 4).round() / 2
    values[17] = -4.0
    return values.reshape(3, 20).to(dtype)


@DTYPES
def test_accepts_the_reference_and_half_the_tolerance(dtype):
    expected = reference(dtype).double()
    assert assert_close(reference(dtype), expected).max_error == 0
    shifted = expected.clone()
    shifted[0, 3] += DEFAULT_TOLERANCE[dtype] / 2 * 4
    found = assert_close(reference(dtype), shifted)
    assert found.where == (0, 3)
    assert found.relative == pytest.approx(DEFAULT_TOLERANCE[dtype] / 2, rel=0.01)


@DTYPES
def test_rejects_twice_its_tolerance(dtype):
    expected = reference(dtype).double()
    expected[2, 5] += DEFAULT_TOLERANCE[dtype] * 2 * 4
    with pytest.raises(AssertionError, match=r"largest error .* at \(2, 5\)"):
        assert_close(reference(dtype), expected)


@DTYPES
def test_rejects_a_sign_flip(dtype):
    with pytest.raises(AssertionError, match="relative 2"):
        assert_close(-reference(dtype), reference(dtype))
    one_flipped = reference(dtype)
    one_flipped[0, 17] *= -1
    with pytest.raises(AssertionError, match=r"at \(0, 17\)"):
        assert_close(one_flipped, reference(dtype))


@DTYPES
def test_rejects_nan_and_infinity(dtype):
    for bad in (math.nan, math.inf, -math.inf):
        broken = reference(dtype)
        broken[1, 1] = bad
        with pytest.raises(AssertionError):
            assert_close(broken, reference(dtype))
        with pytest.raises(AssertionError):
            assert_close(reference(dtype), broken)
    both = reference(dtype)
    both[1, 1] = math.nan
    with pytest.raises(AssertionError, match="NaN"):
        assert_close(both, both)


@DTYPES
def test_equal_infinities_are_equal_and_do_not_set_the_scale(dtype):
    masked, expected = reference(dtype), reference(dtype).double()
    masked[0, 0] = expected[0, 0] = -math.inf
    assert assert_close(masked, expected).magnitude == 4
    masked[0, 0] = math.inf
    with pytest.raises(AssertionError):
        assert_close(masked, expected)


@DTYPES
def test_rejects_another_shape(dtype):
    with pytest.raises(AssertionError, match="shape"):
        assert_close(reference(dtype), reference(dtype)[:1])
    with pytest.raises(AssertionError, match="shape"):
        assert_close(reference(dtype), reference(dtype).reshape(20, 3))


@DTYPES
def test_a_zero_reference_asks_for_zeros(dtype):
    zeros = torch.zeros(3, dtype=dtype)
    assert_close(zeros, zeros)
    with pytest.raises(AssertionError):
        assert_close(zeros + 2**-20, zeros)


@DTYPES
def test_a_wider_tolerance_needs_a_reason(dtype):
    wide = DEFAULT_TOLERANCE[dtype] * 4
    expected = reference(dtype).double()
    expected[0, 0] += DEFAULT_TOLERANCE[dtype] * 2 * 4
    with pytest.raises(ValueError, match="say why"):
        assert_close(reference(dtype), expected, tolerance=wide)
    with pytest.raises(ValueError, match="say why"):
        assert_close(reference(dtype), expected, tolerance=wide, reason=" ")
    assert_close(reference(dtype), expected, tolerance=wide, reason="two roundings")
    assert_close(reference(dtype), reference(dtype), tolerance=DEFAULT_TOLERANCE[dtype] / 4)


@pytest.mark.parametrize("tolerance", [math.nan, math.inf, -1.0])
def test_a_tolerance_must_be_a_number(tolerance):
    with pytest.raises(ValueError, match="finite number"):
        assert_close(torch.ones(1), torch.zeros(1), tolerance=tolerance, reason="none")


def test_integers_must_be_equal():
    assert_close(torch.arange(3), torch.arange(3))
    with pytest.raises(AssertionError):
        assert_close(torch.arange(3), torch.tensor([0, 1, 3]))
    with pytest.raises(AssertionError):
        assert_close(torch.tensor([True, False]), torch.tensor([True, True]))


def test_difference_of_nothing_is_zero():
    assert difference(torch.empty(0, 3), torch.empty(0, 3)).relative == 0


# --- drift -------------------------------------------------------------------------------------------------------


def test_kl_is_the_definition():
    """Summed by hand over two tokens of three words."""
    p, q = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8]]), torch.tensor([[0.125, 0.375, 0.5], [0.1, 0.1, 0.8]])
    by_hand = (0.5 * math.log(4) + 0.25 * math.log(2 / 3) + 0.25 * math.log(1 / 2)) / 2
    drift = logits_drift(p.log(), q.log() + 3)
    assert drift.kl == pytest.approx(by_hand, rel=1e-6)
    assert drift.tokens == 2
    assert drift.top1_agreement == 0.5
    assert logits_drift(q.log(), p.log()).kl != pytest.approx(by_hand, rel=1e-3)


def test_drift_of_equal_logits_is_nothing():
    logits = weight_values(7 * 33, 3).reshape(1, 7, 33).float()
    drift = logits_drift(logits, logits.clone())
    assert (drift.kl, drift.max_error, drift.top1_agreement, drift.tokens) == (0.0, 0.0, 1.0, 7)


def test_drift_does_not_depend_on_the_block_size(monkeypatch):
    reference, actual = (weight_values(50 * 17, seed).reshape(50, 17).float() for seed in (1, 2))
    whole = logits_drift(reference, actual)
    monkeypatch.setattr("jettison.ir.compare._CHUNK_BYTES", 8 * 17 * 3)
    blocks = logits_drift(reference, actual)
    assert blocks.kl == pytest.approx(whole.kl, rel=1e-12)
    assert blocks.top1_agreement == whole.top1_agreement


def test_a_word_that_the_reference_rules_out_counts_nothing():
    reference = torch.tensor([[0.0, 0.0, -math.inf]])
    assert logits_drift(reference, torch.tensor([[0.0, 0.0, -math.inf]])).kl == 0
    assert logits_drift(reference, torch.tensor([[0.0, 0.0, 0.0]])).kl == pytest.approx(math.log(1.5))
    assert logits_drift(torch.zeros(1, 3), reference).kl == math.inf


def test_nan_logits_are_infinitely_far():
    drift = logits_drift(torch.zeros(1, 3), torch.tensor([[0.0, math.nan, 0.0]]))
    assert drift.kl == math.inf
    assert drift.relative_error == math.inf


def test_drift_asks_for_equal_shapes():
    with pytest.raises(ValueError, match="needed equal"):
        logits_drift(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="non-empty"):
        logits_drift(torch.zeros(0, 3), torch.zeros(0, 3))


# --- programs ----------------------------------------------------------------------------------------------------


def head_program(scale: float = 1.0) -> Program:
    return export_body(lambda self, x: F.linear(x.sin(), self.head) * scale, head=(61, 8))


def test_compare_programs_measures_the_second_against_the_first():
    drift = compare_programs(head_program(), head_program(1.5))
    expected, actual = (run_program(p, example_input_ids(p))[0] for p in (head_program(), head_program(1.5)))
    assert drift.max_error == pytest.approx((expected - actual).abs().max().item())
    assert drift.relative_error == pytest.approx(0.5)
    assert drift.top1_agreement == 1
    by_definition = F.kl_div(actual.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="sum")
    assert drift.kl == pytest.approx(by_definition.item() / drift.tokens, rel=1e-3)
    assert drift.tokens == 32


def test_compare_programs_of_one_program_is_zero():
    program = head_program()
    drift = compare_programs(program, program.copy(), example_input_ids(program, 1, 1))
    assert (drift.kl, drift.max_error, drift.top1_agreement, drift.tokens) == (0, 0, 1, 1)


def test_an_encoder_has_no_kl():
    program = export_tiny(Embedded(nn.Linear(8, 8)), kind="encoder")
    drift = compare_programs(program, program)
    assert (drift.kl, drift.top1_agreement, drift.max_error) == (None, None, 0)


def test_a_program_that_gives_nan_is_infinitely_far():
    broken = export_body(lambda self, x: F.linear(x.sin(), self.head), head=(61, 8))
    broken.constants["body.head"].blocks[0].data[0, 0] = math.nan
    drift = compare_programs(head_program(), broken)
    assert drift.kl == math.inf
    assert drift.relative_error == math.inf


def test_every_output_counts():
    class Two(nn.Module):
        def __init__(self, scale):
            super().__init__()
            self.embed, self.scale = nn.Embedding(61, 8), scale

        def forward(self, input_ids):
            x = self.embed(input_ids)
            return {"logits": x, "hidden": x * self.scale}

    drift = compare_programs(export_tiny(Two(1.0)), export_tiny(Two(3.0)))
    assert drift.kl == 0
    assert drift.relative_error == pytest.approx(2)


def test_example_input_ids_stay_in_the_vocabulary_and_the_context():
    program = head_program()
    ids = example_input_ids(program, 3, 1000)
    assert ids.shape == (3, program.info.context)
    assert 0 <= int(ids.min()) <= int(ids.max()) < program.info.vocab_size
    assert len(ids.unique()) == program.info.vocab_size


def cached_program() -> tuple[Program, Program]:
    """A one-head attention without a cache, and the same with its keys in a state, by hand."""

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(61, 8)

        def forward(self, input_ids, position_ids):
            x = (self.embed(input_ids) + position_ids[:, :, None] / 8)[:, None]
            return attention(x, x, x, None, None, None, None, 1.0, True, 0, 0.0)[:, 0]

    plain = export_tiny(Attention())
    cached = plain.copy()
    edit = Edit(cached, "forward", "test")
    node = next(n for n in edit.graph.nodes if n.target is attention)
    positions = input_placeholders(edit.entry)["position_ids"]
    state = State("slots", ("batch", 1, "capacity", 8), torch.float32)
    batch = node.meta["val"].shape[0]
    past = edit.state(state, edit.dynamic_tensor([batch, 1, None, 8], torch.float32, hint=64))
    with edit.before(node):
        slots = edit.call(write_slots, past, node.args[0], positions)
        out = edit.call(attention, node.args[0], slots, slots, positions, None, None, None, 1.0, True, 0, 0.0)
    edit.replace(node, out)
    edit.set_outputs([*output_node(edit.entry).args[0], slots])
    entry = cached.entries.pop("forward")
    cached.entries = {"prefill": entry, "decode": copy_graph(entry)}
    return plain, cached


@pytest.mark.parametrize("prefill", [None, 1, 4, 9])
def test_run_program_feeds_prefill_and_then_decode(prefill):
    plain, cached = cached_program()
    ids = example_input_ids(plain, 2, 9)
    assert_close(run_program(cached, ids, prefill=prefill)[0], run_program(plain, ids)[0])
    drift = compare_programs(plain, cached, ids, prefill=prefill)
    assert drift.relative_error < 1e-6


def test_run_program_returns_only_outputs():
    _, cached = cached_program()
    ids = example_input_ids(cached, 2, 9)
    inputs = {"input_ids": ids, "position_ids": torch.arange(9)[None].repeat(2, 1), "slots": torch.zeros(2, 1, 64, 8)}
    assert len(run_entry(cached, "prefill", inputs)) == 2
    assert len(run_program(cached, ids)) == 1


def test_a_wrong_decode_is_seen():
    """Positions that start at zero again in decode must not go unnoticed."""
    plain, cached = cached_program()
    edit = Edit(cached, "decode", "test")
    positions = input_placeholders(edit.entry)["position_ids"]
    node = next(n for n in edit.graph.nodes if n.target is write_slots)
    with edit.before(node):
        zeros = edit.call(torch.ops.aten.zeros_like.default, positions)
    edit.set_arguments(node, *node.args[:2], zeros)
    ids = example_input_ids(plain, 2, 9)
    assert compare_programs(plain, cached, ids).relative_error < 1e-6
    assert compare_programs(plain, cached, ids, prefill=4).relative_error > 1e-3


@pytest.mark.parametrize("prefill", [0, 10, -1])
def test_prefill_must_be_within_the_tokens(prefill):
    _, cached = cached_program()
    with pytest.raises(ValueError, match="needed at least 1"):
        run_program(cached, example_input_ids(cached, 2, 9), prefill=prefill)


def test_an_input_that_nobody_knows_is_named():
    program = head_program()
    edit = Edit(program, "forward", "test")
    edit.input("pixels", edit.dynamic_tensor([2, None], torch.float32))
    with pytest.raises(ValueError, match="pixels"):
        run_program(program, example_input_ids(program))
    run_program(program, example_input_ids(program), inputs={"pixels": torch.zeros(2, 3)})
