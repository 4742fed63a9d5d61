from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from jettison.api import parse_passes, pipeline_text
from jettison.ir.capture import capture
from jettison.ir.chunked_run import ChunkedRun
from jettison.ir.compare import assert_close, example_input_ids, run_program
from jettison.ir.constants import Constant
from jettison.ir.errors import OptionError, UnsupportedError
from jettison.ir.huggingface import source_from_model
from jettison.ir.match import arguments
from jettison.passes.cache_kv import CacheKV
from jettison.passes.factorize_linear import FactorizeLinear
from jettison.passes.formats import Bitmap
from jettison.passes.merge_qkv_projections import MergeQkvProjections
from jettison.passes.methods.finished_layers import FinishedLayers
from jettison.passes.pipeline import prepare
from jettison.passes.prune_weights import PruneWeights
from jettison.passes.pruners import Magnitude, Pattern, SparseGPT, Wanda, run
from jettison.passes.pruners.base import lowest, lowest_of_groups
from jettison.passes.pruners.sparsegpt import InputProducts
from jettison.passes.quantize_weights import QuantizeWeights
from tests.helpers import (
    Apply,
    Embedded,
    assert_declines,
    assert_golden,
    assert_idempotent,
    calibrated,
    export_tiny,
    run_pass,
)
from tests.models.tiny_mixture import mixture_program
from tests.models.tiny_models import tiny_model
from tests.passes.test_factorize_linear import Gated, gated, of

METHODS = [Magnitude(), Wanda(), SparseGPT()]
HALF = Pattern(0.5)
NAMES = [f"layers.0.{name}.weight" for name in ("gate", "up", "down")]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def correlated(tokens: int, columns: int, seed: int = 0) -> Tensor:
    """Inputs of unequal size that say much about each other."""
    mixed = randn(tokens, columns, seed=seed) @ randn(columns, columns, seed=seed + 1000) / columns**0.5
    return (mixed + 0.3 * randn(tokens, columns, seed=seed + 2000)) * torch.linspace(0.3, 3, columns)


def pruned(method, weight: Tensor, x: Tensor | None, pattern: Pattern = HALF) -> Tensor:
    statistics = method.statistics(weight.shape[1])
    if statistics is not None:
        statistics.add(x)
    return method.prune(weight.clone(), pattern, statistics)


def output_error(weight: Tensor, found: Tensor, x: Tensor) -> float:
    return float(((found - weight) @ x.T).square().sum())


# --- which weights -----------------------------------------------------------------------------------------------


