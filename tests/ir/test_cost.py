"""Totals of small programs against closed forms, by hand."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from jettison.bench import weight_bytes_per_step
from jettison.ir.cost import KINDS, NodeCost, Workload, call_cost, call_costs, phases, state_bytes
from jettison.ir.serialize import save_program
from jettison.passes.cache_kv import CacheKV
from jettison.passes.merge_qkv_projections import MergeQkvProjections
from jettison.passes.policies import H2O, Full, Kivi, Window
from jettison.passes.quantize_weights import QuantizeWeights
from tests.models.tiny_mixture import EXPERTS, LAYERS, WIDTH, mixture_program
from tests.models.tiny_models import VOCAB_SIZE
from tests.models.tiny_programs import tiny_program

# Of the small Llama: E, F, H, Hkv, D and layers.
E, F, H, HKV, D, L = 32, 48, 4, 2, 8, 2
LINEARS = L * (2 * H * D * E + 2 * HKV * D * E + 3 * F * E) + VOCAB_SIZE * E


def llama(*passes, policy=None, name="llama"):
    return tiny_program(name, *passes, CacheKV(policy or Full()))


def decode(program, batch=1, context=64):
    return call_costs(program, "decode", Workload(batch, context, 16))[0]


def of_kind(call, kind):
    return [node for node in call.nodes if node.kind == kind]


def test_bytes_of_a_decode_step_are_those_counted_by_hand():
    call = decode(llama())
    norms, frequencies = (2 * L + 1) * E, D // 2
    assert call.weight_bytes == 4 * (LINEARS + norms + frequencies + E)  # one row of the embedding
    # Groups of heads share keys and values: H would be twice as many.
    assert call.state_read == 4 * 2 * L * HKV * D * 64
    assert call.state_written == 4 * 2 * L * HKV * D
    assert call.tokens == 1


def test_operations_of_a_decode_step_are_those_counted_by_hand():
    call = decode(llama())
    products = [node for kind in ("linear", "head") for node in of_kind(call, kind)]
    assert sum(node.operations for node in products) == 2 * LINEARS
    assert sum(node.operations for node in of_kind(call, "attention")) == L * 4 * H * 64 * D
    assert [node.name for node in of_kind(call, "head")] == ["lm_head.weight"]
    assert {node.kind for node in call.nodes} <= set(KINDS)


def test_operations_grow_with_rows_and_bytes_of_weights_do_not():
    one, three = decode(llama()), decode(llama(), batch=3)
    rows = 4 * 2 * E  # of the embedding
    assert three.weight_bytes == one.weight_bytes + rows
    assert three.state_read == 3 * one.state_read
    assert [node.operations for node in of_kind(three, "linear")] == [
        3 * node.operations for node in of_kind(one, "linear")
    ]
    assert {node.rows for node in of_kind(three, "linear")} == {3}


def test_a_prompt_runs_some_tokens_at_a_time_and_computes_logits_once_per_call():
    program = tiny_program("llama", CacheKV(Full()))
    calls = call_costs(program, "prefill", Workload(1, 1200, 1100))
    assert [call.tokens for call in calls] == [512, 512, 76]
    for call, total in zip(calls, (512, 1024, 1100), strict=True):
        attention = of_kind(call, "attention")
        assert sum(node.operations for node in attention) == L * 4 * H * call.tokens * total * D
        assert call.state_read == 4 * 2 * L * HKV * D * total
        assert of_kind(call, "head")[0].operations == 2 * VOCAB_SIZE * E
    assert calls[0].peak_activation_bytes > calls[2].peak_activation_bytes > 76 * 4 * (E + 2 * F)


def test_packed_weights_are_as_many_bytes_as_in_the_file(tmp_path):
    program = llama(QuantizeWeights(bits=4, group=32))
    save_program(program, tmp_path / "p.json", tmp_path / "w.safetensors")
    stored = load_file(tmp_path / "w.safetensors")
    linears = {
        name: tensor.numel() * tensor.element_size()
        for name, tensor in stored.items()
        if any(part in name for part in ("proj", "lm_head"))
    }
    call = decode(program)
    read = call.bytes_by_constant()
    assert linears
    assert {name: read[name] for name in linears} == linears
    forms = {node.form for node in of_kind(call, "linear")}
    assert forms == {"int4"}
    weights = sum(node.elements for node in [*of_kind(call, "linear"), *of_kind(call, "head")])
    assert weights == LINEARS + L * E * 16  # down has 48 columns, in groups of 32


@pytest.mark.parametrize("passes", [(), (QuantizeWeights(bits=8, group=32),), (MergeQkvProjections(),)])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2", "opt"])
def test_bytes_are_those_that_bench_reads_from_the_text(name, passes):
    program = llama(*passes, name=name)
    for batch in (1, 3):
        assert decode(program, batch).weight_bytes == weight_bytes_per_step(str(program), batch)


def test_a_tied_table_is_read_once_by_the_head():
    program = tiny_program("gpt2", CacheKV(Full()))
    call = decode(program)
    table = of_kind(call, "head")[0].name
    assert program.constants[table].shape[0] == VOCAB_SIZE
    assert call.bytes_by_constant()[table] == program.constants[table].nbytes
    lookups = [node for node in of_kind(call, "embedding") if table in node.weights]
    assert not lookups


def test_routed_experts_count_as_tokens_are_expected_to_choose_them():
    program = mixture_program(16)
    for tokens in (1, 3):
        call = call_cost(program, "forward", Workload(1, tokens, tokens), tokens, tokens)
        share = 1 - (1 - 2 / EXPERTS) ** tokens
        stacks = EXPERTS * (2 * 16 * WIDTH + WIDTH * 16) * 4
        read = [node for node in call.nodes if node.kind == "experts"]
        assert [node.weight_bytes for node in read] == [round(share * stacks)] * LAYERS
        assert {node.operations for node in read} == {2 * tokens * 2 * 3 * 16 * WIDTH}


def test_a_window_and_dropped_tokens_bound_what_is_read():
    whole = decode(llama(), context=128).state_read
    window = decode(llama(policy=Window(size=16)), context=128).state_read
    dropped = decode(llama(policy=H2O(budget=32)), context=128)
    assert window == 4 * 2 * L * HKV * D * (16 + 64)  # and slots to spare
    # Budget and what came behind the prompt.
    assert dropped.state_read <= whole * (32 + 112) / 128 * 1.2
    stored = decode(llama(policy=Kivi(bits=4, group=8, residual=16)), context=128).state_read
    assert stored < 0.7 * whole


def test_bytes_of_states_are_those_of_the_program():
    program, work = llama(), Workload(2, 100, 16)
    assert work.capacity == 128
    assert state_bytes(program, work) == program.state_bytes(2, 128)
    # A prompt is attended to exactly before tokens are dropped.
    dropping = llama(policy=H2O(budget=16))
    assert state_bytes(dropping, Workload(1, 128, 120)) > dropping.state_bytes(1, 128)


def test_phases_are_those_of_the_entries():
    assert phases(llama()) == ("prefill", "decode")
    assert phases(mixture_program(16)) == ("forward",)


def test_activations_at_the_peak_are_between_one_value_and_all_of_them():
    call = call_costs(llama(), "prefill", Workload(1, 64, 64))[0]
    widest = 4 * 64 * F
    everything = sum(node.activation_bytes for node in call.nodes)
    assert widest < call.peak_activation_bytes < everything


def test_an_empty_node_costs_nothing():
    node = NodeCost("x", "other")
    assert (node.weight_bytes, node.operations, node.state_read) == (0, 0, 0)
