from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jettison.ir.compare import assert_close, example_input_ids, run_program
from jettison.ir.constants import Constant
from jettison.ir.edit import Edit
from jettison.ir.errors import OptionError
from jettison.ir.match import is_call
from jettison.ir.ops import attention
from jettison.ir.program import constant_placeholders
from jettison.passes.cache_kv import CacheKV
from jettison.passes.grammar import parse_pipeline
from jettison.passes.merge_qkv_projections import MergeQkvProjections
from jettison.passes.options import build, describe
from jettison.passes.pipeline import apply, prepare
from jettison.passes.policies import Window
from jettison.passes.quantize_weights import QuantizeWeights
from tests.helpers import (
    assert_declines,
    assert_golden,
    assert_idempotent,
    assert_same_numbers,
    export_tiny,
    run_pass,
)

aten = torch.ops.aten
WIDTH, HEAD_DIM = 32, 8


def attend(query, key, value):
    """`[B, S, H * D]` of each, as many heads as fit."""
    heads = [part.reshape(*part.shape[:2], -1, HEAD_DIM).transpose(1, 2) for part in (query, key, value)]
    out = torch.ops.jettison.attention(*heads, None, None, None, None, 1.0, True, 0, 0.0)
    return out.transpose(1, 2).reshape(query.shape)


class Attention(nn.Module):
    """Queries, keys and values of one value; `order` is the order in which the graph computes them."""

    def __init__(self, kv_width=16, biases=(), order=("q_proj", "k_proj", "v_proj")):
        super().__init__()
        widths = {"q_proj": WIDTH, "k_proj": kv_width, "v_proj": kv_width}
        for name in order:
            setattr(self, name, nn.Linear(WIDTH, widths[name], bias=name in biases))
        self.order = order

    def forward(self, x):
        found = {name: getattr(self, name)(x) for name in self.order}
        return attend(found["q_proj"], found["k_proj"], found["v_proj"])


class Decoder(nn.Module):
    """Layers around any attention modules, with positions added to the tokens."""

    def __init__(self, *layers):
        super().__init__()
        self.embed = nn.Embedding(61, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, 61, bias=False)

    def forward(self, input_ids, position_ids):
        x = self.embed(input_ids) + position_ids[:, :, None]
        for layer in self.layers:
            x = x + layer(x)
        return self.head(x)


class Around(nn.Module):
    """An attention written as a function of `(self, x)`, with projections by name and output width."""

    def __init__(self, function, bias=False, **widths):
        super().__init__()
        self.function = function
        for name, width in widths.items():
            setattr(self, name, nn.Linear(WIDTH, width, bias=bias))

    def forward(self, x):
        return self.function(self, x)


def export_layers(*layers):
    program = export_tiny(Decoder(*layers), context=512)
    prepare(program)
    return program


def n_linears(program, entry):
    return sum(is_call(node, aten.linear.default) for node in program.entries[entry].graph.nodes)


ALL = ("q_proj", "k_proj", "v_proj")


def test_golden_grouped(snapshot):
    before = export_layers(Attention())
    after, record = assert_golden(snapshot, MergeQkvProjections(), before, "grouped")
    assert record.rewrites == 1
    assert_same_numbers(before, after)


def test_golden_biases(snapshot):
    before = export_layers(Attention(kv_width=WIDTH, biases=ALL))
    after, record = assert_golden(snapshot, MergeQkvProjections(), before, "biases")
    assert record.rewrites == 1
    assert_same_numbers(before, after)


@pytest.mark.parametrize("order", [ALL, ("v_proj", "k_proj", "q_proj"), ("k_proj", "q_proj", "v_proj")])
def test_any_order_of_computation(order):
    before = export_layers(Attention(order=order), Attention(order=order, biases=ALL))
    after, record = run_pass(MergeQkvProjections(), before)
    assert (record.rewrites, record.misses) == (2, [])
    assert n_linears(after, "forward") == 3
    # Queries come first whatever the order, so that kernels find them packed.
    weight = after.constants["layers.0.qkv_proj.weight"].value()
    assert torch.equal(weight[:WIDTH], before.constants["layers.0.q_proj.weight"].value())
    assert_same_numbers(before, after)


