"""Routed experts in ONNX: the kernels where they fit, linears elsewhere, and greedy tokens of a whole model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jettison
from jettison.codegen.onnx.emit import MINIMUM_ORT
from jettison.codegen.onnx.routed_experts import InterleavedConstant, spell_out_experts
from jettison.ir.compare import assert_close, example_input_ids, run_program
from jettison.ir.constants import Constant
from jettison.ir.program import Program
from jettison.passes.quantize_weights import QuantizeWeights
from tests.codegen.running import Emitted, attributes, emit
from tests.models.tiny_mixture import EXPERTS, LAYERS, WIDTH, mixture_program
from tests.models.tiny_models import random_ids, randomize

MOE, QMOE, LINEAR = "com.microsoft::MoE", "com.microsoft::QMoE", "com.microsoft::MatMulNBits"
SHAPES = ((1, 1), (2, 7), (1, 33))
# Activations in 8-bit integers, through both layers.
INT8_TOLERANCE = 5e-2


def packed(program: Program, *options: Any, **more: Any) -> Program:
    QuantizeWeights(*options, skip="embed", **more).run(program)
    return program


def check(emitted: Emitted, tolerance: float | None = 1e-5) -> None:
    for rows, length in SHAPES:
        ids = example_input_ids(emitted.program, rows, length)
        expected = run_program(emitted.program, ids)[0]
        actual = emitted.executor.run("forward", {"input_ids": ids}, {})
        assert_close(
            next(iter(actual.values())), expected, tolerance=tolerance, reason="order of sums, or 8-bit activations"
        )


def test_experts_run_in_the_kernel_and_leave_their_input_alone(tmp_path: Path):
    """The weights of the second layer sum up to more than one: a softmax inside the kernel could not return them."""
    emitted = emit(mixture_program(48), tmp_path)
    assert emitted.operators()[MOE] == LAYERS
    assert emitted.graphs[0].minimum_ort == MINIMUM_ORT["experts"]
    check(emitted)


@pytest.mark.parametrize(("bits", "group", "symmetric"), [(4, 32, False), (4, 64, True), (8, 32, False)])
def test_packed_experts_run_in_the_kernel(bits: int, group: int, symmetric: bool, tmp_path: Path):
    emitted = emit(packed(mixture_program(128), bits, group, symmetric), tmp_path)
    assert emitted.operators()[QMOE] == LAYERS
    for node in emitted.nodes("QMoE"):
        assert attributes(node).items() >= {"k": 2, "expert_weight_bits": bits, "block_size": group}.items()
    # The kernel for 8 bits quantises activations at every accuracy level.
    check(emitted, 1e-5 if bits == 4 else INT8_TOLERANCE)
    assert emitted.folder.joinpath("model.onnx.data").stat().st_size < 1.2 * emitted.program.weight_bytes() + 2**16


@pytest.mark.parametrize("accuracy_level", [0, 4])
def test_accuracy_level_reaches_the_kernel(accuracy_level: int, tmp_path: Path):
    emitted = emit(packed(mixture_program(64)), tmp_path, accuracy_level=accuracy_level)
    assert {attributes(node)["accuracy_level"] for node in emitted.nodes("QMoE")} == {accuracy_level}
    check(emitted, 1e-5 if accuracy_level == 0 else INT8_TOLERANCE)


def test_experts_that_no_kernel_takes_become_linears(tmp_path: Path):
    """48 columns are no whole groups of 32; each expert is a view of the stack."""
    program = packed(mixture_program(48))
    emitted = emit(program, tmp_path)
    assert (emitted.operators()[QMOE], emitted.operators()[LINEAR]) == (0, 2 * LAYERS * EXPERTS)
    check(emitted)
    spelled = spell_out_experts(program)
    codes = program.constants["body.down0.codes"].blocks[0]
    assert spelled.constants["body.down0.codes.3"].blocks[0].data_ptr() == codes[3].data_ptr()
    assert "body.down0.codes" in program.used_constants(), "the program itself stays as it is"


def test_another_activation_than_silu_becomes_linears(tmp_path: Path):
    emitted = emit(mixture_program(48, "gelu_tanh"), tmp_path)
    assert emitted.operators()[MOE] == 0
    check(emitted)


def test_spelling_out_changes_nothing_where_kernels_fit():
    program = mixture_program(48)
    assert spell_out_experts(program) is program


def test_interleaved_rows_of_any_part():
    stack = torch.arange(2 * 6 * 3).reshape(2, 6, 3)
    constant = InterleavedConstant("stack", Constant("stack", stack))
    assert constant.value()[0].tolist() == [stack[0, row].tolist() for row in (0, 3, 1, 4, 2, 5)]
    assert constant.rows(1, 2).equal(constant.value()[1:])
    codes = InterleavedConstant("codes", Constant("codes", stack.reshape(2, 6, 3, 1)))
    assert (codes.shape, codes.value().tolist()) == ((2, 6, 3), constant.value().tolist())


def greedy(model: Any, ids: Tensor, tokens: int) -> list[int]:
    """What the eager model chooses, and a check that it is no near tie."""
    logits, chosen = [], ids
    with torch.no_grad():
        for _ in range(tokens):
            logits.append(model(chosen).logits[0, -1])
            chosen = torch.cat([chosen, logits[-1].argmax()[None, None]], 1)
    best = torch.stack(logits).topk(2).values
    assert (best[:, 0] - best[:, 1]).min() > 1e-3
    return chosen[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(("target", "policy"), [("torch", "full"), ("onnx", "snapkv{budget=48,window=8}")])
def test_a_model_generates_what_eager_generates(target: str, policy: str):
    """The budget holds all tokens, so that nothing is lost."""
    import transformers

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    routed = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 16}
    config = transformers.Qwen3MoeConfig(vocab_size=97, max_position_embeddings=128, **sizes, **routed)
    model = randomize(transformers.Qwen3MoeForCausalLM(config)).eval()
    ids = random_ids(1, 20)
    made = jettison.optimize(model, f"cache-kv{{policy={policy}}}", target=target)
    out = torch.as_tensor(made.generate(ids, max_new_tokens=16))
    assert out.flatten()[-16:].tolist() == greedy(model, ids, 16)
