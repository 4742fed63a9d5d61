"""Programs: copies that do not touch each other, exact byte counts, and the same bits after saving and loading."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from jettison.ir.capture import capture
from jettison.ir.constants import Constant
from jettison.ir.edit import Edit
from jettison.ir.huggingface import open_checkpoint
from jettison.ir.interpret import run_entry
from jettison.ir.program import (
    PassRecord,
    Program,
    State,
    constant_placeholders,
    copy_graph,
    fake_mode_of,
    input_placeholders,
    output_node,
    placeholders,
    state_placeholders,
)
from jettison.ir.serialize import load_program, save_program
from jettison.passes.cache_kv import CacheKV
from jettison.passes.pipeline import apply, prepare
from jettison.passes.policies import Full, Window
from jettison.passes.quantize_weights import QuantizeWeights
from tests.helpers import Embedded, export_tiny

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"


@cache
def tiny_llama() -> Program:
    """The bundled model, prepared; not to be changed."""
    source = open_checkpoint(TINY_LLAMA)[1]
    source.eager = None
    program = capture(source)
    prepare(program)
    return program


@cache
def cached(*passes: object) -> Program:
    """The bundled model after passes; not to be changed."""
    program = tiny_llama().copy()
    apply(program, list(passes))
    return program


def small() -> Program:
    """Embedding `[61, 8]`, linear `[16, 8]` and its bias: (488 + 128 + 16) * 4 bytes."""
    return export_tiny(Embedded(nn.Linear(8, 16)))


# ------------------------------------------------------------------------------------------------------------- copies


def test_changes_to_a_copy_do_not_reach_the_original() -> None:
    program = small()
    before = str(program)
    twin = program.copy()
    assert str(twin) == before
    edit = Edit(twin, "forward", "test")
    out = output_node(edit.entry)
    with edit.before(out):
        edit.set_outputs([edit.call(torch.ops.aten.relu.default, out.args[0][0])])
    edit.constant(Constant("new", torch.ones(2)))
    edit.state(State("s", ("batch", 3), torch.int8), fake_mode_of(edit.entry).from_tensor(torch.ones(2, 3).char()))
    twin.history.append(PassRecord("test"))
    twin.entries["again"] = copy_graph(twin.entries["forward"])
    twin.pipeline = "test"
    assert str(program) == before
    assert str(twin) != before
    assert (program.history, program.pipeline, program.states, list(program.entries)) == ([], "", {}, ["forward"])
    assert "new" not in program.constants


def test_a_copy_shares_weights_and_metadata_but_no_node() -> None:
    program = small()
    twin = program.copy()
    assert all(twin.constants[name] is constant for name, constant in program.constants.items())
    ours, theirs = (list(p.entries["forward"].graph.nodes) for p in (program, twin))
    assert not set(ours) & set(theirs)
    for left, right in zip(ours, theirs, strict=True):
        assert (left.name, left.op, left.target) == (right.name, right.op, right.target)
        assert left.meta is not right.meta
        assert left.meta.get("val") is right.meta.get("val")


# ------------------------------------------------------------------------------------------------------- byte counts


def test_weight_bytes_count_what_some_entry_reads_once() -> None:
    program = small()
    assert program.weight_bytes() == (61 * 8 + 16 * 8 + 16) * 4
    program.entries["again"] = copy_graph(program.entries["forward"])
    assert program.weight_bytes() == (61 * 8 + 16 * 8 + 16) * 4
    program.constants["unread"] = Constant("unread", torch.ones(1000))
    assert program.weight_bytes() == (61 * 8 + 16 * 8 + 16) * 4
    assert set(program.used_constants()) == {"embed.weight", "body.weight", "body.bias"}


def test_weight_bytes_are_those_of_the_stored_form() -> None:
    program = small()
    weight = program.constants["body.weight"].blocks[0]
    program.constants["body.weight"] = Constant(
        "body.weight", [weight[:4].bfloat16(), weight[4:].bfloat16()], torch.float32
    )
    assert program.weight_bytes() == (61 * 8 + 16) * 4 + 16 * 8 * 2


def test_weight_bytes_of_the_bundled_model_are_those_of_its_file() -> None:
    program = tiny_llama()
    # The table of the rotary embedding is computed, not stored in the model's file.
    computed = sum(c.stored_bytes for name, c in program.used_constants().items() if "rotary" in name)
    header = int.from_bytes((TINY_LLAMA / "model.safetensors").read_bytes()[:8], "little")
    assert program.weight_bytes() - computed == (TINY_LLAMA / "model.safetensors").stat().st_size - 8 - header


@pytest.mark.parametrize(
    ("policy", "slots"), [(Full(), 1024), (Window(size=100), 164)]
)  # 64 slots of slack, whatever the capacity
def test_state_bytes_are_slots_times_what_a_slot_holds(policy: object, slots: int) -> None:
    program = cached(CacheKV(policy))
    layers, kv_heads, head_dim = 6, 4, 32
    assert program.state_bytes(1, 1024) == layers * 2 * kv_heads * slots * head_dim * 4
    assert program.state_bytes(3, 1024) == 3 * program.state_bytes(1, 1024)
    assert tiny_llama().state_bytes(1, 1024) == 0


def test_a_state_knows_its_sizes() -> None:
    state = State("s", ("batch", 4, "capacity", 32), torch.bfloat16)
    assert state.sizes(2, 64) == (2, 4, 64, 32)
    program = small()
    program.states["s"] = state
    assert program.state_bytes(2, 64) == 2 * 4 * 64 * 32 * 2


def test_placeholders_are_told_apart() -> None:
    entry = cached(CacheKV(Full())).entries["decode"]
    constants, states, inputs = constant_placeholders(entry), state_placeholders(entry), input_placeholders(entry)
    assert [*constants.values(), *states.values(), *inputs.values()] == list(placeholders(entry))
    assert list(states)[:2] == ["past_key_values.0.key", "past_key_values.0.value"]
    assert list(inputs) == ["input_ids", "position_ids", "attention_mask", "logits_positions"]
    assert "model.norm.weight" in constants


# ----------------------------------------------------------------------------------------------------- saved programs


@pytest.fixture(params=[True, False], ids=["with metadata", "without metadata"])
def reload(request: pytest.FixtureRequest, tmp_path: Path):
    def load(program: Program) -> Program:
        save_program(program, tmp_path / "program.json", tmp_path / "weights.safetensors")
        return load_program(tmp_path / "program.json", tmp_path / "weights.safetensors", metadata=request.param)

    return load


def prompt(length: int, start: int = 0) -> dict[str, Tensor]:
    ids = (torch.arange(start, start + length) * 37 % 4096)[None].repeat(2, 1)
    return {
        "input_ids": ids,
        "position_ids": torch.arange(start, start + length)[None].repeat(2, 1),
        "attention_mask": torch.ones(2, start + length, dtype=torch.int64),
        "logits_positions": torch.tensor([[-1], [-1]]),
    }


def assert_same_bits(left: tuple[Tensor, ...], right: tuple[Tensor, ...]) -> None:
    assert len(left) == len(right)
    for ours, theirs in zip(left, right, strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("length", [1, 7, 64])
def test_a_loaded_forward_computes_the_same_bits(reload, length: int) -> None:
    loaded = reload(tiny_llama())
    inputs = prompt(length)
    assert_same_bits(run_entry(loaded, "forward", inputs), run_entry(tiny_llama(), "forward", inputs))


@pytest.mark.parametrize("policy", [Full(), Window(size=100)])
def test_loaded_states_compute_the_same_bits(reload, policy: object) -> None:
    program = cached(QuantizeWeights(bits=4, group=32), CacheKV(policy))
    loaded = reload(program)
    results = []
    for each in (program, loaded):
        states = {name: torch.zeros(state.sizes(2, 64), dtype=state.dtype) for name, state in each.states.items()}
        prefilled = run_entry(each, "prefill", {**states, **prompt(5)})
        states = dict(zip(each.states, prefilled[1:], strict=True))
        results.append([prefilled, run_entry(each, "decode", {**states, **prompt(1, start=5)})])
    for ours, theirs in zip(*results, strict=True):
        assert_same_bits(ours, theirs)
    assert not torch.equal(results[0][0][0], results[0][1][0])


def test_loaded_counts_are_the_saved_ones(reload) -> None:
    program = cached(QuantizeWeights(bits=4, group=32), CacheKV(Full()))
    loaded = reload(program)
    assert loaded.weight_bytes() == program.weight_bytes()
    assert loaded.state_bytes(2, 128) == program.state_bytes(2, 128)
    assert loaded.packed == program.packed