def test_the_merged_weight_is_made_of_the_stored_ones():
    before = export_layers(Attention(biases=ALL))
    after, record = run_pass(MergeQkvProjections(), before)
    for kind in ("weight", "bias"):
        merged = after.constants[f"layers.0.qkv_proj.{kind}"]
        parts = [before.constants[f"layers.0.{name}.{kind}"] for name in ALL]
        assert [block is part.blocks[0] for block, part in zip(merged.blocks, parts, strict=True)] == [True] * 3
    assert record.bytes_after == record.bytes_before
    assert not any(f"layers.0.{name}.weight" in after.constants for name in ALL)


def test_a_stored_dtype_other_than_the_graphs():
    before = export_layers(Attention())
    for name, constant in before.constants.items():
        before.constants[name] = Constant(name, constant.value().bfloat16(), torch.float32)
    after, record = run_pass(MergeQkvProjections(), before)
    assert record.rewrites == 1
    assert after.constants["layers.0.qkv_proj.weight"].stored_dtype == torch.bfloat16
    assert_same_numbers(before, after)


def normed_and_rotated(self, x):
    """Qwen3: norms of each head, then a rotation; OPT: a factor on the queries."""
    query, key = (part.reshape(*x.shape[:2], -1, HEAD_DIM) for part in (self.q(x) * 0.5, self.k(x)))
    query, key = (F.rms_norm(part, (HEAD_DIM,), eps=1e-6).transpose(1, 2) for part in (query, key))
    angles = torch.arange(x.shape[1])[None, :, None] * torch.ones(4)
    query, key = (torch.ops.jettison.rotary_embedding(part, angles.cos(), angles.sin(), False) for part in (query, key))
    value = self.v(x).reshape(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2)
    out = torch.ops.jettison.attention(query, key, value, None, None, None, None, 1.0, True, 0, 0.0)
    return out.transpose(1, 2).reshape(x.shape)


def test_whatever_stands_before_the_attention():
    before = export_layers(Around(normed_and_rotated, q=WIDTH, k=16, v=16))
    after, record = run_pass(MergeQkvProjections(), before)
    assert (record.rewrites, record.misses) == (1, [])
    assert_same_numbers(before, after)


@pytest.mark.parametrize("policy", [None, Window(size=9)], ids=["full", "window"])
def test_before_or_after_cache_kv(policy):
    before = export_layers(Attention(), Attention(biases=ALL))
    cache = CacheKV() if policy is None else CacheKV(policy)
    first, _ = run_pass(MergeQkvProjections(), before, cache)
    last, record = run_pass(cache, before, MergeQkvProjections())
    assert (record.rewrites, record.misses) == (4, [])
    assert set(first.used_constants()) == set(last.used_constants())
    for program in (first, last):
        assert [n_linears(program, entry) for entry in ("prefill", "decode")] == [3, 3]
    cached, _ = run_pass(cache, before)
    input_ids = example_input_ids(before, 3, 17)
    expected = run_program(cached, input_ids, prefill=5)[0]
    for program in (first, last):
        assert_close(run_program(program, input_ids, prefill=5)[0], expected)


def test_entries_share_the_merged_weight():
    before, _ = run_pass(CacheKV(), export_layers(Attention()))
    after, _ = run_pass(MergeQkvProjections(), before)
    assert list(after.used_constants()) == ["embed.weight", "head.weight", "layers.0.qkv_proj.weight"]


def test_runs_twice_like_once():
    assert_idempotent(MergeQkvProjections(), export_layers(Attention(biases=ALL), Attention()))


