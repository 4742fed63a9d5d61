"""The loop of every contender: one JSON request per line on stdin, one JSON answer per line on stdout.

Imported by the scripts beside it, each of which runs in the virtual environment of its library; standard library only.
"""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

# Below the smallest vocabulary measured, and clear of special tokens.
TOKEN_RANGE = (10, 30000)

Steps = Iterator[None]


def prompt_tokens(number: int, seed: int = 0) -> list[int]:
    """Seeded random ids."""
    source = random.Random(seed)
    return [source.randrange(*TOKEN_RANGE) for _ in range(number)]


def serve(
    about: dict[str, Any],
    open_run: Callable[[int, int, int], Steps],
    *,
    before_step: Callable[[], object] = lambda: None,
    figures: Callable[[], dict[str, Any]] = dict,
) -> None:
    """Answer requests until stdin ends.

    Args:
        about: What to say of the contender: name, version, weight bytes.
        open_run: `(batch, prompt, new)` to an iterator that prefills before its first item and makes one decode step
            before each further one.
        before_step: Called in front of each of them, outside of what is timed.
        figures: What else to say in an answer.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        steps = open_run(request["batch"], request["prompt"], request["new"])
        seconds = []
        for _ in range(1 + request["new"]):
            before_step()
            start = time.perf_counter()
            next(steps)
            seconds.append(time.perf_counter() - start)
        answer = {"prefill_seconds": seconds[0], "step_seconds": seconds[1:], **figures()}
        print(json.dumps(answer), file=answers, flush=True)


def drop_page_cache(*folders: str) -> None:
    """Have the system forget what it holds of the files in some folders."""
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                file = os.open(os.path.join(parent, name), os.O_RDONLY)
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(file)
