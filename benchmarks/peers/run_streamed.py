"""An artifact whose weights are streamed: `python run_streamed.py FOLDER THREADS`; the page cache is dropped each step.

An answer has the figures of the stream over its decode steps, and which tokens greedy decoding gave.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import version
from typing import Any

from worker import drop_page_cache, prompt_tokens, serve

import jettison

folder, threads = sys.argv[1], int(sys.argv[2])
model = jettison.load(folder, threads=threads or None)
stream = getattr(model.executor, "stream", None)
done: dict[str, Any] = {}


def run(batch: int, prompt: int, new: int) -> Iterator[None]:
    """Greedy steps, so that tokens can be compared with those of a run in memory."""
    session = model.session(batch, prompt + new)
    logits = session.prefill([prompt_tokens(prompt, seed) for seed in range(batch)])
    before = None if stream is None else stream.statistics
    tokens = []
    yield
    for step in range(new):
        tokens.append(logits.argmax(-1).tolist())
        logits = session.decode(tokens[-1])
        if step == new - 1:
            done.update(tokens=tokens)
            if stream is not None:
                counted = stream.statistics.since(before)
                done.update(
                    read_gb_per_s=round(counted.read_gb_per_s, 3),
                    overlap=round(counted.overlap, 3),
                    read_bytes_per_step=counted.bytes_taken // new,
                    waiting_seconds_per_step=round(counted.seconds_waiting / new, 4),
                )
        yield


about = {"version": version("jettison"), "weight_bytes": model.executor.weight_bytes}
serve(about, run, before_step=lambda: drop_page_cache(folder), figures=lambda: done)
