from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jettison.ir.compare import assert_close, example_input_ids, run_program
from jettison.ir.errors import OptionError, UnsupportedError
from jettison.ir.interpret import run_entry
from jettison.ir.program import State
from jettison.passes.cache_kv import CacheKV
from jettison.passes.options import ByRange
from jettison.passes.pipeline import canonicalize, prepare
from jettison.passes.policies import H2O, Full, Int8, Kivi, MiKV, Sinks, SnapKV, Window, XQuant
from jettison.passes.policies.base import AttentionSite
from jettison.passes.select_logits import SelectLogits
from tests.helpers import assert_golden, assert_same_numbers, export_tiny, run_pass

HEAD_DIM = 8


class Attention(nn.Module):
    """Rotated causal self-attention, as capture leaves it."""

    def __init__(self, heads, kv_heads, window, softcap, has_sinks):
        super().__init__()
        width = heads * HEAD_DIM
        self.q, self.o = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, kv_heads * HEAD_DIM, bias=False) for _ in range(2))
        self.sinks = nn.Parameter(torch.zeros(heads)) if has_sinks else None
        self.window, self.softcap = window, softcap

    def forward(self, x, cos, sin):
        query, key, value = (
            part(x).view(*x.shape[:2], -1, HEAD_DIM).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        query, key = (torch.ops.jettison.rotary_embedding(part, cos, sin, False) for part in (query, key))
        # A scale of 8 makes the softmax sharp: a key that should not be seen shows.
        out = torch.ops.jettison.attention(
            query, key, value, None, None, None, self.sinks, 8.0, True, self.window, self.softcap
        )
        return self.o(out.transpose(1, 2).reshape(x.shape))


class Decoder(nn.Module):
    def __init__(self, heads=4, kv_heads=2, windows=(0,), softcap=0.0, has_sinks=False, has_token_shift=False):
        super().__init__()
        self.embed = nn.Embedding(61, heads * HEAD_DIM)
        self.layers = nn.ModuleList(Attention(heads, kv_heads, window, softcap, has_sinks) for window in windows)
        self.head = nn.Linear(heads * HEAD_DIM, 61, bias=False)
        self.register_buffer("frequencies", torch.zeros(HEAD_DIM // 2))
        self.has_token_shift = has_token_shift

    def forward(self, input_ids, position_ids):
        angles = position_ids[:, :, None] * self.frequencies
        x = self.embed(input_ids)
        if self.has_token_shift:
            x = x + F.pad(x, (0, 0, 1, 0))[:, :-1]
        for layer in self.layers:
            x = x + layer(x, angles.cos(), angles.sin())
        return self.head(x)


@functools.cache
def prepared(context=512, **options):
    program = export_tiny(Decoder(**options), context=context)
    prepare(program)
    return program


def run_step(program, entry, states, tokens, lengths):
    """One call of right-padded rows: `lengths` real tokens of each, after those that the states hold.

    Returns logits of every token, the new states and the new totals.
    """
    before = states.pop("totals", torch.zeros(len(tokens), dtype=torch.int64))
    totals = before + torch.tensor(lengths)
    columns = torch.arange(tokens.shape[1])[None].repeat(len(tokens), 1)
    inputs = {
        "input_ids": tokens,
        "position_ids": before[:, None] + columns,
        "attention_mask": (torch.arange(int(totals.max()))[None] < totals[:, None]).long(),
        "logits_positions": columns,
    }
    logits, *new = run_entry(program, entry, {**states, **inputs})
    return logits, {**dict(zip(program.states, new, strict=True)), "totals": totals}


def empty_states(program, batch, capacity):
    return {
        name: torch.zeros(state.sizes(batch, capacity), dtype=state.dtype) for name, state in program.states.items()
    }


def test_golden_full(snapshot):
    before = prepared()
    after, record = assert_golden(snapshot, CacheKV(), before, "full")
    assert record.rewrites == 1
    assert_same_numbers(before, after)


def test_golden_window(snapshot):
    before = prepared(windows=(16,))
    after, record = assert_golden(snapshot, CacheKV(Window()), before, "window")
    assert record.rewrites == 1
    assert_same_numbers(before, after)


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("sinks", Sinks(budget=100)),
        ("h2o", H2O(budget=100, evict="always")),
        ("kivi", Kivi(residual=32, group=8)),
        ("mikv", MiKV(budget=100)),
        ("composed", (SnapKV(budget=100), Int8(residual=64))),
        ("xquant", XQuant(residual=32)),
    ],
)
def test_golden_moving(snapshot, name, policy):
    before = prepared()
    after, record = assert_golden(snapshot, CacheKV(policy), before, name)
    assert record.rewrites == 1
    # Nothing is dropped or compressed yet.
    assert_same_numbers(before, after)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"softcap": 2.0}, "caps its scores"),
        ({"has_sinks": True}, "has learned sinks"),
        ({"windows": (16,)}, "attends to a window of 16 tokens"),
    ],
)
def test_layers_that_cannot_be_compressed_keep_full(options, reason):
    before = prepared(**options)
    after, record = run_pass(CacheKV(Kivi(residual=32, group=8)), before)
    (miss,) = record.misses
    assert miss.reason.startswith("kept full: the layer")
    assert reason in miss.reason
    assert not after.storages
    assert_same_numbers(before, after, ((1, 1), (2, 39)), prefill=4)
    # What drops still applies.
    after, record = run_pass(CacheKV((SnapKV(budget=40), Kivi(residual=32, group=8))), before)
    assert after.retentions.keys() == ({"evict"} if "windows" not in options else set())
    assert "kivi" in record.misses[-1].reason or "window" in record.misses[-1].reason


