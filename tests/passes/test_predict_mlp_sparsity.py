from __future__ import annotations

import functools
import operator
from typing import Any

import pytest
import torch

import jettison
from jettison.api import parse_passes, pipeline_text
from jettison.drift import BudgetExceeded
from jettison.ir.compare import assert_close, run_program
from jettison.ir.edit import Edit
from jettison.ir.errors import OptionError
from jettison.ir.match import arguments, is_call
from jettison.ir.ops import attention, quantized_linear, quantized_sparse_mlp, sparse_mlp
from jettison.passes.cache_kv import CacheKV
from jettison.passes.decode_only import is_decode_only
from jettison.passes.formats import Nf4
from jettison.passes.pipeline import apply
from jettison.passes.policies import POLICIES
from jettison.passes.predict_mlp_sparsity import PredictMlpSparsity
from jettison.passes.predictors import DejaVu, HiRE
from jettison.passes.predictors.base import Samples, recall
from jettison.passes.predictors.hire import second_moment, truncated
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.passes.residual_stream import ancestors
from tests.helpers import (
    assert_declines,
    assert_golden,
    assert_idempotent,
    assert_same_numbers,
    run_pass,
    set_weights,
)
from tests.models import odd_feed_forward as odd
from tests.models.tiny_feed_forward import WIDTH, Decoder, calibrated, decoder, decoder_program, token_ids

GROUP = 8
UP, DOWN = "layers.0.mlp.up.weight", "layers.0.mlp.down.weight"
GATED = {"activation": "silu", "gated": True, "bias": False}


@functools.cache
def captured(**options: Any):
    return decoder_program(**options)


@functools.cache
def layer(module):
    return calibrated(set_weights(Decoder(module())), kind="decoder")


def predict(keep: Any = 0.25, rank: int = 4, predictor: Any = DejaVu, lookahead: str = "same", **options: Any):
    more = {} if predictor is HiRE else {"lookahead": lookahead}
    return PredictMlpSparsity(method=predictor(rank=rank, **more), keep=keep, **{"group": GROUP, **options})


@functools.cache
def sparse():
    """The plainest result, and the record."""
    return run_pass(predict(), captured())


def nodes(program, *targets, entry="forward"):
    return [node for node in program.entries[entry].graph.nodes if is_call(node, *targets)]


def kept(program, entry="forward"):
    return [node.args[1] for node in nodes(program, torch.ops.aten.topk.default, entry=entry)]


def test_golden_relu(snapshot):
    after, record = assert_golden(snapshot, predict(), captured(), "relu")
    assert (record.rewrites, record.misses) == (1, [])
    assert kept(after) == [2]


def test_golden_gated(snapshot):
    after, record = assert_golden(snapshot, predict(predictor=HiRE), captured(**GATED), "gated")
    assert (record.rewrites, record.misses) == (1, [])
    assert kept(after) == [2]


@pytest.mark.parametrize(
    ("predictor", "options"),
    [(DejaVu, GATED), (HiRE, {"layers": 2, "is_flat": True}), (DejaVu, {"activation": "gelu_tanh", "bias": False})],
    ids=["gated", "two_layers_of_rows", "no_biases"],
)
def test_all_groups_are_the_dense_layer(predictor, options):
    after, record = run_pass(predict(1.0, predictor=predictor, force=True), captured(**options))
    assert (record.rewrites, record.misses) == (options.get("layers", 1), [])
    assert len(nodes(after, sparse_mlp)) == record.rewrites
    assert_same_numbers(captured(**options), after)


@pytest.mark.parametrize(("predictor", "options"), [(DejaVu, {}), (HiRE, GATED)], ids=["relu", "gated"])
def test_few_groups_of_a_sparse_layer_are_close(predictor, options):
    """A token fires one kind of neurons of eight."""
    before = captured(tokens=2048, **options)
    more = {"rank": 16, "predictor": predictor, "force": True}
    after, record = run_pass(predict(0.25, **more), before)
    assert (record.rewrites, record.misses) == (1, [])
    worse, _ = run_pass(predict(0.125, **more, stand_in=False), before)
    ids = token_ids(2, 30)
    expected, ours, without = (run_program(each, ids)[0] for each in (before, after, worse))
    assert 1e-6 < (ours - expected).norm() / expected.norm() < 0.25
    assert (ours - expected).norm() < 0.7 * (without - expected).norm()


