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


def serve(about: dict[str, Any], open_run: Callable[[int, int, int], Steps]) -> None:
    """Answer requests until stdin ends.

    Args:
        about: What to say of the contender: name, version, weight bytes.
        open_run: `(batch, prompt, new)` to an iterator that prefills before its first item and makes one decode step
            before each further one.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    print(json.dumps(about), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        steps = open_run(request["batch"], request["prompt"], request["new"])
        seconds = []
        for _ in range(1 + request["new"]):
            start = time.perf_counter()
            next(steps)
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"prefill_seconds": seconds[0], "step_seconds": seconds[1:]}), file=answers, flush=True)
