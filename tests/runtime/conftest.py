"""Fixtures of what generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from jettison.runtime.tokenizer import Tokenizer, load_tokenizer
from tests.runtime.scripted_sessions import Opener

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    pytest.importorskip("transformers")
    return load_tokenizer(TINY_LLAMA)


@pytest.fixture(scope="module")
def llama() -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.LlamaForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32).eval()


@pytest.fixture
def open_llama(llama) -> Opener:
    def logits_of(row: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return llama(torch.tensor([row])).logits[0, -1]

    return Opener(logits_of, llama.config.vocab_size, llama.config.max_position_embeddings)
