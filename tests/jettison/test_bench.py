"""Rates, memory and bytes read."""

from __future__ import annotations

import dataclasses
import gc
import mmap
import os
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from jettison.api import optimize, parse_passes
from jettison.bench import (
    PeakMemory,
    bench,
    bytes_read_per_token,
    physical_cores,
    status_bytes,
    threads_of,
    weight_bytes_per_step,
)
from jettison.ir.allocator import give_back
from jettison.ir.capture import capture
from jettison.ir.errors import OptionError
from jettison.ir.huggingface import source_from_model
from jettison.optimized_model import OptimizedModel
from jettison.passes.pipeline import apply, prepare
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime.session import Session
from jettison.runtime.torch_executor import TorchExecutor
from tests.models.tiny_mixture import mixture_program

KEYS = [
    "prefill_tokens_per_s", "decode_tokens_per_s", "peak_rss_bytes", "peak_anon_bytes", "weight_bytes", "state_bytes",
    "bytes_read_per_token", "threads", "target",
]  # fmt: skip
VOCAB, HIDDEN, CONTEXT, LAYERS = 64, 32, 128, 2
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc (Linux)")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads that wait for a busy core cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def small_llama(**options: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=CONTEXT, **options,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def source(captured_once: None) -> nn.Module:
    return small_llama()


@pytest.fixture(scope="module")
def onnx_model(source: nn.Module) -> OptimizedModel:
    return optimize(source)


@pytest.fixture(scope="module")
def torch_model(source: nn.Module) -> OptimizedModel:
    return optimize(source, target="torch")


def parameter_bytes(module: nn.Module, without: str = "") -> int:
    """f32 bytes of parameters, and of the rotary frequencies, the one constant that is no parameter."""
    named = [tensor for name, tensor in module.named_parameters() if not without or without not in name]
    return 4 * (sum(tensor.numel() for tensor in named) + HIDDEN // 4 // 2)


@pytest.mark.parametrize("target", ["onnx", "torch"])
def test_bench_measures_what_it_says(target, onnx_model, torch_model):
    model = {"onnx": onnx_model, "torch": torch_model}[target]
    started = time.perf_counter()
    result = bench(model, prompt_tokens=40, new_tokens=20, batch=3, rounds=2)
    seconds = time.perf_counter() - started
    assert list(result) == KEYS
    # Two of the three rounds are counted, and at least half of the counted rounds were as fast as the median.
    assert 3 * 40 / seconds < result["prefill_tokens_per_s"] < 1e8
    assert 3 * 20 / seconds < result["decode_tokens_per_s"] < 1e8
    assert result["weight_bytes"] == model.executor.weight_bytes
    assert result["state_bytes"] == LAYERS * 2 * 3 * 2 * 64 * 8 * 4  # key and value, rows, heads, slots, channels, f32
    assert 1 <= result["threads"] <= (os.cpu_count() or 1)
    assert result["target"] == target


@needs_proc
def test_peaks_are_at_least_what_is_resident(onnx_model):
    loaded = onnx_model.executor
    anon_bytes, resident_bytes = status_bytes("RssAnon"), status_bytes("VmRSS")
    result = bench(onnx_model, prompt_tokens=8, new_tokens=4, rounds=1)
    assert loaded is onnx_model.executor
    assert result["peak_anon_bytes"] >= anon_bytes > 1 << 20
    assert result["peak_rss_bytes"] >= resident_bytes
    assert result["peak_rss_bytes"] >= result["peak_anon_bytes"]


def touched_block(size: int) -> mmap.mmap:
    """Mapped, as the C library may take a tensor from free memory between others, which it does not give back."""
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE)
    for _ in range(size >> 20):
        block.write(bytes(1 << 20))
    return block


@needs_proc
def test_a_peak_is_seen_after_it_is_gone():
    size = 192 << 20
    with PeakMemory() as peak:
        before = status_bytes("RssAnon")
        block = touched_block(size)
        time.sleep(0.2)
        block.close()
        time.sleep(0.05)
        after = status_bytes("RssAnon")
    assert peak.anon_bytes >= before + 0.9 * size
    assert after < before + 0.5 * size, "the block was not given back, so this proves nothing"
    stopped = peak.anon_bytes
    block = touched_block(2 * size)
    time.sleep(0.1)
    assert peak.anon_bytes == stopped
    block.close()


@needs_proc
def test_states_take_the_memory_that_is_reported():
    """What the process grows by, of many rows; that the bytes are those of the policy's formula is tested elsewhere."""
    captured = capture(source_from_model(small_llama()))
    prepare(captured)
    sessions = []  # all stay: memory that one gives back would be taken by the next
    for policy in ("full", "snapkv{budget=64}", "kivi{bits=4,residual=32,group=8}", "xquant{residual=32}"):
        program = captured.copy()
        apply(program, parse_passes(f"cache-kv{{policy={policy}}}"))
        executor = TorchExecutor(program)
        gc.collect()
        give_back()  # or states take pages that the process has already
        before = status_bytes("RssAnon")
        session = Session(executor, 4096, CONTEXT)
        session._make_room([CONTEXT - 8] * 4096, is_prompt=True)
        for state in session.states.values():
            state.fill_(1)  # pages that nobody wrote to are not there yet
        grown = status_bytes("RssAnon") - before
        assert session.state_bytes > 16 << 20
        assert abs(grown - session.state_bytes) < 0.05 * session.state_bytes, policy
        sessions.append(session)


