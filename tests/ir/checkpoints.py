"""Model folders as `Checkpoint` reads them, and how their files are damaged."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import torch
from safetensors.torch import save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
FOLDER = "a model folder with config.json and safetensors weights"


def write_model(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)} if tensors is None else tensors, folder / SINGLE)
    return folder


def write_shards(folder: Path, **weight_map: str) -> Path:
    """Tensor `a` in the first shard, `b` in the second; the index says what `weight_map` says."""
    write_model(folder)
    (folder / SINGLE).unlink()
    save_file({"a": torch.zeros(2)}, folder / SHARDS[0])
    save_file({"b": torch.ones(3), "extra": torch.ones(1)}, folder / SHARDS[1])
    index = {"metadata": {}, "weight_map": weight_map or {"a": SHARDS[0], "b": SHARDS[1]}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def raw_weights(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one_tensor(**fields: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields}
