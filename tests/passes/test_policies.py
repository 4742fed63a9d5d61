from __future__ import annotations

import importlib
import pkgutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jettison.ir.compare import assert_close
from jettison.ir.errors import OptionError
from jettison.ir.ops.attention import attend, visible_keys
from jettison.ir.ops.windowed_attention import resident_tokens
from jettison.ir.program import State
from jettison.passes import policies
from jettison.passes.cache_kv import CacheKV
from jettison.passes.grammar import format_pipeline, parse_pipeline
from jettison.passes.options import build, to_spec
from jettison.passes.policies import POLICIES, Full, Policy, Window
from jettison.passes.policies.base import SLOT_GRANULE, AttentionSite, Step
from tests.helpers import weight_values

HEADS, KV_HEADS, DIM = 4, 2, 8


def site(**options):
    facts = {"layer": 0, "heads": HEADS, "kv_heads": KV_HEADS, "key_dim": DIM, "value_dim": DIM, "scale": 0.5,
             "window": 0, "softcap": 0.0, "context": 512, "dtype": torch.float32}  # fmt: skip
    return AttentionSite(**{**facts, **options})


def values(*shape, seed):
    return 4 * weight_values(torch.Size(shape).numel(), seed).reshape(shape).float()


def sequence(batch, length):
    """Queries, keys and values of a whole sequence."""
    heads = (HEADS, KV_HEADS, KV_HEADS)
    return [values(batch, count, length, DIM, seed=seed) for seed, count in enumerate(heads)]


def expected(at, query, key, value, window, sinks=None):
    positions = torch.arange(query.shape[2])[None]
    visible = visible_keys(positions, positions, None, True, window)
    return attend(query, key, value, visible, sinks, at.scale, at.softcap)


def empty_states(policy, at, batch, capacity):
    return {
        short: torch.zeros(state.sizes(batch, capacity), dtype=state.dtype)
        for short, state in policy.states(at).items()
    }


def run_steps(policy, at, parts, calls, capacity=64, sinks=None):
    """The policy's output for a sequence that comes in calls of so many tokens, and the last states."""
    batch = parts[0].shape[0]
    states, outputs, start = empty_states(policy, at, batch, capacity), [], 0
    for count in calls:
        query, key, value = (part[:, :, start : start + count] for part in parts)
        positions = torch.arange(start, start + count)[None].repeat(batch, 1)
        start += count
        totals = torch.full((batch,), start)
        step = Step(at, query, key, value, positions, totals, sinks, states)
        output, states = policy.step(step)
        outputs.append(output)
    return torch.cat(outputs, 2), states


def test_every_policy_file_is_registered_under_its_name():
    names = {module.name for module in pkgutil.iter_modules(policies.__path__)} - {
        "base",
        "cache",
        "evicting",
        "storing",
    }
    assert {name.replace("-", "_") for name in POLICIES} == names
    for name, policy in POLICIES.items():
        module = importlib.import_module(f"jettison.passes.policies.{name.replace('-', '_')}")
        assert policy.__module__ == module.__name__
        assert policy.name == name
        assert issubclass(policy, Policy)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("calls", [[1], [13], [7, 1, 1, 4], [1] * 13])
def test_full_is_attention_over_everything(calls, window, softcap):
    at = site(window=window, softcap=softcap)
    parts = sequence(3, sum(calls))
    out, states = run_steps(Full(), at, parts, calls)
    assert_close(out, expected(at, *parts, window))
    # The slot of a token is its position; the others stay empty.
    assert torch.equal(states["key"][:, :, : sum(calls)], parts[1])
    assert not states["value"][:, :, sum(calls) :].any()


@pytest.mark.parametrize("calls", [[1], [13], [90, 1, 1, 40], [1] * 100, [200, 1]])
@pytest.mark.parametrize(("own", "size"), [(5, None), (0, 5), (9, 5), (5, 9)])
def test_window_is_attention_over_the_shorter_window(calls, own, size):
    at, policy = site(window=own), Window(size=size)
    parts = sequence(2, sum(calls))
    out, states = run_steps(policy, at, parts, calls)
    assert_close(out, expected(at, *parts, 5))
    assert states["key"].shape == (2, KV_HEADS, 5 + SLOT_GRANULE, DIM)


def test_window_passes_softcap_and_sinks_on():
    at, sinks = site(window=6, softcap=2.0), values(HEADS, seed=9)
    parts = sequence(2, 90)
    out, _ = run_steps(Window(), at, parts, [80, 10], sinks=sinks)
    assert_close(out, expected(at, *parts, 6, sinks))