def test_what_never_leaves_full_precision_is_full():
    after, record = run_pass(CacheKV(Int8(residual=512)), prepared())
    full, _ = run_pass(CacheKV(), prepared())
    assert str(after) == str(full)
    assert [miss.reason for miss in record.misses] == [
        "kept full: 512 tokens in full precision are all of a context of 512"
    ]


@pytest.mark.parametrize(
    ("policies", "message"),
    [
        ((Int8(), SnapKV(budget=40)), r"policy=int8\+snapkv: needed one policy, or one that drops"),
        ((Sinks(budget=9), SnapKV(budget=40)), r"policy=sinks\+snapkv: needed one policy"),
        ((Full(), Int8()), r"policy=full\+int8: needed one policy"),
        ((Sinks(budget=9), Int8(), Int8()), "needed one policy"),
        ((H2O(budget=9), Int8()), "h2o adds up the attention of every step"),
        ((MiKV(budget=9), Int8()), "mikv adds up the attention of every step"),
        ((SnapKV(budget=40), XQuant()), "xquant rotates keys by the number of tokens before them"),
        ((SnapKV(budget=40, evict="always"), Int8()), "drop tokens that are compressed already. Use evict=prefill"),
    ],
)
def test_compositions_that_make_no_sense_are_refused(policies, message):
    with pytest.raises(OptionError, match=message):
        CacheKV(policies)
    with pytest.raises(OptionError, match=message):
        CacheKV(layers=ByRange({0: policies}))


def test_distances_in_the_cache_need_rotated_keys():
    before = prepared()
    after, record = run_pass(CacheKV(Sinks(budget=40, positions="cache")), before)
    assert not record.misses
    assert "past_key_values.0.first_keys" in after.states
    unrotated = AttentionSite(0, 4, 2, 8, 8, 1.0, 0, 0.0, 512, torch.float32)
    assert "needs keys that are rotated" in Sinks(budget=40, positions="cache").applies_to(unrotated)
    assert Sinks(budget=40).applies_to(unrotated) is None


@pytest.mark.parametrize("policy", [Kivi(group=16), MiKV(budget=100, group=16)], ids=["kivi", "mikv"])
def test_groups_divide_the_head(policy):
    with pytest.raises(OptionError, match=r"group=16: needed a divisor of the head dimension, which is 8"):
        run_pass(CacheKV(policy), prepared())