def test_stand_ins_are_the_mean_of_what_is_left_out():
    """Keeping one group with every token alike, what is added is what was taken away."""
    program = captured().copy()
    ids = token_ids(1, 1).expand(2, 8)
    names = [n.name for n in program.entries["forward"].graph.nodes if n.op == "placeholder"]
    alike = {"input_ids": ids, "position_ids": torch.zeros_like(ids), "attention_mask": torch.ones_like(ids),
             "logits_positions": torch.arange(8).expand(2, 8)}  # fmt: skip
    program.calibration = lambda: [{name: value for name, value in alike.items() if name in names}]
    after, _ = run_pass(predict(0.125, force=True), program)
    without, _ = run_pass(predict(0.125, force=True, stand_in=False), program)
    assert not any(name.endswith("absent") for name in without.constants)
    expected, ours, worse = (run_program(each, ids, inputs=alike)[0] for each in (program, after, without))
    assert_close(ours, expected)
    assert (worse - expected).abs().max() > 1e-3


def test_what_is_stored():
    after, record = sparse()
    assert DOWN not in after.constants
    assert torch.equal(after.constants[f"{DOWN}.transposed"].value(), captured().constants[DOWN].value().T)
    learned = {name for name in after.constants if ".predictor." in name or name.endswith(".absent")}
    assert learned == {
        "layers.0.mlp.up.absent",
        *(f"layers.0.mlp.up.predictor.{name}" for name in ("first", "first_bias", "second", "second_bias")),
    }
    extra = sum(after.constants[name].stored_bytes for name in learned)
    assert extra == 4 * (9 * WIDTH + 4 * WIDTH + 4 + 8 * 4 + 8)
    assert record.bytes_after == record.bytes_before + extra == after.weight_bytes()
    absent = after.constants["layers.0.mlp.up.absent"].value()
    assert_close(absent[-1], absent[:-1].sum(0))


def test_runs_twice_like_once():
    assert_idempotent(predict(), captured())
    assert_idempotent(predict(predictor=HiRE), captured(**GATED))


def test_the_seed_decides():
    one, two, other = (run_pass(predict(seed=seed), captured())[0] for seed in (0, 0, 1))
    assert str(one) == str(two)
    assert str(one) != str(other)


# --- entries -----------------------------------------------------------------------------------------------------


def test_a_prompt_is_dense_and_decoding_is_not():
    dense, after = captured(), sparse()[0]
    cached, _ = run_pass(CacheKV(), after)
    ids = token_ids(2, 9)
    expected, sparse_logits = run_program(dense, ids)[0], run_program(after, ids)[0]
    assert_close(run_program(cached, ids)[0], expected)
    out = run_program(cached, ids, prefill=4)[0]
    assert_close(out[:, :4], expected[:, :4])
    # Keys and values of one layer do not depend on what its neurons do, so a step is what `forward` computes.
    assert_close(out[:, 4:], sparse_logits[:, 4:])
    assert (out[:, 4:] - expected[:, 4:]).abs().max() > 1e-4
    # No predictor in the prompt, and the weights are the same constants.
    assert (kept(cached, "prefill"), kept(cached, "decode")) == ([], [2])
    (prompt,), (step,) = (nodes(cached, sparse_mlp, entry=entry) for entry in ("prefill", "decode"))
    assert [arguments(prompt)[name] for name in ("indices", "absent")] == [None, None]
    assert cached.weight_bytes() == after.weight_bytes()
    assert [arguments(node)["up"].meta["constant"] for node in (prompt, step)] == [UP, UP]
    assert not is_decode_only(dense)
    assert is_decode_only(after)
    assert is_decode_only(cached)


@pytest.mark.parametrize(("bits", "options"), [(4, GATED), (8, {})], ids=["int4_gated", "int8_relu"])
def test_quantised_layers(bits, options):
    dense = captured(neurons=256, **options)
    quantised, _ = run_pass(QuantizeWeights(bits=bits), dense)
    after, record = run_pass(predict(0.5, group=32, rank=16, predictor=HiRE, force=True), quantised)
    assert (record.rewrites, record.misses) == (1, [])
    cached, _ = run_pass(CacheKV(), after)
    assert len(nodes(after, quantized_sparse_mlp)) == 1
    assert nodes(cached, quantized_sparse_mlp, entry="prefill") == []
    # A prompt is what it was.
    reference, _ = run_pass(CacheKV(), quantised)
    assert len(nodes(cached, quantized_linear, entry="prefill")) == len(
        nodes(reference, quantized_linear, entry="prefill")
    )
    ids = token_ids(2, 7)
    out, expected = run_program(cached, ids, prefill=4)[0], run_program(quantised, ids)[0]
    assert_close(out[:, :4], expected[:, :4])
    assert 0 < (out[:, 4:] - expected[:, 4:]).norm() / expected.norm() < 0.2
    every, _ = run_pass(predict(1.0, group=32, force=True), quantised)
    assert_same_numbers(quantised, every, ((1, 1), (2, 7)))


