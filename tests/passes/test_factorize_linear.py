from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jettison.api import parse_passes, pipeline_text
from jettison.codegen.onnx.emit import emit_program
from jettison.ir.capture import capture
from jettison.ir.chunked_run import ChunkedRun
from jettison.ir.compare import assert_close, example_input_ids, run_program
from jettison.ir.constants import Constant
from jettison.ir.errors import OptionError, UnsupportedError
from jettison.ir.huggingface import source_from_model
from jettison.ir.match import arguments, is_call
from jettison.ir.ops import experts, quantized_linear
from jettison.ir.program import ModelInfo, Program
from jettison.passes import factorize_linear
from jettison.passes.cache_kv import CacheKV
from jettison.passes.factorize_linear import FactorizeLinear
from jettison.passes.factorizers import ASVD, SVD, SVDLLM
from jettison.passes.formats import IntGroups
from jettison.passes.fuse_low_rank import FuseLowRank
from jettison.passes.low_rank.allocation import RankChoice, allocate
from jettison.passes.low_rank.forms import LowRankForm
from jettison.passes.low_rank.sizes import Sizes
from jettison.passes.merge_qkv_projections import MergeQkvProjections
from jettison.passes.methods.finished_layers import FinishedLayers
from jettison.passes.methods.sensitivity import Probe
from jettison.passes.pipeline import prepare
from jettison.passes.quantize_weights import QuantizeWeights
from tests.helpers import (
    Apply,
    Embedded,
    StoreIn,
    assert_declines,
    assert_golden,
    assert_idempotent,
    calibrated,
    export_tiny,
    run_pass,
)
from tests.models.tiny_models import tiny_model

aten = torch.ops.aten
WIDTH, INNER = 32, 48
PACKED = "it is quantised already, and factors are made of whole weights: put factorize-linear before quantize-weights"


class Gated(nn.Module):
    """Gated feed-forward layers with a head."""

    def __init__(self, layers=1):
        super().__init__()
        self.embed = nn.Embedding(61, WIDTH)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm": nn.RMSNorm(WIDTH),
                    "gate": nn.Linear(WIDTH, INNER, bias=False),
                    "up": nn.Linear(WIDTH, INNER),
                    "down": nn.Linear(INNER, WIDTH, bias=False),
                }
            )
            for _ in range(layers)
        )
        self.head = nn.Linear(WIDTH, 61, bias=False)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            h = layer["norm"](x)
            x = x + layer["down"](F.silu(layer["gate"](h)) * layer["up"](h))
        return self.head(x)


@functools.cache
def gated(layers=1):
    return calibrated(export_tiny(Gated(layers), kind="decoder"))


def of(function, **parameters):
    """A calibrated decoder: a function of hidden states `[B, S, 8]` in front of a head."""

    def with_head(self, x):
        return F.linear(function(self, x), self.head)

    module = Embedded(Apply(with_head, **parameters, head=(61, 8)))
    return calibrated(export_tiny(module, kind="decoder"))


@functools.cache
def family_program(family):
    """A small model of transformers, calibrated."""
    return calibrated(capture(source_from_model(tiny_model(family)), torch.float32), vocabulary=97)


def dense_of(after, name):
    """The weight that factors, and perhaps a residual, stand for."""
    node = next(n for n in after.entries["forward"].graph.nodes if reads(n, f"{name}.rows"))
    form = LowRankForm.of(node)
    columns = after.constants[arguments(form.columns)["weight"].meta["constant"]].value()
    return after.constants[f"{name}.rows"].value() @ columns


def reads(node, name):
    return node.op == "call_function" and any(each.meta.get("constant") == name for each in node.all_input_nodes)


def numbers(before, after):
    """Relative squared error of the logits on other tokens."""
    ids = example_input_ids(before, 2, 19)
    expected, found = run_program(before, ids)[0], run_program(after, ids)[0]
    return float((found - expected).square().sum() / expected.square().sum())


