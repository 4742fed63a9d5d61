"""Tunings are measured on what steps launch, kept, and read back on the same GPU only."""

from __future__ import annotations

import json

import pytest
import torch

from jettison.codegen.triton.kernels.base import Tuning
from jettison.codegen.triton.kernels.decode_attention import DecodeAttention
from jettison.codegen.triton.kernels.gemm import Gemm
from jettison.codegen.triton.kernels.top_k import TopK
from jettison.ir.errors import ArtifactError, UnsupportedError
from jettison.passes.policies import Full
from jettison.runtime import tunings
from jettison.runtime.triton_executor import TritonExecutor
from tests.codegen.running import cached_program
from tests.models.tiny_models import VOCAB_SIZE, tiny_model


class Watch:
    """A stopwatch that has an opinion, and runs the kernels that need scratch of the size of a tuning."""

    def __call__(self, launch) -> float:
        if isinstance(launch.func.__self__.kernel, DecodeAttention | TopK):
            launch()
        return opinion(launch.args[0])


def opinion(tuning: Tuning) -> float:
    """Few splits are fast, and many warps."""
    return dict(tuning.tiles).get("SPLITS", 0) - tuning.warps / 100


@pytest.fixture(scope="module")
def program():
    return cached_program(tiny_model("llama", layers=1), Full(), context=64)


@pytest.fixture(scope="module")
def measured(program):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tunings, "_PROMPT", 17)  # more than decode together
        patch.setattr(tunings, "_STEPS", 1)
        return tunings.measure(TritonExecutor(program), Watch())


def test_the_fastest_of_every_kernel_that_a_step_launches_is_kept(program, measured):
    executor = TritonExecutor(program)
    kernels = {name: each.kernel for name, each in executor.emitted.kernels.items()}
    unused = set(kernels) - set(measured["kernels"])
    # Prompts, single rows, batches and the best token; but no call asks for the logits of many tokens.
    assert [(kernels[name].rows, type(kernels[name])) for name in unused] == [(VOCAB_SIZE, Gemm)]
    for name, found in measured["kernels"].items():
        best = min(kernels[name].tunings(), key=opinion)
        assert (found["tiles"], found["warps"], found["stages"]) == (dict(best.tiles), best.warps, best.stages)
        assert found["microseconds"] == round(opinion(best), 2)


def test_an_executor_uses_what_was_measured(program, measured):
    known = tunings.known_tunings(measured)
    executor = TritonExecutor(program, tunings=known)
    name, kernel = next(
        (name, each.kernel) for name, each in executor.emitted.kernels.items()
        if isinstance(each.kernel, DecodeAttention)
    )  # fmt: skip
    assert executor._parts.launchers(kernel).tuning == known[name] != kernel.tunings()[0]
    other = TritonExecutor(program, tunings={name: Tuning.of(SPLITS=5, BLOCK_T=7)})
    assert other._parts.launchers(kernel).tuning != Tuning.of(SPLITS=5, BLOCK_T=7), "no tuning of this kernel"


def test_documents_of_the_cache_are_merged(measured):
    first = {**measured, "kernels": {"a": {"tiles": {"B": 1}, "warps": 4, "stages": 1, "microseconds": 2.0}}}
    path = tunings.keep(first)
    tunings.keep(measured)
    assert tunings.cached_tunings()["kernels"] == {**first["kernels"], **measured["kernels"]}
    assert [each.name for each in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("changed", [{"gpu": "another"}, {"triton": "1.0"}])
def test_other_gpus_and_versions_say_nothing(measured, changed):
    assert tunings.known_tunings({**measured, **changed}, None) == {}


@pytest.mark.parametrize("entry", [None, {}, {"tiles": 3, "warps": 4, "stages": 1}, {"tiles": {}, "warps": "x"}])
def test_entries_that_are_none_are_passed_over(measured, entry):
    assert tunings.known_tunings({**measured, "kernels": {"a": entry}}) == {}
    assert tunings.known_tunings({**measured, "kernels": entry}, [entry]) == {}


def test_a_cache_that_is_no_json_is_passed_over(monkeypatch, tmp_path):
    monkeypatch.setenv("JETTISON_CACHE", str(tmp_path))
    path = tunings.tunings_path()
    path.parent.mkdir()
    for text in ("{", json.dumps([1])):
        path.write_text(text)
        assert tunings.cached_tunings() is None


def test_a_cache_that_cannot_be_written_is_named(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JETTISON_CACHE", str(tmp_path / "file"))
    with pytest.raises(ArtifactError, match="JETTISON_CACHE"):
        tunings.keep(measured)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which can be measured")
def test_without_a_gpu_nothing_is_measured():
    with pytest.raises(UnsupportedError, match="no GPU was found"):
        tunings.stopwatch()