def test_quantising_behind_it_says_what_is_too_late():
    after, record = run_pass(QuantizeWeights(bits=8, only="predictor"), sparse()[0])
    assert set(after.packed) == {f"layers.0.mlp.up.predictor.{name}" for name in ("first", "second")}
    reason = "it is read sparsely already: put quantize-weights before predict-mlp-sparsity"
    assert record.misses == []
    assert_same_numbers(sparse()[0], after, ((2, 7),), tolerance=2e-2, reason="weights in 8 bits choose the groups")
    _, record = run_pass(QuantizeWeights(bits=8), sparse()[0])
    assert [(miss.node, miss.reason) for miss in record.misses] == [(UP, reason)]
    _, record = run_pass(QuantizeWeights(bits=8, skip="mlp"), sparse()[0])
    assert record.misses == []


POLICY_OPTIONS = {
    "window": "{size=12}", "sinks": "{budget=24}", "h2o": "{budget=24}", "snapkv": "{budget=24,window=8}",
    "kivi": "{group=16}", "mikv": "{budget=24}",
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
def test_before_every_policy(policy):
    """Prompts are those of the model without either pass: nothing is dropped, and no code is read, until they end."""
    program = sparse()[0].copy()
    apply(program, parse_passes(f"cache-kv{{policy={policy}{POLICY_OPTIONS.get(policy, '')}}}"))
    ids = token_ids(2, 11)
    out, expected = run_program(program, ids, prefill=9)[0], run_program(captured(), ids)[0]
    assert_close(out[:, :9], expected[:, :9])
    assert (out[:, 9:] - expected[:, 9:]).abs().max() > 1e-4
    assert (kept(program, "prefill"), kept(program, "decode")) == ([], [2])


# --- lookahead ---------------------------------------------------------------------------------------------------


def test_a_predictor_may_run_beside_the_attention():
    before = captured(layers=2, is_flat=True)
    after, record = run_pass(predict(lookahead="previous", force=True), before)
    assert record.rewrites == 2
    order = list(after.entries["forward"].graph.nodes)
    for node, attends in zip(nodes(after, sparse_mlp), nodes(after, attention), strict=True):
        indices = arguments(node)["indices"]
        assert attends not in ancestors(indices)
        assert order.index(indices) < order.index(attends)
    every, _ = run_pass(predict(1.0, lookahead="previous", force=True), before)
    assert_same_numbers(before, every)


def test_moving_a_predictor_changes_nothing():
    after, _ = run_pass(predict(lookahead="previous", force=True), captured())
    moved = after.copy()
    (node,) = nodes(moved, sparse_mlp)
    order = list(moved.entries["forward"].graph.nodes)
    (attends,) = nodes(moved, attention)
    own = [n for n in order if n in ancestors(arguments(node)["indices"]) and n not in ancestors(attends)]
    own = [n for n in own if n.op == "call_function"] + [arguments(node)["indices"]]
    assert len(own) >= 5
    for each in own:
        node.prepend(each)
    moved.entries["forward"].recompile()
    moved.entries["forward"].graph.lint()
    ids = token_ids(2, 7)
    assert torch.equal(run_program(moved, ids)[0], run_program(after, ids)[0])


def test_a_predictor_that_reads_what_comes_later_is_a_bug():
    """The promise that `ensures` checks."""
    pass_ = predict(lookahead="previous", force=True)
    after, _ = run_pass(pass_, captured())
    assert pass_.ensures(after) is None
    (node,) = nodes(after, sparse_mlp)
    edit = Edit(after, "forward", "test")
    with edit.before(node):
        late = edit.call(torch.ops.aten.topk.default, arguments(node)["x"], 2)
        indices = edit.call(operator.getitem, late, 1)
    edit.set_arguments(node, node.args[0], indices, *node.args[2:])
    assert pass_.ensures(after) == f"the predictor of {UP} reads what comes after its source"


# --- how many groups ---------------------------------------------------------------------------------------------


def test_auto_keeps_fewer_for_a_larger_error():
    counts = []
    for error in (0.3, 0.05, 0.0):
        after, record = run_pass(predict("auto", error=error, force=True), captured())
        assert record.rewrites == 1
        counts += kept(after)
    assert counts[0] < counts[1] < counts[2] <= 8
    after, _ = run_pass(predict("auto", force=True), captured())
    assert counts[1] <= kept(after)[0] <= counts[2], "aims at a thousandth"


# --- what it leaves alone ----------------------------------------------------------------------------------------


def reasons(pass_, program):
    after, record = run_pass(pass_, program)
    assert (record.rewrites, str(after)) == (0, str(program))
    return [(miss.node, miss.reason) for miss in record.misses]


def test_declines_what_is_not_sparse():
    program = captured(in_order=False)
    ((node, reason),) = reasons(predict(), program)
    assert node == UP
    assert reason.startswith("its activations are not sparse: 2 of 8 groups lose ")
    assert reason.endswith("% of the energy behind it, more than 5.0% (error)")
    ((_, reason),) = reasons(predict(error=0.001), program)
    assert reason.endswith("more than 0.1% (error)")
    assert run_pass(predict(error=1.0), program)[1].rewrites == 1
    assert run_pass(predict(force=True), program)[1].rewrites == 1


def test_declines_what_is_faster_dense():
    ((node, reason),) = reasons(predict(0.5), captured())
    assert node == UP
    assert reason == (
        "dense is faster: 4 of 8 groups and the predictor are 54% of its bytes, and a gathered byte takes 2.3 times as "
        "long"
    )
    # A wide predictor costs as much as the layer.
    assert "the predictor are 96% of its bytes" in reasons(predict(0.25, rank=72), captured())[0][1]
    packed, _ = run_pass(QuantizeWeights(), captured(neurons=256))
    for target, cost in ((None, 3.2), ("torch", 3.2), ("onnx", 1.6)):
        packed.target = target
        assert f"{cost} times as long" in reasons(predict(0.75, group=32), packed)[0][1]
    assert run_pass(predict(0.5, force=True), captured())[1].rewrites == 1


def test_declines_groups_that_do_not_fit():
    assert reasons(predict(group=24), captured()) == [(UP, "groups of 24 do not divide its 64 neurons")]
    program, _ = run_pass(QuantizeWeights(), captured())
    reason = "groups of 8 neurons cut the groups of 32 columns of its second matrix"
    assert reasons(predict(), program) == [(f"{DOWN}.codes", reason)]


@pytest.mark.parametrize(
    ("module", "node", "reason"),
    [
        (odd.Shared, "layers.0.up.weight", "aten.linear reads layers.0.up.weight too"),
        (odd.Computed, "layers.0 (linear)", "a weight is not a constant"),
        (odd.Watched, "layers.0 (relu)", "something else reads its neurons too"),
        (odd.BiasedGate, "layers.0.gate.weight", "the gate has a bias"),
    ],
)
def test_declines(module, node, reason):
    assert reasons(predict(force=True), layer(module)) == [(node, reason)]


def test_declines_tables_of_values():
    program, _ = run_pass(QuantizeWeights(format=Nf4()), captured())
    assert reasons(predict(force=True), program) == [
        (f"{DOWN}.codes", "its weights are codes into a table, which are not read by groups")
    ]


def test_lookahead_needs_an_attention():
    reason = "there is no residual before an attention that lookahead=previous could read"
    assert reasons(predict(lookahead="previous", force=True), layer(odd.Plain)) == [("layers.0.up.weight", reason)]
    assert run_pass(predict(force=True), layer(odd.Plain))[1].rewrites == 1


def test_skip_is_searched_in_names():
    program = captured(layers=2, is_flat=True)
    after, record = run_pass(predict(skip=r"layers\.1\."), program)
    assert (record.rewrites, record.misses) == (1, [])
    assert [describe.args[3].meta["constant"] for describe in nodes(after, sparse_mlp)] == [UP]
    assert_declines(predict(skip="mlp"), program, reason=None)


def test_needs_the_captured_graph_and_text():
    cached, _ = run_pass(CacheKV(), captured())
    with pytest.raises(OptionError, match=r"\[predict-mlp-sparsity\] behind cache-kv(?s:.)*cache-kv last"):
        predict().run(cached)
    silent = captured().copy()
    silent.calibration = None
    with pytest.raises(OptionError, match="Decoder: needs a decoder and text to calibrate on"):
        predict().run(silent)
    assert PredictMlpSparsity().needs_calibration


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("group=0", "group=0: needs 1 or more neurons"),
        ("keep=0", "keep=0.*: needs a share above 0, at most 1, or auto"),
        ("keep=1.5", "keep=1.5: needs a share"),
        ("error=-1", "error=-1.*: needs a share of energy, 0 or more"),
        ("skip='a['", r"skip='a\[': needs a regular expression"),
        ("method=dejavu,rank=0", r"\[dejavu\] rank=0: needs 1 or more"),
        ("method=hire{rank=0}", r"\[hire\] rank=0: needs 1 or more"),
        ("method=hire,lookahead=previous", "lookahead"),
        ("method=magic", "magic"),
        ("method=dejavu,lookahead=next", "lookahead"),
    ],
)
def test_refuses_options(text, message):
    with pytest.raises(OptionError, match=message):
        parse_passes(f"predict-mlp-sparsity{{{text}}}")