def test_a_budget_that_drops_nothing_is_full():
    after, record = run_pass(CacheKV(SnapKV(budget=512)), prepared())
    full, _ = run_pass(CacheKV(), prepared())
    assert str(after) == str(full)
    assert [miss.reason for miss in record.misses] == [
        "kept full: a budget of 512 tokens drops nothing within a context of 512"
    ]


def test_layers_have_policies_of_their_own():
    before = prepared(windows=(0, 0, 0, 16))
    policies = ByRange({0: Full(), (2, 3): Sinks(budget=50)})
    after, record = run_pass(CacheKV(SnapKV(budget=40), policies), before)
    layers = {name: kept.layers for name, kept in after.retentions.items()}
    assert layers == {"evict": (1,), "evict_1": (2,)}
    assert [(kept.mask, kept.budget) for kept in after.retentions.values()] == [("slot_mask", 40), ("slot_mask_1", 50)]
    (miss,) = record.misses
    assert "attends to a window of 16 tokens" in miss.reason
    assert_same_numbers(before, after, ((1, 1), (2, 39)), prefill=4)
    # Beyond the budgets something is lost.
    ids = example_input_ids(before, 2, 120)
    expected, dropped = run_program(before, ids)[0], run_program(after, ids, prefill=100)[0]
    assert (expected - dropped)[:, :100].abs().max() < 1e-4
    assert (expected - dropped)[:, 100:].abs().max() > 1e-3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Sinks(budget=0), r"\[sinks\] budget=0: needed at least 1"),
        (lambda: Sinks(budget=4), r"\[sinks\] first=4: needed 0 to 3"),
        (lambda: Sinks(budget=9, every=0), r"\[sinks\] every=0: needed at least 1"),
        (lambda: H2O(budget=9, recent=10), r"\[h2o\] recent=10: needed 0 to 9"),
        (lambda: SnapKV(budget=32), r"\[snapkv\] window=32: needed 1 to 31"),
        (lambda: SnapKV(budget=33, kernel=4), r"\[snapkv\] kernel=4: needed an odd number"),
        (
            lambda: CacheKV((Sinks(budget=9, positions="cache"), Int8())),
            "sinks with positions=cache rotates keys again",
        ),
        (lambda: Int8(residual=0), r"\[int8\] residual=0: needed at least 1"),
        (lambda: Kivi(group=0), r"\[kivi\] group=0: needed a divisor of residual=128"),
        (lambda: Kivi(residual=100), r"\[kivi\] group=32: needed a divisor of residual=100"),
        (lambda: XQuant(group=0), r"\[xquant\] group=0: needed a divisor of residual=128"),
        (lambda: XQuant(residual=40), r"\[xquant\] group=32: needed a divisor of residual=40"),
        (lambda: MiKV(budget=0), r"\[mikv\] budget=0: needed at least 1"),
        (lambda: MiKV(budget=9, group=0), r"\[mikv\] group=0: needed at least 1"),
    ],
)
def test_bad_options_of_policies(make, message):
    with pytest.raises(OptionError, match=message):
        make()


@pytest.mark.parametrize("prefill", [1, 5, 100], ids=["one", "some", "all"])
@pytest.mark.parametrize("kv_heads", [2, 4], ids=["grouped", "multi_head"])
def test_prefill_and_decode_are_forward(kv_heads, prefill):
    before = prepared(kv_heads=kv_heads, windows=(0, 0))
    after, _ = run_pass(CacheKV(), before)
    assert_same_numbers(before, after, ((1, 1), (1, 9), (3, 16)), prefill=prefill)


@pytest.mark.parametrize(
    "options", [{"softcap": 2.0}, {"has_sinks": True}, {"windows": (3, 0)}], ids=["softcap", "sinks", "window"]
)
@pytest.mark.parametrize("policy", [Full(), Window()], ids=["full", "window"])
def test_what_the_attention_does_survives(policy, options):
    before = prepared(**options)
    after, _ = run_pass(CacheKV(policy), before)
    assert_same_numbers(before, after, prefill=4)


def test_canonicalisation_keeps_the_meaning():
    before = prepared(windows=(0, 16))
    after, _ = run_pass(CacheKV(Window()), before)
    canonicalize(after)
    assert_same_numbers(before, after, prefill=4)


