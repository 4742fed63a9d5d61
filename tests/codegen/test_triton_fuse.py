"""What goes together, and what is said about the rest."""

from __future__ import annotations

import torch

from jettison.codegen.triton.emit import emit, fallbacks, plan_text
from jettison.codegen.triton.steps import AttentionStep, CacheStep, LinearStep, NormStep, Step, TorchStep
from jettison.ir import ops
from jettison.ir.match import is_call
from jettison.ir.program import Program
from jettison.passes.base import Pass
from jettison.passes.cache_kv import CacheKV
from jettison.passes.policies import Full
from jettison.passes.quantize_weights import QuantizeWeights
from tests.models.tiny_programs import tiny_program


def steps_of(program: Program, kind: type[Step], entry: str = "decode") -> list[Step]:
    return [step for step in emit(program).steps[entry] if isinstance(step, kind)]


def llama(*passes: Pass) -> Program:
    return tiny_program("llama", *passes, CacheKV(Full()))


def test_linears_of_one_x_are_one_launch():
    linears = steps_of(llama(QuantizeWeights(bits=4, group=32)), LinearStep)
    assert [len(step.weights) for step in linears] == [3, 1, 2, 1] * 2 + [1]
    assert [step.norm is not None for step in linears] == [True, False, True, False] * 2 + [False]
    assert [step.epilogue.is_gated for step in linears] == [False, False, True, False] * 2 + [False]
    assert [step.epilogue.has_residual for step in linears] == [False, True, False, True] * 2 + [False]


def test_linears_in_different_formats_stay_apart():
    program = llama(QuantizeWeights(bits=4, group=32, skip="v_proj"))
    weights = [len(step.weights) for step in steps_of(program, LinearStep)]
    assert weights[:3] == [2, 1, 1]
    assert any("other readers" in step.reason for step in steps_of(program, LinearStep))
    assert len(steps_of(program, NormStep)) == 3, "the norm in front of them is read twice"


def test_attention_and_cache_have_kernels_while_decoding():
    program = llama()
    assert len(steps_of(program, CacheStep)) == len(steps_of(program, AttentionStep)) == 2
    assert len(steps_of(program, CacheStep, "prefill")) == 2
    assert not steps_of(program, AttentionStep, "prefill")
    reasons = {each["reason"] for each in fallbacks(emit(program), "prefill")}
    assert "PyTorch's own kernels attend to prompts" in reasons


def test_qk_norms_stand_between():
    """Queries and keys are normalised head by head; the cache is written by a kernel all the same."""
    caches = steps_of(tiny_program("qwen3", CacheKV(Full()), layers=1), CacheStep)
    assert [step.kernel.rotated for step in caches] == [8]


def test_a_group_without_a_kernel_says_so():
    program = llama(QuantizeWeights(bits=4, group=32))
    decode = program.entries["decode"]
    node = next(node for node in decode.graph.nodes if is_call(node, ops.quantized_linear))
    # As a checkpoint may come that was packed elsewhere.
    node.args = (*node.args[:6], 16, *node.args[7:])
    reasons = {str(each["reason"]) for each in fallbacks(emit(program), "decode")}
    assert any("groups of 16 columns do not fill the tiles" in reason for reason in reasons)


def test_every_node_is_in_one_step():
    for family in ("opt", "mixtral"):
        program = tiny_program(family, CacheKV(Full()), layers=1)
        for name, steps in emit(program).steps.items():
            nodes = [node for step in steps for node in step.nodes]
            called = [node for node in program.entries[name].graph.nodes if node.op == "call_function"]
            assert len(nodes) == len(set(nodes))
            assert set(nodes) == set(called)


def test_steps_come_behind_what_they_take():
    program = llama()
    for steps in emit(program).steps.values():
        made: set[torch.fx.Node] = set()
        for step in steps:
            assert all(value.op == "placeholder" or value in made for value in step.inputs)
            made.update(step.outputs)


def test_plan_names_every_step():
    program = llama(QuantizeWeights(bits=4, group=32))
    emitted = emit(program)
    lines = plan_text(program, emitted).splitlines()
    assert len(lines) == sum(len(steps) for steps in emitted.steps.values()) + 2
    assert any("gemv_int4_g32" in line for line in lines)
    assert sum("torch" in line for line in lines[1:]) >= sum(
        isinstance(step, TorchStep) for step in emitted.steps["decode"]
    )
