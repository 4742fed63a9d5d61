"""Fused factored layers on the Triton target, on any machine in Triton's interpreter: numbers, launches and memory."""

from __future__ import annotations

import pytest
import torch

from jettison.codegen.triton.emit import emit
from jettison.codegen.triton.steps import LinearStep, LowRankAttentionStep, LowRankMlpStep, TorchStep
from jettison.ir.compare import assert_close, example_input_ids
from jettison.ir.interpret import run_entry
from jettison.passes.cache_kv import CacheKV
from jettison.passes.fuse_low_rank import FuseLowRank
from jettison.passes.pipeline import apply
from jettison.runtime.session import Session
from jettison.runtime.torch_executor import TorchExecutor
from jettison.runtime.triton_executor import TritonExecutor
from tests.helpers import run_pass
from tests.models.tiny_low_rank import ATTENTIONS, MLPS, Attention, Mlp, encoder

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


@pytest.mark.parametrize("name", MLPS)
def test_feed_forward_layers(name):
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
