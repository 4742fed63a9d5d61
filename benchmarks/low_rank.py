"""What low ranks lose and save: an encoder, a decoder beside quantisation, and the time and memory of factorising.

    python benchmarks/low_rank.py --text FILE --calibration FILE [--minilm FOLDER] [--only SECTION ...]

`minilm`: all-MiniLM-L6-v2 from FOLDER, every linear of its layers factored: cosine of the mean-pooled embeddings of 128
pieces of FILE, of 64 tokens each, to those of the whole model, by method and share of the parameters; the mean and the
lowest tenth.

`llama`: the bundled tiny-llama, its linears alone (the token table, which is the head, stays): KL from dense on text
it was not trained on, and bytes of these linears, of plain low ranks, of 8 bits and of 3, and of 3 bits with a low rank
beside them.

`cost`: `optimize` in a process of its own on the shape of Llama-3.2-1B with random weights and the calibration that it
has by default: seconds, and the peak of anonymous memory against the folder.

Writes benchmarks/results/low_rank.json (sections that are not asked for stay).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from compile_cost import ROOT, run
from contextual_sparsity import GATED_MODEL, WINDOW, WINDOWS, Scorer, calibrated
from random_models import make_llama
from record import RESULTS, environment, write
from torch import Tensor

from jettison.api import parse_passes
from jettison.ir.interpret import run_entry
from jettison.ir.program import Program, input_placeholders
from jettison.runtime.tokenizer import load_tokenizer
from jettison.sample_text import framed_tokens, load_text, load_windows

SECTIONS = ("minilm", "llama", "cost")
RATIOS = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
METHODS = ("svd", "asvd", "svd-llm")
PIECES, PIECE = 128, 64
FACTORS_IN_INT8 = "quantize-weights{bits=8,group=32,only='columns|rows'}"
LLAMA = {
    "int8, groups of 128": "quantize-weights{bits=8,group=128,skip='embed'}",
    "int3, groups of 128": "quantize-weights{bits=3,group=128,skip='embed'}",
    "int3, groups of 64": "quantize-weights{bits=3,group=64,skip='embed'}",
    "int3, groups of 32": "quantize-weights{bits=3,group=32,skip='embed'}",
    "int3 by gptq, groups of 128": "quantize-weights{bits=3,group=128,method=gptq,skip='embed'}",
    "int3 by gptq, groups of 32": "quantize-weights{bits=3,group=32,method=gptq,skip='embed'}",
    "int3 and rank 4": "factorize-linear{rank=4,residual=int3}",
    "int3 and rank 8": "factorize-linear{rank=8,residual=int3}",
    "int3 and rank 16": "factorize-linear{rank=16,residual=int3}",
    "int3 to nearest and rank 8, by svd": "factorize-linear{rank=8,residual=int3,method=svd}",
    "int3 and rank 16 in int8": f"factorize-linear{{rank=16,residual=int3}},{FACTORS_IN_INT8}",
    **{f"low rank, {each}": f"factorize-linear{{ratio={each}}}" for each in (0.5, 0.7, 0.9)},
    "low rank, 0.7, nothing shared": "factorize-linear{ratio=0.7,share=false}",
    "low rank, 0.7, svd": "factorize-linear{ratio=0.7,method=svd}",
    "low rank, 0.7, asvd": "factorize-linear{ratio=0.7,method=asvd}",
    "low rank, auto, bytes of 0.7": "factorize-linear{rank=auto,budget=BYTES}",
    "low rank, 0.7, in int8": f"factorize-linear{{ratio=0.7}},{FACTORS_IN_INT8}",
}
SECONDS_LIMIT, PEAK_SHARE = 25 * 60.0, 0.8


def pooled(program: Program, pieces: Tensor) -> Tensor:
    """Mean-pooled embeddings of pieces of text `[P, S]`, all tokens real: `[P, E]`, of length one."""
    given = {
        "input_ids": pieces, "attention_mask": torch.ones_like(pieces), "token_type_ids": torch.zeros_like(pieces),
        "position_ids": torch.arange(pieces.shape[1])[None].expand_as(pieces),
    }  # fmt: skip
    wanted = input_placeholders(program.entries["forward"])
    hidden = run_entry(program, "forward", {name: given[name] for name in wanted})[0]
    return F.normalize(hidden.mean(1).double(), dim=-1)


def minilm(folder: Path, text: Path, calibration: Path) -> dict[str, Any]:
    """Cosines over methods and ratios."""
    program = calibrated(calibration, folder)
    front, tokens, behind = framed_tokens(load_tokenizer(folder), load_text(text))
    own = PIECE - len(front) - len(behind)
    step = (len(tokens) - own) // PIECES
    pieces = torch.tensor([[*front, *tokens[i * step : i * step + own], *behind] for i in range(PIECES)])
    dense = pooled(program, pieces)
    found: dict[str, Any] = {"weight_bytes": program.weight_bytes(), "pieces": PIECES, "tokens_of_each": PIECE}
    for method in METHODS:
        found[method] = {}
        for ratio in RATIOS:
            copy = program.copy()
            for pass_ in parse_passes(f"factorize-linear{{method={method},ratio={ratio}}}"):
                record = pass_.run(copy)
            cosines = (pooled(copy, pieces) * dense).sum(-1)
            found[method][str(ratio)] = {
                "cosine": round(float(cosines.mean()), 4),
                "cosine_lowest_tenth": round(float(cosines.quantile(0.1)), 4),
                "linears": record.rewrites,
                "weight_bytes": copy.weight_bytes(),
            }
            print(method, ratio, found[method][str(ratio)], flush=True)
    return found


def llama(text: Path, calibration: Path) -> dict[str, Any]:
    """KL beside bytes."""
    program = calibrated(calibration, GATED_MODEL)
    windows = [torch.tensor(ids) for ids in load_windows(text, load_tokenizer(GATED_MODEL), WINDOW)[:WINDOWS]]
    scorer = Scorer(program, windows)
    others = program.weight_bytes() - linear_bytes(program)
    found: dict[str, Any] = {"model": GATED_MODEL.name, "linear_bytes": linear_bytes(program)}
    for name, pipeline in LLAMA.items():
        copy = program.copy()
        budget = others + int(0.7 * found["linear_bytes"])
        records = [pass_.run(copy) for pass_ in parse_passes(pipeline.replace("BYTES", str(budget)))]
        found[name] = {
            "pipeline": pipeline.replace("BYTES", str(budget)), "linear_bytes": copy.weight_bytes() - others,
            **scorer.score(copy), "seconds": round(sum(record.seconds for record in records), 1),
        }  # fmt: skip
        print(name, found[name], flush=True)
    return found


def linear_bytes(program: Program) -> int:
    """Stored bytes of the matrices of the layers."""
    used = program.used_constants().items()
    return sum(each.stored_bytes for name, each in used if len(each.shape) == 2 and "embed" not in name)


def cost(calibration: Path, layers: int) -> dict[str, Any]:
    """What factorising takes."""
    pipeline = "factorize-linear{ratio=0.5}"
    with tempfile.TemporaryDirectory(prefix="jettison-bench-") as scratch:
        model, out = Path(scratch) / "model", Path(scratch) / "out"
        make_llama(model, layers)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(ROOT / "examples" / "models" / "tiny-llama" / name, model)
        folder_bytes = sum(each.stat().st_size for each in model.iterdir())
        figures = run(model, out, pipeline, "--calibration", str(calibration))
    share = round(int(str(figures["peak_anon_bytes"])) / folder_bytes, 3)
    return {
        "layers": layers, "pipeline": pipeline, "folder_bytes": folder_bytes, **figures,
        "peak_anon_share_of_folder": share,
        "limits": {"seconds": SECONDS_LIMIT, "peak_anon_share_of_folder": PEAK_SHARE},
    }  # fmt: skip


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, type=Path)
    parser.add_argument("--calibration", required=True, type=Path)
    parser.add_argument("--minilm", type=Path, help="folder of all-MiniLM-L6-v2")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=[])
    parser.add_argument("--layers", type=int, default=16, help="of the model for cost")
    arguments = parser.parse_args()
    wanted = arguments.only or [name for name in SECTIONS if name != "minilm" or arguments.minilm is not None]
    if "minilm" in wanted and arguments.minilm is None:
        parser.error("minilm needs --minilm FOLDER")
    before = environment()
    sections: dict[str, Callable[[], dict[str, Any]]] = {
        "minilm": lambda: minilm(arguments.minilm, arguments.text, arguments.calibration),
        "llama": lambda: llama(arguments.text, arguments.calibration),
        "cost": lambda: cost(arguments.calibration, arguments.layers),
    }
    path = RESULTS / "low_rank.json"
    for name in wanted:
        measured = {**sections[name](), "environment": before}
        figures = json.loads(path.read_text()) if path.exists() else {}
        figures.pop("environment", None)
        figures[name] = measured
        print(write("low_rank", figures, before), flush=True)


if __name__ == "__main__":
    main()
