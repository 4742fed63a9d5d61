"""The Triton executor against the torch one: the same logits and tokens, on any machine in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from jettison.api import parse_passes
from jettison.codegen.triton.steps import TorchStep
from jettison.ir.compare import assert_close
from jettison.ir.errors import OptionError
from jettison.ir.program import Program
from jettison.passes.cache_kv import CacheKV
from jettison.passes.pipeline import apply, prepare
from jettison.passes.policies import Full, Kivi, SnapKV, Window
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime.generation import generate
from jettison.runtime.generation_options import GenerationOptions
from jettison.runtime.session import Session
from jettison.runtime.torch_executor import TorchExecutor
from jettison.runtime.triton_executor import TritonExecutor
from jettison.source import open_source
from tests.models.shortened import shortened
from tests.models.tiny_programs import tiny_program
from tests.runtime.test_recorded_step import Recorder

STEPS = 5


def compare(program: Program, prompts: list[list[int]], tolerance: float | None = None, steps: int = STEPS) -> None:
    """Prompts, then greedy tokens, through both."""
    expected = Session(TorchExecutor(program, kernels="reference"), len(prompts), 64, prefill_chunk=8)
    actual = Session(TritonExecutor(program), len(prompts), 64, prefill_chunk=8)
    reason = "another order of operations in the dtype of the graph" if tolerance else ""
    logits, wanted = actual.prefill(prompts), expected.prefill(prompts)
    for _ in range(steps):
        assert_close(logits.float(), wanted.float(), tolerance=tolerance, reason=reason)
        tokens = wanted.argmax(-1).tolist()
        if tolerance is None:
            assert logits.argmax(-1).tolist() == tokens
        logits, wanted = actual.decode(tokens), expected.decode(tokens)


def test_greedy_tokens_of_a_trained_model(tmp_path):  # no fixture of conftest: `make gpu` leaves that out
    program = open_source(shortened("tiny-llama", 2, tmp_path)).program
    prepare(program)
    apply(program, [QuantizeWeights(bits=4, group=64), CacheKV(Full())])
    compare(program, [[5, 100, 200, 77, 9]], steps=1)


@pytest.mark.parametrize("bits", [None, 4])
def test_several_rows(bits):
    passes = [QuantizeWeights(bits=bits, group=32)] if bits else []
    compare(tiny_program("llama", *passes, CacheKV(Full())), [[5, 10, 20], [7, 77, 9], [1, 2, 3]], steps=3)


@pytest.mark.parametrize(
    ("family", "layers"), [("qwen3", 1), ("phi3", 1), ("gemma2", 2), ("gpt_neox", 1), ("opt", 1), ("mixtral", 1)]
)
def test_families(family, layers):
    program = tiny_program(family, QuantizeWeights(bits=8, group=32), CacheKV(Full()), layers=layers)
    compare(program, [[1, 5, 9, 3, 8, 4, 6, 2, 7, 11, 12]], steps=2)


@pytest.mark.parametrize("policy", [Window(size=16), SnapKV(budget=16, window=4), Kivi(bits=4, group=8, residual=16)])
def test_policies(policy):
    program = tiny_program("llama", CacheKV(policy), layers=1)
    compare(program, [list(range(3, 40))])


@pytest.mark.parametrize("options", ["format=nf4{group=32}", "bits=3,group=32", "bits=2,group=32,symmetric=true"])
def test_formats(options):
    program = tiny_program("llama", *parse_passes(f"quantize-weights{{{options}}}"), CacheKV(Full()), layers=1)
    compare(program, [[1, 5, 9, 3]], steps=2)


def test_half_precision_stays_close():
    program = tiny_program("llama", QuantizeWeights(bits=4, group=32), CacheKV(Full()), layers=1, dtype="bfloat16")
    compare(program, [[1, 5, 9, 3]], tolerance=0.05)


def test_replayed_steps_are_the_steps():
    """What a CUDA graph does, without one: later steps run from buffers, with a mask that is longer than the row."""
    recorder = Recorder()
    program = tiny_program("llama", CacheKV(Full()), layers=1)
    plain, recorded = (Session(TritonExecutor(program, record=record), 1, 64) for record in (None, recorder))
    assert torch.equal(*(each.prefill([[1, 5, 9, 3]]) for each in (plain, recorded)))
    for token in (4, 8, 15, 16):
        assert torch.equal(plain.decode([token]), recorded.decode([token]))
    logits = plain.decode([23])
    values, tokens = recorded.decode_best([23], 3)
    assert torch.equal(values, logits.topk(3, 1).values)
    assert torch.equal(tokens, logits.topk(3, 1).indices)
    assert (recorder.recorded, recorder.replayed) == (1, 3), "the first step of a kind runs as it is"
    assert plain.lengths == recorded.lengths
    with pytest.raises(OptionError, match="picks at most 64"):
        recorded.decode_best([1], 65)


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 4, "seed": 3}])
def test_generation_from_the_best_tokens_is_generation_from_all(options, monkeypatch):
    program = tiny_program("llama", CacheKV(Full()), layers=1)
    executor = TritonExecutor(program)
    given = GenerationOptions(max_new_tokens=5, eos_token_id=[], **options)
    best = generate(lambda *sizes: Session(executor, *sizes), [[1, 2, 3], [4]], given).token_ids
    monkeypatch.setattr(Session, "most_best", 0)
    assert generate(lambda *sizes: Session(executor, *sizes), [[1, 2, 3], [4]], given).token_ids == best


def test_a_layer_is_six_launches():
    program = tiny_program("llama", QuantizeWeights(bits=4, group=32), CacheKV(Full()))
    steps = TritonExecutor(program).emitted.steps["decode"]
    launched = [step for step in steps if not isinstance(step, TorchStep)]
    layers = 2
    assert len(launched) == 6 * layers + 3  # and the embedding, the last norm and the head


def test_weights_are_held_once():
    program = tiny_program("llama", QuantizeWeights(bits=4, group=32), CacheKV(Full()))
    executor = TritonExecutor(program)
    # Zero points take a number each here, and four bits there.
    assert executor.weight_bytes < 1.5 * program.weight_bytes()
    assert executor.weight_bytes >= program.weight_bytes()


def test_an_unknown_entry_is_refused():
    with pytest.raises(OptionError, match="no entry 'sideways'"):
        TritonExecutor(tiny_program("llama", CacheKV(Full()))).run("sideways", {}, {})


def test_states_are_on_the_device():
    executor = TritonExecutor(tiny_program("llama", CacheKV(Full())))
    session = Session(executor, 1, 64)
    assert {state.device.type for state in session.states.values()} == {executor.device.type}
    assert session.prefill([[1, 2, 3]]).device == torch.device("cpu")