@pytest.mark.parametrize("policy", [Full(), Window()], ids=["full", "window"])
def test_rows_of_different_lengths(policy):
    """Right-padded prompts, then a token per row: each row computes what it computes alone."""
    before = prepared(windows=(16, 16))
    after, record = run_pass(CacheKV(policy), before)
    assert record.misses == []
    tokens, lengths = example_input_ids(before, 3, 24), [19, 1, 12]
    states = empty_states(after, 3, 64)
    logits, states = run_step(after, "prefill", states, tokens[:, :19], lengths)
    pieces = [[logits[row, :length]] for row, length in enumerate(lengths)]
    for step in range(4):
        column = torch.tensor(lengths)[:, None] + step
        logits, states = run_step(after, "decode", states, tokens.gather(1, column), [1, 1, 1])
        for row in range(3):
            pieces[row].append(logits[row])
    for row, length in enumerate(lengths):
        alone = run_program(before, tokens[row : row + 1, : length + 4])[0][0]
        assert_close(torch.cat(pieces[row]), alone, what=f"row {row}")


def test_prompts_may_come_in_pieces():
    before = prepared(windows=(16, 0))
    after, _ = run_pass(CacheKV(Window()), before)
    tokens = example_input_ids(before, 2, 150)
    states, pieces = empty_states(after, 2, 192), []
    for start, stop in ((0, 50), (50, 149), (149, 150)):
        logits, states = run_step(after, "prefill", states, tokens[:, start:stop], [stop - start] * 2)
        pieces.append(logits)
    assert_close(torch.cat(pieces, 1), run_program(before, tokens)[0])


@pytest.mark.parametrize(("size", "prefill"), [(5, 1), (8, 60), (5, 130)])
def test_window_of_a_size_is_attention_masked_to_it(size, prefill):
    """The buffers hold 69 and 72 slots; 140 tokens pass through them."""
    after, record = run_pass(CacheKV(Window(size=size)), prepared(windows=(0, 8)))
    assert record.misses == []
    masked = prepared(windows=(size, size))
    tokens = example_input_ids(masked, 2, 140)
    actual = run_program(after, tokens, prefill=prefill)[0]
    assert_close(actual, run_program(masked, tokens)[0])
    with pytest.raises(AssertionError, match="relative"):
        assert_close(actual, run_program(prepared(windows=(0, 8)), tokens)[0])


def test_window_takes_the_models_own():
    before = prepared(windows=(8, 8))
    after, _ = run_pass(CacheKV(Window()), before)
    tokens = example_input_ids(before, 2, 80)
    assert_close(run_program(after, tokens, prefill=7)[0], run_program(before, tokens)[0])
    assert after.states["past_key_values.1.value"].shape == ("batch", 2, 8 + 64, HEAD_DIM)


def test_states():
    after, _ = run_pass(CacheKV(), prepared(windows=(0, 0)))
    assert list(after.states.values()) == [
        State(f"past_key_values.{layer}.{kind}", ("batch", 2, "capacity", HEAD_DIM), torch.float32)
        for layer in (0, 1)
        for kind in ("key", "value")
    ]
    assert after.state_bytes(batch=3, capacity=128) == 4 * 3 * 2 * 128 * HEAD_DIM * 4
    assert list(after.entries) == ["prefill", "decode"]


def test_states_have_the_dtype_of_the_graph():
    program = export_tiny(Decoder(), dtype=torch.bfloat16)
    prepare(program)
    after, _ = run_pass(CacheKV(), program)
    assert {state.dtype for state in after.states.values()} == {torch.bfloat16}
    assert_same_numbers(program, after, prefill=5, tolerance=4e-2, reason="the two orders round differently in bf16")


def test_a_layer_without_a_window_keeps_everything():
    before = prepared(windows=(0, 16))
    after, record = run_pass(CacheKV(Window()), before)
    assert record.rewrites == 2
    assert [(miss.node, miss.reason) for miss in record.misses] == [
        ("layers.0", "kept full: the layer has no sliding window and no size was given")
    ]
    assert after.states["past_key_values.0.key"].shape[2] == "capacity"
    assert after.states["past_key_values.1.key"].shape[2] == 16 + 64
    assert_same_numbers(before, after, prefill=4)


