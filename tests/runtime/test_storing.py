"""Policies that compress tokens, on trained models, in both targets."""

from __future__ import annotations

import pytest
import torch

import jettison
from jettison.api import parse_passes
from jettison.cli import main
from jettison.passes.pipeline import apply
from jettison.runtime.session import Session
from tests.models.shortened import shortened
from tests.runtime.long_generation import assert_same_tokens
from tests.runtime.test_eviction import LLAMA, captured, executor, rows, run_json, session

KIVI = "kivi{bits=4,residual=64}"
MIKV = "mikv{budget=48,bits=4,every=8}"
XQUANT = "xquant{bits=4,residual=64}"
COMPOSED = "snapkv{budget=80,window=16}+kivi{bits=4,residual=32}"
# The largest error of a logit over the largest logit, beside a full cache; the larger of both models' first layers,
# and a half more.
BOUNDS = {
    "int8{residual=8}": 1.3e-3,
    "int4{residual=8}": 2.5e-2,
    "kivi{bits=4,residual=32}": 1.7e-2,
    "kivi{bits=2,residual=64}": 3.6e-2,
    MIKV: 5.5e-3,
    XQUANT: 8e-3,
    "xquant{bits=8,group=64,residual=64}": 8e-4,
}
EMITTED = (
    ("tiny-llama/1", "kivi{bits=2,residual=64}"),
    ("tiny-llama/1", MIKV),
    ("tiny-llama/2", COMPOSED),
    ("tiny-opt/1", "int4{residual=8}"),
    ("tiny-llama/2", XQUANT),
    ("tiny-opt/1", XQUANT),
)
TOLERANCE = 1e-5


def run(opened, prompts, steps):
    """Logits `[B, steps + 1, V]` of prompts and what follows them, token by token."""
    logits = [opened.prefill([row[: len(row) - steps] for row in prompts])]
    logits += [opened.decode([row[len(row) - steps + step] for row in prompts]) for step in range(steps)]
    return torch.stack(logits, 1)


def as_full(name, opened):
    """A session that holds what another one attends to, decompressed, in a full cache."""
    full = session(name, "full", "torch", opened.batch)
    (kept,) = opened.kept
    for row in range(opened.batch):
        own = opened._row_states(row)
        stored, held = kept.stored_tokens(row), kept.held[row]
        states = kept.allocate(1, stored + held)
        kept.copy(own, states, held, into=stored)
        kept.load(opened.executor, row, own, states)
        kept.held[row] = held
        for state, values in full.states.items():
            values[row, :, : stored + held] = states[state][0]
    full.lengths = list(opened.lengths)
    return full


# With a head of keys for each head of queries, the layouts that differ then.
NOT_SHARED = [("tiny-opt/1", policy) for policy in ("kivi{bits=2,residual=64}", MIKV, XQUANT)]


@pytest.mark.parametrize(("name", "policy"), [*(("tiny-llama/2", policy) for policy in BOUNDS), *NOT_SHARED])
def test_the_error_is_bounded_and_not_zero(name, policy):
    prompts = rows(name)
    logits = {each: run(session(name, each, "torch", 3), prompts, 10) for each in (policy, "full")}
    errors = (logits[policy] - logits["full"]).abs().amax((0, 2)) / logits["full"].abs().max()
    assert errors[0] < 1e-6, "a prompt is attended to exactly"
    assert (errors[1:] > 0).all()
    assert errors.max() < BOUNDS[policy]
    alone = run(session(name, policy, "torch"), prompts[:1], 10)
    assert (alone[0] - logits[policy][0]).abs().max() < TOLERANCE * logits[policy].abs().max()


@pytest.mark.parametrize(
    ("name", "policy", "target"),
    [("tiny-llama/2", policy, "torch") for policy in BOUNDS]
    + [(*each, "torch") for each in NOT_SHARED]
    + [(name, policy, "onnx") for name, policy in EMITTED if "+" not in policy],
)
def test_a_step_attends_to_all_that_is_stored(name, policy, target):
    """Steps, and then a second prompt, are those of a full cache that holds the decompressed keys and values."""
    prompts = rows(name)
    opened = session(name, policy, target, 3)
    run(opened, prompts, 30)
    for token in (7, 8):
        full = as_full(name, opened)
        mine, expected = opened.decode([token] * 3), full.decode([token] * 3)
        assert (mine - expected).abs().max() < TOLERANCE * expected.abs().max()
    full = as_full(name, opened)
    more = [[3, 4, 5], [6], [9] * 11]
    mine, expected = opened.prefill(more), full.prefill(more)
    assert (mine - expected).abs().max() < TOLERANCE * expected.abs().max()
    (kept,) = opened.kept
    assert all(kept.held[row] + kept.stored_tokens(row) == opened.lengths[row] for row in range(3))


