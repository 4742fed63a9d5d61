"""Small models with random weights, built from configurations of transformers: nothing is downloaded.

Weights are drawn so that every part matters: norms are not one, biases are not zero, attention is far from uniform.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

VOCAB_SIZE = 97
CONTEXT = 128
# Shorter than the longest test sequence (64), so that a window that is not applied shows.
WINDOW = 16

# Names of sizes as Llama and most others spell them; families with other names give their own.
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class TinyModel:
    """How to build one small model.

    Attributes:
        config: Name of the configuration class.
        model: Name of the model class.
        options: Fields of the configuration; `None` removes a common one.
    """

    config: str
    model: str
    options: dict[str, Any] = field(default_factory=dict)


def _llama_like(prefix: str, **options: Any) -> TinyModel:
    return TinyModel(f"{prefix}Config", f"{prefix}ForCausalLM", options)