def test_as_many_as_asked_for_and_of_equal_ones_the_first():
    scores = torch.tensor([[3.0, 1.0, 1.0, 1.0, 2.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    expected = [[False, True, True, False, False], [True, True, False, False, False]]
    assert lowest(scores, 2).tolist() == expected
    assert not lowest(scores, 0).any()
    assert lowest(scores, 5).all()
    groups = lowest_of_groups(torch.tensor([[2.0, 1.0, 1.0, 1.0, 4.0, 3.0, 2.0, 1.0]]), Pattern(0.5, 2, 4))
    assert groups.tolist() == [[False, True, True, False, False, False, True, True]]


def test_magnitude_compares_the_whole_matrix():
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [5.0, -6.0, 7.0, -8.0]])
    assert pruned(Magnitude(), weight, None).tolist() == [[0, 0, 0, 0], [5, -6, 7, -8]]
    assert pruned(Magnitude(), weight, None, Pattern(0.5, 2, 4)).tolist() == [[0, 0, 3, -4], [0, 0, 7, -8]]


def test_wanda_compares_within_a_row():
    weight = torch.tensor([[1.0, -2.0, 3.0, -4.0], [5.0, -6.0, 7.0, -8.0]])
    x = torch.diag(torch.tensor([10.0, 1.0, 2.0, 1.0]))
    assert pruned(Wanda(), weight, x).tolist() == [[1, 0, 3, 0], [5, 0, 7, 0]]


def test_wanda_with_orthonormal_inputs_is_magnitude_by_row():
    weight, x = randn(9, 32), torch.linalg.qr(randn(32, 32, seed=1)).Q
    assert torch.equal(pruned(Wanda(), weight, x) == 0, lowest(weight.abs(), 16))


def test_wanda_does_not_see_factors_that_cancel():
    weight, x = randn(8, 32), randn(50, 32, seed=1)
    factors = 2.0 ** torch.arange(-16, 16)
    expected = pruned(Wanda(), weight, x) == 0
    assert torch.equal(pruned(Wanda(), weight / factors, x * factors) == 0, expected)


def test_sparsegpt_of_independent_inputs_is_magnitude_by_block():
    weight, x = randn(6, 200), 3 * torch.eye(200)
    expected = weight.clone()
    for block in (slice(0, 128), slice(128, 200)):
        chosen = lowest(weight[:, block].abs().reshape(1, -1), weight[:, block].numel() // 2)
        expected[:, block] = weight[:, block].masked_fill(chosen.view(6, -1), 0.0)
    assert torch.allclose(pruned(SparseGPT(), weight, x), expected)


def test_sparsegpt_makes_up_for_one_weight_as_optimal_brain_surgeon_does():
    """`dw = -w_p / [H^-1]_pp * [H^-1]_p` over the columns behind p; earlier ones are done."""
    weight, x = randn(4, 8), correlated(40, 8)
    products = (x.T @ x).double()
    products += 0.01 * products.diagonal().mean() * torch.eye(8, dtype=torch.float64)
    found = pruned(SparseGPT(), weight, x, Pattern(1 / 32))
    ((row, column),) = (found == 0).nonzero().tolist()
    # Of the columns from p on alone: what is in front of p does not move any more.
    inverse = torch.linalg.inv(products[column:, column:])
    expected = weight.double()
    expected[row, column:] -= expected[row, column] / inverse[0, 0] * inverse[0]
    assert torch.allclose(found.double(), expected, atol=1e-5)
    costs = weight.double()[:, :].square()
    factor = torch.linalg.cholesky(torch.linalg.inv(products), upper=True)
    assert int((costs / factor.diagonal().square()).argmin()) == row * 8 + column


def test_sparsegpt_chooses_groups_from_what_is_left_of_them():
    weight, x = randn(16, 32), correlated(100, 32)
    found = pruned(SparseGPT(), weight, x, Pattern(0.5, 2, 4))
    assert bool(((found == 0).view(16, -1, 4).sum(-1) == 2).all())
    first = lowest_of_groups(weight.square() * 1.0, Pattern(0.5, 2, 4))
    assert not torch.equal(found == 0, first)


def test_better_methods_lose_less():
    orders = []
    for seed in range(100):
        x, weight = correlated(200, 32, seed), randn(16, 32, seed=seed + 50)
        magnitude, wanda, sparsegpt = (output_error(weight, pruned(m, weight, x), x) for m in METHODS)
        orders.append((sparsegpt <= wanda, wanda <= magnitude))
    assert sum(first for first, _ in orders) >= 95
    assert sum(second for _, second in orders) >= 95


def test_sparsegpt_loses_less_than_its_zeros_alone():
    for seed in range(20):
        x, weight = correlated(200, 160, seed), randn(16, 160, seed=seed + 50)
        found = pruned(SparseGPT(), weight, x)
        assert output_error(weight, found, x) < output_error(weight, weight.masked_fill(found == 0, 0.0), x)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("pattern", [Pattern(0.3), HALF, Pattern(0.5, 2, 4), Pattern(0.75, 1, 4), Pattern(0.5, 4, 8)])
def test_exactly_as_many_zeros_as_asked_for(method, pattern):
    weight, x = randn(10, 200).round(decimals=1), correlated(50, 200)
    weight[weight == 0] = 0.1
    zeros = pruned(method, weight, x, pattern) == 0
    if pattern.group:
        kept = (~zeros).view(10, -1, pattern.group).sum(-1)
        assert bool((kept == pattern.kept).all())
    elif method.name == "magnitude":
        assert int(zeros.sum()) == pattern.count(2000)
    elif method.name == "wanda":
        assert set(zeros.sum(1).tolist()) == {pattern.count(200)}
    else:
        assert [int(zeros[:, :128].sum()), int(zeros[:, 128:].sum())] == [pattern.count(1280), pattern.count(720)]


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_nothing_to_do_leaves_every_bit(method):
    weight, x = randn(6, 140), correlated(50, 140)
    assert torch.equal(pruned(method, weight, x, Pattern(0.0)), weight)
    assert torch.equal(pruned(method, weight, x, Pattern(0.0, 4, 4)), weight)
    once = pruned(method, weight, x)
    assert torch.equal(pruned(method, once, x), once)


@pytest.mark.parametrize("method", METHODS[1:], ids=lambda method: method.name)
def test_channels_that_were_always_zero_go_first(method):
    weight, x = randn(8, 64), correlated(100, 64)
    x[:, 16:32] = 0
    found = pruned(method, weight, x)
    assert bool((found[:, 16:32] == 0).all())
    assert int((found == 0).sum()) == 8 * 32
    fewer = pruned(method, weight, x, Pattern(0.125))
    assert int((fewer == 0).sum()) == 8 * 8
    assert torch.equal(fewer[:, :16], weight[:, :16]) or method.name == "sparsegpt"


def test_fewer_tokens_than_channels_are_enough():
    weight, x = randn(8, 96), randn(3, 96, seed=5)
    found = pruned(SparseGPT(damping=1e-9), weight, x)
    assert bool(found.isfinite().all())
    assert int((found == 0).sum()) == 8 * 48


# --- graphs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pass_"), [("half", PruneWeights()), ("groups", PruneWeights(pattern="2:4", only="up"))]
)
def test_golden_gated(snapshot, name, pass_):
    assert name in ("half", "groups")
    _, record = assert_golden(snapshot, pass_, gated(), name)
    assert record.rewrites == (3 if name == "half" else 1)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_runs_twice_like_once(method, pattern):
    assert_idempotent(PruneWeights(method=method, pattern=pattern), gated(2))


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_program_computes_with_the_weights_that_are_left(method):
    after, record = run_pass(PruneWeights(method=method), gated(2))
    assert record.rewrites == 6
    module = Gated(2)
    module.load_state_dict({name: after.constants[name].value() for name in module.state_dict()})
    for batch, length in ((1, 1), (2, 7), (3, 16)):
        ids = example_input_ids(after, batch, length)
        with torch.no_grad():
            assert_close(run_program(after, ids)[0], module(ids))
    for name in ("embed.weight", "head.weight", "layers.0.norm.weight"):
        assert after.constants[name] is gated(2).constants[name]


def test_the_weights_are_those_of_the_method():
    """By hand from what the linear reads once those before it are pruned."""
    after, _ = run_pass(PruneWeights(method=SparseGPT()), gated())
    program = gated().copy()
    for name in NAMES[:2]:
        program.constants[name] = after.constants[name]
    down = next(n for n in program.entries["forward"].graph.nodes if reads(n, NAMES[2]))
    statistics = InputProducts(48)
    ChunkedRun(program, "forward", program.calibration()).advance(arguments(down)["input"], statistics.add)
    expected = SparseGPT().prune(program.constants[NAMES[2]].value().clone(), HALF, statistics)
    assert torch.equal(after.constants[NAMES[2]].value(), expected)


def reads(node, name):
    return node.op == "call_function" and any(each.meta.get("constant") == name for each in node.all_input_nodes)


def test_calibrated_methods_lose_less_of_what_the_first_linears_give():
    program, losses = gated(), []
    seen: list[Tensor] = []
    first = next(n for n in program.entries["forward"].graph.nodes if reads(n, NAMES[0]))
    ChunkedRun(program, "forward", program.calibration()).advance(arguments(first)["input"], seen.append)
    x = torch.cat([each.flatten(0, -2) for each in seen])
    for method in METHODS:
        after, _ = run_pass(PruneWeights(method=method), program)
        losses.append([output_error(program.constants[n].value(), after.constants[n].value(), x) for n in NAMES[:2]])
    for magnitude, wanda, sparsegpt in zip(*losses, strict=True):
        assert sparsegpt < 0.9 * wanda < 0.9 * magnitude


def test_figures_and_the_note():
    _, record = run_pass(PruneWeights(sparsity=0.25), gated())
    assert record.layers == {name: {"sparsity": 0.25} for name in NAMES}
    assert set(NAMES) <= set(record.where)
    assert record.bytes_before == record.bytes_after
    (note,) = record.notes
    assert note.startswith("Zeros take as many bytes as other weights until they are left out: add quantize-weights")
    assert "format=bitmap{of=int4}" in note
    _, record = run_pass(PruneWeights(sparsity=0), gated())
    assert (record.rewrites, record.notes) == (0, [])


def test_no_sparsity_is_the_identity():
    for pass_ in (PruneWeights(sparsity=0), PruneWeights(method=SparseGPT(), pattern="4:4")):
        assert_declines(pass_, gated(), reason=None)


def test_bytes_go_with_the_bitmap():
    program = gated(2)
    after, _ = run_pass(PruneWeights(), program)
    stored, record = run_pass(QuantizeWeights(format=Bitmap("float")), after)
    assert record.rewrites == 6
    assert stored.weight_bytes() < 0.85 * program.weight_bytes()
    ids = example_input_ids(after, 2, 9)
    assert_close(run_program(stored, ids)[0], run_program(after, ids)[0])


@functools.cache
def family_program(family):
    return calibrated(capture(source_from_model(tiny_model(family)), torch.float32), vocabulary=97)


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2", "bert"])
def test_families(family):
    """Conv1D and merged projections (GPT-2) are pruned along their inputs, too."""
    program = family_program(family)
    after, record = run_pass(PruneWeights(method=Wanda(), pattern="2:4"), program)
    assert record.rewrites >= 8
    assert record.misses == []
    for name in record.layers:
        linear = next(n for n in after.entries["forward"].graph.nodes if reads(n, name))
        assert linear.target is torch.ops.aten.linear.default
        kept = (after.constants[name].value() != 0).view(len(after.constants[name].value()), -1, 4).sum(-1)
        assert bool((kept <= 2).all())


def test_merged_projections_are_one_matrix():
    merged, _ = run_pass(MergeQkvProjections(), family_program("llama"))
    after, record = run_pass(PruneWeights(method=Wanda()), merged)
    name = next(name for name in record.layers if "qkv_proj" in name)
    zeros = (after.constants[name].value() == 0).sum(1)
    assert set(zeros.tolist()) == {after.constants[name].shape[1] // 2}


def test_weights_stay_in_the_dtype_of_the_checkpoint():
    program = calibrated(export_tiny(Gated().to(torch.bfloat16), kind="decoder", dtype=torch.float32))
    for method in METHODS:
        after, _ = run_pass(PruneWeights(method=method), program)
        assert {after.constants[name].stored_dtype for name in NAMES} == {torch.bfloat16}
        assert after.weight_bytes() == program.weight_bytes()
        stored, _ = run_pass(QuantizeWeights(format=Bitmap("float")), after)
        assert stored.constants[f"{NAMES[0]}.values"].dtype == torch.bfloat16


# --- what it leaves alone ----------------------------------------------------------------------------------------


def test_skip_and_only():
    after, record = run_pass(PruneWeights(skip="gate", only="gate|up"), gated())
    assert list(record.layers) == ["layers.0.up.weight"]
    assert after.constants["layers.0.down.weight"] is gated().constants["layers.0.down.weight"]
    _, record = run_pass(PruneWeights(only="nowhere"), gated())
    assert [(miss.node, miss.reason) for miss in record.misses] == [
        ("only='nowhere'", "found in the name of no weight")
    ]


def test_declines_a_shared_weight():
    def function(self, x):
        return F.linear(F.linear(x, self.w), self.w)

    assert_declines(PruneWeights(), of(function, w=(8, 8)), reason="aten.linear reads body.w too")


def test_declines_a_computed_weight():
    program = export_tiny(
        Embedded(Apply(lambda self, x: F.linear(F.silu(F.linear(x, self.w * x.sum())), self.v), w=(8, 8), v=(8, 8)))
    )
    prepare(program)
    _, misses = PruneWeights().find(program)
    assert [miss.reason for miss in misses] == ["the weight is not a constant"]


def test_declines_quantised_weights():
    program, _ = run_pass(QuantizeWeights(bits=4, only="layers"), gated())
    assert_declines(
        PruneWeights(), program, reason="it is quantised already: put prune-weights before quantize-weights"
    )


def test_declines_columns_that_are_no_whole_groups():
    assert_declines(
        PruneWeights(pattern="3:5", only="up|gate"), gated(), reason="its 32 columns are no whole groups of 5"
    )


def test_declines_stacks_of_experts():
    program = mixture_program(32)
    _, record = run_pass(PruneWeights(), program)
    assert "weights of routed experts are stacks, which no sparse format stores" in {m.reason for m in record.misses}


def test_factors_are_pruned_like_other_linears():
    after, _ = run_pass(FactorizeLinear(rank=8, share=False), gated())
    _, record = run_pass(PruneWeights(), after)
    assert record.rewrites == 6


# --- errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "needs a share from 0, below 1"),
        ({"sparsity": -0.1}, "needs a share from 0, below 1"),
        ({"pattern": "half"}, "needs unstructured, or n:m"),
        ({"pattern": "0:4"}, "needs n:m with n from 1 to m"),
        ({"pattern": "5:4"}, "needs n:m with n from 1 to m"),
        ({"pattern": "2:4", "sparsity": 0.6}, "the pattern makes 0.5 of the weights zero"),
        ({"skip": "("}, "needs a regular expression"),
        ({"only": "("}, "needs a regular expression"),
    ],
)
def test_option_errors(options, message):
    with pytest.raises(OptionError, match=message):
        PruneWeights(**options)