@pytest.mark.parametrize(
    ("policy", "prompt", "counts"),
    [
        # Stored and exact tokens after the prompt, and after each of some more.
        ("kivi{bits=4,residual=32}", 31, [(0, 31), (0, 32), (32, 1), (32, 2)]),
        ("kivi{bits=4,residual=32}", 70, [(64, 6), (64, 7)]),
        ("kivi{bits=4,residual=64}", 63, [(0, 63), (0, 64), (32, 33)]),
        ("kivi{bits=4,residual=64}", 64, [(32, 32), (32, 33)]),
        ("kivi{bits=4,residual=64}", 130, [(96, 34), (96, 35)]),
        ("int4{residual=3}", 2, [(2, 0), (2, 1), (2, 2), (2, 3), (5, 1)]),
    ],
)
def test_how_many_tokens_are_stored(policy, prompt, counts):
    opened = session("tiny-llama/2", policy, "torch")
    row = rows("tiny-llama/2")[0] + [5, 6, 7, 8, 9]
    opened.prefill([row[:prompt]])
    (kept,) = opened.kept
    found = [(kept.stored_tokens(0), kept.held[0])]
    for token in row[prompt : prompt + len(counts) - 1]:
        opened.decode([token])
        found.append((kept.stored_tokens(0), kept.held[0]))
    assert found == counts


