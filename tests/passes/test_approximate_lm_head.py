from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jettison.ir.compare import assert_close, example_input_ids, run_program
from jettison.ir.errors import OptionError
from jettison.ir.interpret import run_entry
from jettison.ir.match import is_call
from jettison.ir.ops import quantized_linear
from jettison.ir.serialize import load_program, save_program
from jettison.passes.approximate_lm_head import ApproximateLmHead
from jettison.passes.cache_kv import CacheKV
from jettison.passes.formats.int_groups import IntGroups
from jettison.passes.grammar import format_pipeline, parse_pipeline
from jettison.passes.options import build, to_spec
from jettison.passes.pipeline import prepare
from jettison.passes.policies import H2O, Kivi, SnapKV, Window
from jettison.passes.quantize_weights import QuantizeWeights
from tests.helpers import (
    Apply,
    Embedded,
    assert_declines,
    assert_golden,
    assert_idempotent,
    export_tiny,
    run_pass,
)
from tests.passes.test_cache_kv import Decoder

WIDTH, VOCAB, FEW = 64, 200, 8
PASS = ApproximateLmHead(candidates=FEW)
LOW_RANK = ApproximateLmHead(candidates=FEW, estimator="lowrank", rank=4)


def headed(function=None, *, width=WIDTH, vocab=VOCAB, bias=False, kind="decoder"):
    """Hidden states and a head; `function(head, hidden)` makes the logits."""
    head = nn.Linear(width, vocab, bias=bias)
    body = Apply(lambda self, x: (function or (lambda head, x: head(x)))(self.head, x))
    body.head = head
    program = export_tiny(Embedded(body, width=width), kind=kind)
    prepare(program)
    ids = example_input_ids(program, 4, 16)
    program.calibration = lambda: [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_positions": torch.arange(16).repeat(4, 1)}
    ]
    return program


@functools.cache
def plain():
    return headed()


@functools.cache
def decoder():
    program = export_tiny(Decoder(), context=128)
    prepare(program)
    return program


def outputs(program, entry, inputs):
    return dict(zip(program.outputs_of(entry), run_entry(program, entry, inputs), strict=False))


def test_golden_head(snapshot):
    after, record = assert_golden(snapshot, PASS, plain(), "head")
    assert record.rewrites == 1
    assert after.weight_bytes() > plain().weight_bytes()


def test_golden_entries(snapshot):
    approximate, _ = run_pass(PASS, decoder())
    after, record = assert_golden(snapshot, CacheKV(), approximate, "entries")
    assert record.rewrites == 1
    assert after.outputs_of("decode") == ("candidates", "candidate_logits", "reserve", "bounds", "head_input")
    assert after.outputs_of("head") == after.outputs_of("head_rows") == after.outputs_of("prefill") == ("logits",)


def test_golden_low_rank(snapshot):
    program, _ = run_pass(LOW_RANK, decoder_with_text())
    after, _ = run_pass(CacheKV(), program)
    # The factors come out of decompositions: only their shapes are the same everywhere.
    lines = [line.partition(" #")[0] for line in str(after).splitlines() if "entry " in line or "estimate" in line]
    assert "\n".join(lines) == snapshot(name="low_rank")


def decoder_with_text():
    program = decoder().copy()
    ids = example_input_ids(program, 2, 16)
    usual = {"input_ids": ids, "position_ids": torch.arange(16).repeat(2, 1), "attention_mask": torch.ones_like(ids),
             "logits_positions": torch.arange(16).repeat(2, 1)}  # fmt: skip
    program.calibration = lambda: [usual]
    return program


@pytest.mark.parametrize("chosen", [PASS, LOW_RANK, ApproximateLmHead(candidates=FEW, certify=False)], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 7)])
def test_candidates_are_exact_and_the_best_token_is_one_of_them(chosen, shape):
    ids = example_input_ids(plain(), *shape)
    (expected,) = run_program(plain(), ids)
    (found,) = run_program(run_pass(chosen, plain())[0], ids)
    assert found.shape == expected.shape
    is_exact = (found - expected).abs() < 1e-5
    assert (is_exact.sum(-1) >= FEW).all()
    best = found.argmax(-1, keepdim=True)
    assert is_exact.gather(-1, best).all()


def test_as_many_candidates_as_tokens_are_the_dense_head():
    ids = example_input_ids(plain(), 2, 7)
    x = run_program(plain(), ids)[0][..., :WIDTH].contiguous()
    weight = torch.arange(50 * WIDTH).reshape(50, WIDTH).sin()
    dense = F.linear(x, weight)
    candidates, reserve, bounds = torch.ops.jettison.head_candidates(dense, x, None, 50, 8, 64)
    assert (reserve.shape[-1], bounds.shape[-1], bounds.max()) == (0, 1, -torch.inf)
    exact = torch.ops.jettison.selected_linear(x, candidates, weight, None)
    assert_close(torch.ops.jettison.complete_logits(torch.zeros_like(dense), candidates, exact), dense)


