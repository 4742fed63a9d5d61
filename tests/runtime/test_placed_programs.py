"""What `place-weights` puts on disk the torch target streams, whatever passes came before: the same numbers."""

from __future__ import annotations

import pytest
import torch

from jettison.api import parse_passes
from jettison.passes.cache_kv import CacheKV
from jettison.passes.pipeline import apply
from jettison.passes.place_weights import PlaceWeights
from jettison.runtime.session import Session
from jettison.runtime.torch_executor import TorchExecutor
from tests.models.tiny_programs import tiny_program

# As little memory as can be: everything that may be streamed is.
HOST = PlaceWeights(host=1, reserve=1, context=64, prompt=8)


def least_memory(program):
    """The bytes that a refusal says are needed."""
    from jettison.ir.errors import OptionError

    with pytest.raises(OptionError, match="Give host=") as refused:
        apply(program.copy(), [HOST])
    return int(str(refused.value).partition("Give host=")[2].split()[0])


def logits(executor):
    session = Session(executor, 1, 64)
    found = [session.prefill([[5, 10, 20, 7]])]
    for _ in range(3):
        found.append(session.decode(found[-1].argmax(-1).tolist()).clone())
    return torch.stack(found)


@pytest.mark.parametrize(
    ("family", "passes"),
    [
        ("llama", ""),
        ("gpt2", ""),
        ("opt", "quantize-weights{bits=8,group=32}"),
        ("qwen2", "merge-qkv-projections,quantize-weights{bits=4,group=32}"),
        ("llama", "quantize-weights{bits=2,group=32}"),
        ("llama", "quantize-weights{bits=3,group=32}"),
        ("llama", "quantize-weights{format=nf4}"),
        ("llama", "prune-weights{method=magnitude},quantize-weights{format=bitmap{of=int8,group=64}}"),
        ("llama", "factorize-linear{method=svd,rank=4},fuse-low-rank"),
        ("llama", "quantize-weights{bits=4,group=32},cache-kv{policy=window{size=16}}"),
        ("llama", "quantize-weights{bits=4,group=32},cache-kv{policy=kivi{group=8}}"),
    ],
)
def test_what_is_placed_can_be_streamed(family, passes):
    chosen = parse_passes(passes) if passes else []
    if "cache-kv" not in passes:
        chosen.append(CacheKV())
    program = tiny_program(family, *chosen)
    expected = logits(TorchExecutor(program))
    apply(program, [PlaceWeights(host=least_memory(program), reserve=1, context=64, prompt=8)])
    executor = TorchExecutor(program)
    found = logits(executor)
    if family == "gpt2":  # in memory its weights are views of the transposed ones, which another loop multiplies
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    else:
        assert torch.equal(found, expected)
    # Where no kernel holds the weights, they are in memory.
    assert (executor.stream is None) == (not program.placement.tiers)
    assert bool(program.placement.tiers) == ("nf4" not in passes and "bits=3" not in passes)
