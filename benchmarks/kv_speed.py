"""Decode speed and state bytes of KV-cache policies against `full`, at long contexts.

    python benchmarks/kv_speed.py [--shapes half one heads]

Random weights: speed does not depend on what they are. Nor does it on what a cache holds, so a session is not prefilled
but told how many tokens it has seen and holds; its states are allocated as after a prompt of that length. Policies of a
shape run in one process, a few steps each in turn. Writes benchmarks/results/kv_speed.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpu_decode import read_bandwidth
from random_models import make_llama
from record import environment, write

import jettison
from jettison.bench import weight_bytes_per_step
from jettison.optimized_model import OptimizedModel
from jettison.runtime.session import Session

CONTEXT, NEW_TOKENS, BUDGET = 32768, 256, 1024
CONTEXTS = (2048, 8192, 16384)
FLAT_POSITIONS = (1000, 8000)


@dataclass(frozen=True)
class Shape:
    """A Llama of some size.

    Attributes:
        about: In words.
        layers: How many.
        sizes: Of its configuration.
        weights: The pass that quantises it.
        policies: What is measured beside `full`.
        flat: Policies whose decode time at `FLAT_POSITIONS` is compared.
    """

    about: str
    layers: int
    sizes: dict[str, int]
    weights: str
    policies: tuple[str, ...]
    flat: tuple[str, ...] = ()


SNAPKV = f"snapkv{{budget={BUDGET}}}"
STORED = ("kivi{bits=2}", "kivi{bits=4}", "int8", f"{SNAPKV}+kivi{{bits=4}}", f"mikv{{budget={BUDGET}}}", "xquant")
SHAPES = {
    "half": Shape(
        "Qwen2.5-0.5B: 24 layers, 14 heads, 2 key heads of 64",
        24,
        {"hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14,
         "num_key_value_heads": 2, "vocab_size": 151936},
        "quantize-weights{bits=4,group=128}",
        (SNAPKV, *STORED),
        ("sinks{budget=512,evict=always}", "h2o{budget=512,evict=always}", "snapkv{budget=512,evict=always}"),
    ),
    "one": Shape(
        "Llama-3.2-1B: 16 layers, 32 heads, 8 key heads of 64",
        16,
        {"hidden_size": 2048, "intermediate_size": 8192, "num_attention_heads": 32,
         "num_key_value_heads": 8, "vocab_size": 128256},
        "quantize-weights{bits=4,group=128}",
        (SNAPKV, "kivi{bits=2}"),
    ),
    "heads": Shape(
        "multi-head: 24 layers, 32 heads of 64",
        24,
        {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32,
         "num_key_value_heads": 32, "vocab_size": 32000},
        "quantize-weights{bits=8,group=128}",
        (SNAPKV,),
    ),
}  # fmt: skip


def filled(model: OptimizedModel, tokens: int) -> Session:
    """A session as it is after a prompt of `tokens`, up to the values of its states."""
    session = model.session(1, tokens + NEW_TOKENS)
    session._make_room([tokens], is_prompt=True)
    for kept in session.kept:
        budget, stored = kept.retention.budget, kept.stored
        kept.held = [tokens if budget is None else min(tokens, budget)]
        if stored is not None:
            takes_dropped = stored.storage.takes_dropped
            stored.filled = [stored.storage.moving(tokens if takes_dropped else kept.held[0])]
            kept.held[0] -= 0 if takes_dropped else stored.tokens(0)
    session.lengths = [tokens]
    return session


def step_ms(sessions: dict[str, Session], rounds: int, steps: int) -> dict[str, float]:
    """Median milliseconds of a decode step of each, in interleaved rounds of which the first warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    for round_ in range(rounds + 1):
        for name, session in sessions.items():
            for _ in range(steps):
                start = time.perf_counter()
                session.decode([7])
                if round_:
                    seconds[name].append(time.perf_counter() - start)
    return {name: round(1e3 * statistics.median(each), 3) for name, each in seconds.items()}


def mean_ms(session: Session, steps: int) -> float:
    """Mean milliseconds of a decode step, those that drop tokens included."""
    session.decode([7])
    start = time.perf_counter()
    for _ in range(steps):
        session.decode([7])
    return 1e3 * (time.perf_counter() - start) / steps


def compiled(folder: str, shape: Shape, policies: tuple[str, ...]) -> dict[str, OptimizedModel]:
    """The model of a shape with each policy, opened: the folder may go."""
    models = {
        policy: jettison.optimize(Path(folder) / "model", f"{shape.weights},cache-kv{{policy={policy}}}")
        for policy in policies
    }
    for model in models.values():
        _ = model.executor
    return models


def measure(shape: Shape, rounds: int) -> dict[str, Any]:
    """Figures of one shape."""
    figures: dict[str, Any] = {"shape": shape.about, "weights": shape.weights, "read_gb_per_s": read_bandwidth()}
    with tempfile.TemporaryDirectory(prefix="jettison-bench-") as folder:
        make_llama(Path(folder) / "model", shape.layers, max_position_embeddings=CONTEXT, **shape.sizes)
        # One lot after the other: each model has its weights in memory.
        figures |= measure_contexts(shape, compiled(folder, shape, ("full", *shape.policies)), rounds)
        if shape.flat:
            figures["mean_decode_ms_by_position"] = measure_flat(compiled(folder, shape, shape.flat), rounds)
    return figures


def measure_contexts(shape: Shape, models: dict[str, OptimizedModel], rounds: int) -> dict[str, Any]:
    """Decode time and state bytes by context and policy."""
    figures: dict[str, Any] = {}
    for tokens in CONTEXTS:
        sessions = {policy: filled(model, tokens) for policy, model in models.items()}
        times = step_ms(sessions, rounds, 8)
        found = figures[str(tokens)] = {}
        for policy, session in sessions.items():
            weights, states = weight_bytes_per_step(models[policy].graph, 1), session.state_bytes
            found[policy] = {"decode_ms": times[policy], "state_bytes": states, "weight_bytes_read": weights}
            whole = found["full"]
            found[policy]["times_faster"] = round(whole["decode_ms"] / times[policy], 3)
            found[policy]["times_less_state"] = round(whole["state_bytes"] / states, 2)
            # Our uncompressed states are in 32 bits.
            found[policy]["times_less_state_than_in_16_bits"] = round(whole["state_bytes"] / 2 / states, 2)
            bytes_ratio = (whole["weight_bytes_read"] + whole["state_bytes"]) / (weights + states)
            found[policy]["times_fewer_bytes"] = round(bytes_ratio, 3)
            print(shape.about, tokens, policy, found[policy], flush=True)
        del sessions
    return figures


def measure_flat(models: dict[str, OptimizedModel], rounds: int) -> dict[str, Any]:
    """Mean decode time early and late in a sequence, by policy."""
    found: dict[str, Any] = {}
    for policy, model in models.items():
        rows = {tokens: filled(model, tokens) for tokens in FLAT_POSITIONS}
        by_round = [{tokens: mean_ms(session, 32) for tokens, session in rows.items()} for _ in range(rounds + 1)][1:]
        means = {tokens: statistics.median(each[tokens] for each in by_round) for tokens in FLAT_POSITIONS}
        first, last = (means[tokens] for tokens in FLAT_POSITIONS)
        found[policy] = {**{str(tokens): round(ms, 3) for tokens, ms in means.items()}, "ratio": round(last / first, 3)}
        print(policy, found[policy], flush=True)
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    before = environment()
    figures = {name: measure(SHAPES[name], arguments.rounds) for name in arguments.shapes}
    print(write("kv_speed", figures, before))


if __name__ == "__main__":
    main()
