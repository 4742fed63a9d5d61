"""transformers in bf16, its layers offloaded to disk by accelerate: `python run_accelerate.py FOLDER THREADS`.

Embedding and head stay in memory: they share a table, which would be read twice. The page cache is dropped before every
step.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator

import accelerate
import torch
import transformers
from worker import drop_page_cache, prompt_tokens, serve

folder, threads = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(threads or torch.get_num_threads())
scratch = tempfile.TemporaryDirectory(prefix="jettison-bench-")
model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
for number, layer in enumerate(model.model.layers):
    accelerate.disk_offload(layer, f"{scratch.name}/{number}", execution_device=torch.device("cpu"))


@torch.inference_mode()
def run(batch: int, prompt: int, new: int) -> Iterator[None]:
    """The library's own dynamic cache."""
    rows, cache = [prompt_tokens(prompt, seed) for seed in range(batch)], None
    for tokens in [rows, *([[token]] * batch for token in prompt_tokens(new, seed=1))]:
        out = model(input_ids=torch.tensor(tokens), past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache = out.past_key_values
        yield


about = {"version": accelerate.__version__, "transformers": transformers.__version__, "weight_bytes": size}
serve(about, run, before_step=lambda: drop_page_cache(folder, scratch.name))