def test_text():
    text = "predict-mlp-sparsity{method=dejavu,rank=16,lookahead=previous,keep=0.1,group=64}"
    (pass_,) = parse_passes(text)
    assert pass_ == PredictMlpSparsity(method=DejaVu(16, "previous"), keep=0.1, group=64)
    assert parse_passes(pipeline_text([pass_])) == [pass_]
    assert parse_passes("predict-mlp-sparsity") == [PredictMlpSparsity(method=DejaVu(), keep="auto", group=32)]


# --- predictors --------------------------------------------------------------------------------------------------


def test_recall_counts_what_matters():
    scores = torch.tensor([[3.0, 2.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    assert recall(scores, scores, 2) == 1
    # Of the second token only one group is worth anything.
    assert recall(torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 1.0, 0.0]]), scores, 2) == pytest.approx(1 / 3)
    assert recall(scores, torch.zeros(2, 4), 2) == 0


def test_training_finds_what_decides():
    """Every token fires the two groups that its largest channels name, and the recall of tokens not seen is high."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(17408, 16, generator=generator)
    scores = torch.relu(inputs[:, :8]) ** 2
    samples = Samples(inputs[:16384], scores[:16384], torch.zeros(64, 16), None, None, torch.ones(64), "relu")
    found = []
    for seed in (0, 1):
        made = DejaVu(rank=24).fit(samples, 2, seed)
        found.append(recall(DejaVu().scores(inputs[16384:], made, "relu"), scores[16384:], 2))
    assert found[0] != found[1]
    assert min(found) > 0.9 > 0.3 > recall(torch.randn(1024, 8, generator=generator), scores[16384:], 2)
    # One token is little to learn from, and no error.
    alone = Samples(inputs[:1], scores[:1], torch.zeros(64, 16), None, None, torch.ones(64), "relu")
    assert all(value.isfinite().all() for value in DejaVu(rank=24).fit(alone, 2, 0).values())


def test_factors_keep_what_inputs_need():
    """Inputs in a few directions: as many factors give the products exactly, which those of the matrix alone do not."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(24, 16, generator=generator)
    inputs = torch.randn(200, 4, generator=generator) @ torch.randn(4, 16, generator=generator)
    rows, columns = truncated(matrix, second_moment(inputs), 4)
    assert (rows.shape, columns.shape) == ((24, 4), (4, 16))
    expected = inputs @ matrix.T
    left, values, right = torch.linalg.svd(matrix)
    plain = inputs @ ((left[:, :4] * values[:4]) @ right[:4]).T
    assert (inputs @ columns.T @ rows.T - expected).norm() < 0.02 * expected.norm() < 0.1 * (plain - expected).norm()


