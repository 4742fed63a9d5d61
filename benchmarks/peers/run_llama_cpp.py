"""llama.cpp as a contender: `python run_llama_cpp.py MODEL.gguf THREADS`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import llama_cpp
from worker import prompt_tokens, serve

path, threads = sys.argv[1], int(sys.argv[2])
llama_cpp.llama_backend_init()
settings = llama_cpp.llama_model_default_params()
settings.n_gpu_layers = 0
model = llama_cpp.llama_model_load_from_file(path.encode(), settings)


def decode(context: object, tokens: list[int]) -> None:
    """Run tokens, and compute the logits of the last."""
    array = (llama_cpp.llama_token * len(tokens))(*tokens)
    status = llama_cpp.llama_decode(context, llama_cpp.llama_batch_get_one(array, len(tokens)))
    if status != 0:
        raise SystemExit(f"llama_decode returned {status}")


def run(batch: int, prompt: int, new: int) -> Iterator[None]:
    """One sequence in a context of its own."""
    assert batch == 1, "several sequences are not measured"
    options = llama_cpp.llama_context_default_params()
    options.n_ctx, options.n_batch = prompt + new + 16, 512
    options.n_threads = options.n_threads_batch = threads
    context = llama_cpp.llama_init_from_model(model, options)
    tokens = prompt_tokens(prompt)
    try:
        for start in range(0, prompt, 512):
            decode(context, tokens[start : start + 512])
        yield
        for token in prompt_tokens(new, seed=1):
            decode(context, [token])
            yield
    finally:
        llama_cpp.llama_free(context)


serve({"version": llama_cpp.__version__, "weight_bytes": os.path.getsize(path)}, run)