def test_names_do_not_collide():
    """Projections without a path of their own, and a merged one that is there already."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(61, WIDTH)
            for name in ("query", "key", "value", "again_query", "again_key", "again_value"):
                setattr(self, name, nn.Linear(WIDTH, WIDTH, bias=False))
            self.head = nn.Linear(WIDTH, 61, bias=False)

        def forward(self, input_ids):
            x = self.embed(input_ids)
            x = x + attend(self.query(x), self.key(x), self.value(x))
            return self.head(x + attend(self.again_query(x), self.again_key(x), self.again_value(x)))

    before = export_tiny(Flat())
    prepare(before)
    after, record = run_pass(MergeQkvProjections(), before)
    assert record.rewrites == 2
    assert {name for name in after.constants if "qkv" in name} == {"qkv_proj.weight", "qkv_proj1.weight"}
    assert_same_numbers(before, after)


def test_an_encoder():
    before = export_tiny(Decoder(Attention(biases=ALL)), kind="encoder")
    prepare(before)
    after, record = run_pass(MergeQkvProjections(), before)
    assert record.rewrites == 1
    assert_same_numbers(before, after)


def test_leaves_a_projection_of_the_models_own_alone():
    """Phi-3 and GPT-2 have one projection for all three."""

    def merged(self, x):
        return attend(*self.qkv(x).split((WIDTH, 16, 16), -1))

    assert_declines(MergeQkvProjections(), export_layers(Around(merged, qkv=WIDTH + 32)), reason=None)


def test_is_not_interested_in_a_gated_mlp():
    program = export_layers(Around(lambda self, x: self.gate(x).tanh() * self.up(x), gate=WIDTH, up=WIDTH))
    assert_declines(MergeQkvProjections(), program, reason=None)


@pytest.mark.parametrize(
    ("function", "widths", "reason"),
    [
        (
            lambda self, x: attend(self.q(x), self.k(x + 1), self.v(x)),
            {"q": WIDTH, "k": 16, "v": 16},
            "queries, keys and values are projections of different values",
        ),
        (
            lambda self, x: attend(self.q(x), *self.kv(x).split(16, -1)),
            {"q": WIDTH, "kv": 32},
            "two of queries, keys and values share a projection",
        ),
        (
            lambda self, x: attend(self.q(x) + self.q_more(x), self.k(x), self.v(x)),
            {"q": WIDTH, "q_more": WIDTH, "k": 16, "v": 16},
            "the queries come from 2 linears, not from one",
        ),
        (
            lambda self, x: attend(self.q(x), x[..., :16], self.v(x)),
            {"q": WIDTH, "v": 16},
            "the keys come from no linears, not from one",
        ),
        (
            lambda self, x: attend(self.q(x), self.k(x), F.linear(x, self.v.weight * x.sum())),
            {"q": WIDTH, "k": 16, "v": 16},
            "the weight of a projection is not a constant",
        ),
        (
            lambda self, x: attend(self.q(x), self.k(x), self.v(x)) + (self.k.weight * x.sum()).sum(),
            {"q": WIDTH, "k": 16, "v": 16},
            "layers.0.k.weight is read elsewhere too",
        ),
        (
            lambda self, x: attend(self.q(x), self.k(x), F.linear(x, self.k.weight)),
            {"q": WIDTH, "k": 16},
            "two of queries, keys and values share a projection",
        ),
    ],
    ids=["inputs", "fused_pair", "sum", "no_linear", "computed", "shared", "same_weight"],
)
def test_declines(function, widths, reason):
    assert_declines(MergeQkvProjections(), export_layers(Around(function, **widths)), reason=reason)


@pytest.mark.parametrize("biases", [("q_proj",), ("q_proj", "v_proj")])
def test_declines_when_only_some_have_a_bias(biases):
    """Whisper has none on its keys; zeros would be stored and added for nothing."""
    program = export_layers(Attention(biases=biases))
    assert_declines(MergeQkvProjections(), program, reason="only some of the projections have a bias")


def test_declines_when_a_bias_is_computed():
    def function(self, x):
        return attend(self.q(x), self.k(x), F.linear(x, self.v.weight, x.sum((0, 1))[:16]))

    program = export_layers(Around(function, bias=True, q=WIDTH, k=16, v=16))
    assert_declines(MergeQkvProjections(), program, reason="the bias of a projection is not a constant")


@pytest.mark.parametrize(("kind", "what"), [("weight", "weights"), ("bias", "biases")])
def test_declines_when_stored_dtypes_differ(kind, what):
    program = export_layers(Attention(biases=ALL))
    name = f"layers.0.v_proj.{kind}"
    program.constants[name] = Constant(name, program.constants[name].value().bfloat16(), torch.float32)
    assert_declines(MergeQkvProjections(), program, reason=f"the {what} of the projections have different dtypes")


def test_declines_layers_that_share_their_weights():
    """ALBERT runs one layer several times."""
    layer = Attention()
    _, record = run_pass(MergeQkvProjections(), export_layers(layer, layer))
    assert record.rewrites == 0
    assert {miss.reason for miss in record.misses} == {"layers.0.q_proj.weight is read elsewhere too"}


def test_keys_of_two_sets_of_queries_are_merged_with_the_first():
    def function(self, x):
        key, value = self.k(x), self.v(x)
        return attend(self.q(x), key, value) + attend(self.other(x), key, value)

    before = export_layers(Around(function, q=WIDTH, other=WIDTH, k=16, v=16))
    after, record = run_pass(MergeQkvProjections(), before)
    assert record.rewrites == 1
    assert [miss.reason for miss in record.misses] == ["its keys are merged with those of other queries"]
    assert_same_numbers(before, after)


def test_declines_when_another_entry_uses_the_projections_otherwise():
    """A policy may write its decoding step out; merging in prefill alone would store both forms."""
    program, _ = run_pass(CacheKV(), export_layers(Attention()))
    edit = Edit(program, "decode", "test")
    key = constant_placeholders(edit.entry)["layers.0.k_proj.weight"]
    (linear,) = key.users
    with edit.before(linear):
        other = edit.call(aten.neg.default, linear.args[0])
    edit.set_arguments(linear, other, key)
    (written_out,) = [node for node in edit.graph.nodes if is_call(node, attention)]
    edit.replace(written_out, written_out.args[0])
    assert_declines(MergeQkvProjections(), program, reason="another entry uses the projections in another way")


def test_quantized_weights_are_too_late():
    program, _ = run_pass(QuantizeWeights(), export_layers(Attention()))
    with pytest.raises(OptionError, match="Write merge-qkv-projections before quantize-weights"):
        MergeQkvProjections().run(program)


def test_quantized_weights_after_it_are_in_time():
    program = export_layers(Attention(), Attention(biases=ALL))
    text = "merge-qkv-projections,quantize-weights{bits=8}"
    registry = {pass_.name: pass_ for pass_ in (MergeQkvProjections, QuantizeWeights)}
    passes = [build(registry[spec.name], spec, where=text, registries={}) for spec in parse_pipeline(text)]
    records = apply(program, passes)
    assert [record.rewrites for record in records] == [2, 4]
    assert "layers.1.qkv_proj.weight" in program.packed


def test_a_weight_that_stays_beside_the_merged_one_is_a_bug():
    """The promise that `ensures` checks."""
    after, _ = run_pass(MergeQkvProjections(), export_layers(Attention()))
    head = after.constants["head.weight"]
    merged = after.constants["layers.0.qkv_proj.weight"]
    after.constants["layers.0.qkv_proj.weight"] = Constant(merged.name, (*merged.blocks[:2], head.blocks[0]))
    assert MergeQkvProjections().ensures(after) == (
        "head.weight is read beside layers.0.qkv_proj.weight, which contains it"
    )


def test_has_no_options():
    assert describe(MergeQkvProjections) == []