@pytest.mark.parametrize("damping", [0, 2])
def test_damping_errors(damping):
    with pytest.raises(OptionError, match="damping"):
        SparseGPT(damping=damping)


def test_text():
    text = "prune-weights{method=sparsegpt{damping=0.1},sparsity=0.3,skip='down'},prune-weights{pattern=2:4}"
    first, second = parse_passes(text)
    assert first == PruneWeights(method=SparseGPT(damping=0.1), sparsity=0.3, skip="down")
    assert second == PruneWeights(pattern="2:4")
    assert parse_passes(pipeline_text([first, second])) == [first, second]
    assert parse_passes("prune-weights{method=wanda}") == [PruneWeights(method=Wanda())]
    with pytest.raises(OptionError, match="wando"):
        parse_passes("prune-weights{method=wando}")


def test_needs_whole_sequences_and_text():
    cached, _ = run_pass(CacheKV(), family_program("llama"))
    for method in METHODS:
        with pytest.raises(OptionError, match="behind cache-kv"):
            PruneWeights(method=method).run(cached)
    program = export_tiny(Gated(), kind="decoder")
    prepare(program)
    with pytest.raises(OptionError, match=r"method=wanda: needs text to calibrate on.*method=magnitude"):
        PruneWeights(method=Wanda()).run(program)
    assert PruneWeights().run(program).rewrites == 3
    assert [PruneWeights(method=method).needs_calibration for method in METHODS] == [False, True, True]


