"""Programs of several kinds, and where they are saved."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from jettison.ir.capture import capture
from jettison.ir.huggingface import open_checkpoint, source_from_model
from jettison.ir.program import MissRecord, PassRecord, Program
from jettison.ir.serialize import save_program
from jettison.passes.cache_kv import CacheKV
from jettison.passes.pipeline import apply, prepare
from jettison.passes.policies import Full, Window
from jettison.passes.quantize_weights import QuantizeWeights
from tests.helpers import Embedded, export_body, export_tiny

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
PROGRAMS = (
    "captured", "prepared", "full", "window", "quantised", "encoder captured", "encoder prepared", "gpt2 captured",
    "gpt2 prepared", "literals",
)  # fmt: skip

needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="memory is sampled from Linux's /proc")
Json = dict[str, Any]


@cache
def built(name: str) -> Program:
    """A program of each kind; not to be changed."""
    if name == "literals":
        return export_body(_literals)
    if name.endswith("prepared") or name in ("full", "window", "quantised"):
        before = {"full": "prepared", "window": "prepared", "quantised": "prepared"}.get(name)
        program = built(before or name.replace("prepared", "captured").strip()).copy()
        if before is None:
            prepare(program)
        passes = {"full": [CacheKV(Full())], "window": [CacheKV(Window(size=100))]}
        passes["quantised"] = [QuantizeWeights(bits=4, group=32, skip="mlp"), QuantizeWeights(bits=8), CacheKV(Full())]
        apply(program, passes.get(name, []))
        return program
    import transformers

    torch.manual_seed(0)
    if name == "captured":
        source = open_checkpoint(TINY_LLAMA)[1]
    elif name == "encoder captured":
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = transformers.BertConfig(vocab_size=99, max_position_embeddings=64, **small)
        source = source_from_model(transformers.BertModel(config))
    else:
        config = transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=99, n_positions=64, bos_token_id=0, eos_token_id=0
        )
        source = source_from_model(transformers.GPT2LMHeadModel(config))
    source.eager = None
    return capture(source)


def _literals(_: Any, hidden: Tensor) -> Tensor:
    """A body whose graph has every kind of argument."""
    batch, length, width = hidden.shape
    filled = torch.full((batch, max(length * 3 // 2, 1), width), -math.inf, dtype=torch.float64)
    kept = hidden[:, torch.arange(length, device="cpu")]
    smooth = nn.functional.gelu(hidden.clamp(min=-math.inf, max=1e-30), approximate="tanh")
    smooth = smooth.clone(memory_format=torch.contiguous_format)
    zeros = torch.zeros((batch, length), dtype=torch.int64, layout=torch.strided, device="cpu")
    finite = torch.nan_to_num(filled.sum(1, keepdim=True), nan=0.5, posinf=math.inf, neginf=-0.0)
    return smooth + kept + finite.to(torch.float32) + zeros[..., None]


def saved(program: Program, folder: Path) -> tuple[Path, Path]:
    files = folder / "program.json", folder / "weights.safetensors"
    save_program(program, *files)
    return files


@cache
def small_program() -> Program:
    """Of four nodes; not to be changed."""
    program = export_tiny(Embedded(nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 61))))
    program.pipeline = "quantize-weights{bits=4}"
    record = PassRecord("cache-kv", 2, [MissRecord("layer 1", "kept full")], 1.5, 10, 5, 1, math.inf, None)
    program.history = [record]
    return program
