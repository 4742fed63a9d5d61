"""What an approximate language-model head costs and finds, beside the whole head.

    OMP_NUM_THREADS=1 python benchmarks/approximate_head.py --text FILE [--rounds 15]

1. Time of the head alone, of the size of Llama-3.2-1B's (V 128256, E 2048): random weights, one row, one thread, both
   targets. The whole head as it is and quantised, and approximated with each estimator, by which the best token is
   found. Hidden states point to a row of the head at a cosine of 0.3, so that there is a best token as text has one;
   the share of steps that fell back is noted. Every way runs once per round; medians. With all of them open, rows that
   an ONNX head reads one by one come from a file that has left the memory by then: `--ways` measures some alone.
2. On the bundled models and held-out text: how often the best token is among the candidates, how often that is proven,
   and how often both heads generate the same token.

Writes benchmarks/results/approximate_head.json; a part that is left out stays as it was.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, environment, write
from torch import Tensor, nn

import jettison
from jettison.codegen.onnx.emit import emit_program, weight_bytes
from jettison.evaluate import evaluate
from jettison.ir.capture import capture_module
from jettison.ir.program import Program, copy_graph
from jettison.passes.approximate_lm_head import ApproximateLmHead
from jettison.passes.base import Pass
from jettison.passes.decode_only import specialize_entries
from jettison.passes.pipeline import prepare
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime.approximate_head import Candidates
from jettison.runtime.executor import Executor
from jettison.runtime.onnx_executor import OnnxExecutor, OnnxGraph
from jettison.runtime.torch_executor import TorchExecutor

VOCAB, WIDTH, INPUTS, COSINE = 128256, 2048, 64, 0.3
MODELS = Path(__file__).resolve().parent.parent / "examples" / "models"
INT8_HEAD, INT4_HEAD = QuantizeWeights(8, 128, skip="embed"), QuantizeWeights(4, 128, skip="embed")
Step = Callable[[Tensor], bool]
"""Finds the best token of an input, and says whether that took the whole head."""


class HeadAlone(nn.Module):
    """A table of hidden states, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(INPUTS, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        with torch.no_grad():
            self.head.weight.normal_(std=0.02)
            to_row = torch.nn.functional.normalize(self.head.weight[:: VOCAB // INPUTS][:INPUTS])
            noise = torch.nn.functional.normalize(torch.randn(INPUTS, WIDTH))
            self.embed.weight.copy_(100 * (COSINE * to_row + (1 - COSINE**2) ** 0.5 * noise))

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[B, S]` ids to `[B, S, V]`."""
        return self.head(self.embed(input_ids))


def captured(module: nn.Module, passes: Sequence[Pass], dtype: torch.dtype) -> Program:
    """The head with entries as `cache-kv` makes them, without a cache."""
    program = capture_module(module, kind="decoder", context=64, dtype=dtype)
    prepare(program)
    ids = torch.arange(INPUTS)[None]
    usual = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "logits_positions": ids}
    program.calibration = lambda: [usual]
    for each in passes:
        each.run(program)
    entry = program.entries.pop("forward")
    program.entries = {"prefill": entry, "decode": copy_graph(entry)}
    specialize_entries(program, "benchmark")
    del program.entries["prefill"]
    return program


def onnx_executor(program: Program, folder: Path) -> Executor:
    """A session on one thread."""
    folder.mkdir()
    graphs = [
        OnnxGraph(each.path, each.entries, tuple(each.inputs), tuple(each.outputs), {})
        for each in emit_program(program, folder)
    ]
    return OnnxExecutor(graphs, program.info, {}, weight_bytes(program), threads=1)


def step_of(executor: Executor) -> Step:
    """One decode step of the head alone."""

    def step(token: Tensor) -> bool:
        inputs = {
            "input_ids": token, "attention_mask": torch.ones_like(token), "logits_positions": torch.zeros_like(token),
        }  # fmt: skip
        outputs = executor.run("decode", {name: inputs[name] for name in executor.entries["decode"].inputs}, {})
        if "logits" in outputs:
            outputs["logits"][0, 0].argmax()
            return False
        found = Candidates.of(outputs)
        found.best(1, executor)
        return found.bounds is not None and not bool(found.certified(1, with_reserve=True))

    return step


def head_times(rounds: int, ways: Sequence[str], root: Path) -> dict[str, Any]:
    """Milliseconds per step, and the share of steps that fell back."""
    pipelines: dict[str, Sequence[Pass]] = {
        "whole": [], "int8": [INT8_HEAD], "int4": [INT4_HEAD],
        "approximate int4": [ApproximateLmHead()],
        "approximate int4 of int8": [INT8_HEAD, ApproximateLmHead()],
        "approximate lowrank": [ApproximateLmHead(estimator="lowrank")],
        "approximate lowrank of int4": [INT4_HEAD, ApproximateLmHead(estimator="lowrank")],
    }  # fmt: skip
    module, steps = HeadAlone().eval(), {}
    for name, passes in pipelines.items():
        for target, dtype in (("onnx f32", torch.float32), ("torch bf16", torch.bfloat16)):
            way = f"{target} {name}"
            if ways and not any(each in way for each in ways):
                continue
            program = captured(module, passes, dtype)
            is_onnx = target.startswith("onnx")
            steps[way] = step_of(
                onnx_executor(program, root / way.replace(" ", "-")) if is_onnx else TorchExecutor(program)
            )
    taken: dict[str, list[float]] = {way: [] for way in steps}
    fallen: dict[str, int] = dict.fromkeys(steps, 0)
    for number in range(rounds + 2):
        token = torch.tensor([[number % INPUTS]])
        for way, step in steps.items():
            started = time.perf_counter()
            is_fallback = step(token)
            if number > 1:  # the first rounds warm up
                taken[way].append(1e3 * (time.perf_counter() - started))
                fallen[way] += is_fallback
    return {
        way: {"ms": round(statistics.median(times), 3), "fallbacks": fallen[way] / rounds}
        for way, times in taken.items()
    }


def quality(text: str, tokens: int, targets: Sequence[str]) -> dict[str, Any]:
    """What the approximate heads of the bundled models find."""
    found: dict[str, Any] = {}
    for name in ("tiny-llama", "tiny-opt"):
        whole = jettison.optimize(MODELS / name, "", target="torch")
        expected = whole.generate(text[:400], max_new_tokens=tokens)
        for target in targets:
            for pipeline in (
                "approximate-lm-head{candidates=16}", "approximate-lm-head",
                "approximate-lm-head{estimator=lowrank,rank=32}", "approximate-lm-head{estimator=lowrank}",
            ):  # fmt: skip
                model = jettison.optimize(MODELS / name, pipeline, target=target)
                measured = evaluate(model, text=text[:20000], context=256, prefill=32, reference=MODELS / name)
                found[f"{name} {target} {pipeline}"] = {
                    "tokens": measured.tokens,
                    "top1_agreement": measured.top1_agreement,
                    "certified_fraction": measured.certified_fraction,
                    "generates_the_same": model.generate(text[:400], max_new_tokens=tokens) == expected,
                }
    return found


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15, help="0 leaves the first part out")
    parser.add_argument("--text", type=Path, help="held-out text for the second part; without it there is none")
    parser.add_argument("--tokens", type=int, default=128, help="tokens that both heads generate")
    parser.add_argument("--targets", nargs="+", default=["torch", "onnx"], help="of the second part")
    parser.add_argument("--ways", nargs="*", default=(), help="only those whose names contain one of these")
    parser.add_argument("--print", action="store_true", help="show the figures and write nothing")
    chosen, before = parser.parse_args(), environment()
    torch.set_num_threads(1)
    path = RESULTS / "approximate_head.json"
    figures: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    figures.pop("environment", None)
    if chosen.rounds:
        with tempfile.TemporaryDirectory() as root:
            part = "some_heads" if chosen.ways else "head"
            figures[part] = {**head_times(chosen.rounds, chosen.ways, Path(root)), "environment": before}
    if chosen.text is not None:
        figures["quality"] = {**quality(chosen.text.read_text(), chosen.tokens, chosen.targets), "environment": before}
    print(figures if chosen.print else write("approximate_head", figures, before))


if __name__ == "__main__":
    main()
