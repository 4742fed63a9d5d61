"""What every weight quantiser of this folder reads and writes; `weights_peers.py` calls them and scores what they make.

Each runs as `python run_TOOL.py MODEL_FOLDER REQUEST.json OUT_FOLDER` in the virtual environment of its tool.
REQUEST.json holds `settings` (a list; each has a `name`, and what the docstring of the script says) and `windows`
(lists of token ids: the calibration text, the same for every tool). For each setting it writes

- `NAME.safetensors`: the weights that the tool changed, dequantised, in fp32, under the names of the folder;
- `NAME.json`: versions, seconds, settings and bytes; or `error`, where the tool refused.

Needs torch and safetensors, nothing of jettison.
"""

from __future__ import annotations

import json
import platform
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

PARTS = ("codes", "scales", "zero_points", "other")


@dataclass
class Stored:
    """Bytes of one matrix in the file of the tool.

    Attributes:
        bits: Per code.
        group: Columns that share a scale.
        codes: Bytes of the codes, padding included.
        scales: Bytes of the scales.
        zero_points: Bytes of the zero points.
        other: Bytes of what else a reader needs: shapes, group indices, scales of input channels.
        floats: How many of these are floating-point numbers.
        float_itemsize: Bytes of one of them.
    """

    bits: int
    group: int
    codes: int
    scales: int
    zero_points: int = 0
    other: int = 0
    floats: int = 0
    float_itemsize: int = 2

    @property
    def total(self) -> int:
        """All of them."""
        return sum(getattr(self, part) for part in PARTS)


@dataclass
class Found:
    """What a tool made of a model under one setting.

    Attributes:
        weights: What it changed, dequantised, by the folder's names; norms too where it folded scales into them.
        stored: The matrices that it encoded, by the same names.
        dense_itemsize: Bytes per number of everything else in its file.
        notes: What a reader has to know.
    """

    weights: dict[str, Tensor]
    stored: dict[str, Stored]
    dense_itemsize: int
    notes: list[str] = field(default_factory=list)


def is_linear(name: str, weight: Tensor) -> bool:
    """Whether a tensor of a folder is the matrix of a linear inside a layer: no embedding, no head."""
    return weight.dim() == 2 and "embed" not in name and "lm_head" not in name


def table_name(weights: dict[str, Tensor]) -> str:
    """Name of the token embedding."""
    return next(name for name in weights if name.endswith(("embed_tokens.weight", "word_embeddings.weight")))


def read_weights(folder: str | Path) -> dict[str, Tensor]:
    """Every floating-point tensor of a folder, in fp32.

    Args:
        folder: Hugging Face folder with one safetensors file.
    """
    loaded = load_file(str(Path(folder) / "model.safetensors"))
    return {name: value.float() for name, value in loaded.items() if value.is_floating_point()}


def relative_error(weight: Tensor, decoded: Tensor) -> float:
    """Squared error over squared norm."""
    return ((weight - decoded).double().square().sum() / weight.double().square().sum()).item()


def _encoded_linears(original: dict[str, Tensor], found: Found) -> list[str]:
    return [name for name in found.stored if name in original and is_linear(name, original[name])]


def byte_counts(original: dict[str, Tensor], found: Found) -> dict[str, Any]:
    """Bytes of the linears and of the whole model, in full.

    In `linear_bytes_16` every scale counts as 16 bits, so that a tool that was given an fp32 model, and so keeps fp32
    scales, compares with one that keeps 16-bit ones. A head that was encoded beside its tied table counts on top of it.
    """
    names = _encoded_linears(original, found)
    linears, weights = [found.stored[name] for name in names], sum(original[name].numel() for name in names)
    linear_bytes = sum(each.total for each in linears)
    linear_bytes_16 = linear_bytes - sum(each.floats * (each.float_itemsize - 2) for each in linears)
    dense = sum(value.numel() for name, value in original.items() if name not in found.stored)
    return {
        "linear_weights": weights,
        "linear_bytes": linear_bytes,
        "linear_bytes_16": linear_bytes_16,
        "linear_bits_per_weight": round(8 * linear_bytes / max(1, weights), 4),
        "linear_bits_per_weight_16": round(8 * linear_bytes_16 / max(1, weights), 4),
        "parts": {part: sum(getattr(each, part) for each in found.stored.values()) for part in PARTS},
        "dense_parameters": dense,
        "dense_bytes": dense * found.dense_itemsize,
        "whole_bytes": dense * found.dense_itemsize + sum(each.total for each in found.stored.values()),
    }


def _errors(original: dict[str, Tensor], found: Found) -> dict[str, float]:
    """Relative errors of the decoded linears: largest and mean."""
    errors = [relative_error(original[name], found.weights[name]) for name in _encoded_linears(original, found)]
    return {"largest": max(errors), "mean": sum(errors) / len(errors)} if errors else {}


def serve(
    tool: str, packages: Sequence[str], quantise: Callable[[str, dict[str, Any], list[list[int]]], Found]
) -> None:
    """Do what the request on the command line asks for.

    Args:
        tool: Name in the results.
        packages: Distributions whose versions matter.
        quantise: `(model folder, setting, calibration windows)` to what the tool made of it.
    """
    folder, request_path, out = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    request = json.loads(request_path.read_text())
    original = read_weights(folder)
    versions = {name: version(name) for name in packages} | {"python": platform.python_version()}
    for setting in request["settings"]:
        about: dict[str, Any] = {"tool": tool, "versions": versions, "model": Path(folder).name, "setting": setting}
        start = time.perf_counter()
        try:
            found = quantise(folder, setting, request["windows"])
        except Exception as error:  # a peer's refusal is a result, of whatever class
            traceback.print_exc()
            about["error"] = f"{type(error).__name__}: {error}"
        else:
            about["seconds"] = round(time.perf_counter() - start, 2)
            about["bytes"] = byte_counts(original, found)
            about["encoded"] = sorted({f"{each.bits} bits, group {each.group}" for each in found.stored.values()})
            about["relative_error"] = _errors(original, found)
            about["notes"] = found.notes
            weights = {name: value.float().contiguous() for name, value in found.weights.items()}
            save_file(weights, str(out / f"{setting['name']}.safetensors"))
        (out / f"{setting['name']}.json").write_text(json.dumps(about, indent=2) + "\n")
        print(tool, setting["name"], about.get("error", about.get("relative_error")), file=sys.stderr, flush=True)
