"""A model larger than the memory of its GPU: weights that wait in pinned host memory or on disk, beside accelerate.

    PYTHONPATH=. python benchmarks/gpu_offload.py [--layers 32] [--device-gib 6] [--host-gib 6] [--tokens 16]
        [--prompt 128] [--tiny]

The shape is Llama-3.1-8B in bf16 with random weights, placed by `place-weights` within `--device-gib` of the GPU. A
step takes the token of the last one and ends when its own is read; steps of all contenders take turns. `copy_gb_per_s`
is what a step copies over its time, `plain_copy_gb_per_s` what one large copy from pinned memory reaches, and
`prediction_error` is predicted over measured less one. accelerate has the same limit, where it is installed. `--tiny`
runs a small shape on any machine, without peers, to see that the script works. Adds `offload` to
benchmarks/results/gpu-DEVICE.json.

`disk` is the same model with `--host-gib` of main memory, the process included, the rest of it on disk: `read_gb_per_s`
is what it reads in a step over its time, `read_share` that over the rate of direct reads measured before.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
from dataclasses import replace
from typing import Any

import torch
from gpu_decode import SHAPE, TINY, WARM_STEPS, Ours, interleaved, random_model, write_section
from record import environment

from jettison.ir.cost import call_costs
from jettison.ir.placement import READ_AHEAD_BYTES
from jettison.ir.program import Program
from jettison.ir.roofline import TYPICAL_CPU, TYPICAL_GPU, Rates, predict
from jettison.passes.cache_kv import CacheKV
from jettison.passes.pipeline import apply, prepare
from jettison.passes.place_weights import PlaceWeights
from jettison.runtime.machine import gpu_rates, machine_rates
from jettison.runtime.triton_executor import TritonExecutor
from jettison.source import open_source

GIB = 1 << 30


class Accelerate:
    """transformers with the layers that do not fit in host memory, moved by accelerate's hooks."""

    def __init__(self, model: Any, prompt: list[int], limit: int) -> None:
        from accelerate import dispatch_model, infer_auto_device_map
        from transformers import DynamicCache

        names = model._no_split_modules
        places = infer_auto_device_map(model, {0: limit, "cpu": 1 << 40}, no_split_module_classes=names)
        self._model, self._cache = dispatch_model(model, places), DynamicCache()
        self._token = self._run(torch.tensor([prompt], device="cuda"))

    @torch.no_grad()
    def _run(self, ids: torch.Tensor) -> torch.Tensor:
        logits = self._model(ids, past_key_values=self._cache, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
        token.item()
        return token.cuda()

    def step(self) -> None:
        """Append the last token, read the next one."""
        self._token = self._run(self._token)


def placed(program: Program, place: PlaceWeights) -> tuple[Program, TritonExecutor]:
    """A program with some of its weights elsewhere, and what runs it."""
    program = program.copy()
    apply(program, [CacheKV(), place])
    return program, TritonExecutor(program)


def predicted_milliseconds(program: Program, place: PlaceWeights, rates: Rates) -> float:
    """Of a decode step."""
    return 1e3 * predict(call_costs(program, "decode", place.workload(program)), rates, program.placement).seconds


def with_disk(captured: Program, place: PlaceWeights, prompt: list[int], tokens: int, rates: Rates) -> dict[str, Any]:
    """Measure a placement that has weights on disk, alone: another contender would wait for its reads."""
    program, executor = placed(captured, place)
    assert executor.stream is not None, "some are elsewhere"
    assert executor.stream.disk is not None, "host memory does not hold the rest"
    steps = {"jettison": Ours(executor, prompt, place.workload(program).context).step}
    interleaved(steps, 1)
    before = executor.stream.disk.statistics
    milliseconds = interleaved(steps, tokens)["jettison"]
    read = executor.stream.disk.statistics.since(before)
    per_step = read.bytes_taken / (WARM_STEPS + tokens)
    predicted = predicted_milliseconds(program, place, rates)
    return {
        "host_bytes": place.host, "milliseconds": milliseconds, "read_bytes_per_step": per_step,
        "copied_bytes_per_step": executor.stream.step_bytes, "restarts": read.restarts,
        "read_gb_per_s": per_step / milliseconds / 1e6, "direct_gb_per_s": rates.disk / 1e9,
        "read_share": per_step / milliseconds * 1e3 / rates.disk, "predicted_milliseconds": predicted,
        "prediction_error": predicted / milliseconds - 1,
    }  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--device-gib", type=float, default=6)
    parser.add_argument("--host-gib", type=float, default=6)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    if not arguments.tiny and not torch.cuda.is_available():
        raise SystemExit("no GPU on this machine: nothing was measured")
    before = environment()
    model = random_model(TINY if arguments.tiny else SHAPE, arguments.layers)
    dense_bytes = sum(each.nbytes for each in model.parameters())
    prompt = [index % model.config.vocab_size for index in range(arguments.prompt)]
    capacity = -(-(arguments.prompt + arguments.tokens + WARM_STEPS + 8) // 64) * 64
    # What it takes beside a model of the usual size is more than a tiny one.
    limit, reserve = (dense_bytes * 9 // 10, 1) if arguments.tiny else (int(arguments.device_gib * GIB), None)
    program = open_source(model, dtype="bfloat16").program
    program.target = "triton"
    prepare(program)
    place = PlaceWeights(device=limit, context=capacity, prompt=arguments.prompt, reserve=reserve)
    beside = TYPICAL_CPU.process_bytes + READ_AHEAD_BYTES + dense_bytes // 40
    beside = beside if arguments.tiny else int(arguments.host_gib * GIB)
    captured = program
    program, executor = placed(captured, place)
    assert executor.stream is not None, "not all of it fits"
    found: dict[str, Any] = {
        "layers": arguments.layers, "prompt": arguments.prompt, "tokens": arguments.tokens, "limit_bytes": limit,
        "weight_bytes": dense_bytes, "copied_bytes_per_step": executor.stream.step_bytes,
        "ring_bytes": executor.stream.nbytes,
    }  # fmt: skip
    steps = {"jettison": Ours(executor, prompt, capacity).step}
    if arguments.tiny:
        found["milliseconds"] = interleaved(steps, 2)
        found["disk"] = with_disk(captured, replace(place, host=beside), prompt, 2, TYPICAL_GPU)
        print(json.dumps(found, indent=2))
        return
    torch.cuda.reset_peak_memory_stats()
    interleaved(steps, 2)
    found["peak_bytes"] = torch.cuda.max_memory_allocated()
    rates, _ = gpu_rates(machine_rates())
    predicted = predicted_milliseconds(program, place, rates)
    if importlib.util.find_spec("accelerate"):
        steps["accelerate"] = Accelerate(model, prompt, limit).step
    times = interleaved(steps, arguments.tokens)
    copied = executor.stream.step_bytes / times["jettison"] / 1e6
    found |= {
        "milliseconds": times, "copy_gb_per_s": copied, "plain_copy_gb_per_s": rates.copy / 1e9,
        "copy_share": copied * 1e9 / rates.copy, "predicted_milliseconds": predicted,
        "prediction_error": predicted / times["jettison"] - 1,
    }  # fmt: skip
    del steps, executor
    found["disk"] = with_disk(captured, replace(place, host=beside), prompt, arguments.tokens, rates)
    print(write_section("offload", found, before))


if __name__ == "__main__":
    main()
