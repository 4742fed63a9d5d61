"""Two targets side by side over a long prompt and a long answer."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from jettison.runtime.executor import Executor
from jettison.runtime.session import Session
from jettison.runtime.tokenizer import load_tokenizer

MODELS = Path(__file__).parents[2] / "examples" / "models"
PROMPT_TOKENS, NEW_TOKENS = 700, 200
# A step in which two tokens are closer than this, of the largest logit, may go either way.
NEAR_TIE = 1e-4


@functools.cache
def prompt(name: str) -> list[int]:
    """Tokens of a text that stays what it is."""
    tokenizer = load_tokenizer(MODELS / name.partition("/")[0])
    words = (Path(__file__).parents[2] / "LICENSE").read_text()
    ids = tokenizer.encode(words)
    return (ids * (1 + PROMPT_TOKENS // len(ids)))[:PROMPT_TOKENS]


def assert_same_tokens(name: str, *executors: Executor) -> None:
    """Greedy decoding gives the same tokens, up to the first near-tie.

    Args:
        name: Of the model, for its tokenizer.
        executors: Two of the same program.
    """
    sessions = [Session(each, 1, PROMPT_TOKENS + NEW_TOKENS) for each in executors]
    logits = [each.prefill([prompt(name)])[0] for each in sessions]
    for step in range(NEW_TOKENS):
        best, other = (int(each.argmax()) for each in logits)
        if best != other:
            gap = max(float(each[best] - each[other]).__abs__() for each in logits)
            assert gap < NEAR_TIE * float(logits[0].abs().max()), f"step {step}: {best} or {other}"
            assert step, "the first token may not be a tie"
            return
        logits = [each.decode([best])[0] for each in sessions]
    assert torch.allclose(*logits, atol=1e-2)