def test_without_proc_nothing_is_made_up(onnx_model, monkeypatch, tmp_path):
    monkeypatch.setattr("jettison.bench._STATUS", tmp_path / "status")
    result = bench(onnx_model, prompt_tokens=4, new_tokens=2, rounds=1)
    assert result["peak_rss_bytes"] is None
    assert result["peak_anon_bytes"] is None


def test_status_is_read_in_bytes(monkeypatch, tmp_path):
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmHWM:\t     123 kB\nRssAnon:\t      45 kB\nThreads:\t7\n")
    monkeypatch.setattr("jettison.bench._STATUS", status)
    assert status_bytes("VmHWM") == 123 * 1024
    assert status_bytes("RssAnon") == 45 * 1024
    assert status_bytes("Threads") is None


def test_a_token_reads_every_weight_but_only_its_row_of_the_table(onnx_model, torch_model):
    module = small_llama()
    row_bytes = HIDDEN * 4
    expected = parameter_bytes(module, without="embed_tokens") + row_bytes
    for model in (onnx_model, torch_model):
        assert weight_bytes_per_step(model.graph, 1) == expected
        assert weight_bytes_per_step(model.graph, 5) == expected + 4 * row_bytes


def test_a_tied_table_is_the_head_and_read_once():
    model = optimize(small_llama(tie_word_embeddings=True), target="torch")
    module = small_llama(tie_word_embeddings=True)
    assert weight_bytes_per_step(model.graph, 7) == parameter_bytes(module)


def test_packed_weights_are_read_packed(source):
    model = optimize(source, "quantize-weights{bits=4,group=32}", target="torch")
    weights = [tensor for name, tensor in small_llama().named_parameters() if tensor.dim() == 2 and "embed" not in name]
    # A group of 32: 16 bytes of codes, a scale of 4; half a byte of zero point, and whole bytes per row.
    packed = sum(t.shape[0] * (t.shape[1] // 32 * 20 + -(-t.shape[1] // 32 // 2)) for t in weights)
    norms = 4 * ((2 * LAYERS + 1) * HIDDEN + HIDDEN // 4 // 2)
    row_bytes = 16 + 4 + 1
    assert weight_bytes_per_step(model.graph, 1) == packed + norms + row_bytes
    assert weight_bytes_per_step(model.graph, 3) == packed + norms + 3 * row_bytes


def test_bytes_read_share_the_weights_among_rows_and_add_the_states_of_one(onnx_model, torch_model):
    prompt, new, slots = 40, 9, 64
    slot_bytes = LAYERS * 2 * 2 * 8 * 4
    for batch in (1, 4):
        weights = weight_bytes_per_step(onnx_model.graph, batch) / batch
        # Steps see 41 to 49 tokens: 45 on average.
        session = onnx_model.session(batch, prompt + new)
        assert bytes_read_per_token(onnx_model, session, prompt, new) == round(weights + 45 * slot_bytes)
        session = torch_model.session(batch, prompt + new)
        assert bytes_read_per_token(torch_model, session, prompt, new) == round(weights + slots * slot_bytes)


def test_threads_are_those_of_the_executor(onnx_model, torch_model, monkeypatch):
    assert threads_of(torch_model.executor, "torch") == torch.get_num_threads() == 1
    monkeypatch.setattr(onnx_model.executor, "threads", 3, raising=False)
    assert threads_of(onnx_model.executor, "onnx") == 3


def test_hyper_threads_are_counted_once(monkeypatch, tmp_path):
    for cpu, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        folder = tmp_path / f"cpu{cpu}" / "topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(f"{siblings}\n")
    monkeypatch.setattr("jettison.bench._CPUS", tmp_path)
    assert physical_cores() == 2
    monkeypatch.setattr("jettison.bench._CPUS", tmp_path / "none")
    assert physical_cores() == torch.get_num_threads()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"prompt_tokens": 0}, "prompt_tokens=0"),
        ({"new_tokens": 0}, "new_tokens=0"),
        ({"batch": 0}, "batch=0"),
        ({"rounds": 0}, "rounds=0"),
        ({"prompt_tokens": CONTEXT, "new_tokens": 1}, f"needs at most {CONTEXT} together"),
    ],
)
def test_bench_refuses_what_it_cannot_measure(torch_model, settings, words):
    with pytest.raises(OptionError, match=words):
        bench(torch_model, **settings)


def test_bench_needs_a_decoder(torch_model, monkeypatch):
    monkeypatch.setattr(torch_model, "info", dataclasses.replace(torch_model.info, kind="encoder"))
    with pytest.raises(OptionError, match="is an encoder"):
        bench(torch_model)


@pytest.mark.parametrize("bits", [None, 4])
def test_of_experts_a_step_reads_those_that_are_chosen(bits):
    """Two of four for one row; with many rows all of them, once."""
    program = mixture_program(48)
    if bits is not None:
        QuantizeWeights(bits, skip="embed").run(program)
    text = str(program).replace("entry forward(", "entry decode(")
    constants = program.used_constants()
    stacks = sum(constant.nbytes for name, constant in constants.items() if "gate_up" in name or "down" in name)
    routers = sum(constant.nbytes for name, constant in constants.items() if "router" in name)
    row = 4 * constants["embed.weight"].shape[1]
    assert weight_bytes_per_step(text, 1) == stacks // 2 + routers + row
    assert weight_bytes_per_step(text, 50) == stacks + routers + 50 * row
