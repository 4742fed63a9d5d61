"""An artifact of jettison: `python run_jettison.py FOLDER THREADS`; 0 threads leave it to the runtime."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import version

from worker import prompt_tokens, serve

import jettison

model = jettison.load(sys.argv[1], threads=int(sys.argv[2]) or None)


def run(batch: int, prompt: int, new: int) -> Iterator[None]:
    """A session of the runtime."""
    session = model.session(batch, prompt + new)
    session.prefill([prompt_tokens(prompt, seed) for seed in range(batch)])
    yield
    for token in prompt_tokens(new, seed=1):
        # As greedy generation does: the best token alone, where that is less work.
        if session.most_best:
            session.decode_best([token] * batch, 1)
        else:
            session.decode([token] * batch)
        yield


serve({"version": version("jettison"), "weight_bytes": model.executor.weight_bytes}, run)