@pytest.mark.parametrize("vocabulary", [1, 5, 100, 2500, 2501])
def test_the_largest_bounds_come_first(vocabulary):
    estimate = torch.randn(2, 3, vocabulary, generator=torch.Generator().manual_seed(vocabulary))
    x, errors = torch.randn(2, 3, 40), torch.rand(2, vocabulary)
    for given in (None, errors):
        candidates, reserve, bounds = torch.ops.jettison.head_candidates(estimate, x, given, 4, 12, 32)
        everything = torch.ops.jettison.head_candidates(estimate, x, given, vocabulary, 0, 32)[0]
        wanted = min(vocabulary, 16)
        assert torch.equal(torch.cat([candidates, reserve], -1), everything[..., :wanted])
        assert (bounds.diff(dim=-1) <= 0).all()
        assert (bounds[..., -1] == -torch.inf).all() == (vocabulary <= 16)
        if given is None:
            listed = estimate.gather(-1, reserve)
            assert torch.equal(bounds[..., : listed.shape[-1]], listed)


def test_prompts_run_the_head_as_it_was():
    ids = example_input_ids(decoder(), 2, 9)
    before, _ = run_pass(CacheKV(), decoder())
    after, _ = run_pass(PASS, decoder(), CacheKV())
    assert torch.equal(run_program(after, ids)[0], run_program(before, ids)[0])
    texts = [str(program).partition("entry prefill")[2].partition("entry decode")[0] for program in (before, after)]
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize(
    "policy", [Window(16), SnapKV(16, window=4), H2O(16), Kivi(bits=4, group=8, residual=16)], ids=str
)
def test_every_cache_decodes_with_the_whole_head_where_it_is_asked(policy):
    ids = example_input_ids(decoder(), 2, 24)
    before, _ = run_pass(CacheKV(policy), decoder())
    after, _ = run_pass(PASS, decoder(), CacheKV(policy))
    assert_close(run_program(after, ids, prefill=21)[0], run_program(before, ids, prefill=21)[0])


def softcapped(head, x):
    return 30.0 * torch.tanh(head(x) / 30.0) + 1.0


@pytest.mark.parametrize("bias", [False, True])
def test_what_follows_the_head_is_done_to_candidates_and_bounds(bias):
    program = headed(softcapped, bias=bias)
    ids = example_input_ids(program, 3, 1)
    (expected,) = run_program(program, ids)
    after = specialized(run_pass(PASS, program)[0])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_positions": torch.zeros_like(ids)}
    found = outputs(after, "decode", inputs)
    assert_close(found["candidate_logits"], expected.gather(-1, found["candidates"]))
    assert (found["bounds"][..., :-1] >= expected.gather(-1, found["reserve"])).all()
    hidden = {"head_input": found["head_input"]}
    assert_close(outputs(after, "head", hidden)["logits"], expected)
    rows = outputs(after, "head_rows", {**hidden, "head_tokens": found["reserve"]})["logits"]
    assert_close(rows, expected.gather(-1, found["reserve"]))


def specialized(program):
    """Entries as `cache-kv` makes them, of a program that has nothing to cache."""
    from jettison.ir.program import copy_graph
    from jettison.passes.decode_only import specialize_entries

    entry = program.entries.pop("forward")
    program.entries = {"prefill": entry, "decode": copy_graph(entry)}
    specialize_entries(program, "test")
    return program


@pytest.mark.parametrize(("bits", "chosen"), [(8, PASS), (4, LOW_RANK), (8, LOW_RANK)], ids=str)
def test_rows_of_a_packed_head_are_looked_up(bits, chosen):
    dense = headed(width=128, vocab=400)
    packed, _ = run_pass(QuantizeWeights(bits), dense)
    packed.calibration = dense.calibration
    after, record = run_pass(chosen, packed)
    assert record.rewrites == 1
    ids = example_input_ids(packed, 2, 5)
    found, expected = run_program(after, ids)[0], run_program(packed, ids)[0]
    assert (((found - expected).abs() < 1e-5).sum(-1) >= FEW).all()
    entries = specialized(after.copy()).entries
    assert any(is_call(node, quantized_linear) for node in entries["prefill"].graph.nodes)
    assert "aten.linear" not in str(specialized(after.copy()))


