"""Fused factored layers on the Triton target, on any machine in Triton's interpreter: numbers, launches and memory."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from jettison.codegen.triton.emit import emit, fallbacks
from jettison.codegen.triton.kernels import low_rank_mlp
from jettison.codegen.triton.kernels.gemm import DECODE_ROWS
from jettison.codegen.triton.launch import Launchers
from jettison.codegen.triton.low_rank_step import low_rank_attention_step
from jettison.codegen.triton.steps import LinearStep, LowRankAttentionStep, LowRankMlpStep, TorchStep
from jettison.ir import ops
from jettison.ir.compare import assert_close, example_input_ids
from jettison.ir.interpret import run_entry
from jettison.ir.match import is_call
from jettison.ir.program import Program
from jettison.passes.cache_kv import CacheKV
from jettison.passes.fuse_low_rank import FuseLowRank
from jettison.passes.pipeline import apply, prepare
from jettison.runtime.low_rank_steps import RunLowRankAttention
from jettison.runtime.session import Session
from jettison.runtime.torch_executor import TorchExecutor
from jettison.runtime.triton_executor import TritonExecutor
from tests.codegen.test_triton_kernels import DEVICE
from tests.helpers import export_tiny, run_pass
from tests.models.tiny_low_rank import ATTENTIONS, MLPS, NEURONS, Attention, Decoder, Mlp, encoder
from tests.runtime.allocations import Allocations

# One token, several of them, and more than count as few.
SIZES = ((1, 1), (1, 13), (3, 7))


def check(layer, kind):
    """A fused layer against the program as it was; the step that it became."""
    before = encoder(layer)
    after, record = run_pass(FuseLowRank(), before)
    assert record.rewrites == 1
    executor = TritonExecutor(after)
    (step,) = (each for each in executor.emitted.steps["forward"] if isinstance(each, kind))
    for batch, length in SIZES:
        inputs = {"input_ids": example_input_ids(before, batch, length)}
        (out,) = executor.run("forward", inputs, {}).values()
        (expected,) = run_entry(before, "forward", inputs)
        assert_close(out, expected, what=f"batch {batch}, length {length}")
    return step


@pytest.fixture
def few(monkeypatch):
    """More than 16 tokens are many."""
    monkeypatch.setattr(low_rank_mlp, "FEW_TOKENS", DECODE_ROWS)


@pytest.mark.parametrize("many", ["chain", "kernel"])
@pytest.mark.parametrize("name", MLPS)
def test_feed_forward_layers(name, many, request):
    if many == "kernel":
        request.getfixturevalue("few")
    step = check(Mlp(**MLPS[name]), LowRankMlpStep)
    given = MLPS[name]
    # One launch makes the neurons, unless gate and up come from different dimensions.
    is_apart = bool(given.get("gated")) and not given.get("shared") and given.get("up", 5) is not None
    assert len(step.neurons) == 1 + is_apart
    assert (step.last is None) == (given.get("down", 3) is None)
    end = step.last or step.sums
    assert end.epilogue.has_residual == (not given.get("is_flat"))


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attentions(name):
    check(Attention(**ATTENTIONS[name]), LowRankAttentionStep)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(dtype):
    layers = [Attention(**ATTENTIONS["causal_gqa_rotated"]), Mlp("silu", gated=True)]
    wide, program = encoder(*layers), encoder(*layers, dtype=dtype)
    apply(program, [FuseLowRank()])
    executor, inputs = TritonExecutor(program), {"input_ids": example_input_ids(wide, 2, 11)}
    (out,) = executor.run("forward", inputs, {}).values()
    (expected,) = run_entry(wide, "forward", inputs)
    assert (out.float() - expected).abs().max() < 0.03 * expected.abs().max()
    assert not torch.equal(out.float(), expected)


# Decode.


def decoder(*passes: object) -> Program:
    program = export_tiny(Decoder(), kind="decoder")
    prepare(program)
    apply(program, [*passes, CacheKV()])
    return program


def compare(program: Program, prompts: list[list[int]]) -> None:
    """A prompt of more than a few tokens, and greedy steps."""
    ours, theirs = (
        Session(executor, len(prompts), 64)
        for executor in (TritonExecutor(program), TorchExecutor(program, kernels="reference"))
    )
    found, expected = ours.prefill(prompts), theirs.prefill(prompts)
    for _ in range(3):
        assert_close(found, expected)
        tokens = expected.argmax(-1).tolist()
        found, expected = ours.decode(tokens), theirs.decode(tokens)
    assert_close(found, expected)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("prompts", [[list(range(3, 23))], [list(range(3, 23)), [7, 8]]], ids=["one row", "two rows"])
@pytest.mark.parametrize("passes", [[], [FuseLowRank()]], ids=["factors", "fused"])
def test_decoders(passes, prompts):
    compare(decoder(*passes), prompts)


def linears(program: Program) -> list[LinearStep]:
    steps = emit(program).steps["decode"]
    assert not any(
        is_call(step.nodes[0], torch.ops.aten.linear.default) for step in steps if isinstance(step, TorchStep)
    )
    return [step for step in steps if isinstance(step, LinearStep)]


def test_factored_linears_are_chains_of_products():
    """Without `fuse-low-rank`: both factors of every linear are kernels, and first factors of one x are one launch."""
    steps = linears(decoder())
    attention, gated, plain = [3, 1, 1, 1, 1], [2, 1, 1, 1, 1], [1, 1, 1, 1]
    assert [len(step.weights) for step in steps] == [*attention, *gated, *attention, *plain, 1]
    # Behind gate and up, which come from different dimensions, PyTorch activates and multiplies.
    activated = [step for step in emit(decoder()).steps["decode"] if is_call(step.nodes[0], ops.gated_activation)]
    assert [type(step) for step in activated] == [TorchStep]


def test_what_is_fused_decodes_in_products():
    program = decoder(FuseLowRank())
    gated, plain = (step for step in emit(program).steps["decode"] if isinstance(step, LowRankMlpStep))
    assert [product.epilogue.name for product in gated.neurons] == ["bias", "bias_silu_factor"]
    assert [product.epilogue.name for product in plain.neurons] == ["bias_gelu"]
    assert [step.last.epilogue.name for step in (gated, plain)] == ["bias_residual", "bias_residual"]
    assert not [each for each in fallbacks(emit(program), "decode") if "low_rank" in str(each["operator"])]


# Memory.


def fused(layer: nn.Module) -> TritonExecutor:
    program = encoder(layer)
    apply(program, [FuseLowRank()])
    return TritonExecutor(program)


@pytest.mark.parametrize("name", ["gelu", "silu_gated", "gelu_tanh_gated", "dense_down"])
def test_nothing_as_large_as_the_neurons_of_all_tokens_is_made(name):
    layer = Mlp(**MLPS[name])
    executor, unfused = fused(layer), TritonExecutor(encoder(layer))
    batch, length = 9, 64
    assert batch * length > low_rank_mlp.FEW_TOKENS
    inputs = {"input_ids": torch.arange(batch * length).reshape(batch, length) % 61}
    with Allocations() as seen:
        executor.run("forward", inputs, {})
    with Allocations() as plain:
        unfused.run("forward", inputs, {})
    neurons = batch * length * NEURONS * 4
    assert seen.largest < neurons / 2 < plain.largest


def test_the_kernel_runs_from_so_many_tokens_on():
    """Of fewer, the neurons are written, which are few."""
    executor = fused(Mlp())
    largest = []
    for tokens in (low_rank_mlp.FEW_TOKENS, low_rank_mlp.FEW_TOKENS + 64):
        with Allocations() as seen:
            executor.run("forward", {"input_ids": torch.arange(tokens).reshape(-1, 64) % 61}, {})
        largest.append(seen.largest)
    assert largest[0] == low_rank_mlp.FEW_TOKENS * NEURONS * 4 > largest[1]


def test_heads_of_all_tokens_are_not_made():
    """Values of one channel, so that the result is small."""
    batch, steps, heads, dim = 2, 40, 4, 32
    given: dict[str, Tensor] = {"x": torch.randn(batch, steps, 3), "wide": torch.randn(heads * dim, 3)}
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = given["x"]
    wide, narrow = (graph.placeholder(name) for name in ("wide", "narrow"))
    for node, value in ((wide, given["wide"]), (narrow, torch.randn(heads, 3))):
        node.meta.update(val=value, constant=node.name)
    operands = (x, x, x, wide, None, wide, None, narrow, *[None] * 7, heads, heads, False, 0.2, True, 0, 0.0)
    node = graph.call_function(ops.low_rank_attention, operands)
    node.meta["val"] = torch.empty(batch, steps, heads, 1)
    step = low_rank_attention_step(node)
    run = RunLowRankAttention(step, Constants({"wide": given["wide"], "narrow": narrow.meta["val"]}), Launchers())
    with Allocations() as seen:
        (out,) = run(*[given["x"].to(DEVICE)] * 3)
    assert seen.largest < batch * steps * heads * dim * 4 / 4
    values = [
        None if each is None else each.meta["val"] if isinstance(each, torch.fx.Node) else each for each in operands
    ]
    assert_close(out.cpu(), ops.low_rank_attention(*values))


class Constants:
    """Weights on the device."""

    def __init__(self, held: dict[str, Tensor]) -> None:
        self.held = {name: value.to(DEVICE) for name, value in held.items()}

    def constant(self, name: str) -> Tensor:
        return self.held[name]


@pytest.mark.parametrize("name", ["silu_gated", "gelu_tanh_gated", "dense_up"])
def test_weights_are_held_once(name):
    program = encoder(Mlp(**MLPS[name]))
    apply(program, [FuseLowRank()])
    assert TritonExecutor(program).weight_bytes == program.weight_bytes()
