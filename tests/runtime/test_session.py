"""Sessions over both executors: batches, ragged prompts, chunks, positions, windows, saved states."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from jettison.codegen.onnx.emit import emit_program
from jettison.ir.compare import assert_close
from jettison.ir.errors import ArtifactError, OptionError
from jettison.ir.program import Program
from jettison.passes.cache_kv import CacheKV
from jettison.passes.pipeline import apply, prepare
from jettison.passes.policies import Full, Window
from jettison.runtime.executor import Executor
from jettison.runtime.onnx_executor import OnnxExecutor, OnnxGraph
from jettison.runtime.session import SLOT_GRANULE, Session
from jettison.runtime.torch_executor import TorchExecutor
from jettison.source import open_source
from tests.models.tiny_models import CONTEXT, TINY_MODELS, VOCAB_SIZE, WINDOW, random_ids, randomize

# Of the largest logit: between targets, and between ways to cut a prompt.
TOLERANCE, REASON = 1e-4, "fp32 in another order of operations"
POLICIES = {"full": Full(), "window": Window(size=WINDOW)}
KINDS = [(target, policy) for target in ("torch", "onnx") for policy in POLICIES]


def ids(rows: int, length: int, seed: int = 0) -> list[list[int]]:
    return random_ids(rows, length, seed=seed).tolist()


def same(actual: Tensor, expected: Tensor, what: str = "logits") -> None:
    assert_close(actual, expected, tolerance=TOLERANCE, reason=REASON, what=what)


@pytest.fixture(scope="module")
def eager() -> Any:
    transformers = pytest.importorskip("transformers")
    options = {**TINY_MODELS["llama"].options, "hidden_size": 64}
    return randomize(transformers.LlamaForCausalLM(transformers.LlamaConfig(**options))).eval()


@pytest.fixture(scope="module")
def programs(eager: Any) -> dict[str, Program]:
    captured = open_source(eager).program
    prepare(captured)
    found = {}
    for name, policy in POLICIES.items():
        found[name] = captured.copy()
        apply(found[name], [CacheKV(policy)])
    return found


@pytest.fixture(scope="module")
def executors(programs: dict[str, Program], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Executor]:
    """`executors(target, policy)`, each made once."""
    made: dict[tuple[str, str], Executor] = {}

    def make(target: str, policy: str) -> Executor:
        program = programs[policy]
        if target == "torch":
            return TorchExecutor(program)
        (graph,) = emit_program(program, tmp_path_factory.mktemp(policy))
        inputs = tuple(name for name in graph.inputs if name not in graph.states)
        described = OnnxGraph(graph.path, graph.entries, inputs, program.outputs, graph.states)
        return OnnxExecutor([described], program.info, program.states, 0, threads=1, allow_spinning=False)

    def get(target: str, policy: str) -> Executor:
        if (target, policy) not in made:
            made[target, policy] = make(target, policy)
        return made[target, policy]

    return get


@pytest.fixture(params=KINDS, ids=["-".join(kind) for kind in KINDS])
def executor(request: pytest.FixtureRequest, executors: Callable[[str, str], Executor]) -> Executor:
    return executors(*request.param)


@pytest.fixture(params=["torch", "onnx"])
def full(request: pytest.FixtureRequest, executors: Callable[[str, str], Executor]) -> Executor:
    return executors(request.param, "full")


# --- what the logits are --------------------------------------------------------------------------


def test_score_is_teacher_forcing(full: Executor, eager: Any) -> None:
    rows = ids(2, 40)
    with torch.no_grad():
        expected = eager(torch.tensor(rows)).logits
    same(Session(full, 2, 64).score(rows), expected)
    session = Session(full, 2, 64)
    pieces = [session.score([row[start : start + 8] for row in rows]) for start in range(0, 40, 8)]
    assert session.lengths == [40, 40]
    same(torch.cat(pieces, 1), expected, "scored in pieces")


def test_prefill_and_decode_go_on_where_the_model_would(full: Executor, eager: Any) -> None:
    rows = ids(3, 20)
    with torch.no_grad():
        expected = eager(torch.tensor(rows)).logits
    session = Session(full, 3, 64)
    same(session.prefill([row[:12] for row in rows]), expected[:, 11])
    for column in range(12, 20):
        same(session.decode([row[column] for row in rows]), expected[:, column], f"token {column}")


def test_score_equals_decoding_token_by_token(executor: Executor) -> None:
    """Past the capacity of a windowed cache too: 80 slots hold a window of 16."""
    (row,) = ids(1, 110)
    scored = Session(executor, 1, CONTEXT).score([row])
    session = Session(executor, 1, CONTEXT)
    stepped = [session.prefill([row[:1]])] + [session.decode([token]) for token in row[1:]]
    same(torch.stack(stepped, 1), scored)


def test_a_window_forgets_what_is_further_back(executors: Callable[[str, str], Executor]) -> None:
    """Two layers see back two windows at most: an earlier token changes nothing. With `full` it does."""
    (row,) = ids(1, 100)
    other = [(row[0] + 1) % VOCAB_SIZE, *row[1:]]
    for target in ("torch", "onnx"):
        windowed, full = (
            [Session(executors(target, policy), 1, CONTEXT).prefill([tokens]) for tokens in (row, other)]
            for policy in ("window", "full")
        )
        assert torch.equal(windowed[0], windowed[1])
        assert not torch.allclose(full[0], full[1], atol=1e-3)


@pytest.mark.parametrize("policy", POLICIES)
def test_targets_agree(executors: Callable[[str, str], Executor], policy: str) -> None:
    rows = ids(3, 30)
    ours, theirs = (Session(executors(target, policy), 3, CONTEXT) for target in ("torch", "onnx"))
    same(ours.prefill(rows), theirs.prefill(rows))
    for step in range(70):  # past 80 tokens, where a window moves
        tokens = [(7 * step + row) % VOCAB_SIZE for row in range(3)]
        same(ours.decode(tokens), theirs.decode(tokens), f"step {step}")
    for name, state in ours.states.items():
        # Slots that hold no token are nobody's: one target may write padding there, another nothing.
        used = slice(0, (100 - 65) if policy == "window" else 100)
        same(state[:, :, used], theirs.states[name][:, :, used], name)


# --- batches --------------------------------------------------------------------------------------


def test_ragged_rows_equal_each_row_alone(executor: Executor) -> None:
    prompts = [row[:length] for row, length in zip(ids(4, 75), (1, 9, 75, 30), strict=True)]
    steps = ids(4, 8, seed=1)
    together = Session(executor, 4, CONTEXT)
    first = together.prefill(prompts)
    later = [together.decode([row[step] for row in steps]) for step in range(8)]
    assert together.lengths == [9, 17, 83, 38]
    for index, prompt in enumerate(prompts):
        alone = Session(executor, 1, CONTEXT)
        same(first[index : index + 1], alone.prefill([prompt]), f"row {index}")
        for step in range(8):
            same(later[step][index : index + 1], alone.decode([steps[index][step]]), f"row {index}, step {step}")


def test_more_prompt_can_follow_a_prompt(executor: Executor) -> None:
    rows = ids(2, 50)
    whole = Session(executor, 2, 64).prefill(rows)
    session = Session(executor, 2, 64)
    session.prefill([rows[0][:30], rows[1][:3]])
    same(session.prefill([rows[0][30:], rows[1][3:]]), whole)


@pytest.mark.parametrize("length", [16, 50, 51])
def test_chunked_prefill_equals_one_call(executor: Executor, length: int) -> None:
    rows = ids(2, length)
    whole, chunked = Session(executor, 2, 64), Session(executor, 2, 64, prefill_chunk=16)
    same(chunked.prefill(rows), whole.prefill(rows))
    same(chunked.decode([5, 6]), whole.decode([5, 6]))
    scored, pieces = Session(executor, 2, 64), Session(executor, 2, 64, prefill_chunk=16)
    same(pieces.score(rows), scored.score(rows))


def test_chunks_run_as_calls_of_at_most_that_many_tokens(executors: Callable[[str, str], Executor]) -> None:
    seen: list[tuple[str, tuple[int, ...]]] = []

    class Watched:
        def __init__(self, inner: Executor) -> None:
            self.inner, self.info, self.entries, self.states = inner, inner.info, inner.entries, inner.states
            self.retentions, self.storages, self.device = inner.retentions, inner.storages, inner.device
            self.placement = inner.placement

        def run(self, entry: str, inputs: dict[str, Tensor], states: dict[str, Tensor]) -> dict[str, Tensor]:
            seen.append((entry, tuple(inputs["input_ids"].shape)))
            return self.inner.run(entry, inputs, states)

    session = Session(Watched(executors("torch", "full")), 1, 64, prefill_chunk=16)  # type: ignore[arg-type]
    session.prefill(ids(1, 50))
    session.decode([3])
    assert seen == [("prefill", (1, 16))] * 3 + [("prefill", (1, 2)), ("decode", (1, 1))]


# --- saved states ---------------------------------------------------------------------------------


@pytest.mark.parametrize("tokens", [12, 79, 95])
def test_restored_session_continues_bit_for_bit(executor: Executor, tmp_path: Path, tokens: int) -> None:
    """Before, at and after the point where a window moves."""
    session = Session(executor, 2, CONTEXT)
    session.prefill([row[: tokens - 2 * index] for index, row in enumerate(ids(2, tokens))])
    session.decode([4, 5])
    session.save(tmp_path / "session.safetensors")
    expected = [session.decode([step, step + 1]) for step in range(6)]
    restored = Session(executor, 2, CONTEXT)
    restored.prefill(ids(2, 3, seed=9))  # whatever was there is gone
    restored.restore(tmp_path / "session.safetensors")
    assert restored.lengths == [tokens + 1, tokens - 1], "positions go on"
    for step, logits in enumerate(expected):
        assert torch.equal(restored.decode([step, step + 1]), logits)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("first", "second"), [("torch", "onnx"), ("onnx", "torch")])
def test_states_move_between_targets(
    executors: Callable[[str, str], Executor], tmp_path: Path, policy: str, first: str, second: str
) -> None:
    session = Session(executors(first, policy), 2, CONTEXT)
    session.prefill([ids(1, 90)[0], ids(1, 40, seed=1)[0]])
    session.save(tmp_path / "session")
    moved = Session(executors(second, policy), 2, CONTEXT)
    moved.restore(tmp_path / "session")
    for step in range(8):
        same(moved.decode([step, 2 * step]), session.decode([step, 2 * step]), f"step {step}")


def test_saved_file_is_plain_safetensors_and_replaces_what_was_there(full: Executor, tmp_path: Path) -> None:
    path = tmp_path / "session.safetensors"
    path.write_text("something else")
    session = Session(full, 1, 64)
    session.prefill(ids(1, 5))
    session.save(path)
    with safe_open(str(path), framework="pt") as saved:
        assert json.loads(saved.metadata()["lengths"]) == [5]
        assert set(saved.keys()) == set(session.states)
    assert [file.name for file in tmp_path.iterdir()] == ["session.safetensors"]


def test_states_that_cannot_be_written_leave_nothing_behind(
    full: Executor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = Session(full, 1, 64)
    with pytest.raises(ArtifactError, match="cannot be written"):
        session.save(tmp_path / "missing" / "session")

    def full_disk(source: Any, target: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full_disk)
    with pytest.raises(ArtifactError, match=r"No space left on device.*MB free"):
        session.save(tmp_path / "session")
    assert not list(tmp_path.iterdir())


def damaged(path: Path, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    with safe_open(str(path), framework="pt") as saved:
        metadata = saved.metadata()
    tensors = load_file(path)
    change(tensors, metadata)
    save_file(tensors, path, metadata)
    return path


CHANGES: dict[str, Callable[[dict[str, Tensor], dict[str, str]], Any]] = {
    "a state missing": lambda tensors, metadata: tensors.pop("past_key_values.0.key"),
    "another capacity": lambda tensors, metadata: metadata.update(capacity="128"),
    "another model": lambda tensors, metadata: metadata.update(model="OtherForCausalLM"),
    "no lengths": lambda tensors, metadata: metadata.pop("lengths"),
    "lengths that are none": lambda tensors, metadata: metadata.update(lengths="[5"),
    "too many rows": lambda tensors, metadata: metadata.update(lengths="[5, 5]"),
    "more tokens than slots": lambda tensors, metadata: metadata.update(lengths="[65]"),
    "a negative length": lambda tensors, metadata: metadata.update(lengths="[-1]"),
    "a length that is no number": lambda tensors, metadata: metadata.update(lengths='["5"]'),
}


@pytest.mark.parametrize("what", CHANGES)
def test_states_of_something_else_are_refused(
    executors: Callable[[str, str], Executor], tmp_path: Path, what: str
) -> None:
    session = Session(executors("torch", "full"), 1, 64)
    session.prefill(ids(1, 5))
    session.save(tmp_path / "session")
    before = {name: state.clone() for name, state in session.states.items()}
    with pytest.raises(ArtifactError, match="another program, batch or capacity"):
        session.restore(damaged(tmp_path / "session", CHANGES[what]))
    assert session.lengths == [5], "the session is as it was"
    assert all(torch.equal(state, before[name]) for name, state in session.states.items())


def test_files_that_are_no_session_are_refused(full: Executor, tmp_path: Path) -> None:
    session = Session(full, 1, 64)
    (tmp_path / "garbage").write_bytes(os.urandom(100))
    session.save(tmp_path / "whole")
    (tmp_path / "half").write_bytes((tmp_path / "whole").read_bytes()[:1000])
    for name in ("garbage", "half", "missing"):
        with pytest.raises(ArtifactError, match=f"{name}: not a saved session"):
            session.restore(tmp_path / name)
    with pytest.raises(ArtifactError, match=r"2 states.*needed 4|another program, batch or capacity"):
        Session(full, 2, 64).restore(tmp_path / "whole")


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch": 0}, "batch=0: needed at least 1"),
        ({"capacity": 0}, "capacity=0: needed at least 1"),
        ({"prefill_chunk": 0}, "prefill_chunk=0: needed at least 1"),
        ({"capacity": CONTEXT + 1}, f"capacity {CONTEXT + 1}: the model's context is {CONTEXT} tokens"),
    ],
)
def test_settings_out_of_range(full: Executor, settings: dict[str, int], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Session(full, **{"batch": 1, "capacity": 64, **settings})


def test_capacity_is_rounded_up_to_slots_within_the_context(full: Executor) -> None:
    assert Session(full, 1, 1).capacity == SLOT_GRANULE
    assert Session(full, 1, 65).capacity == 2 * SLOT_GRANULE
    assert Session(full, 1, CONTEXT).capacity == CONTEXT
    assert Session(full, 1, 65).states["past_key_values.0.key"].shape[2] == 2 * SLOT_GRANULE


def test_window_holds_its_slots_whatever_the_capacity(executors: Callable[[str, str], Executor]) -> None:
    small, large = (Session(executors("torch", "window"), 2, capacity) for capacity in (64, CONTEXT))
    assert small.state_bytes == large.state_bytes == 2 * 2 * 2 * 2 * (WINDOW + SLOT_GRANULE) * 16 * 4
    full = Session(executors("torch", "full"), 2, CONTEXT)
    assert full.state_bytes == 2 * 2 * 2 * 2 * CONTEXT * 16 * 4


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([[1, 2]], "1 rows given: this session has 2"),
        ([[1], []], "row 1 is empty"),
        ([[1, VOCAB_SIZE], [1, 1]], f"row 0 holds token {VOCAB_SIZE}: LlamaForCausalLM knows 0 to {VOCAB_SIZE - 1}"),
        ([[1], [-1]], "row 1 holds token -1"),
        ([[1], [1] * 65], "row 1 holds 0 tokens and 65 more do not fit the session's 64"),
    ],
)
@pytest.mark.parametrize("method", ["prefill", "score"])
def test_bad_rows_are_refused_before_anything_runs(
    full: Executor, rows: list[list[int]], message: str, method: str
) -> None:
    session = Session(full, 2, 64)
    with pytest.raises(OptionError, match=message):
        getattr(session, method)(rows)
    assert session.lengths == [0, 0]
    assert not any(state.any() for state in session.states.values())


def test_scoring_rows_of_different_length_is_refused(full: Executor) -> None:
    with pytest.raises(OptionError, match="score: rows of 2, 1 tokens: needed the same number"):
        Session(full, 2, 64).score([[1, 2], [3]])


def test_decoding_past_the_capacity_is_refused(full: Executor) -> None:
    session = Session(full, 1, 64)
    session.prefill(ids(1, 63))
    session.decode([1])
    with pytest.raises(OptionError, match=f"64 tokens and 1 more do not fit.*larger capacity.*at most {CONTEXT}"):
        session.decode([1])
    with pytest.raises(OptionError, match="2 rows given"):
        session.decode([1, 2])
    with pytest.raises(OptionError, match=f"token {VOCAB_SIZE}"):
        Session(full, 1, 64).decode([VOCAB_SIZE])


def test_an_encoder_has_no_session(executors: Callable[[str, str], Executor]) -> None:
    encoder: Any = SimpleNamespace(info=executors("torch", "full").info, entries={"forward": None})
    with pytest.raises(OptionError, match="is an encoder: it has no next token"):
        Session(encoder, 1, 64)
