from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

from jettison.ir.compare import assert_close, run_program
from jettison.ir.constants import Constant
from jettison.ir.errors import OptionError, UnsupportedError
from jettison.passes.cache_kv import CacheKV
from jettison.passes.cluster_neurons import ClusterNeurons, permuted
from jettison.passes.quantize_weights import QuantizeWeights
from tests.helpers import (
    assert_declines,
    assert_golden,
    assert_idempotent,
    assert_same_numbers,
    run_pass,
    set_weights,
)
from tests.models import odd_feed_forward as odd
from tests.models.tiny_feed_forward import KINDS, Decoder, calibrated, decoder_program, token_ids

GROUPS_OF_8 = ClusterNeurons(group=8)
UP, DOWN = "layers.0.mlp.up.weight", "layers.0.mlp.down.weight"


@functools.cache
def mixed(activation: str = "relu", **options: Any):
    """Neurons of a kind are far apart."""
    return decoder_program(activation, in_order=False, **options)


@functools.cache
def around(mlp: type[nn.Module]):
    """One module behind an embedding."""
    return calibrated(set_weights(Decoder(mlp())), kind="decoder")


def test_golden_relu(snapshot):
    after, record = assert_golden(snapshot, GROUPS_OF_8, mixed(), "relu")
    assert (record.rewrites, record.misses) == (1, [])
    assert_same_numbers(mixed(), after)


@pytest.mark.parametrize(
    "options",
    [{"gated": True, "bias": False, "activation": "silu"}, {"gated": True}, {"layers": 2, "is_flat": True},
     {"bias": False, "activation": "gelu"}],
    ids=["gated", "gated_biases", "two_layers_of_rows", "no_biases"],
)  # fmt: skip
def test_outputs_are_the_same(options):
    before = mixed(**options)
    after, record = run_pass(GROUPS_OF_8, before)
    assert (record.rewrites, record.misses) == (options.get("layers", 1), [])
    assert (record.bytes_before, record.bytes_after) == (before.weight_bytes(), before.weight_bytes())
    assert_same_numbers(before, after)


def test_neurons_of_a_kind_become_neighbours():
    after, _ = run_pass(GROUPS_OF_8, mixed(gated=True))
    rows = {name: mixed(gated=True).constants[name].value() for name in (UP, DOWN, "layers.0.mlp.up.bias")}
    found = after.constants[UP].value()
    order = [(rows[UP] == row).all(1).nonzero().item() for row in found]
    kinds = (torch.tensor(order) % KINDS).reshape(KINDS, -1)
    assert (kinds == kinds[:, :1]).all()
    # Everything of a neuron has moved with it, and the biases of the result have not.
    assert torch.equal(after.constants[DOWN].value(), rows[DOWN][:, order])
    assert torch.equal(after.constants["layers.0.mlp.up.bias"].value(), rows["layers.0.mlp.up.bias"][order])
    for name in ("gate.weight", "down.bias"):
        old, new = (p.constants[f"layers.0.mlp.{name}"].value() for p in (mixed(gated=True), after))
        assert torch.equal(new, old[order] if name == "gate.weight" else old)


def test_runs_twice_like_once():
    assert_idempotent(GROUPS_OF_8, mixed())
    assert_idempotent(GROUPS_OF_8, mixed(layers=2, is_flat=True))


def test_runs_are_alike():
    one, two = (run_pass(GROUPS_OF_8, mixed())[0] for _ in range(2))
    assert str(one) == str(two)


def test_stored_dtypes_and_blocks_stay():
    before = mixed().copy()
    narrow = before.constants[UP].value().bfloat16()
    before.constants[UP] = Constant(UP, (narrow[:10], narrow[10:]), torch.float32)
    after, record = run_pass(GROUPS_OF_8, before)
    assert record.rewrites == 1
    assert (after.constants[UP].stored_dtype, after.constants[UP].dtype) == (torch.bfloat16, torch.float32)
    assert record.bytes_after == record.bytes_before
    assert_same_numbers(before, after)


def test_permuted_rows_and_columns():
    value = torch.arange(6).reshape(2, 3)
    constant = Constant("a", (value[:1], value[1:]))
    assert permuted(constant, torch.tensor([1, 0]), 0).value().tolist() == [[3, 4, 5], [0, 1, 2]]
    assert permuted(constant, torch.tensor([2, 0, 1]), 1).value().tolist() == [[2, 0, 1], [5, 3, 4]]