# --- graphs ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pass_"),
    [
        ("alone", FactorizeLinear(rank=6, share=False)),
        ("shared", FactorizeLinear(ratio=0.5, share=True)),
        ("residual", FactorizeLinear(rank=2, residual="int4", group=32, share=False, only="down|up")),
    ],
)
def test_golden_gated(snapshot, name, pass_):
    assert name in ("alone", "shared", "residual")
    after, record = assert_golden(snapshot, pass_, gated(), name)
    assert record.rewrites == (2 if name == "residual" else 3)
    assert not after.constants.keys() & {f"layers.0.{each}.weight" for each in ("down", "up")}


def test_shapes_and_stored_dtypes():
    program = export_tiny(Gated().to(torch.bfloat16), kind="decoder", dtype=torch.float32)
    after, _ = run_pass(FactorizeLinear(rank=5, share=True), calibrated(program))
    used = after.used_constants()
    # Two of rank 5 have 2 * 5 * (48 + 32) parameters, and one of rank 6 as many columns as fit.
    assert used["layers.0.shared.columns"].shape == (800 // (48 + 48 + 32), 32)
    assert used["layers.0.up.weight.rows"].shape == (48, 6)
    assert used["layers.0.down.weight.columns"].shape == (5, 48)
    assert {used[name].stored_dtype for name in used if name.endswith(("columns", "rows"))} == {torch.bfloat16}
    assert {used[name].dtype for name in used if name.endswith(("columns", "rows"))} == {torch.float32}


@pytest.mark.parametrize("pass_", [FactorizeLinear(rank=6), FactorizeLinear(ratio=0.4, residual="int4", group=32)])
def test_runs_twice_like_once(pass_):
    assert_idempotent(pass_, gated(2))
    after, _ = run_pass(pass_, gated(2))
    _, record = run_pass(pass_, after)
    assert record.misses == []


# --- numbers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SVD(), ASVD(), ASVD(alpha=1.0), SVDLLM()])
@pytest.mark.parametrize("rank", [1, 7, 19])
def test_the_program_computes_with_the_factors(method, rank):
    """The model with the weights that the factors stand for, in the place of its own."""
    after, record = run_pass(FactorizeLinear(method=method, rank=rank, share=False), gated(2))
    assert record.rewrites == 6
    module = Gated(2)
    weights = {name: gated(2).constants[name].value() for name in module.state_dict()}
    for name in weights:
        if f"{name}.rows" in after.constants:
            weights[name] = dense_of(after, name)
            assert torch.linalg.matrix_rank(weights[name]) <= rank
    module.load_state_dict(weights)
    for batch, length in ((1, 1), (2, 7), (3, 16)):
        ids = example_input_ids(after, batch, length)
        with torch.no_grad():
            assert_close(run_program(after, ids)[0], module(ids))


def test_a_rank_just_below_break_even_loses_little():
    """19 of 32 directions; inputs have fewer that matter."""
    losses = [numbers(gated(2), run_pass(FactorizeLinear(rank=rank), gated(2))[0]) for rank in (2, 8, 19)]
    assert losses[0] > losses[1] > losses[2]
    assert losses[2] < 0.3 * losses[0]


def test_weights_of_low_rank_are_found_exactly():
    def function(self, x):
        return x + F.linear(F.silu(F.linear(x, self.up, self.bias)), self.down)

    program = of(function, up=(24, 8), bias=(24,), down=(8, 24))
    for name in ("body.up", "body.down"):
        weight = program.constants[name].blocks[0]
        left, values, right = torch.linalg.svd(weight, full_matrices=False)
        weight.copy_(left[:, :3] * values[:3] @ right[:3])
    after, record = run_pass(FactorizeLinear(rank=3), program)
    assert record.rewrites == 2
    assert_close(
        run_program(after, example_input_ids(program, 2, 9))[0],
        run_program(program, example_input_ids(program, 2, 9))[0],
    )


def test_a_dead_channel_and_few_tokens_are_no_trouble():
    def function(self, x):
        dead = torch.cat([x, torch.zeros_like(x)], -1)
        return x + F.linear(F.relu(F.linear(dead, self.up)), self.down)

    program = of(function, up=(40, 16), down=(8, 40))
    batches = [{name: value[:1, :5] for name, value in batch.items()} for batch in program.calibration()[:1]]
    program.calibration = lambda: batches
    after, record = run_pass(FactorizeLinear(rank=4), program)
    assert record.rewrites == 2
    columns = after.constants["body.up.columns"].value()
    assert bool((columns[:, 8:] == 0).all())
    assert bool(columns.isfinite().all())


def test_later_layers_see_what_earlier_ones_lose():
    after, _ = run_pass(FactorizeLinear(rank=3, share=False), gated(2))
    first, _ = run_pass(FactorizeLinear(rank=3, share=False, only=r"layers\.0\."), gated(2))
    alone, _ = run_pass(FactorizeLinear(rank=3, share=False, only=r"layers\.1\."), gated(2))
    rows = "layers.0.up.weight.rows"
    assert torch.equal(after.constants[rows].value(), first.constants[rows].value())
    name = "layers.1.down.weight"
    assert not torch.allclose(dense_of(after, name), dense_of(alone, name), rtol=1e-3)


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen2", "bert"])
def test_families(family):
    """Conv1D and merged projections (GPT-2), biases (OPT, Qwen2, BERT)."""
    program = family_program(family)
    after, record = run_pass(FactorizeLinear(rank=6), program)
    assert record.rewrites >= 8
    assert {miss.reason for miss in record.misses} == set()
    small, large = (numbers(program, run_pass(FactorizeLinear(rank=rank), program)[0]) for rank in (2, 11))
    assert large < min(1, small)
    assert after.weight_bytes() < program.weight_bytes()


def test_merged_projections_are_one_matrix():
    program = family_program("llama")
    merged, _ = run_pass(MergeQkvProjections(), program)
    after, record = run_pass(FactorizeLinear(rank=6), merged)
    assert any("qkv_proj.weight.rows" in name for name in record.layers)
    assert numbers(merged, after) < numbers(merged, run_pass(FactorizeLinear(rank=2), merged)[0])


def test_one_matrix_of_columns_where_it_loses_less():
    """Two copies of a matrix share everything; two that have nothing in common share nothing."""

    def function(self, x):
        return x + F.linear(F.silu(F.linear(x, self.gate)) * F.linear(x, self.up), self.down)

    program = of(function, gate=(24, 8), up=(24, 8), down=(8, 24))
    program.constants["body.up"].blocks[0].copy_(program.constants["body.gate"].blocks[0])
    after, _ = run_pass(FactorizeLinear(rank=3), program)
    assert "body.shared.columns" in after.constants
    assert after.constants["body.shared.columns"].shape == (2 * 3 * 32 // 56, 8)
    for share in (True, False):
        forced, _ = run_pass(FactorizeLinear(rank=3, share=share), program)
        assert ("body.shared.columns" in forced.constants) is share
    apart = of(function, gate=(24, 8), up=(24, 8), down=(8, 24))
    for name, kept in (("body.gate", slice(0, 4)), ("body.up", slice(4, 8))):
        weight = torch.zeros(24, 8)
        weight[:, kept] = apart.constants[name].blocks[0][:, kept]
        apart.constants[name].blocks[0].copy_(weight)
    after, _ = run_pass(FactorizeLinear(rank=4), apart)
    assert "body.shared.columns" not in after.constants


# --- residuals ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [SVD(), SVDLLM()])
def test_a_residual_and_factors_lose_less_than_either(method):
    program = gated(2)
    plain = numbers(program, run_pass(QuantizeWeights(bits=2, group=32, only="layers"), program)[0])
    factors = numbers(program, run_pass(FactorizeLinear(method=method, rank=4), program)[0])
    after, record = run_pass(FactorizeLinear(method=method, rank=4, residual="int2", group=32), program)
    assert numbers(program, after) < 0.8 * plain < factors
    assert sum(is_call(node, quantized_linear) for node in after.entries["forward"].graph.nodes) == 6
    assert record.rewrites == 6


def test_factors_behind_a_residual_can_be_quantised():
    after, _ = run_pass(FactorizeLinear(rank=8, residual="int3", group=32), gated())
    both, record = run_pass(QuantizeWeights(bits=8, group=32, only="columns|rows"), after)
    assert record.misses == []
    assert both.weight_bytes() < after.weight_bytes()
    assert numbers(after, both) < 1e-3


# --- bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.1, 0.33, 0.5, 0.9])
@pytest.mark.parametrize("share", [True, False])
def test_a_ratio_is_the_share_of_the_parameters(ratio, share):
    after, record = run_pass(FactorizeLinear(ratio=ratio, share=share), gated(2))
    dense = 2 * 3 * WIDTH * INNER
    kept = sum(each.blocks[0].numel() for n, each in after.used_constants().items() if n.endswith(("columns", "rows")))
    assert record.bytes_before - record.bytes_after == 4 * (dense - kept)
    largest_step = 2 * ((2 * INNER + WIDTH) + (INNER + WIDTH)) if share else 6 * (INNER + WIDTH)
    assert ratio * dense - largest_step <= kept <= ratio * dense
    assert sum(each["bytes_kept"] * WIDTH * INNER for each in record.layers.values()) == pytest.approx(kept, rel=1e-3)


def test_figures_and_the_note_where_8_bits_are_fewer():
    _, record = run_pass(FactorizeLinear(ratio=0.2, share=False), gated())
    figures = record.layers["layers.0.up.weight.rows"]
    assert figures["rank"] == int(0.2 * WIDTH * INNER / (WIDTH + INNER))
    assert figures["bytes_kept"] <= 0.2
    assert 0 < figures["loss"] < 1
    # 8 bits of 32 columns, padded to 128, and a scale and a zero point.
    assert figures["int8_bytes"] == pytest.approx((128 + 5) / (4 * 32), abs=1e-4)
    assert record.notes == []
    # As from a checkpoint in bf16, with groups that are full.
    wide = Embedded(Apply(lambda self, x: F.linear(F.linear(F.silu(F.linear(x, self.a)), self.b), self.head),
                          a=(256, 128), b=(128, 256), head=(61, 128)), width=128)  # fmt: skip
    program = calibrated(export_tiny(wide.to(torch.bfloat16), kind="decoder", dtype=torch.float32))
    for ratio, count in ((0.45, 0), (0.7, 2)):
        _, record = run_pass(FactorizeLinear(ratio=ratio, method=SVD()), program)
        assert [note.startswith(f"{count} of 2 factored weights take more bytes") for note in record.notes] == (
            [True] if count else []
        )


def test_the_loss_of_the_report_is_that_of_the_results():
    program = gated()
    after, record = run_pass(FactorizeLinear(rank=4, share=False, only="up|gate"), program)
    seen = []
    site = next(n for n in program.entries["forward"].graph.nodes if reads(n, "layers.0.up.weight"))
    ChunkedRun(program, "forward", program.calibration()).advance(arguments(site)["input"], seen.append)
    x = torch.cat([each.flatten(0, -2) for each in seen])
    weight = program.constants["layers.0.up.weight"].value()
    lost = (x @ (weight - dense_of(after, "layers.0.up.weight")).T).square().sum() / (x @ weight.T).square().sum()
    assert record.layers["layers.0.up.weight.rows"]["loss"] == pytest.approx(float(lost), abs=2e-5)


def test_the_artifact_is_smaller_by_the_ratio(tmp_path):
    """What is on disk of a graph for ONNX: the matrices are a share of what they were, and the rest stays."""
    body = Apply(lambda self, x: x + F.linear(F.silu(F.linear(x, self.up)), self.down), up=(512, 256), down=(256, 512))
    program = calibrated(export_tiny(Embedded(body, width=256), kind="encoder"))
    dense, sizes = 4 * 2 * 512 * 256, {}
    for ratio in (1.0, 0.5, 0.25):
        copy = program.copy()
        if ratio < 1:
            FactorizeLinear(ratio=ratio).run(copy)
        folder = tmp_path / str(ratio)
        folder.mkdir()
        emit_program(copy, folder)
        sizes[ratio] = sum(path.stat().st_size for path in folder.iterdir())
    for ratio in (0.5, 0.25):
        # Tensors begin at multiples of a page.
        assert sizes[1.0] - sizes[ratio] == pytest.approx((1 - ratio) * dense, abs=0.02 * dense)


# --- ranks by budget ---------------------------------------------------------------------------------------------


def test_auto_spends_the_budget_where_it_helps():
    program = gated(3)
    others = sum(
        each.stored_bytes
        for n, each in program.used_constants().items()
        if not n.endswith(("up.weight", "gate.weight", "down.weight"))
    )
    dense = program.weight_bytes() - others
    for share in (0.35, 0.6):
        budget = others + int(share * dense)
        after, record = run_pass(FactorizeLinear(rank="auto", budget=budget), program)
        assert others < after.weight_bytes() <= budget
        assert after.weight_bytes() > others + 0.8 * share * dense
        ranks = {each["rank"] for each in record.layers.values()}
        assert len(ranks) > 1
    alike, _ = run_pass(FactorizeLinear(ratio=0.6), program)
    assert numbers(program, after) < 1.1 * numbers(program, alike)


def test_auto_leaves_weights_dense_with_room_to_spare():
    program = gated()
    after, record = run_pass(FactorizeLinear(rank="auto", budget=program.weight_bytes()), program)
    assert str(after) == str(program)
    assert {miss.reason for miss in record.misses} == {
        "the budget has room for it as it is, and other weights lose less for the bytes"
    }
    assert {miss.node for miss in record.misses} == {f"layers.0.{each}.weight" for each in ("gate", "up", "down")}


def test_auto_with_a_residual():
    program = gated(2)
    after, _ = run_pass(
        FactorizeLinear(rank="auto", budget=program.weight_bytes() * 3 // 4, residual="int4", group=32), program
    )
    assert after.weight_bytes() <= program.weight_bytes() * 3 // 4


def test_auto_of_an_encoder():
    program = family_program("bert")
    budget = program.weight_bytes() * 8 // 10
    after, _ = run_pass(FactorizeLinear(rank="auto", budget=budget), program)
    assert after.weight_bytes() <= budget
    probe = Probe(program, program.calibration())
    expected = torch.cat([run_program(program, batch["input_ids"])[0] for batch in program.calibration()])
    found = torch.cat([run_program(after, batch["input_ids"])[0] for batch in program.calibration()])
    error = float((found - expected).square().sum() / expected.square().sum())
    assert probe.loss_of(after) == pytest.approx(error, rel=1e-4)


def test_a_budget_that_cannot_be_met():
    with pytest.raises(
        OptionError, match=r"budget=1,000 bytes: the smallest ranks take .*, of which .* are of weights"
    ):
        run_pass(FactorizeLinear(rank="auto", budget=1000), gated())


def test_allocation_takes_the_least_loss():
    priced = {
        ("a", "b"): [RankChoice({}, 100, 0.0), RankChoice({("a", "b"): 3}, 40, 0.5)],
        ("c",): [RankChoice({}, 100, 0.0), RankChoice({("c",): 2}, 40, 0.1), RankChoice({("c",): 4}, 70, 0.05)],
    }
    assert allocate(priced, 200, 0).chosen == {}
    found = allocate(priced, 155, 10)
    assert (found.chosen, set(found.declined)) == ({("c",): 2}, {"a", "b"})
    assert allocate(priced, 110, 0).chosen == {("a", "b"): 3, ("c",): 4}


# --- misses and options ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("function", "parameters", "reason"),
    [
        (lambda self, x: F.linear(F.silu(F.linear(x, self.w)), self.w), {"w": (8, 8)}, "aten.linear reads body.w too"),
        (
            lambda self, x: F.silu(F.linear(x, self.w)),
            {"w": (8, 8)},
            "factors of rank 4 would have 64 parameters, and the weight has 64: below 4 they are fewer",
        ),
    ],
    ids=["shared", "break_even"],
)
def test_declines(function, parameters, reason):
    assert_declines(FactorizeLinear(rank=4), of(function, **parameters), reason=reason)


def test_declines_a_residual_that_is_no_smaller():
    program = of(lambda self, x: F.silu(F.linear(x, self.w)), w=(8, 8))
    reason = "the factors and the residual would take 296 bytes, and the weight takes 256"
    assert_declines(FactorizeLinear(rank=2, residual="int4", group=32), program, reason=reason)


def test_declines_a_computed_weight():
    program = export_tiny(
        Embedded(Apply(lambda self, x: F.linear(F.silu(F.linear(x, self.w * x.sum())), self.v), w=(8, 8), v=(8, 8)))
    )
    prepare(program)
    sites, misses = FactorizeLinear().find(program)
    assert [miss.reason for miss in misses] == ["the weight is not a constant"]
    assert all(name != "body.w" for _, name in sites)


def test_declines_vectors():
    program = of(lambda self, x: x * F.linear(x, self.w)[..., None], w=(8,))
    assert_declines(FactorizeLinear(rank=2), program, reason="the weight is [8], not a matrix of f32, bf16 or f16")


def test_declines_quantised_weights():
    packed, _ = run_pass(StoreIn(IntGroups(bits=8)), gated())
    assert_declines(FactorizeLinear(), packed, reason=PACKED)


def test_leaves_heads_and_routers_alone():
    def function(self, x):
        tokens = x.reshape(-1, 8)
        shares, indices = torch.softmax(F.linear(tokens, self.router), -1).topk(2)
        out = experts(tokens, indices, shares, self.gate_up, self.down, "silu").reshape(x.shape)
        return x + out + F.linear(F.silu(F.linear(tokens, self.one)), self.two).reshape(x.shape)

    shapes = {"router": (4, 8), "gate_up": (4, 16, 8), "down": (4, 8, 8), "one": (16, 8), "two": (8, 16)}
    _, record = run_pass(FactorizeLinear(rank=2), of(function, **shapes))
    assert (set(record.layers), record.misses) == ({"body.one.rows", "body.two.rows"}, [])


def test_skip_and_only():
    _, record = run_pass(FactorizeLinear(rank=4, only="up|down", skip="down"), gated())
    assert set(record.layers) == {"layers.0.up.weight.rows"}
    _, record = run_pass(FactorizeLinear(rank=4, skip="nothing"), gated())
    assert [miss.reason for miss in record.misses] == ["found in the name of no weight"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ratio": 0.5, "rank": 4}, "ratio=0.5 with rank=4: leave one of them out"),
        ({"ratio": 1.0}, "ratio=1.0: needs a share above 0 and below 1"),
        ({"ratio": 0.0}, "ratio=0.0: needs a share"),
        ({"rank": 0}, "rank=0: needs 1 or more, or auto"),
        ({"rank": "auto"}, "rank=auto with budget=None"),
        ({"rank": 3, "budget": 100}, "rank=3 with budget=100"),
        ({"rank": "auto", "budget": 0}, "budget=0: needs bytes above 0"),
        ({"rank": 3, "group": 64}, "group=64 without a residual"),
        ({"only": "("}, "only='.'.*needs a regular expression"),
    ],
)
def test_options(options, message):
    with pytest.raises(OptionError, match=rf"\[factorize-linear\] {message}"):
        FactorizeLinear(**options)
    with pytest.raises(OptionError, match=r"\[asvd\] alpha=-1"):
        ASVD(alpha=-1.0)


def test_text_and_back():
    for text in (
        "factorize-linear{method=svd-llm,ratio=0.5,share=auto,seed=0}",
        "factorize-linear{method=asvd{alpha=1.0},rank=8,residual=int3,group=64,share=true,skip='mlp',seed=1}",
        "factorize-linear{method=svd,rank=auto,budget=3MB,share=false,only='mlp',seed=0}",
    ):
        assert pipeline_text(parse_passes(text)) == text
    assert parse_passes("factorize-linear{method=asvd,alpha=0.25}")[0].method == ASVD(alpha=0.25)


def test_needs_text_and_a_graph_of_whole_sequences():
    program = gated().copy()
    program.calibration = None
    with pytest.raises(OptionError, match=r"\[factorize-linear\] method=svd-llm: needs text to calibrate on"):
        FactorizeLinear().run(program)
    with pytest.raises(OptionError, match=r"\[factorize-linear\] rank=auto: needs text to calibrate on"):
        FactorizeLinear(method=SVD(), rank="auto", budget=100).run(program)
    assert run_pass(FactorizeLinear(method=SVD()), program)[1].rewrites == 3
    assert not FactorizeLinear(method=SVD()).needs_calibration
    cached, _ = run_pass(CacheKV(), family_program("llama"))
    for pass_ in (FactorizeLinear(method=SVD()), FactorizeLinear()):
        with pytest.raises(OptionError, match=r"\[factorize-linear\].*behind cache-kv.*Put cache-kv last"):
            pass_.run(cached)


def test_inputs_that_are_not_finite_are_refused():
    program = of(lambda self, x: F.linear(F.silu(F.linear(x, self.w)), self.v), w=(24, 8), v=(8, 24))
    program.constants["embed.weight"].blocks[0][5] = torch.inf
    with pytest.raises(UnsupportedError, match=r"\[factorize-linear\] body.w: what its linear reads .* is not finite"):
        run_pass(FactorizeLinear(rank=2), program)


# --- interruptions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pass_", [FactorizeLinear(rank=4), FactorizeLinear(rank=3, residual="int4", group=32)])
def test_an_interrupted_run_goes_on(pass_, tmp_path, monkeypatch):
    whole, _ = run_pass(pass_, gated(2))
    calls, made = [], factorize_linear.best_factors

    def interrupted(*given):
        calls.append(given)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return made(*given)

    monkeypatch.setattr(factorize_linear, "best_factors", interrupted)
    program = gated(2).copy()
    program.finished = FinishedLayers(tmp_path / "unfinished", "this")
    stop = 3
    with pytest.raises(KeyboardInterrupt):
        pass_.run(program.copy())
    assert len(list((tmp_path / "unfinished").glob("*.safetensors"))) == 2
    calls.clear()
    stop = 0
    for expected in (2, 0):
        resumed, _ = run_pass(pass_, program)
        assert str(resumed) == str(whole)
        assert len(calls) == expected
        calls.clear()


@pytest.mark.parametrize(
    ("rows", "ratio", "rank"), [(1024, 0.7, 160), (1024, 0.5, 116), (1024, 0.56, 128), (2, 0.1, 1)]
)
def test_large_ranks_of_a_ratio_are_aligned(rows: int, ratio: float, rank: int) -> None:
    weight = Constant("w", torch.zeros(rows, 300))
    program = Program({}, {"w": weight}, ModelInfo("decoder", "one", 8, 8))
    assert Sizes(program, None, False).rank_of_ratio(["w"], ratio) == rank
    assert 0.94 * ratio < rank * (rows + 300) / (rows * 300) <= ratio or rank == 1


def test_fusing_says_that_it_reads_no_remainders():
    reason = "few bits are added to its factors (residual=), which the operator does not read"
    pass_ = FactorizeLinear(rank=2, residual="int4", group=32)
    for program, nodes in ((gated(), 1), (family_program("llama"), 4)):
        after, _ = run_pass(pass_, program)
        _, record = run_pass(FuseLowRank(), after)
        assert (record.rewrites, [miss.reason for miss in record.misses]) == (0, [reason] * nodes)
