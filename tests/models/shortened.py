"""The models that come with the repository, with their first layers only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

from jettison.ir.match import layer_index

MODELS = Path(__file__).parents[2] / "examples" / "models"


def shortened(name: str, layers: int, folder: Path) -> Path:
    """Write a model with its first layers and its tokenizer into a folder: emitting ONNX takes time for every layer."""
    folder.mkdir(exist_ok=True)
    for file in (MODELS / name).iterdir():
        if file.suffix == ".json":
            shutil.copy(file, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": layers}))
    weights = load_file(MODELS / name / "model.safetensors")
    kept = {key: value for key, value in weights.items() if (layer_index(key) or 0) < layers}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder
