from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import jettison
from jettison.ir.capture import capture_module
from jettison.ir.compare import assert_close, example_input_ids, run_program
from jettison.ir.match import arguments, is_call
from jettison.ir.ops import attention, low_rank_attention, low_rank_mlp
from jettison.passes.cache_kv import CacheKV
from jettison.passes.formats import IntGroups
from jettison.passes.fuse_low_rank import FuseLowRank
from jettison.passes.pipeline import apply, prepare
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.source import open_source
from tests.helpers import (
    StoreIn,
    assert_declines,
    assert_golden,
    assert_idempotent,
    assert_same_numbers,
    export_tiny,
    run_pass,
    set_weights,
)
from tests.models.tiny_low_rank import (
    ATTENTIONS,
    MLPS,
    WIDTH,
    Attention,
    Decoder,
    Layers,
    Mlp,
    encoder,
    factored,
    linear,
)
from tests.models.tiny_models import tiny_model

FUSE = FuseLowRank()


def calls(program, *operators):
    return [node for entry in program.entries.values() for node in entry.graph.nodes if is_call(node, *operators)]


def test_golden_encoder(snapshot):
    before = encoder(Attention(drops=True), Mlp())
    after, record = assert_golden(snapshot, FUSE, before, "encoder")
    assert (record.rewrites, record.misses) == (2, [])
    # The first factors, and the linear behind the attention.
    assert len(calls(after, torch.ops.aten.linear.default)) == 5
    assert_same_numbers(before, after)


def test_golden_decoder(snapshot):
    before = encoder(Attention(**ATTENTIONS["causal_gqa_rotated"]), Mlp("silu", gated=True, shared=True, bias=False))
    after, record = assert_golden(snapshot, FUSE, before, "decoder")
    assert record.rewrites == 2
    # Shared factors are multiplied once.
    (fused,) = calls(after, low_rank_mlp)
    assert fused.args[0] is fused.args[1]
    assert_same_numbers(before, after)


@pytest.mark.parametrize("name", MLPS)
def test_feed_forward_layers(name):
    before = encoder(Mlp(**MLPS[name]))
    after, record = run_pass(FUSE, before)
    assert (record.rewrites, record.misses) == (1, [])
    assert after.weight_bytes() == before.weight_bytes()
    assert_same_numbers(before, after)


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attentions(name):
    before = encoder(Attention(**ATTENTIONS[name]))
    after, record = run_pass(FUSE, before)
    assert (record.rewrites, record.misses) == (1, [])
    assert not calls(after, attention)
    assert_same_numbers(before, after)


@torch.no_grad()
def test_full_rank_is_dense():
    """Against the same layers with whole weights, of which each pair is a singular value decomposition."""
    whole = [Attention(ranks=(None, None, None)), Mlp("silu", gated=True, up=None, down=None)]
    pairs = [Attention(ranks=(WIDTH,) * 3), Mlp("silu", gated=True, up=WIDTH, down=WIDTH)]
    plain = encoder(*whole)
    encoder(*pairs)  # has set their weights
    for ours, theirs in zip(pairs, whole, strict=True):
        for name, module in theirs.named_modules():
            if isinstance(module, nn.Linear):
                pair = ours.get_submodule(name)
                last = pair[1] if isinstance(pair, nn.Sequential) else pair
                last.bias.copy_(module.bias)
                if last is pair:
                    last.weight.copy_(module.weight)
                    continue
                left, values, right = torch.linalg.svd(module.weight.double(), full_matrices=False)
                pair[0].weight.copy_(values.sqrt()[:, None] * right)
                pair[1].weight.copy_(left * values.sqrt())
    program = encoder_as_it_is(*pairs)
    after, record = run_pass(FUSE, program)
    assert record.rewrites == 2
    for batch, length in ((1, 1), (3, 9)):
        ids = example_input_ids(plain, batch, length)
        assert_close(run_program(after, ids)[0], run_program(plain, ids)[0], tolerance=1e-4, reason="factors in fp32")


def encoder_as_it_is(*layers):
    """A prepared program of layers whose weights are theirs; the embedding is that of other programs."""
    model = Layers(*layers)
    kept = {name: value.clone() for name, value in model.state_dict().items() if name.startswith("layers")}
    set_weights(model)
    model.load_state_dict(kept, strict=False)
    program = capture_module(model, context=64, dtype=torch.float32, kind="encoder")
    prepare(program)
    return program


@pytest.mark.parametrize(
    ("family", "fused", "missed"),
    [("bert", 4, 0), ("llama", 4, 0), ("opt", 4, 0), ("qwen3", 2, 2), ("gemma2", 4, 0)],
)
def test_models_of_transformers(family, fused, missed):
    """Two layers each; queries and keys of Qwen3 are normalised."""
    before = open_source(factored(tiny_model(family), 9)).program
    prepare(before)
    after, record = run_pass(FUSE, before)
    assert (record.rewrites, len(record.misses)) == (fused, missed)
    assert_same_numbers(before, after, ((1, 1), (2, 7)))


def test_factors_of_queries_and_keys_are_those_of_scores():
    def forward(self, x):
        return attend(heads(self.q(x) * 0.5), heads(self.k(x) * 3), heads(self.v(x)))

    before = encoder(Changed(forward, **{name: linear(WIDTH, WIDTH, 3, bias=True) for name in ("q", "k", "v")}))
    after, record = run_pass(FUSE, before)
    assert (record.rewrites, record.misses) == (1, [])
    (fused,) = calls(after, low_rank_attention)
    assert arguments(fused)["scale"] == 1.5
    assert_same_numbers(before, after)


def test_runs_twice_like_once():
    assert_idempotent(FUSE, encoder(Attention(), Mlp()))


class Changed(nn.Module):
    """A layer whose forward is given."""

    def __init__(self, forward, **linears):
        super().__init__()
        for name, module in linears.items():
            setattr(self, name, module)
        self._forward = forward

    def forward(self, x):
        return self._forward(self, x)


def heads(x):
    return x.unflatten(-1, (-1, 8)).transpose(1, 2)


def attend(query, key, value):
    out = torch.ops.jettison.attention(query, key, value, None, None, None, None, 1.0, False, 0, 0.0)
    return out.transpose(1, 2).flatten(2)


def neurons_read_twice(self, x):
    hidden = F.relu(self.up(x))
    return self.down(hidden) + hidden.sum(-1, keepdim=True)


def up_read_twice(self, x):
    hidden = self.up(x)
    return self.down(F.relu(hidden)) + hidden.mean(-1, keepdim=True)


def keys_read_twice(self, x):
    keys = self.k(x)
    return attend(heads(self.q(x)), heads(keys), heads(self.v(x))) + keys


def heads_read_twice(self, x):
    values = heads(self.v(x))
    return attend(heads(self.q(x)), heads(self.k(x)), values) + values.mean()


def norm_between(self, x):
    return attend(heads(self.q(x)), F.rms_norm(heads(self.k(x)), (8,)), heads(self.v(x)))


def turned(x, factor):
    angles = torch.arange(x.shape[2])[None, :, None] * torch.arange(1, 5) * factor
    return torch.ops.jettison.rotary_embedding(x, angles.cos(), angles.sin(), False)


def other_angles(self, x):
    return attend(turned(heads(self.q(x)), 0.3), turned(heads(self.k(x)), 0.2), heads(self.v(x)))


def scaled_values(self, x):
    return attend(heads(self.q(x) * 0.5), heads(self.k(x)), heads(self.v(x) * 0.5))


def turned_values(self, x):
    return attend(*(turned(heads(each(x)), 0.3) for each in (self.q, self.k, self.v)))


def written_activation(self, x):
    hidden = self.up(x)
    return self.down(hidden * torch.tanh(hidden * 0.5 + hidden.pow(3)))


def computed_weight(self, x):
    return F.linear(F.linear(F.relu(F.linear(self.up[0](x), self.up[1].weight * x.mean())), self.down[0].weight),
                    self.down[1].weight)  # fmt: skip


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (neurons_read_twice, "something else reads its neurons too"),
        (up_read_twice, "something else reads its neurons too"),
        (keys_read_twice, "something else reads its queries, keys or values too"),
        (heads_read_twice, "something else reads its queries, keys or values too"),
        (
            norm_between,
            "between a linear and the attention stands more than a split into heads and a rotation",
        ),
        (other_angles, "queries and keys are rotated by different angles"),
        (scaled_values, "its values are multiplied"),
        (turned_values, "not queries and keys alone are rotated"),
        (written_activation, "between its linears stands something else than an activation that has a name"),
        (computed_weight, "a weight is not a constant"),
    ],
)
def test_declines(forward, reason):
    pairs = {name: linear(WIDTH, WIDTH, 3, bias=False) for name in ("q", "k", "v")}
    pairs |= {"up": linear(WIDTH, 40, 3, bias=False), "down": linear(40, WIDTH, 3, bias=False)}
    assert_declines(FUSE, encoder(Changed(forward, **pairs)), reason=reason)