def test_before_cache_kv():
    after, _ = run_pass(GROUPS_OF_8, mixed(), CacheKV())
    cached, _ = run_pass(CacheKV(), run_pass(GROUPS_OF_8, mixed())[0])
    ids = token_ids(2, 9)
    assert_close(run_program(cached, ids, prefill=4)[0], run_program(mixed(), ids)[0])
    assert after.entries.keys() == cached.entries.keys()


def test_skip_is_searched_in_names():
    before = mixed(layers=2, is_flat=True)
    after, record = run_pass(ClusterNeurons(group=8, skip=r"layers\.1\."), before)
    assert (record.rewrites, record.misses) == (1, [])
    assert after.constants["layers.1.mlp.up.weight"] is before.constants["layers.1.mlp.up.weight"]


def test_declines_what_is_in_order():
    reason = "no other order of its neurons keeps 1 % more"
    assert_declines(GROUPS_OF_8, decoder_program(), reason=reason)


def test_declines_groups_that_do_not_divide():
    assert_declines(ClusterNeurons(group=24), mixed(), reason="groups of 24 do not divide its 64 neurons")


def test_declines_quantised_weights():
    program, _ = run_pass(QuantizeWeights(bits=8), mixed())
    assert_declines(GROUPS_OF_8, program, reason="its weights are quantised: order neurons before quantize-weights")


def test_declines_a_layer_that_is_half_quantised():
    program, _ = run_pass(QuantizeWeights(bits=8, skip="up"), mixed())
    assert_declines(GROUPS_OF_8, program, reason="one of its linears is quantised and another is not")


@pytest.mark.parametrize(
    ("mlp", "node", "reason"),
    [
        (odd.Shared, "layers.0.up.weight", "aten.linear reads layers.0.up.weight too"),
        (odd.Computed, "layers.0 (linear)", "a weight is not a constant"),
        (odd.ComputedBias, "layers.0.up.weight", "a weight is not a constant"),
        (odd.Watched, "layers.0 (relu)", "something else reads its neurons too"),
        (odd.WatchedGate, "layers.0.gate.weight", "something else reads its neurons too"),
        (odd.BiasedGate, "layers.0.gate.weight", "the gate has a bias"),
    ],
)
def test_declines(mlp, node, reason):
    assert_declines(GROUPS_OF_8, around(mlp), reason=reason)
    _, record = run_pass(GROUPS_OF_8, around(mlp))
    assert [miss.node for miss in record.misses] == [node]


def test_is_not_interested_in_other_linears():
    assert_declines(GROUPS_OF_8, around(odd.Unlike), reason=None)


def test_refuses_what_is_not_finite():
    program = mixed().copy()
    up = program.constants[UP].value().clone()
    up[3] = float("inf")
    program.constants[UP] = Constant(UP, up)
    with pytest.raises(UnsupportedError, match=r"\[layers.0.mlp.up.weight\] what its neurons compute is not finite"):
        GROUPS_OF_8.run(program)


def test_needs_the_captured_graph_and_text():
    cached, _ = run_pass(CacheKV(), mixed())
    with pytest.raises(OptionError, match=r"\[cluster-neurons\] behind cache-kv: needs the graph(?s:.)*cache-kv last"):
        GROUPS_OF_8.run(cached)
    encoder = decoder_program(kind="encoder")
    with pytest.raises(OptionError, match=r"\[cluster-neurons\] Decoder: needs a decoder and text"):
        GROUPS_OF_8.run(encoder)
    silent = mixed().copy()
    silent.calibration = None
    with pytest.raises(OptionError, match="needs a decoder and text to calibrate on"):
        GROUPS_OF_8.run(silent)
    assert GROUPS_OF_8.needs_calibration


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group": 1}, "group=1: needs 2 or more neurons"),
        ({"keep": 0}, "keep=0: needs a share above 0 and below 1"),
        ({"keep": 1.0}, "keep=1.0: needs a share above 0 and below 1"),
        ({"skip": "mlp["}, r"skip='mlp\[': needs a regular expression"),
    ],
)
def test_refuses_options(options, message):
    with pytest.raises(OptionError, match=r"\[cluster-neurons\] " + message):
        ClusterNeurons(**options)
