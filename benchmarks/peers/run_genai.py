"""ONNX Runtime GenAI, whose steps contain its greedy search: `python run_genai.py FOLDER THREADS`."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import numpy
import onnxruntime_genai
from worker import prompt_tokens, serve

folder, threads = sys.argv[1], int(sys.argv[2])
config = onnxruntime_genai.Config(folder)
config.overlay(f'{{"model": {{"decoder": {{"session_options": {{"intra_op_num_threads": {threads}}}}}}}}}')
model = onnxruntime_genai.Model(config)


def run(batch: int, prompt: int, new: int) -> Iterator[None]:
    """Greedy search that no end token stops."""
    length = prompt + new + 2
    parameters = onnxruntime_genai.GeneratorParams(model)
    parameters.set_search_options(max_length=length, min_length=length, do_sample=False, batch_size=batch)
    generator = onnxruntime_genai.Generator(model, parameters)
    tokens = numpy.array([prompt_tokens(prompt, seed) for seed in range(batch)], dtype=numpy.int32)
    generator.append_tokens(tokens)
    generator.generate_next_token()
    yield
    for _ in range(new):
        generator.generate_next_token()
        yield


size = os.path.getsize(os.path.join(folder, "model.onnx.data"))
serve({"version": onnxruntime_genai.__version__, "weight_bytes": size}, run)