@pytest.mark.parametrize("layer", [Mlp(up=None, down=None), Attention(ranks=(None, None, None))])
def test_is_not_interested_in_whole_linears(layer):
    assert_declines(FUSE, encoder(layer), reason=None)


def test_is_not_interested_in_a_linear_behind_a_linear_without_an_activation():
    assert_declines(FUSE, encoder(linear(WIDTH, WIDTH, 3, bias=True)), reason=None)
    pairs = {name: linear(WIDTH, WIDTH, 3, bias=True) for name in ("first", "second")}
    assert_declines(FUSE, encoder(Changed(lambda self, x: self.second(self.first(x)), **pairs)), reason=None)
    assert_declines(FUSE, encoder(Changed(lambda self, x: self.second(x + self.first(x)), **pairs)), reason=None)


def test_a_first_factor_with_a_bias_or_another_reader_stays_in_the_graph():
    def forward(self, x):
        summed = self.columns(F.relu(self.up(x)))
        return self.rows(summed) + summed.mean()

    modules = {"columns": nn.Linear(40, 3), "rows": nn.Linear(3, WIDTH), "up": linear(WIDTH, 40, 3, bias=True)}
    for function in (forward, lambda self, x: self.rows(self.columns(F.relu(self.up(x))))):
        before = encoder(Changed(function, **modules))
        after, record = run_pass(FUSE, before)
        assert (record.rewrites, record.misses) == (1, [])
        (fused,) = calls(after, low_rank_mlp)
        assert fused.meta["val"].shape[-1] == 3
        assert_same_numbers(before, after)


def test_declines_over_quantised_factors():
    quantised, _ = run_pass(StoreIn(IntGroups(4, 32)), encoder(Mlp(), Attention()))
    assert_declines(
        FUSE, quantised,
        reason="its factors are quantised, and the operator reads factors as they are: leave quantize-weights out, or "
        "this pass",
    )  # fmt: skip


def test_quantisation_behind_it_leaves_what_it_reads_and_says_so():
    reason = "fuse-low-rank has joined its linears, and reads their factors as they are: leave fuse-low-rank out"
    after, record = run_pass(FUSE, encoder(Attention(), Mlp()), QuantizeWeights(bits=8))
    assert [miss.reason for miss in record.misses] == [reason, reason]
    # First factors, the linear behind the attention and the embedding are in 8 bits all the same.
    assert sorted(after.packed) == [
        "embed.weight", "layers.0.out.weight", *(f"layers.0.qkv.{i}.0.weight" for i in range(3)), "layers.1.up.0.weight"
    ]  # fmt: skip
    _, record = run_pass(FUSE, encoder(Mlp()), QuantizeWeights(bits=8, skip=r"up|down"))
    assert record.misses == []


def decoder():
    program = export_tiny(Decoder(), kind="decoder")
    prepare(program)
    return program


def generated(passes, target):
    made = jettison.optimize(set_weights(Decoder()), passes, target=target, context=64)
    return torch.as_tensor(made.generate(torch.arange(14).reshape(2, 7) % 61, max_new_tokens=12))


def test_a_cache_behind_it_holds_keys_and_values_in_full_width():
    plain, fused = decoder(), decoder()
    apply(plain, [CacheKV()])
    apply(fused, [FUSE, CacheKV()])
    assert fused.states == plain.states
    for entry in ("prefill", "decode"):
        nodes = fused.entries[entry].graph.nodes
        counts = [sum(is_call(node, op) for node in nodes) for op in (attention, low_rank_mlp, low_rank_attention)]
        assert counts == [2, 2, 0]
    assert_same_numbers(decoder(), fused)
    assert_same_numbers(decoder(), fused, ((2, 7),), prefill=3)


def test_generates_the_same_tokens():
    expected = generated("cache-kv", "torch")
    for target in ("torch", "onnx"):
        assert torch.equal(generated("fuse-low-rank,cache-kv", target), expected)


def test_behind_a_cache_it_fuses_feed_forward_layers():
    program = decoder()
    apply(program, [CacheKV()])
    after, record = run_pass(FUSE, program)
    assert record.rewrites == 4
    assert {miss.reason for miss in record.misses} == {"its keys and values are written to a cache in full width"}
    first = decoder()
    apply(first, [FUSE, CacheKV()])
    assert len(calls(after, low_rank_mlp)) == len(calls(first, low_rank_mlp)) == 4
    assert_same_numbers(program, after)


def test_dtypes_of_the_graph():
    before = encoder(Attention(), Mlp(), dtype=torch.bfloat16)
    after, record = run_pass(FUSE, before)
    assert record.rewrites == 2
    assert_same_numbers(before, after)
