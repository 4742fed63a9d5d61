"""ONNX Runtime GenAI loads what `save_pretrained` wrote and generates what jettison's own runtime generates.

The bundled model, with text and tokenizer, is in `tests/cli/test_other_runtimes.py`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest

import jettison
from tests.models.tiny_models import WINDOW, random_ids, tiny_model

# ONNX Runtime and GenAI report their use to their maker, unless they are told not to before they are loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
genai = pytest.importorskip("onnxruntime_genai")
pytest.importorskip("transformers")

FULL, OWN_WINDOW, WINDOW_OF_16 = (
    f"cache-kv{{policy={policy}}}" for policy in ("full", "window", f"window{{size={WINDOW}}}")
)
INT4 = "quantize-weights{bits=4,group=32}"
# The cache has 64 slots beside the window: a prompt that fills them all, and one that gets there while decoding.
SLOTS = WINDOW + 64
END = 2
LENGTHS = ((SLOTS + 10, 24), (WINDOW + 8, SLOTS))
MakeArtifact = Callable[[str, str], Path]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> MakeArtifact:
    """Folder of a random model of one layer, written once per family and pipeline."""
    root = tmp_path_factory.mktemp("genai")
    folders: dict[tuple[str, str], Path] = {}

    def make(family: str, passes: str) -> Path:
        key = (family, passes)
        if key not in folders:
            model = tiny_model(family)
            # A second layer would cost half as much time again; the bundled model has six.
            model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
            # A logit of zero is never the largest: random models soon draw the end token otherwise.
            model.lm_head.weight.data[END] = 0.0
            folders[key] = jettison.optimize(model, passes).save_pretrained(root / str(len(folders)))
        return folders[key]

    return make


def generate(
    folder: Path,
    rows: list[list[int]],
    new_tokens: int,
    *,
    pieces: list[list[int]] | None = None,
    overlay: str = "{}",
    **settings: Any,
) -> list[list[int]]:
    """What GenAI generates; rows of equal length, greedy unless told otherwise, one row perhaps given in pieces."""
    config = genai.Config(str(folder))
    config.overlay(overlay)
    model = genai.Model(config)
    parameters = genai.GeneratorParams(model)
    parameters.set_search_options(batch_size=len(rows), max_length=len(rows[0]) + new_tokens, **settings)
    generator = genai.Generator(model, parameters)
    for given in [rows] if pieces is None else [[piece] for piece in pieces]:
        generator.append_tokens(numpy.array(given, dtype=numpy.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [[int(token) for token in generator.get_sequence(row)[len(prompt) :]] for row, prompt in enumerate(rows)]


def prompt_of(length: int, *, seed: int = 0) -> list[int]:
    return random_ids(1, length, seed=seed)[0].tolist()


def load(folder: Path) -> jettison.OptimizedModel:
    return jettison.load(folder, threads=1, allow_spinning=False)


@pytest.mark.parametrize(
    ("family", "passes"),
    [
        ("llama", FULL), ("llama", f"{INT4},{WINDOW_OF_16}"), ("qwen2", FULL), ("qwen2", WINDOW_OF_16),
        ("mistral", OWN_WINDOW),
    ],
)  # fmt: skip
def test_tokens_are_those_of_jettison(artifact: MakeArtifact, family: str, passes: str) -> None:
    folder = artifact(family, passes)
    model = load(folder)
    for length, new_tokens in LENGTHS:
        prompt = prompt_of(length)
        expected = model.generate([prompt], max_new_tokens=new_tokens)[0]
        assert len(expected) == new_tokens
        assert generate(folder, [prompt], new_tokens) == [expected]


def test_a_window_is_seen_in_the_tokens(artifact: MakeArtifact) -> None:
    """Or the comparison of windowed caches would compare nothing."""
    length, new_tokens = LENGTHS[0]
    full, window = (
        generate(artifact("llama", passes), [prompt_of(length)], new_tokens) for passes in (FULL, WINDOW_OF_16)
    )
    assert full != window


@pytest.mark.parametrize("passes", [FULL, WINDOW_OF_16])
def test_rows_of_a_batch(artifact: MakeArtifact, passes: str) -> None:
    folder = artifact("llama", passes)
    rows = [prompt_of(30, seed=seed) for seed in (1, 2)]
    assert generate(folder, rows, 24) == load(folder).generate(rows, max_new_tokens=24)


@pytest.mark.parametrize("passes", [FULL, WINDOW_OF_16])
def test_prompt_in_pieces(artifact: MakeArtifact, passes: str) -> None:
    """Several tokens behind a past. (GenAI 0.18 never runs a token that it generated just before `append_tokens`.)"""
    folder, pieces = artifact("llama", passes), [prompt_of(50, seed=3), prompt_of(SLOTS - 40, seed=4)]
    prompt = [token for piece in pieces for token in piece]
    assert generate(folder, [prompt], 24, pieces=pieces) == load(folder).generate([prompt], max_new_tokens=24)


def test_generation_ends_at_an_end_token(artifact: MakeArtifact) -> None:
    """GenAI keeps the end token to itself."""
    folder, prompt = artifact("llama", FULL), prompt_of(30)
    end = generate(folder, [prompt], 24)[0][5]
    (tokens,) = generate(folder, [prompt], 24, overlay=json.dumps({"model": {"eos_token_id": [END, end]}}))
    assert len(tokens) <= 5
    assert [[*tokens, end]] == load(folder).generate([prompt], max_new_tokens=24, eos_token_id=[END, end])


def test_padding_token_in_a_prompt_is_a_token(artifact: MakeArtifact) -> None:
    """Models without one give the end of text as padding token, and prompts hold that."""
    folder = artifact("llama", FULL)
    prompt = [0, *prompt_of(20), 0, 0]
    assert generate(folder, [prompt], 24) == load(folder).generate([prompt], max_new_tokens=24)


def test_repetition_penalty_means_the_same(artifact: MakeArtifact) -> None:
    folder = artifact("qwen2", FULL)
    plain, penalised = (generate(folder, [prompt_of(30)], 24, repetition_penalty=penalty) for penalty in (1.0, 1.3))
    assert plain != penalised
    assert penalised == load(folder).generate([prompt_of(30)], max_new_tokens=24, repetition_penalty=1.3)
