"""Folders of models with random bf16 weights, in the shapes of models that people run."""

from __future__ import annotations

from pathlib import Path
from statistics import NormalDist
from typing import Any

import torch

_STD = 0.02


def make_llama(folder: Path, layers: int, **sizes: Any) -> None:
    """Write a model in the shape of Llama-3.2-1B (16 layers: 1.24 B weights, 2.47 GB), but for what `sizes` say."""
    from transformers import LlamaConfig, LlamaForCausalLM

    usual = {
        "vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
        "num_key_value_heads": 8, "max_position_embeddings": 8192, "head_dim": 64, "tie_word_embeddings": True,
    }  # fmt: skip
    config = LlamaConfig(
        **{**usual, **sizes}, num_hidden_layers=layers, bos_token_id=0, eos_token_id=0, rope_theta=500000.0,
        dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model = _randomised(model)
    for name, buffer in model.named_buffers():
        buffer.fill_(0.5) if "inv_freq" in name else buffer.zero_()
    model.save_pretrained(folder)


def make_opt(folder: Path, layers: int, *, fires: float = 0.5) -> None:
    """Write a model in the shape of OPT-6.7B, of which a share of the neurons fires for a token."""
    from transformers import OPTConfig, OPTForCausalLM

    width, neurons = 4096, 16384
    config = OPTConfig(
        vocab_size=50272, hidden_size=width, word_embed_proj_dim=width, ffn_dim=neurons, num_hidden_layers=layers,
        num_attention_heads=32, max_position_embeddings=2048, dtype="bfloat16",
    )  # fmt: skip
    with torch.device("meta"):
        model = OPTForCausalLM(config)
    model = _randomised(model)
    before_relu = NormalDist(0, _STD * width**0.5)  # what a neuron adds up of a normalised input
    for layer in model.model.decoder.layers:
        layer.fc1.bias.data.fill_(before_relu.inv_cdf(fires))
    model.save_pretrained(folder)


def _randomised(model: Any) -> Any:
    torch.manual_seed(0)
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1) if parameter.dim() == 1 else parameter.normal_(0, _STD)
    model.tie_weights()
    return model
