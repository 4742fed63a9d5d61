"""Factored layers in ONNX: against the program, in chunks, and what the files hold."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import jettison
from jettison.ir import token_chunks
from jettison.ir.compare import assert_close, example_input_ids
from jettison.ir.interpret import run_entry
from jettison.ir.program import Program
from jettison.passes.fuse_low_rank import FuseLowRank
from jettison.passes.pipeline import apply
from jettison.runtime.artifact import Artifact
from jettison.runtime.prepared import find_prepared
from jettison.runtime.prepared import prepare as prepare_weights
from tests.codegen.running import REASON, TOLERANCE, Emitted, emit
from tests.helpers import set_weights
from tests.models.tiny_low_rank import ATTENTIONS, MLPS, Attention, Decoder, Mlp, encoder


@pytest.fixture
def few(monkeypatch):
    """Chunks of four tokens."""
    for name in ("FEWEST", "MOST"):
        monkeypatch.setattr(token_chunks, name, 4)


def fused(*layers: torch.nn.Module) -> Program:
    program = encoder(*layers)
    (record,) = apply(program, [FuseLowRank()])
    assert record.rewrites == len(layers)
    return program


def check(emitted: Emitted) -> None:
    for batch, length in ((1, 1), (1, 13), (3, 2), (3, 7)):
        inputs = {"input_ids": example_input_ids(emitted.program, batch, length)}
        (out,) = emitted.executor.run("forward", inputs, {}).values()
        (expected,) = run_entry(emitted.program, "forward", inputs)
        assert_close(out, expected, tolerance=TOLERANCE, reason=REASON, what=f"batch {batch}, length {length}")


@pytest.mark.usefixtures("few")
def test_feed_forward_layers_in_chunks(tmp_path: Path):
    """All of them in one file: a function for each set of operands."""
    emitted = emit(fused(*(Mlp(**options) for options in MLPS.values())), tmp_path)
    check(emitted)
    called = [name for name in emitted.operators() if "LowRankMlp" in name]
    assert sorted(called) == sorted({f"jettison::{function.name}" for function in emitted.model.functions})


def test_feed_forward_layers_at_once(tmp_path: Path):
    check(emit(fused(Mlp(), Mlp("silu", gated=True)), tmp_path))


def test_attentions(tmp_path: Path):
    check(emit(fused(*(Attention(**options) for options in ATTENTIONS.values())), tmp_path))


def test_weights_are_stored_once(tmp_path: Path):
    emitted = emit(fused(Attention(), Mlp()), tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.glob("*.data"))
    names = [each.name for each in emitted.model.graph.initializer]
    assert len(names) == len(set(names))
    assert size < 1.05 * emitted.program.weight_bytes() + 2**16


def test_prompts_and_steps_share_one_graph_whose_weights_can_be_prepared(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("JETTISON_CACHE", str(tmp_path / "cache"))
    made = jettison.optimize(set_weights(Decoder()), "fuse-low-rank,cache-kv", target="onnx", context=64)
    ids = torch.arange(14).reshape(2, 7) % 61
    expected = torch.as_tensor(made.generate(ids, max_new_tokens=12))
    made.save_pretrained(tmp_path / "artifact")
    assert [path.name for path in (tmp_path / "artifact").glob("*.onnx")] == ["model.onnx"]
    artifact = Artifact.open(tmp_path / "artifact")
    prepare_weights(artifact, ["model.onnx"])
    loaded = jettison.load(tmp_path / "artifact")
    assert find_prepared(artifact)
    assert loaded.executor.is_prepared
    assert torch.equal(torch.as_tensor(loaded.generate(ids, max_new_tokens=12)), expected)
