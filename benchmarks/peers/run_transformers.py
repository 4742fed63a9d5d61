"""Eager transformers in bf16: `python run_transformers.py FOLDER THREADS`."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
import transformers
from worker import prompt_tokens, serve

torch.set_num_threads(int(sys.argv[2]))
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).eval()


@torch.inference_mode()
def step(tokens: list[list[int]], cache: object) -> object:
    """Run tokens behind a cache; returns the new cache."""
    out = model(input_ids=torch.tensor(tokens), past_key_values=cache, use_cache=True, logits_to_keep=1)
    return out.past_key_values


def run(batch: int, prompt: int, new: int) -> Iterator[None]:
    """The library's own dynamic cache."""
    cache = step([prompt_tokens(prompt, seed) for seed in range(batch)], None)
    yield
    for token in prompt_tokens(new, seed=1):
        cache = step([[token]] * batch, cache)
        yield


size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
serve({"version": transformers.__version__, "weight_bytes": size}, run)