def test_a_window_near_the_context_keeps_everything():
    before = prepared(context=80)
    after, record = run_pass(CacheKV(Window(size=16)), before)
    assert [miss.reason for miss in record.misses] == [
        "kept full: a window of 16 tokens saves nothing within a context of 80"
    ]
    assert str(after) == str(run_pass(CacheKV(), before)[0])


def test_strict_refuses_a_layer_that_keeps_everything():
    with pytest.raises(UnsupportedError, match="no sliding window and no size was given"):
        CacheKV(Window()).run(prepared().copy(), strict=True)


def test_refuses_an_encoder():
    program = export_tiny(Decoder(), kind="encoder")
    with pytest.raises(OptionError, match=r"\[cache-kv\] Decoder is an encoder.* Drop cache-kv from the pipeline"):
        CacheKV().run(program)


def test_refuses_a_second_cache():
    program, _ = run_pass(CacheKV(), prepared())
    with pytest.raises(OptionError, match=r"already has a KV cache\. Give cache-kv once in the pipeline"):
        CacheKV().run(program)


class Rest(nn.Module):
    """A decoder around any function of `(hidden [B, S, 32], position_ids)`."""

    def __init__(self, function):
        super().__init__()
        self.embed, self.head = nn.Embedding(61, 32), nn.Linear(32, 61)
        self.function = function

    def forward(self, input_ids, position_ids):
        return self.head(self.function(self.embed(input_ids) + position_ids[:, :, None]))


def attend(x, *, causal=True, positions=None):
    heads = x.unflatten(2, (4, 8)).transpose(1, 2)
    out = torch.ops.jettison.attention(heads, heads, heads, positions, None, None, None, 1.0, causal, 0, 0.0)
    return out.transpose(1, 2).flatten(2)


def attend_with_bias(x):
    """ALiBi, which no operator of ours has."""
    heads = x.unflatten(2, (4, 8)).transpose(1, 2)
    behind = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])[None]
    bias = torch.where(behind < 0, -torch.inf, -behind.float())
    return F.scaled_dot_product_attention(heads, heads, heads, attn_mask=bias).transpose(1, 2).flatten(2)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (torch.sin, "no attention was recognised in Rest"),
        (lambda x: attend(x, positions=torch.arange(x.shape[1])[None]), "has positions of its own"),
        (attend_with_bias, r"its attention was not recognised \(see the misses of raise-attention\)"),
    ],
    ids=["none", "positions", "bias"],
)
def test_refuses_attention_that_has_no_cache(function, message):
    program = export_tiny(Rest(function))
    prepare(program)
    with pytest.raises(UnsupportedError, match=message):
        CacheKV().run(program)
    assert list(program.entries) == ["forward"]


def test_refuses_attention_to_later_tokens():
    """Capture finds such a model to be an encoder; cache-kv does not rely on it."""
    program = export_tiny(Rest(lambda x: attend(x, causal=False)))
    program.info = dataclasses.replace(program.info, kind="decoder")
    SelectLogits().run(program)
    with pytest.raises(UnsupportedError, match=r"attends to later positions\. Only causal self-attention has"):
        CacheKV().run(program)


def test_refuses_a_model_that_counts_positions_itself():
    class Counting(Decoder):
        def forward(self, input_ids):
            positions = torch.arange(input_ids.shape[1])[None]
            return super().forward(input_ids, positions)

    program = export_tiny(Counting())
    prepare(program)
    with pytest.raises(UnsupportedError, match="Give forward a `position_ids`"):
        CacheKV().run(program)


def test_refuses_a_model_whose_head_is_unknown():
    program = export_tiny(Decoder())
    with pytest.raises(UnsupportedError, match="head of Decoder was not recognised"):
        CacheKV().run(program)


def test_tokens_that_meet_outside_attention_are_refused():
    program = prepared(has_token_shift=True)
    with pytest.raises(UnsupportedError, match=r"in Decoder: a token reads earlier tokens outside attention"):
        run_pass(CacheKV(), program)
