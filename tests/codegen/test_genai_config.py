"""`genai_config.json` as text; `test_genai.py` runs it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor, nn

from jettison.codegen.onnx.genai_config import genai_config
from jettison.ir.program import Program, State
from jettison.passes.policies import Full, Window
from tests.codegen.running import cached_program
from tests.models.tiny_models import CONTEXT, VOCAB_SIZE, WINDOW, randomize, tiny_model

CONFIG = {"model_type": "llama", "eos_token_id": 2, "bos_token_id": 1}


class Plain(nn.Module):
    """One layer: four heads of eight channels over two keys."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB_SIZE, 24)
        self.query, self.key, self.value = nn.Linear(24, 32), nn.Linear(24, 16), nn.Linear(24, 16)
        self.out, self.head = nn.Linear(32, 24), nn.Linear(24, VOCAB_SIZE)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + position_ids[:, :, None] / CONTEXT
        heads = [layer(x).unflatten(-1, (-1, 8)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True)
        return self.head(x + self.out(attended.transpose(1, 2).flatten(2)))


@pytest.fixture(scope="module")
def plain() -> Program:
    return cached_program(randomize(Plain()).eval(), Full(), context=CONTEXT)


def test_sizes_come_from_the_graph(plain: Program) -> None:
    described = genai_config(CONFIG, {}, plain)
    assert described is not None
    decoder = described["model"]["decoder"]
    assert {key: decoder[key] for key in decoder if isinstance(decoder[key], int)} == {
        "head_size": 8, "hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 1,
    }  # fmt: skip
    assert decoder["filename"] == "model.onnx"
    assert decoder["inputs"]["past_key_names"] % 0 == "past_key_values.0.key"
    assert decoder["inputs"]["past_value_names"] % 0 in plain.states
    assert decoder["outputs"] == {
        "logits": "logits",
        "present_key_names": "present.%d.key",
        "present_value_names": "present.%d.value",
    }
    assert "sliding_window" not in decoder
    assert described["model"]["vocab_size"] == VOCAB_SIZE
    assert described["model"]["context_length"] == described["search"]["max_length"] == CONTEXT
    assert described["search"]["past_present_share_buffer"] is True
    assert json.loads(json.dumps(described)) == described


@pytest.mark.parametrize(
    ("config", "generation", "expected"),
    [
        ({"eos_token_id": 2, "bos_token_id": 1}, {}, {"eos_token_id": 2, "bos_token_id": 1, "pad_token_id": 2}),
        ({"eos_token_id": 2}, {"eos_token_id": [5, 6]}, {"eos_token_id": [5, 6], "bos_token_id": 5, "pad_token_id": 5}),
        ({"pad_token_id": 0, "eos_token_id": 7}, {}, {"eos_token_id": 7, "bos_token_id": 7, "pad_token_id": 0}),
        (
            {"pad_token_id": VOCAB_SIZE, "eos_token_id": [7, VOCAB_SIZE]},
            {"bos_token_id": -1},
            {"eos_token_id": 7, "bos_token_id": 7, "pad_token_id": 7},
        ),
        ({"eos_token_id": 7}, {"eos_token_id": None}, {"eos_token_id": 7, "bos_token_id": 7, "pad_token_id": 7}),
        ({}, {}, {}),
    ],
)
def test_special_tokens(
    plain: Program, config: dict[str, Any], generation: dict[str, Any], expected: dict[str, Any]
) -> None:
    described = genai_config({"model_type": "llama", **config}, generation, plain)
    assert described is not None
    assert {key: value for key, value in described["model"].items() if key.endswith("_token_id")} == expected


@pytest.mark.parametrize(
    ("family", "expected"), [("llama", "llama"), ("qwen3", "qwen3"), ("gpt2", "decoder"), ("new", "decoder")]
)
def test_families_that_genai_does_not_know_are_plain_decoders(plain: Program, family: str, expected: str) -> None:
    described = genai_config({"model_type": family}, {}, plain)
    assert described is not None
    assert described["model"]["type"] == expected


def test_sampling_defaults_of_the_model_are_kept(plain: Program) -> None:
    generation = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1}
    described = genai_config(CONFIG, generation, plain)
    assert described is not None
    assert described["search"].items() >= generation.items()
    silent = genai_config(CONFIG, dict.fromkeys(generation), plain)
    assert silent == genai_config(CONFIG, {}, plain), "null is as good as nothing"


def test_mixed_windows_are_described() -> None:
    pytest.importorskip("transformers")
    program = cached_program(tiny_model("gemma2"), Window())
    described = genai_config(CONFIG, {}, program)
    assert described is not None
    window = described["model"]["decoder"]["sliding_window"]
    assert window == {
        "window_size": WINDOW, "cache_slack": 64, "layers": [0], "slide_inputs": False, "slide_key_value_cache": False,
    }  # fmt: skip
    assert window["window_size"] + window["cache_slack"] == program.states["past_key_values.0.key"].shape[2]


def test_one_window_everywhere_is_read_from_the_graph() -> None:
    program = cached_program(randomize(Plain()).eval(), Window(size=WINDOW), context=CONTEXT)
    described = genai_config(CONFIG, {}, program)
    assert described is not None
    assert "sliding_window" not in described["model"]["decoder"]


def test_what_the_format_cannot_say_gets_no_file(plain: Program) -> None:
    assert genai_config({}, {}, plain) is None, "a module without a config"
    narrow = plain.copy()
    value = narrow.states["past_key_values.0.value"]
    narrow.states[value.name] = State(value.name, (*value.shape[:3], 4), value.dtype)
    assert genai_config(CONFIG, {}, narrow) is None, "values narrower than keys"
    stateless = plain.copy()
    stateless.states = {}
    assert genai_config(CONFIG, {}, stateless) is None
