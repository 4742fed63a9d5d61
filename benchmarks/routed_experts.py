"""What a layer of routed experts costs, by how it runs: kernels, linears over all tokens, gathered stacks.

    OMP_NUM_THREADS=1 python benchmarks/routed_experts.py [--rounds 15]

One layer of 16 experts, 1024 wide inside and out, two for each token; random weights, one thread. Every way runs once
per round, so that they share what the machine does besides; medians. Writes benchmarks/results/routed_experts.json.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import onnxruntime
import torch
import torch.nn.functional as F
from record import environment, write
from torch import Tensor, nn

from jettison.codegen.onnx import routed_experts
from jettison.codegen.onnx.emit import emit_program
from jettison.ir.capture import capture_module
from jettison.ir.ops import experts
from jettison.ir.program import Program
from jettison.passes.pipeline import prepare
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime.torch_executor import TorchExecutor

EXPERTS, WIDTH, INNER, CHOICES, VOCAB = 16, 1024, 1024, 2, 64
TOKENS = (1, 64, 512)
# Copying the stacks of each token takes 24 MB per token.
MOST_GATHERED = 1
Run = Callable[[Tensor], object]


class Layer(nn.Module):
    """Experts behind a router; `gathered` copies the stacks that were chosen, as a graph without an operator would."""

    def __init__(self, *, gathered: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gathered = gathered
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.router = nn.Parameter(torch.randn(EXPERTS, WIDTH))
        self.gate_up = nn.Parameter(torch.randn(EXPERTS, 2 * INNER, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, INNER) / INNER**0.5)

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[B, S]` ids to `[B, S, E]`."""
        x = self.embed(input_ids).reshape(-1, WIDTH)
        weights, indices = torch.softmax(F.linear(x, self.router), -1).topk(CHOICES)
        if not self.gathered:
            return experts(x, indices, weights, self.gate_up, self.down, "silu").reshape(*input_ids.shape, WIDTH)
        gate, up = (self.gate_up[indices] @ x[:, None, :, None]).chunk(2, 2)
        out = (self.down[indices] @ (F.silu(gate) * up)).squeeze(-1) * weights[..., None]
        return out.sum(1).reshape(*input_ids.shape, WIDTH)


def captured(bits: int | None = None, **options: Any) -> Program:
    """The layer, quantised or not."""
    program = capture_module(Layer(**options).eval(), kind="encoder", context=1024)
    prepare(program)
    if bits is not None:
        QuantizeWeights(bits, skip="embed").run(program)
    return program


def onnx_run(program: Program, folder: Path, accuracy_level: int = 4, *, fused: bool = True) -> Run:
    """A session on one thread."""
    folder.mkdir()
    is_fused = routed_experts.is_fused if fused else lambda node: False
    with mock.patch.object(routed_experts, "is_fused", is_fused):
        graph = emit_program(program, folder, accuracy_level=accuracy_level)[0]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    session = onnxruntime.InferenceSession(str(graph.path), options)
    return lambda ids: session.run(None, {"input_ids": ids.numpy()})


def torch_run(program: Program) -> Run:
    """The torch target."""
    executor = TorchExecutor(program)
    return lambda ids: executor.run("forward", {"input_ids": ids}, {})


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    rounds, before = parser.parse_args().rounds, environment()
    torch.set_num_threads(1)
    dense, eight, four = captured(), captured(8), captured(4)
    with tempfile.TemporaryDirectory() as root:
        to = Path(root)
        ways: dict[str, Run] = {
            "onnx f32 MoE": onnx_run(dense, to / "moe"),
            "onnx f32 gathered stacks": onnx_run(captured(gathered=True), to / "gathered"),
            "onnx int8 QMoE": onnx_run(eight, to / "qmoe8"),
            "onnx int4 QMoE": onnx_run(four, to / "qmoe4"),
            "onnx int4 QMoE, accuracy level 0": onnx_run(four, to / "qmoe40", 0),
            "onnx int4 linears over all tokens": onnx_run(four, to / "linears", fused=False),
            "torch f32": torch_run(dense),
            "torch int8": torch_run(eight),
            "torch int4": torch_run(four),
        }
        found: dict[str, dict[str, float]] = {name: {} for name in ways}
        for tokens in TOKENS:
            ids = torch.randint(VOCAB, (1, tokens))
            taken: dict[str, list[float]] = {}
            for number in range(rounds + 1):
                for name, run in ways.items():
                    if "gathered" in name and tokens > MOST_GATHERED:
                        continue
                    started = time.perf_counter()
                    run(ids)
                    if number:  # the first round warms up
                        taken.setdefault(name, []).append(1e3 * (time.perf_counter() - started))
            for name, times in taken.items():
                found[name][f"{tokens} tokens"] = round(statistics.median(times), 3)
    weights = {"f32": dense.weight_bytes(), "int8": eight.weight_bytes(), "int4": four.weight_bytes()}
    print(write("routed_experts", {"latency_ms": found, "weight_bytes": weights}, before))


if __name__ == "__main__":
    main()