def test_a_head_that_was_approximated_keeps_its_weight():
    approximate, _ = run_pass(PASS, plain())
    after, record = run_pass(QuantizeWeights(4), approximate)
    reasons = {miss.node: miss.reason for miss in record.misses}
    assert not any(name.startswith("body.head") for name in set(after.packed) - set(approximate.packed))
    assert "body.head.weight" in after.constants
    assert record.rewrites == 1, reasons  # the embedding


def test_stored_bytes_are_those_of_the_estimator():
    after, record = run_pass(PASS, plain())
    estimator = IntGroups(4, 64).bytes((VOCAB, WIDTH)) + 2 * 4 * VOCAB
    assert record.bytes_after == record.bytes_before + estimator == after.weight_bytes()
    assert set(after.packed) == {"body.head.weight.estimate"}


def test_a_tied_table_is_stored_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(VOCAB, WIDTH)

        def forward(self, input_ids):
            return F.linear(self.embed(input_ids), self.embed.weight)

    program = export_tiny(Tied(), kind="decoder")
    prepare(program)
    after, _ = run_pass(PASS, program)
    assert [name for name in after.used_constants() if name.endswith("weight")] == ["embed.weight"]


def test_a_saved_program_knows_what_its_entries_return(tmp_path):
    after, _ = run_pass(PASS, decoder(), CacheKV())
    save_program(after, tmp_path / "program.json", tmp_path / "weights.safetensors")
    loaded = load_program(tmp_path / "program.json", tmp_path / "weights.safetensors")
    assert str(loaded) == str(after)
    assert loaded.entry_outputs == after.entry_outputs


@pytest.mark.parametrize("chosen", [PASS, LOW_RANK], ids=str)
def test_a_second_run_changes_nothing(chosen):
    assert_idempotent(chosen, plain())


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        (lambda: headed(kind="encoder"), "only the logits of a decoder are searched for the best token"),
        (
            lambda: headed(lambda head, x: head(x).softmax(-1)),
            "the language-model head is not a linear with a constant weight",
        ),
        (
            lambda: headed(lambda head, x: -1.0 * head(x)),
            "body (mul.Tensor) after the head may change the order of logits",
        ),
        (lambda: headed(vocab=FEW), "the vocabulary has 8 tokens, and candidates=8"),
    ],
)
def test_declines(program, reason):
    assert_declines(PASS, program(), reason=reason)


def test_declines_where_the_estimator_is_as_large_as_the_head():
    packed, _ = run_pass(QuantizeWeights(4, 64), plain())
    reason = "the estimator and the candidates would read 7696 bytes and the head has 7400: too many to gain anything"
    assert_declines(PASS, packed, reason=reason)


def test_declines_a_packed_head_with_a_bias():
    packed, _ = run_pass(QuantizeWeights(8), headed(bias=True))
    assert_declines(PASS, packed, reason="the head is packed and has a bias")


@pytest.mark.parametrize(("columns", "rank"), [(1, 1), (64, 32), (256, 64), (2048, 256)])
def test_rank_unless_given(columns, rank):
    assert ApproximateLmHead(estimator="lowrank").rank_for(columns) == rank
    assert ApproximateLmHead(estimator="lowrank", rank=7).rank_for(columns) == 7


def test_declines_a_rank_that_is_none():
    chosen = ApproximateLmHead(candidates=FEW, estimator="lowrank", rank=WIDTH)
    assert_declines(chosen, plain(), reason="rank=64 is no less than the 64 columns of the head")


def test_runs_before_the_cache():
    cached, _ = run_pass(CacheKV(), decoder())
    with pytest.raises(OptionError, match=r"behind cache-kv.*Put cache-kv last"):
        PASS.run(cached)


def test_a_low_rank_needs_text():
    program = plain().copy()
    program.calibration = None
    with pytest.raises(OptionError, match=r"estimator=lowrank: needs text.*estimator=int4"):
        LOW_RANK.run(program)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"candidates": 0}, "candidates=0: needs at least 1"),
        ({"estimator": "lowrank", "rank": 0}, "rank=0: needs at least 1"),
        ({"rank": 8}, "rank=8 with estimator=int4"),
        ({"estimator": "lowrank", "certify": True}, "certify=true with estimator=lowrank"),
    ],
)
def test_option_errors(options, message):
    with pytest.raises(OptionError, match=message):
        ApproximateLmHead(**options)


@pytest.mark.parametrize(
    "text",
    [
        "approximate-lm-head{candidates=64,estimator=int4,certify=true}",
        "approximate-lm-head{candidates=16,estimator=lowrank,rank=32,certify=false}",
    ],
)
def test_text_round_trip(text):
    (spec,) = parse_pipeline(text)
    chosen = build(ApproximateLmHead, spec, where=text, registries={})
    assert format_pipeline([to_spec(chosen)]) == text