HEADS, KV_HEADS, DIM = 8, 4, 32
# Of a row and layer, for a prompt of 120 tokens and 72 behind it: tokens in full precision, and those compressed with
# the bytes of both codes and of their ranges in fp16.
FORMULAS = {
    "int8{residual=8}": KV_HEADS * (8 * 8 * DIM + 192 * 2 * (DIM + 4)),
    "int4{residual=8}": KV_HEADS * (8 * 8 * DIM + 192 * 2 * (DIM // 2 + 4)),
    "kivi{bits=4,residual=32}": KV_HEADS * (32 * 8 * DIM + 192 * 2 * (DIM // 2 + 4)),
    "kivi{bits=2,residual=64}": KV_HEADS * (64 * 8 * DIM + 160 * 2 * (DIM // 4 + 4)),
    # With positions and what was received; two ranges for a head; the balancer.
    MIKV: KV_HEADS * (56 * (8 * DIM + 8) + 144 * 2 * (DIM // 2 + 8) + 3 * 4 * DIM),
    # Latents of all heads; values of 64 bytes share a range.
    XQUANT: KV_HEADS * (64 * 8 * DIM + 160 * 2 * (DIM // 2 + 4)),
    "xquant{bits=8,group=64,residual=64}": KV_HEADS * (64 * 8 * DIM + 192 * 2 * (DIM + 2)),
    # Of 80 and 72 tokens; with positions, and the last queries.
    COMPOSED: KV_HEADS * (32 * (8 * DIM + 4) + 128 * 2 * (DIM // 2 + 4)) + HEADS * 16 * 4 * DIM,
}


@pytest.mark.parametrize("policy", [*BOUNDS, COMPOSED])
def test_allocated_bytes_are_those_of_the_formula(policy):
    name, layers = "tiny-llama/2", 2
    opened = session(name, policy, "torch", 2)
    opened.prefill([rows(name)[0][:120]] * 2)
    assert opened.state_bytes == 2 * layers * FORMULAS[policy]
    if policy != COMPOSED:  # whose bytes depend on the prompt
        program = captured(name).copy()
        apply(program, parse_passes(f"cache-kv{{policy={policy}}}"))
        assert opened.state_bytes == program.state_bytes(2, 192)


@pytest.mark.parametrize(("name", "policy"), EMITTED)
def test_prompts_are_attended_to_exactly(name, policy):
    prompts = [row[:-1] for row in rows(name)]
    mine, full = (session(name, each, "onnx", 3).prefill(prompts) for each in (policy, "full"))
    assert (mine - full).abs().max() <= 1e-6 * full.abs().max()


@pytest.mark.parametrize(("name", "policy"), EMITTED)
def test_both_targets_generate_the_same_tokens(name, policy):
    assert_same_tokens(name, *(executor(name, policy, target) for target in ("torch", "onnx")))


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_saved_sessions_continue_identically(target, tmp_path):
    name, policy = EMITTED[1]
    first, second = (session(name, policy, target, 3) for _ in range(2))
    first.prefill(rows(name))
    for token in range(9):
        first.decode([token, token + 1, token + 2])
    first.save(tmp_path / "saved")
    second.restore(tmp_path / "saved")
    for token in range(40):
        assert torch.equal(first.decode([token] * 3), second.decode([token] * 3))
    assert first.kept[0].stored.filled == second.kept[0].stored.filled
    several = first.repeated(2)
    assert torch.allclose(several.decode([1] * 6)[::2], first.decode([1] * 3), atol=1e-4)


def test_what_a_policy_keeps_is_compressed():
    """Of a prompt, the tokens that snapkv keeps; of a later one, its budget over everything."""
    name, row = LLAMA, rows(LLAMA)[0]
    composed, alone = (session(name, each, "torch") for each in (COMPOSED, COMPOSED.partition("+")[0]))
    logits = {each: [each.prefill([row[:110]])] for each in (composed, alone)}
    (kept,), (plain,) = composed.kept, alone.kept
    assert (kept.stored_tokens(0), kept.held[0], plain.held[0]) == (64, 16, 80)
    full = session(name, "full", "torch")
    expected = [full.prefill([row[:110]])]
    for token in row[110:120]:
        expected.append(full.decode([token]))
        for each, found in logits.items():
            found.append(each.decode([token]))
    mine, theirs = torch.cat(logits[composed]), torch.cat(logits[alone])
    assert torch.equal(mine[0], theirs[0])
    # Compressing what is left costs less than having dropped the rest.
    assert 0 < (mine - theirs).abs().max() < (theirs - torch.cat(expected)).abs().max()
    composed.prefill([row[120:130]])
    assert kept.stored_tokens(0) + kept.held[0] == 80


def test_neighbours_are_compressed_together():
    """Tokens that were kept are in order before they are grouped: their keys come back."""
    name, row = LLAMA, rows(LLAMA)[0]
    policy = "sinks{budget=64}+kivi{bits=4,residual=32}"
    opened, full = session(name, policy, "torch"), session(name, "full", "torch")
    for each in (opened, full):
        each.prefill([row])
    (kept,) = opened.kept
    states = kept.allocate(1, 64)
    kept.load(opened.executor, 0, opened._row_states(0), states)
    key = full.states["past_key_values.1.key"][:, :, : len(row)]
    wanted = torch.cat([key[:, :, :4], key[:, :, len(row) - 60 :]], 2)[:, :, : kept.stored_tokens(0)]
    found = states["past_key_values.1.key"][:, :, : kept.stored_tokens(0)]
    assert kept.stored_tokens(0) == 64
    assert (found - wanted).abs().max() < 0.1 * wanted.abs().max()


def test_a_short_context_keeps_full():
    assert not Session(executor("tiny-llama/2", "kivi{residual=1024}", "torch"), 1, 64).kept
    assert "forward" in captured("tiny-llama/2").entries


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_artifacts_keep_what_was_chosen(target, tmp_path):
    """A composition and a form of its own for one layer, saved, prepared where there is something to, and loaded."""
    pipeline = f"cache-kv{{policy={COMPOSED},layers={{1: {KIVI}}}}}"
    made = jettison.optimize(shortened("tiny-llama", 2, tmp_path / "model"), pipeline, target=target)
    row = rows("tiny-llama/2")[0]
    expected = made.generate(row, max_new_tokens=40)
    made.save_pretrained(tmp_path / "out")
    loaded = [jettison.load(tmp_path / "out", verify=True, allow_spinning=False)]
    if target == "onnx":
        names = {path.stem for path in (tmp_path / "out").glob("*.onnx")}
        assert names == {"model", "evict", "store", "load", "store_1", "load_1"}
        assert main(["prepare", str(tmp_path / "out")]) == 0
        loaded.append(jettison.load(tmp_path / "out", allow_spinning=False))
    for each in loaded:
        assert each.generate(row, max_new_tokens=40) == expected
    explained = run_json("explain", tmp_path / "out")
    layers = [layer for layer in explained["layers"] if layer["kv_policy"]]
    assert [layer["kv_policy"].partition("{")[0] for layer in layers] == ["snapkv", "kivi"]
    assert "+kivi" in layers[0]["kv_policy"]
    # 4 bits and a range for 32 values, of keys and values; the composition holds positions of uncompressed ones only.
    assert [layer["state_bytes_per_token"] for layer in layers] == [4 * 2 * (16 + 4)] * 2
    inspected = run_json("inspect", tmp_path / "out")
    assert inspected["state_bytes"] == made.report.state_bytes
