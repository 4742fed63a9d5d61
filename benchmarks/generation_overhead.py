"""What generation costs outside the model: choosing tokens, detokenising, keeping the books.

    python benchmarks/generation_overhead.py [--steps 200] [--repeats 9]

The model is replaced by one that returns prepared logits over the vocabulary of Llama-3.2 (128,256) at no cost, so all
the time there is, is generation's own. Two kinds of logits: `peaked` like those of a trained model (probability falls
with the square of the rank, the nucleus of 0.9 has some six tokens), and `flat` (normal with deviation 3, some 5,000).
`session_us_per_step` is what `Session.decode` adds around the executor. Writes
benchmarks/results/generation_overhead.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from record import environment, write

from jettison.ir.program import ModelInfo, State
from jettison.runtime.executor import EntrySignature
from jettison.runtime.generation import generate, stream
from jettison.runtime.generation_options import GenerationOptions
from jettison.runtime.session import Session
from jettison.runtime.tokenizer import Tokenizer, load_tokenizer

TINY_LLAMA = Path(__file__).resolve().parent.parent / "examples" / "models" / "tiny-llama"
VOCAB_SIZE, CONTEXT = 128_256, 131_072
# What the shares are of: about a decode step of Llama-3.2-1B with int4 weights on two cores.
STEP_MS = 45.0
PROMPT_TOKENS = 2000
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "temperature, top_k=50": {"do_sample": True, "temperature": 0.7, "top_k": 50},
    "top_p=0.9": {"do_sample": True, "top_k": 0, "top_p": 0.9},
    "min_p=0.05": {"do_sample": True, "top_k": 0, "min_p": 0.05},
    "no filter": {"do_sample": True, "top_k": 0},
    "repetition_penalty": {"repetition_penalty": 1.1},
    "all together": {
        "do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1,
    },
    "greedy, text": {"stop_strings": ["\n\n"]},
}  # fmt: skip


class FakeSession:
    """Returns one of the prepared logits after another."""

    context, vocab_size = CONTEXT, VOCAB_SIZE

    def __init__(self, logits: Sequence[torch.Tensor]) -> None:
        self._logits, self._steps = logits, 0
        self.lengths: list[int] = []
        self.states: dict[str, torch.Tensor] = {}

    def prefill(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """The first logits."""
        return self._logits[0]

    def decode(self, tokens: Sequence[int]) -> torch.Tensor:
        """The next logits."""
        self._steps += 1
        return self._logits[self._steps % len(self._logits)]


class FakeExecutor:
    """Returns the same logits at every call."""

    info = ModelInfo("decoder", "Fake", CONTEXT, VOCAB_SIZE)
    states: Mapping[str, State] = {}
    weight_bytes = 0

    def __init__(self, logits: torch.Tensor) -> None:
        self._outputs = {"logits": logits[:, None]}
        inputs = ("input_ids", "position_ids", "attention_mask", "logits_positions")
        self.entries = dict.fromkeys(("prefill", "decode"), EntrySignature(inputs, (), ("logits",)))

    def run(self, entry: str, inputs: Mapping[str, Any], states: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """The outputs."""
        return self._outputs


def prepare_logits(kind: str, batch: int, steps: int, known: int) -> list[torch.Tensor]:
    """`steps` tensors `[B, V] f32` whose best tokens are among the `known` ones of the tokenizer."""
    generator = torch.Generator().manual_seed(batch)
    prepared = []
    for _ in range(steps):
        rows = []
        for _ in range(batch):
            if kind == "peaked":
                scores = -2.0 * torch.log(torch.arange(1, VOCAB_SIZE + 1, dtype=torch.float32))
            else:
                scores = torch.randn(VOCAB_SIZE, generator=generator).sort(descending=True).values * 3.0
            best, others = scores[:known], scores[known:]
            order = torch.randperm(known, generator=generator), torch.randperm(len(others), generator=generator)
            rows.append(torch.cat([best[order[0]], others[order[1]]]))
        prepared.append(torch.stack(rows))
    return prepared


def generation_us(
    logits: Sequence[torch.Tensor], mode: str, steps: int, repeats: int, tokenizer: Tokenizer
) -> dict[str, float]:
    """Microseconds per step of a whole generation, opening and reading the prompt included."""
    batch = len(logits[0])
    options = GenerationOptions(max_new_tokens=steps, seed=0, eos_token_id=[], **MODES[mode])
    prompt = torch.randint(VOCAB_SIZE, (PROMPT_TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
    has_text = mode.endswith("text")
    taken = []
    for _ in range(repeats):
        started = time.perf_counter()
        if has_text and batch == 1:
            pieces = sum(1 for _ in stream(lambda *_: FakeSession(logits), prompt, options, tokenizer))
            assert pieces > steps / 4
        else:
            result = generate(
                lambda *_: FakeSession(logits), [prompt] * batch, options, tokenizer if has_text else None
            )
            assert result.steps == steps - 1
        taken.append((time.perf_counter() - started) / steps * 1e6)
    median = statistics.median(taken)
    return {
        "us_per_step": round(median, 1),
        "us_per_step_lowest": round(min(taken), 1),
        "share_of_step": round(median / STEP_MS / 1e3, 4),
    }


def session_us(logits: torch.Tensor, length: int, steps: int, repeats: int) -> float:
    """Microseconds per `Session.decode` at about `length` tokens per row."""
    taken = []
    for _ in range(repeats):
        session = Session(FakeExecutor(logits), len(logits), length + steps, prefill_chunk=length)
        session.prefill([[1] * length] * len(logits))
        started = time.perf_counter()
        for _ in range(steps):
            session.decode([1] * len(logits))
        taken.append((time.perf_counter() - started) / steps * 1e6)
    return round(statistics.median(taken), 1)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(TINY_LLAMA)
    before = environment()
    rows, sessions = [], []
    for batch in (1, 4):
        for kind in ("peaked", "flat"):
            logits = prepare_logits(kind, batch, 8, tokenizer.vocab_size)
            for mode in MODES:
                figures = generation_us(logits, mode, arguments.steps, arguments.repeats, tokenizer)
                rows.append({"batch": batch, "logits": kind, "mode": mode, **figures})
                print(rows[-1], flush=True)
        for length in (128, 4096):
            microseconds = session_us(logits[0], length, arguments.steps, arguments.repeats)
            sessions.append({"batch": batch, "tokens": length, "session_us_per_step": microseconds})
            print(sessions[-1], flush=True)
    figures = {
        "vocab_size": VOCAB_SIZE, "step_ms": STEP_MS, "prompt_tokens": PROMPT_TOKENS, "steps": arguments.steps,
        "repeats": arguments.repeats, "torch_threads": torch.get_num_threads(), "generation": rows, "session": sessions,
    }  # fmt: skip
    print(write("generation_overhead", figures, before))


if __name__ == "__main__":
    main()
