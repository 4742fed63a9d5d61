"""Whole decode steps on a GPU: int4 with our kernels, beside bf16 compiled by torch and int4 of torchao, in one run.

    PYTHONPATH=. python benchmarks/gpu_decode.py [--layers 32] [--tokens 64] [--prompt 128] [--tiny]

The shape is Llama-3.1-8B with random weights, which speed does not depend on. A step takes the token of the last one
and ends when its own is read. Steps of all contenders take turns. `--tiny` runs a small shape on any machine, without
peers, to see that the script works. Adds `decode` to benchmarks/results/gpu-DEVICE.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_kernels import file_name
from record import RESULTS, environment, write
from torch import nn

import jettison
from jettison.runtime.session import Session
from jettison.runtime.triton_executor import TritonExecutor
from jettison.runtime.tunings import measure, stopwatch

BF16 = torch.bfloat16
SHAPE = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "tie_word_embeddings": False,
}  # fmt: skip
TINY = {**SHAPE, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2,
        "vocab_size": 128, "max_position_embeddings": 256}  # fmt: skip
PASSES = "quantize-weights{bits=4,group=128}"
WARM_STEPS = 8


def random_model(shape: dict[str, Any], layers: int) -> Any:
    """A Llama whose weights are drawn once, in bf16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=layers)).to(BF16)
    # Angles are computed when the model is made, and have to be computed somewhere.
    rotary = type(model.model.rotary_emb)(model.config)
    model = model.to_empty(device="cpu").eval()
    model.model.rotary_emb = rotary
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.02, 0.02) if parameter.dim() > 1 else nn.init.ones_(parameter)
    return model


class Ours:
    """Our session, which picks the best token on the device."""

    def __init__(self, executor: TritonExecutor, prompt: list[int], capacity: int) -> None:
        self._session = Session(executor, 1, capacity)
        self._token = int(self._session.prefill([prompt]).argmax())

    def step(self) -> None:
        """Append the last token, read the next one."""
        _, tokens = self._session.decode_best([self._token], 1)
        self._token = int(tokens)


class Compiled:
    """transformers with a static cache, its forward compiled."""

    def __init__(self, model: Any, prompt: list[int], capacity: int) -> None:
        from transformers import StaticCache

        self._cache = StaticCache(config=model.config, max_cache_len=capacity)
        ids = torch.tensor([prompt], device="cuda")
        with torch.no_grad():
            logits = model(ids, past_key_values=self._cache, use_cache=True).logits
        self._token, self._position = logits[:, -1:].argmax(-1), len(prompt)
        self._forward = torch.compile(model.forward, mode="max-autotune", fullgraph=True)

    @torch.no_grad()
    def step(self) -> None:
        """Append the last token, read the next one."""
        place = torch.tensor([[self._position]], device="cuda")
        logits = self._forward(
            self._token, position_ids=place, cache_position=place[0], past_key_values=self._cache, use_cache=True
        ).logits
        self._token, self._position = logits[:, -1:].argmax(-1).clone(), self._position + 1
        self._token.item()


def interleaved(steps: dict[str, Callable[[], None]], count: int) -> dict[str, float]:
    """Median milliseconds of a step of each."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(WARM_STEPS + count):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if index >= WARM_STEPS:
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(each) for name, each in times.items()}


def busy(step: Callable[[], None], count: int = 5) -> dict[str, float]:
    """Kernels of a step, and the share of it in which none runs."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        for _ in range(count):
            step()
        torch.cuda.synchronize()
    kernels = [event for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    first, last = min(each.time_range.start for each in kernels), max(each.time_range.end for each in kernels)
    running = sum(each.time_range.elapsed_us() for each in kernels)
    return {"kernels": len(kernels) / count, "idle_share": max(0.0, 1 - running / (last - first))}


def write_section(section: str, found: dict[str, Any], before: dict[str, Any]) -> Path:
    """Add figures to the file of this GPU, or replace them there."""
    path = RESULTS / f"{file_name()}.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    known.pop("environment", None)
    return write(file_name(), {**known, section: found}, before)


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("no GPU on this machine: nothing was measured")
    before = environment()
    model = random_model(TINY if arguments.tiny else SHAPE, arguments.layers)
    dense_bytes = sum(each.nbytes for each in model.parameters())
    prompt = [index % model.config.vocab_size for index in range(arguments.prompt)]
    capacity = arguments.prompt + arguments.tokens + WARM_STEPS + 64
    passes = PASSES.replace("128", "32") if arguments.tiny else PASSES
    executor = jettison.optimize(model, passes, target="triton", dtype="bfloat16").executor
    assert isinstance(executor, TritonExecutor), "the target"
    found: dict[str, Any] = {"layers": arguments.layers, "prompt": arguments.prompt, "tokens": arguments.tokens,
                             "passes": passes, "bf16_weight_bytes": dense_bytes,
                             "weight_bytes": executor.weight_bytes}  # fmt: skip
    if arguments.tiny:
        found["milliseconds"] = interleaved({"int4": Ours(executor, prompt, capacity).step}, 2)
        print(json.dumps(found, indent=2))
        return
    measure(executor, stopwatch())
    torch.cuda.reset_peak_memory_stats()
    ours = Ours(executor, prompt, capacity)
    interleaved({"int4": ours.step}, 2)
    found["peak_bytes"] = torch.cuda.max_memory_allocated()
    found["step"] = busy(ours.step)
    found["recording_refused"] = None if executor.recorded is None else executor.recorded.refusal
    dense = model.cuda()
    contenders = {"int4": ours.step, "bf16 compiled": Compiled(dense, prompt, capacity).step}
    found["milliseconds"] = interleaved(contenders, arguments.tokens)
    print(json.dumps(found, indent=2), flush=True)
    try:
        from torchao.quantization import Int4WeightOnlyConfig, quantize_
    except ImportError:
        found["torchao"] = "not installed"
    else:
        torch._dynamo.reset()
        quantize_(dense, Int4WeightOnlyConfig(group_size=128))
        contenders = {"int4": ours.step, "torchao int4 compiled": Compiled(dense, prompt, capacity).step}
        found["torchao"] = interleaved(contenders, arguments.tokens)
    print(write_section("decode", found, before))


if __name__ == "__main__":
    main()