# --- the front door ----------------------------------------------------------------------------------------------


def optimized(passes: str, **settings: Any):
    return jettison.optimize(decoder(), passes, target="torch", context=64, calibration_size=(4, 32), **settings)


def test_check_measures_the_drift():
    text = "cluster-neurons{group=8},predict-mlp-sparsity{keep=0.5,group=8,method=hire,rank=16,force=true}"
    model = optimized(text, check=True)
    clustered, predicted, cached = model.report.passes
    assert clustered.kl == pytest.approx(0, abs=1e-9)
    assert predicted.rewrites == 1
    assert 1e-9 < predicted.kl < 0.05
    # Half of the tokens are a prompt then.
    assert cached.kl < predicted.kl
    assert model.report.pipeline.startswith("cluster-neurons{group=8,keep=0.125},predict-mlp-sparsity{method=hire")
    assert len(model.generate(token_ids(1, 5), max_new_tokens=4)[0]) >= 4


def test_a_budget_names_the_pass():
    with pytest.raises(BudgetExceeded, match=r"\[predict-mlp-sparsity\] the program is") as caught:
        optimized("predict-mlp-sparsity{keep=0.125,group=8,method=hire,rank=4,force=true,stand_in=false}", max_kl=1e-9)
    assert caught.value.pass_name == "predict-mlp-sparsity"