def test_numbers_that_are_not_finite_are_refused():
    program = gated().copy()
    weight = program.constants[NAMES[1]].value().clone()
    weight[0, 0] = torch.nan
    program.constants[NAMES[1]] = Constant(NAMES[1], weight)
    with pytest.raises(UnsupportedError, match=r"layers\.0\.up\.weight: it holds numbers that are not finite"):
        PruneWeights().run(program)
    program = gated().copy()
    large = program.constants["layers.0.norm.weight"].value() * 1e30
    program.constants["layers.0.norm.weight"] = Constant("layers.0.norm.weight", large)
    with pytest.raises(UnsupportedError, match="is not finite on the calibration tokens"):
        PruneWeights(method=SparseGPT()).run(program)


# --- interruptions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_an_interrupted_run_goes_on(method, monkeypatch, tmp_path):
    pass_ = PruneWeights(method=method)
    whole, _ = run_pass(pass_, gated(2))
    calls, stop = [], 0
    original = run.PruningRun._pruned

    def interrupted(self, weight, statistics):
        calls.append(weight.name)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return original(self, weight, statistics)

    monkeypatch.setattr(run.PruningRun, "_pruned", interrupted)
    program = gated(2).copy()
    program.finished = FinishedLayers(tmp_path / "unfinished", "this")
    stop = 4
    with pytest.raises(KeyboardInterrupt):
        pass_.run(program.copy())
    assert len(list((tmp_path / "unfinished").glob("*.safetensors"))) == 2
    calls.clear()
    stop = 0
    for expected in (3, 0):
        resumed, _ = run_pass(pass_, program)
        assert str(resumed) == str(whole)
        assert len(calls) == expected
        calls.clear()
