"""A KV-cache policy that is not part of the package: what `CONTRIBUTING.md` shows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from jettison.passes.cache_kv import CacheKV
from jettison.passes.pipeline import apply
from jettison.passes.policies import Full
from jettison.passes.policies.evicting import Cached, EvictingPolicy
from jettison.passes.policies.storing import StoringPolicy
from jettison.runtime.session import Session
from jettison.runtime.torch_executor import TorchExecutor
from tests.codegen.running import emit
from tests.runtime.masked_oracle import RecordingSession, masked_logits
from tests.runtime.test_eviction import captured, rows

MODEL = "tiny-llama/2"


@dataclass(frozen=True)
class SmallKeys(EvictingPolicy):
    """Keep tokens with small keys, and the last one."""

    name: ClassVar[str] = "small-keys"

    def importance(self, cached: Cached) -> torch.Tensor:
        return (-cached.states["key"].norm(dim=-1)).masked_fill(cached.age == 1, torch.inf)


@dataclass(frozen=True)
class Quarters(StoringPolicy):
    """8 bits, and a range for each quarter of a head."""

    name: ClassVar[str] = "quarters"
    bits: ClassVar[int] = 8

    def groups(self, site):
        return {"key": (1, 4), "value": (1, 4)}


def opened(policy, target, folder):
    program = captured(MODEL).copy()
    apply(program, [CacheKV(policy)])
    return TorchExecutor(program) if target == "torch" else emit(program, folder).executor


@pytest.mark.parametrize("target", ["torch", "onnx"])
def test_it_drops_what_it_says(target, tmp_path):
    row = rows(MODEL)[0]
    session = RecordingSession(opened(SmallKeys(budget=30), target, tmp_path), 1, 192)
    logits = [session.prefill([row[:120]])]
    held = session.states["past_key_values.0.key"][0, :, :30].norm(dim=-1)
    logits += [session.decode([token]) for token in row[120:]]
    expected = masked_logits(captured(MODEL), row, session.seen[0])[119:]
    assert (torch.cat(logits) - expected).abs().max() <= 1e-5 * expected.abs().max()
    everything = Session(opened(Full(), "torch", tmp_path), 1, 192)
    everything.prefill([row[:120]])
    norms = everything.states["past_key_values.0.key"][0, :, :120].norm(dim=-1)
    for mine, all_of_head in zip(held, norms, strict=True):
        wanted = torch.cat([all_of_head[:-1].sort().values[:29], all_of_head[-1:]])
        assert torch.allclose(mine.sort().values, wanted.sort().values, rtol=1e-4)


def test_it_compresses_as_it_says(tmp_path):
    row = rows(MODEL)[0]
    mine, full = (Session(opened(each, "torch", tmp_path), 1, 192) for each in (Quarters(residual=16), Full()))
    for each in (mine, full):
        each.prefill([row[:120]])
    assert mine.kept[0].stored.filled == [120]
    errors = [(mine.decode([token]) - full.decode([token])).abs().max() for token in row[120:]]
    assert 0 < max(errors) < 0.05
    assert mine.state_bytes == 2 * 4 * (16 * 8 * 32 + 192 * 2 * (32 + 4 * 4))
