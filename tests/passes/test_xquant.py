"""`xquant`: keys and values made again from what they are projections of."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from jettison.ir.compare import compare_programs
from jettison.ir.program import State, state_name
from jettison.passes.cache_kv import CacheKV
from jettison.passes.formats import Nf4
from jettison.passes.merge_qkv_projections import MergeQkvProjections
from jettison.passes.policies import Kivi, XQuant
from jettison.passes.quantize_weights import QuantizeWeights
from tests.helpers import StoreIn, run_pass
from tests.models.tiny_programs import tiny_program


@dataclasses.dataclass(frozen=True)
class Unrounded(XQuant):
    """Stores what it makes keys and values from as it is."""

    name = "unrounded"

    def stored_states(self, site):
        return {
            f"{short}_made": State(
                state_name(site.layer, f"{short}_made"), ("batch", heads, "stored", self.granule * width), torch.float32
            )
            for short, (heads, width) in self.forms(site).items()
        }

    def packed(self, site, values):
        return {f"{short}_made": each.flatten(3) for short, each in values.items()}

    def unpacked(self, site, stored):
        return {
            short: stored[f"{short}_made"].unflatten(3, (self.granule, -1)).flatten(2, 3) for short in self.forms(site)
        }


UNROUNDED = Unrounded(residual=8, group=4)


# Layers are treated one by one; where they are not alike, and in two families more, there are two.
LAYERS = {"qwen2": 2, "qwen3": 2, "smollm3": 2}


def program_of(name):
    return tiny_program(name, layers=LAYERS.get(name, 1))


def assert_same_logits(before, after):
    drift = compare_programs(before, after, torch.arange(90).reshape(2, 45) % 90 + 3, prefill=17)
    assert drift.max_error < 2e-5 * drift.magnitude


def stored_numbers(program):
    """Numbers per token of each layer."""
    made = [state for state in program.states.values() if state.name.endswith("_made")]
    return sum(state.shape[3] for state in made) // UNROUNDED.granule


@pytest.mark.parametrize(
    ("name", "numbers"),
    [
        # Two key heads of 8 below an input of 32: latents, as many as the keys and values.
        ("qwen3", 32),  # a norm per head
        ("olmo2", 32),  # a norm over all heads
        ("glm", 32),  # half of the channels are rotated, interleaved
        ("smollm3", 32),  # a layer without rotation
        # As many key heads as query heads: the input, half as many.
        ("gpt2", 32),  # merged and transposed, no rotation
        ("gpt_neox", 32),  # merged by head
    ],
)
def test_unrounded_it_is_the_model(name, numbers):
    """Over stored tokens, several times filled."""
    before = program_of(name)
    after, record = run_pass(CacheKV(UNROUNDED), before)
    assert not record.misses
    assert stored_numbers(after) == numbers * LAYERS.get(name, 1)
    assert_same_logits(before, after)


def test_other_layers_keep_full():
    """Keys of DeepSeek-V3 are joined from two projections."""
    after, record = run_pass(CacheKV(UNROUNDED), program_of("deepseek_v3"))
    reason = "kept full: its keys are computed by aten.slice_scatter.default from their projection"
    assert [miss.reason for miss in record.misses] == [reason]
    assert not after.storages


@pytest.mark.parametrize(("name", "quantize"), [
    ("qwen2", QuantizeWeights(group=32)), ("gpt_neox", QuantizeWeights(group=32)), ("qwen2", StoreIn(Nf4(32))),
])  # fmt: skip
def test_it_follows_other_passes(name, quantize):
    """Merged projections and packed weights are read as the model computes with them."""
    before, _ = run_pass(MergeQkvProjections(), program_of(name))
    before, _ = run_pass(quantize, before)
    after, record = run_pass(CacheKV(UNROUNDED), before)
    assert not record.misses
    full, _ = run_pass(CacheKV(), before)
    assert_same_logits(full, after)


def test_bases_are_not_quantised():
    """Nor are tables of angles, which are read by position as embeddings are."""
    before, _ = run_pass(CacheKV(XQuant(residual=32)), program_of("qwen2"))
    after, record = run_pass(QuantizeWeights(group=32), before)
    assert record.rewrites
    assert not record.misses
    assert {name for name in after.constants if name.startswith("past_key_values.")} == {
        name for name in before.constants if name.startswith("past_key_values.")
    }


def bytes_per_token(name, policy):
    program, _ = run_pass(CacheKV(policy), program_of(name))
    return (program.state_bytes(1, 128) - program.state_bytes(1, 96)) / 32


def test_models_without_shared_key_heads_hold_half():
    """4 bits and a range of 32 bits for 32 numbers; kivi holds so many of keys and of values."""
    policies = (XQuant(residual=32), Kivi(bits=4, residual=32, group=8))
    assert bytes_per_token("gpt2", policies[0]) == 32 * (0.5 + 4 / 32)
    assert bytes_per_token("gpt2", policies[1]) == 64 * (0.5 + 4 / 8)
    assert bytes_per_token("qwen2", policies[0]) == 2 * (16 * (0.5 + 4 / 32) + 16 * (0.5 + 4 / 16))


@pytest.mark.parametrize(("name", "products"), [("qwen2", 2 * 16 * 16), ("gpt2", 32 * 64)])
def test_products_of_a_step(name, products):
    """What a stored token costs at every step, as the docstring states it."""
    from torch.utils.flop_counter import FlopCounterMode

    from jettison.ir.interpret import run_entry

    program, _ = run_pass(CacheKV(XQuant(residual=32)), program_of(name))
    states = {
        each.name: torch.zeros(each.sizes(1, 3), dtype=each.dtype)
        for each in program.states.values()
        if ".0." in each.name and each.dtype != torch.float32
    }
    with FlopCounterMode(display=False) as counter:
        run_entry(program, "load", {**states, "layer": torch.tensor([0])})
    assert counter.get_total_flops() == 2 * 3 * 32 * products