def test_window_keeps_the_last_tokens_in_order():
    at = site(window=5)
    parts = sequence(1, 100)
    _, states = run_steps(Window(), at, parts, [30] + [1] * 70)
    resident = int(resident_tokens(torch.tensor([100]), 5 + SLOT_GRANULE, 5))
    assert torch.equal(states["key"][:, :, :resident], parts[1][:, :, 100 - resident :])


@settings(max_examples=200, deadline=None)
@given(window=st.integers(1, 40), slack=st.integers(0, 40), tokens=st.integers(0, 400))
def test_resident_tokens_hold_the_window_and_fit(window, slack, tokens):
    """Counted one by one: a full buffer gives up as many of the oldest tokens as leave the window and the new one."""
    capacity, resident = window + slack, 0
    for _ in range(tokens):
        if resident == capacity:
            resident = window - 1
        resident += 1
    assert int(resident_tokens(torch.tensor(tokens), capacity, window)) == resident
    assert min(tokens, window) <= resident <= capacity


def test_padding_behind_the_first_tokens_leaves_no_trace():
    at, policy = site(window=5), Window()
    parts = sequence(2, 9)
    states = empty_states(policy, at, 2, 64)
    positions = torch.arange(9)[None].repeat(2, 1)
    out, states = policy.step(Step(at, *parts, positions, torch.tensor([9, 4]), None, states))
    short, alone = run_steps(policy, at, [part[1:, :, :4] for part in parts], [4])
    assert_close(out[1:, :, :4], short)
    assert torch.equal(states["key"][1:, :, :4], alone["key"][:, :, :4])


@pytest.mark.parametrize(("window", "size", "slots"), [(16, None, 80), (0, 16, 80), (16, 8, 72), (8, 16, 72)])
def test_states_of_window(window, size, slots):
    at = site(layer=3, window=window, value_dim=4, dtype=torch.bfloat16)
    assert Window(size=size).applies_to(at) is None
    assert Window(size=size).states(at) == {
        "key": State("past_key_values.3.key", ("batch", KV_HEADS, slots, DIM), torch.bfloat16),
        "value": State("past_key_values.3.value", ("batch", KV_HEADS, slots, 4), torch.bfloat16),
    }


def test_states_of_full():
    at = site(layer=1, value_dim=4)
    assert Full().applies_to(at) is None
    assert Full().states(at)["value"] == State("past_key_values.1.value", ("batch", 2, "capacity", 4), torch.float32)


@pytest.mark.parametrize(
    ("policy", "facts", "reason"),
    [
        (Window(), {}, "the layer has no sliding window and no size was given"),
        (Window(), {"window": 448}, "a window of 448 tokens saves nothing within a context of 512"),
        (Window(size=600), {}, "a window of 600 tokens saves nothing within a context of 512"),
        (Window(size=447), {}, None),
    ],
    ids=["no_window", "own", "size", "just_below"],
)
def test_where_window_applies(policy, facts, reason):
    assert policy.applies_to(site(**facts)) == reason


@pytest.mark.parametrize("size", [0, -3])
def test_window_refuses_a_size_below_one(size):
    with pytest.raises(OptionError, match=rf"\[window\] size={size}: needed at least 1 token"):
        Window(size=size)


@pytest.mark.parametrize(
    ("text", "policy", "canonical"),
    [
        ("cache-kv", Full(), "cache-kv{policy=full}"),
        ("cache-kv{policy=full}", Full(), "cache-kv{policy=full}"),
        ("cache-kv{policy=window}", Window(), "cache-kv{policy=window}"),
        ("cache-kv{policy=window{size=128}}", Window(size=128), "cache-kv{policy=window{size=128}}"),
        ("cache-kv{policy=window,size=128}", Window(size=128), "cache-kv{policy=window{size=128}}"),
    ],
)
def test_text_of_policies(text, policy, canonical):
    (spec,) = parse_pipeline(text)
    built = build(CacheKV, spec, where=text, registries={Policy: POLICIES})
    assert built == CacheKV(policy)
    assert format_pipeline([to_spec(built)]) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cache-kv{policy=windw}", "Did you mean window?"),
        ("cache-kv{policy=window{size=0}}", "size=0: needed at least 1 token"),
        ("cache-kv{policy=window{size=many}}", "option 'size' needs int|none"),
        ("cache-kv{policy=full,size=3}", "no option 'size'"),
    ],
)
def test_text_that_is_wrong(text, message):
    (spec,) = parse_pipeline(text)
    with pytest.raises(OptionError) as error:
        build(CacheKV, spec, where=text, registries={Policy: POLICIES})
    assert message in str(error.value)
