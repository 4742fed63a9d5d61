"""The Triton executor against the torch one: the same logits and tokens, on any machine in Triton's interpreter."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from torch import nn

import jettison
from jettison.api import parse_passes
from jettison.codegen.triton.steps import SparseMlpStep, TorchStep
from jettison.ir import ops
from jettison.ir.compare import assert_close, usual_inputs
from jettison.ir.errors import OptionError
from jettison.ir.match import is_call
from jettison.ir.program import Program, input_placeholders
from jettison.passes.base import Pass
from jettison.passes.cache_kv import CacheKV
from jettison.passes.pipeline import apply, prepare
from jettison.passes.policies import Full, Kivi, SnapKV, Window
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime.executor import Executor
from jettison.runtime.generation import generate
from jettison.runtime.generation_options import GenerationOptions
from jettison.runtime.session import Session
from jettison.runtime.torch_executor import TorchExecutor
from jettison.runtime.triton_executor import TritonExecutor
from jettison.source import open_source
from tests.models.shortened import shortened
from tests.models.tiny_models import TINY_MODELS, randomize, tiny_config
from tests.models.tiny_programs import tiny_program
from tests.runtime.test_recorded_step import Recorder

STEPS = 5


def calibrated(model: object, *passes: Pass) -> Program:
    """With passes that learn from tokens, here of any kind."""
    program = open_source(model).program
    prepare(program)
    tokens = usual_inputs(torch.randint(3, 97, (4, 32), generator=torch.Generator().manual_seed(0)))
    wanted = input_placeholders(program.entries["forward"])
    program.calibration = lambda: [{name: tokens[name] for name in wanted}]
    apply(program, passes)
    return program


def compare(program: Program, prompts: list[list[int]], tolerance: float | None = None, steps: int = STEPS) -> None:
    """Prompts, then greedy tokens, through both."""
    compare_executors(TritonExecutor(program), TorchExecutor(program, kernels="reference"), prompts, tolerance, steps)


def compare_executors(
    ours: TritonExecutor, theirs: Executor, prompts: list[list[int]], tolerance: float | None = None, steps: int = STEPS
) -> None:
    actual, expected = (Session(each, len(prompts), 64, prefill_chunk=8) for each in (ours, theirs))
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


def wide_model(family: str) -> nn.Module:
    """One layer of four groups of neurons."""
    config = tiny_config(family)
    config.num_hidden_layers, config.ffn_dim, config.intermediate_size = 1, 128, 128
    return randomize(getattr(transformers, TINY_MODELS[family].model)(config)).eval()


SPARSE = "predict-mlp-sparsity{keep=0.5,force=true,group=32}"


def test_sparse_layers():
    model = wide_model("opt")
    made_for = functools.partial(jettison.optimize, model, SPARSE, calibration_size=(8, 32))
    theirs, made = (made_for(target=target) for target in ("torch", "triton"))
    steps = made.executor.emitted.steps
    (sparse,) = (step for step in steps["decode"] if isinstance(step, SparseMlpStep))
    assert sparse.second.epilogue.has_residual
    assert sparse.second.has_stand_ins
    topk = next(step for step in steps["decode"] if is_call(step.nodes[0], torch.ops.aten.topk.default))
    assert topk.reason.startswith("PyTorch picks groups")
    reasons = {str(step.reason) for step in steps["prefill"] if is_call(step.nodes[0], ops.sparse_mlp)}
    assert reasons == {"PyTorch's own kernels multiply prompts"}
    prompts = [[5, 10, 20, 7], [9, 3]]
    assert made.generate(prompts, max_new_tokens=4) == theirs.generate(prompts, max_new_tokens=4)
    compare_executors(made.executor, theirs.executor, prompts, steps=2)


def test_quantised_sparse_layers():
    model = wide_model("llama")
    quantized = QuantizeWeights(bits=4, group=32)
    program = calibrated(model, quantized, *parse_passes(SPARSE), CacheKV(Full()))
    compare(program, [[5, 10, 20, 7], [9, 3]], steps=2)
    dense = calibrated(model, quantized, CacheKV(Full()))
    added = program.weight_bytes() - dense.weight_bytes()  # a predictor and stand-ins: weights are held once
    assert TritonExecutor(program).weight_bytes - TritonExecutor(dense).weight_bytes <= added


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
