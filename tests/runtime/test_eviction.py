"""Policies that drop tokens, on trained models, in both targets."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import tempfile
import weakref
from pathlib import Path

import pytest
import torch

import jettison
from jettison.api import parse_passes
from jettison.cli import main
from jettison.ir.errors import ArtifactError
from jettison.passes.pipeline import apply, prepare
from jettison.runtime.session import Session
from jettison.runtime.tokenizer import load_tokenizer
from jettison.runtime.torch_executor import TorchExecutor
from jettison.source import open_source
from tests.codegen.running import emit
from tests.models.shortened import MODELS, shortened
from tests.runtime.long_generation import assert_same_tokens
from tests.runtime.masked_oracle import RecordingSession, masked_logits

TEXT = "The squire and the doctor were to sail in the morning with the tide, and I was to follow. " * 8
POLICIES = (
    "sinks{budget=40}",
    "sinks{budget=40,first=0,evict=always,every=1}",
    "h2o{budget=40}",
    "h2o{budget=40,evict=always,every=1}",
    "h2o{budget=40,recent=5,age=true,evict=always,every=7}",
    "snapkv{budget=40,window=16}",
    "snapkv{budget=40,window=4,kernel=3,pool=max,evict=always,every=5}",
)
TOLERANCE = 1e-5
LLAMA = "tiny-llama/2"


@functools.cache
def captured(name):
    """A model, or with `/2` behind its name its first two layers: emitting ONNX takes time for every layer."""
    name, _, layers = name.partition("/")
    if not layers:
        program = open_source(MODELS / name).program
    else:
        with tempfile.TemporaryDirectory() as folder:
            program = open_source(shortened(name, int(layers), Path(folder))).program
    prepare(program)
    return program


@functools.cache
def executor(name, policy, target):
    program = captured(name).copy()
    apply(program, parse_passes(f"cache-kv{{policy={policy}}}"))
    if target == "torch":
        return TorchExecutor(program)
    folder = tempfile.TemporaryDirectory()
    opened = emit(program, Path(folder.name)).executor
    weakref.finalize(opened, folder.cleanup)
    return opened


def session(name, policy, target, batch=1):
    return Session(executor(name, policy, target), batch, 192)


@functools.cache
def rows(name):
    """Three prompts of different length and what follows them."""
    ids = load_tokenizer(MODELS / name.partition("/")[0]).encode(TEXT)
    return [ids[start : start + length] for start, length in ((0, 130), (9, 97), (3, 36))]


def run_json(*words):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main([*map(str, words), "--json"]) == 0
    return json.loads(out.getvalue())


def compare(name, policy, target, prompts, steps, chunk=48):
    """Every logit that a session decodes against the oracle."""
    session = RecordingSession(executor(name, policy, target), len(prompts), 192, prefill_chunk=chunk)
    given = [row[: len(row) - steps] for row in prompts]
    logits = [session.prefill(given)]
    logits += [session.decode([row[len(row) - steps + step] for row in prompts]) for step in range(steps)]
    decoded = torch.stack(logits, 1)
    for index, row in enumerate(prompts):
        expected = masked_logits(captured(name), row, session.seen[index])[len(row) - steps - 1 :]
        assert (decoded[index] - expected).abs().max() <= TOLERANCE * expected.abs().max(), f"row {index}"
    return session


EMITTED = [("tiny-llama/2", POLICIES[4]), ("tiny-llama/1", POLICIES[5])]
EMITTED += [("tiny-opt/1", POLICIES[index]) for index in (1, 6)]


@pytest.mark.parametrize(
    ("name", "policy", "target"),
    [("tiny-llama/2", POLICIES[index], "torch") for index in (1, 2, 4, 5, 6)]
    + [("tiny-opt/1", POLICIES[index], "torch") for index in (0, 3)]
    + [(*emitted, "onnx") for emitted in EMITTED],
)
def test_decoding_is_a_full_cache_with_dropped_keys_masked(name, policy, target):
    batch = compare(name, policy, target, rows(name), steps=20)
    (kept,) = batch.kept
    if kept.retention.every is not None:
        assert kept.slots == 40 + kept.retention.every >= max(kept.held)
    alone = compare(name, policy, target, rows(name)[:1], steps=20)
    assert alone.seen[0] == batch.seen[0], "a row keeps the same tokens alone and in a batch"
    assert min(len(head) for layer in alone.seen[0][-1] for head in layer) < len(rows(name)[0])


@pytest.mark.parametrize(("name", "policy"), EMITTED)
def test_both_targets_generate_the_same_tokens(name, policy):
    assert_same_tokens(name, *(executor(name, policy, target) for target in ("torch", "onnx")))


def test_the_oracle_notices_a_wrong_key():
    name = LLAMA
    recorded = compare(name, POLICIES[0], "torch", rows(name)[:1], steps=20)
    seen = [[[set(head) for head in layer] for layer in query] for query in recorded.seen[0]]
    for query in seen[-20:]:
        query[1][1].discard(max(query[1][1]) - 1)
    row = rows(name)[0]
    right, wrong = (masked_logits(captured(name), row, each)[-20:] for each in (recorded.seen[0], seen))
    assert (right - wrong).abs().max() > 10 * TOLERANCE * right.abs().max()


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_first_tokens_are_as_near_as_in_the_cache(target):
    policy = "sinks{budget=40,positions=cache,evict=always,every=5}"
    prompts = rows(LLAMA)
    batch = RecordingSession(executor(LLAMA, policy, target), 3, 192, prefill_chunk=48)
    logits = [batch.prefill([row[:-20] for row in prompts])]
    logits += [batch.decode([row[len(row) - 20 + step] for row in prompts]) for step in range(20)]
    for index, row in enumerate(prompts):
        near, far = (masked_logits(captured(LLAMA), row, batch.seen[index], first=first)[-21:] for first in (4, 0))
        found = torch.stack([each[index] for each in logits])
        assert (found - near).abs().max() <= TOLERANCE * near.abs().max()
        if len(row) > 90:
            assert (found - far).abs().max() > 100 * TOLERANCE * far.abs().max()


@pytest.mark.parametrize("target", ["torch", "onnx"])
@pytest.mark.parametrize("policy", ["snapkv{budget=120,evict=always}"])
def test_a_prompt_within_the_budget_is_bit_identical_to_full(policy, target):
    row = rows(LLAMA)[0][:110]
    sessions = [session(LLAMA, each, target) for each in (policy, "full")]
    logits = [[each.prefill([row[:60]])] for each in sessions]
    for each, found in zip(sessions, logits, strict=True):
        found += [each.decode([token]) for token in row[60:]]
    assert all(torch.equal(mine, yours) for mine, yours in zip(*logits, strict=True))


@pytest.mark.parametrize(("policy", "target"), [(POLICIES[0], "torch"), (POLICIES[5], "torch"), (POLICIES[5], "onnx")])
def test_prompts_are_attended_to_exactly(policy, target):
    row = rows(LLAMA)[0]
    mine, full = (session(LLAMA, each, target).prefill([row]) for each in (policy, "full"))
    assert torch.equal(mine, full)


@pytest.mark.parametrize("target", ["torch", "onnx"])
@pytest.mark.parametrize("policy", [POLICIES[4], POLICIES[5]])
def test_saved_sessions_continue_identically(policy, target, tmp_path):
    first, second = (session(LLAMA, policy, target, 3) for _ in range(2))
    first.prefill(rows(LLAMA))
    for token in range(9):
        first.decode([token, token + 1, token + 2])
    first.save(tmp_path / "saved")
    second.restore(tmp_path / "saved")
    for token in range(20):
        assert torch.equal(first.decode([token] * 3), second.decode([token] * 3))
    assert (first.lengths, first.kept[0].held) == (second.lengths, second.kept[0].held)
    with pytest.raises(ArtifactError, match="another program, batch or capacity"):
        session(LLAMA, POLICIES[0], target, 3).restore(tmp_path / "saved")
    with pytest.raises(ArtifactError, match="another program, batch or capacity"):
        session(LLAMA, policy, target, 2).restore(tmp_path / "saved")


@pytest.mark.parametrize("target", ["torch", "onnx"])
@pytest.mark.parametrize("policy", [POLICIES[4], POLICIES[5]])
def test_a_second_prompt_continues(policy, target):
    row = rows(LLAMA)[0]
    recorded = RecordingSession(executor(LLAMA, policy, target), 1, 192, prefill_chunk=48)
    recorded.prefill([row[:70]])
    for token in row[70:75]:
        recorded.decode([token])
    logits = [recorded.prefill([row[75:120]])]
    logits += [recorded.decode([token]) for token in row[120:]]
    expected = masked_logits(captured(LLAMA), row, recorded.seen[0])[119:]
    assert (torch.cat(logits) - expected).abs().max() <= TOLERANCE * expected.abs().max()


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_a_repeated_row_continues_as_the_row_does(target):
    row = rows(LLAMA)[0]
    one = session(LLAMA, POLICIES[5], target)
    one.prefill([row])
    several = one.repeated(2)
    assert several.state_bytes == 2 * one.state_bytes
    for token in range(8):
        logits = several.decode([token, token + 1])
        assert torch.allclose(logits[0], one.decode([token])[0], atol=1e-4)
    assert not torch.equal(logits[0], logits[1])


@pytest.mark.parametrize("policy", POLICIES)
def test_allocated_bytes_are_those_of_the_formula(policy):
    opened = session(LLAMA, policy, "torch", 2)
    opened.prefill([row[:90] for row in rows(LLAMA)[:2]])
    (kept,) = opened.kept
    slots = 40 + (kept.retention.every or 192 - 90)
    layers, heads, kv_heads, dim = 2, 8, 4, 32
    per_slot = kv_heads * (2 * dim * 4 + 4 + (4 if policy.startswith("h2o") else 0))
    window = {POLICIES[5]: 16, POLICIES[6]: 4}.get(policy, 0)
    assert opened.state_bytes == 2 * layers * (slots * per_slot + heads * window * dim * 4)


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_artifacts_keep_what_was_chosen(target, tmp_path):
    """Layers of three kinds, saved, prepared where there is something to prepare, and loaded again."""
    pipeline = "cache-kv{policy=snapkv{budget=40,window=16},layers={1: full, 2: sinks{budget=50,evict=always}}}"
    model = shortened("tiny-llama", 3, tmp_path / "model")
    made = jettison.optimize(model, pipeline, target=target, allow_spinning=False)
    row = rows(LLAMA)[0]
    expected = made.generate(row, max_new_tokens=20)
    made.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out" / "genai_config.json").exists()
    plain = jettison.load(tmp_path / "out", verify=True, allow_spinning=False)
    assert plain.generate(row, max_new_tokens=20) == expected
    if target == "onnx":
        names = {path.name for path in (tmp_path / "out").glob("*.onnx")}
        assert names == {"model.onnx", "evict.onnx", "evict_1.onnx"}
        assert main(["prepare", str(tmp_path / "out")]) == 0
        assert jettison.load(tmp_path / "out", allow_spinning=False).generate(row, max_new_tokens=20) == expected
    session = plain.session(1, 192)
    session.prefill([row])
    assert [(kept.retention.layers, kept.held[0]) for kept in session.kept] == [((0,), 40), ((2,), 50)]
    explained = run_json("explain", tmp_path / "out")
    named = [layer["kv_policy"] for layer in explained["layers"] if layer["kv_policy"]]
    assert [name.partition("{")[0] for name in named] == ["snapkv", "full", "sinks"]
    # What is generated adds to the layers that drop after the prompt only, and to that which drops nothing.
    added = [layer["state_bytes_per_token"] for layer in explained["layers"] if layer["kv_policy"]]
    assert added == [4 * (2 * 32 * 4 + 4), 4 * 2 * 32 * 4, 0]
