"""AirLLM 3 in bf16, a shard of a layer at a time: `python run_airllm.py FOLDER THREADS`; the page cache is dropped."""

from __future__ import annotations

import contextlib
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import version

import torch
from airllm import AutoModel
from worker import drop_page_cache, prompt_tokens, serve

folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads or torch.get_num_threads())
scratch = tempfile.TemporaryDirectory(prefix="jettison-bench-")
with contextlib.redirect_stdout(sys.stderr):  # what it prints is no answer
    model = AutoModel.from_pretrained(folder, device="cpu", dtype=torch.bfloat16, layer_shards_saving_path=scratch.name)


@torch.inference_mode()
def run(batch: int, prompt: int, new: int) -> Iterator[None]:
    """Calls of the module below its `generate`, with the library's cache."""
    rows, cache = [prompt_tokens(prompt, seed) for seed in range(batch)], None
    for tokens in [rows, *([[token]] * batch for token in prompt_tokens(new, seed=1))]:
        out = model(input_ids=torch.tensor(tokens), past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        yield


serve({"version": version("airllm")}, run, before_step=lambda: drop_page_cache(folder, scratch.name))
