"""Weights of a GPU that lie on the host or on disk: the same numbers as with all of them on the device."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from jettison.ir.errors import OptionError
from jettison.ir.placement import READ_AHEAD_BYTES, Placement
from jettison.ir.program import Program
from jettison.ir.roofline import TYPICAL_CPU
from jettison.passes.cache_kv import CacheKV
from jettison.passes.place_weights import PlaceWeights
from jettison.passes.policies import Full
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime.session import Session
from jettison.runtime.triton_executor import TritonExecutor
from tests.models.tiny_programs import tiny_program
from tests.runtime.test_recorded_step import Recorder

RING = 24 << 10


def placed(program: Program, ring_bytes: int = RING, tier: str = "host", only: str = "") -> Program:
    """The linears on the host, by the names that packed weights have too."""
    program = program.copy()
    names = [name for name in program.used_constants() if "proj" in name and only in name]
    program.placement = Placement(dict.fromkeys(names, tier), {}, ring_bytes)
    return program


def tokens_and_logits(executor: TritonExecutor, prompts: list[list[int]], steps: int = 4) -> list[torch.Tensor]:
    session = Session(executor, len(prompts), 64)
    # Copies: what a recorded step returns is written over by the next one where the device is the CPU.
    found = [session.prefill(prompts).clone()]
    for _ in range(steps):
        found.append(session.decode(found[-1].argmax(-1).tolist()).clone())
    return found


@pytest.mark.parametrize(
    ("bits", "rows", "tier", "is_recorded"),
    [(None, 1, "host", True), (4, 2, "host", False), (4, 1, "host", True), (4, 1, "disk", False)],
)
def test_streamed_weights_compute_the_same(bits: int | None, rows: int, tier: str, is_recorded: bool) -> None:
    program = tiny_program("llama", *([QuantizeWeights(bits=bits, group=32)] if bits else []), CacheKV(Full()))
    prompts = [[5, 10, 20, 7], [9, 3]][:rows]
    recorder = Recorder()
    ring = RING if bits is None else 6 << 10
    # A step that reads from disk is not recorded, even where it could be.
    ours = TritonExecutor(placed(program, ring, tier), record=recorder if is_recorded or tier == "disk" else None)
    resident = TritonExecutor(program)
    found, expected = tokens_and_logits(ours, prompts), tokens_and_logits(resident, prompts)
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert recorder.replayed == (3 if is_recorded else 0)
    assert ours.stream is not None
    assert resident.stream is None
    assert ours.stream.bytes_copied > 3 * ours.stream.step_bytes
    assert ours.stream.nbytes <= ring < ours.stream.step_bytes
    # With what aligns them.
    assert resident.weight_bytes <= ours.weight_bytes <= resident.weight_bytes + 512 * 4 * 14


def test_what_is_on_the_host_is_not_on_the_device() -> None:
    program = tiny_program("llama", CacheKV(Full()))
    ours = TritonExecutor(placed(program, only="mlp"))
    held = sum(program.constants[name].nbytes for name in program.used_constants() if "mlp" in name)
    assert ours._weights.nbytes == TritonExecutor(program)._weights.nbytes - held
    assert ours.stream is not None
    assert ours.stream.step_bytes == held


@pytest.mark.parametrize("bits", [None, 3])
def test_a_plan_fits_its_device(bits: int | None) -> None:
    program = tiny_program("llama", *([QuantizeWeights(bits=bits, group=32)] if bits else []), CacheKV(Full()))
    program.target = "triton"
    resident = TritonExecutor(program)
    expected = tokens_and_logits(resident, [[5, 10, 20]], steps=2)
    with pytest.raises(OptionError, match="bytes are missing") as caught:
        PlaceWeights(device=1, context=64, prompt=16, reserve=1).run(program)
    least = int(str(caught.value).partition("Give device=")[2].split()[0])
    streamed = []
    for device in (least, least + (resident.weight_bytes // 4)):
        placed = program.copy()
        PlaceWeights(device=device, context=64, prompt=16, reserve=1).run(placed)
        ours = TritonExecutor(placed)
        found = tokens_and_logits(ours, [[5, 10, 20]], steps=2)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        assert ours.stream is not None
        assert ours._weights.nbytes + ours.stream.nbytes + program.state_bytes(1, 64) <= device
        streamed.append(ours.stream.step_bytes)
    assert streamed[0] > streamed[1] > 0


def test_sessions_that_take_turns() -> None:
    program = tiny_program("llama", CacheKV(Full()))
    expected = tokens_and_logits(TritonExecutor(program), [[5, 10, 20]])
    ours = TritonExecutor(placed(program), record=Recorder())
    sessions = [Session(ours, 1, 64) for _ in range(2)]
    found = [[session.prefill([[5, 10, 20]]).clone()] for session in sessions]
    for _ in range(4):
        for session, logits in zip(sessions, found, strict=True):
            logits.append(session.decode(logits[-1].argmax(-1).tolist()).clone())
    for logits in found:
        assert all(torch.equal(*pair) for pair in zip(logits, expected, strict=True))


def test_what_does_not_fit_the_host_comes_from_disk() -> None:
    program = tiny_program("llama", QuantizeWeights(bits=4, group=32), CacheKV(Full()))
    program.target = "triton"
    expected = tokens_and_logits(TritonExecutor(program), [[5, 10, 20]])
    with pytest.raises(OptionError, match="bytes are missing") as caught:
        PlaceWeights(device=1, context=64, prompt=16, reserve=1).run(program)
    least = int(str(caught.value).partition("Give device=")[2].split()[0])
    host = TYPICAL_CPU.process_bytes + READ_AHEAD_BYTES + 16_000
    PlaceWeights(device=least, host=host, context=64, prompt=16, reserve=1).run(program)
    assert program.placement is not None
    assert set(program.placement.tiers.values()) == {"host", "disk"}
    ours = TritonExecutor(program)
    assert all(torch.equal(*pair) for pair in zip(tokens_and_logits(ours, [[5, 10, 20]]), expected, strict=True))
    assert ours.stream is not None
    assert ours.stream.disk is not None
    read = ours.stream.disk.statistics
    assert read.bytes_taken > 0
    assert sum(memory.nbytes for memory in ours.stream._memory.values()) <= 16_000
    assert read.restarts <= 1, "weights are read in the order of the steps"


def test_a_ring_that_is_too_small_is_refused() -> None:
    program = tiny_program("llama", CacheKV(Full()))
    for tier in ("host", "disk"):
        with pytest.raises(OptionError, match="ring_bytes=512: needed at least"):
            TritonExecutor(placed(program, ring_bytes=512, tier=tier))


def test_no_weight_on_the_host_is_no_stream() -> None:
    program = placed(tiny_program("llama", CacheKV(Full())))
    assert program.placement is not None
    program.placement = replace(program.placement, tiers={})
    assert TritonExecutor(program).stream is None
