"""GPTQ, AWQ and rounding by llm-compressor: `python run_llm_compressor.py MODEL_FOLDER REQUEST.json OUT_FOLDER`.

Runs in a virtual environment of its own:

    python3.11 -m venv llmc && llmc/bin/pip install torch==2.13.0 llmcompressor==0.14.0.1

See `weight_files.py` for what goes in and out. A setting has `method` (`gptq`, `awq` or `rtn`), `bits`, `group`,
`symmetric`, `dtype` (of the model that is quantised, hence of its scales), `whole` (the head too: it ties no more), and
perhaps `actorder`, `dampening` and `observer`, whose defaults are the tool's.

The model is saved compressed; its bytes are those of that file, and the weights are what transformers makes of that
folder by compressed-tensors, converted to fp32.

Without an accelerator its AWQ stops at `pin_memory`, which it calls on every cached tensor and which torch refuses
there. Nothing is copied to a device on such a machine, so `pin_memory` is made to return the tensor.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.core import reset_session
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from loguru import logger
from safetensors import safe_open
from torch import Tensor
from weight_files import Found, Stored, is_linear, read_weights, serve

HEAD = "lm_head.weight"
# Parts of a compressed linear, by the end of their names.
PARTS = {
    "weight_packed": "codes", "weight_scale": "scales", "weight_zero_point": "zero_points", "weight_shape": "other",
    "weight_g_idx": "other",
}  # fmt: skip


def recipe(setting: dict[str, Any]) -> list[Any]:
    """The modifiers of a setting."""
    weights: dict[str, Any] = {
        "num_bits": setting["bits"], "type": "int", "symmetric": setting["symmetric"], "strategy": "group",
        "group_size": setting["group"],
    }  # fmt: skip
    if "observer" in setting:
        weights["observer"] = setting["observer"]
    shared = {
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": [] if setting["whole"] else ["lm_head"],
    }
    if setting["method"] == "gptq":
        given = {"actorder": "actorder", "dampening_frac": "dampening"}
        options = {theirs: setting[ours] for theirs, ours in given.items() if ours in setting}
        return [GPTQModifier(**shared, **options)]
    if setting["method"] == "awq":
        return [AWQModifier(), QuantizationModifier(**shared)]
    if setting["method"] == "rtn":
        return [QuantizationModifier(**shared)]
    raise ValueError(f"method={setting['method']!r}: needs gptq, awq or rtn")


def open_model(folder: str, **options: Any) -> Any:
    """The model of a folder, decoder or encoder."""
    config = transformers.AutoConfig.from_pretrained(folder)
    is_decoder = any("CausalLM" in name for name in config.architectures)
    cls = transformers.AutoModelForCausalLM if is_decoder else transformers.AutoModel
    return cls.from_pretrained(folder, **options)


def compress(folder: str, setting: dict[str, Any], windows: list[list[int]], out: str) -> None:
    """Write the compressed model."""
    model = open_model(folder, dtype=getattr(torch, setting["dtype"]))
    if setting["whole"]:
        # The tool warns that a tied head would carry the table along; as its advice goes, they part first.
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    calibration = Dataset.from_dict({"input_ids": windows, "attention_mask": [[1] * len(each) for each in windows]})
    reset_session()
    needs_data = setting["method"] != "rtn"
    options: dict[str, Any] = {}
    if needs_data:
        options = {
            "dataset": calibration, "num_calibration_samples": len(windows), "max_seq_length": len(windows[0]),
            "shuffle_calibration_samples": False, "batch_size": 8,
        }  # fmt: skip
    oneshot(model=model, recipe=recipe(setting), tie_word_embeddings=not setting["whole"], **options)
    model.save_pretrained(out, save_compressed=True)


def skip_pinning() -> None:
    """See the module docstring."""
    if not torch.accelerator.is_available():
        Tensor.pin_memory = lambda self, *_: self


def stored_parts(out: str, setting: dict[str, Any]) -> tuple[dict[str, Stored], int]:
    """Bytes of each encoded matrix in a compressed folder, and the item size of what is dense in it."""
    stored: dict[str, Stored] = {}
    itemsize = 4
    for path in sorted(Path(out).glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a dictionary
                module, _, part = name.rpartition(".")
                value = file.get_tensor(name)
                if part not in PARTS:
                    itemsize = value.itemsize
                    continue
                each = stored.setdefault(f"{module}.weight", Stored(setting["bits"], setting["group"], 0, 0))
                setattr(each, PARTS[part], getattr(each, PARTS[part]) + value.nbytes)
                if value.is_floating_point():
                    each.floats, each.float_itemsize = each.floats + value.numel(), value.itemsize
    return stored, itemsize


def loaded_weights(out: str) -> dict[str, Tensor]:
    """What transformers reads from a compressed folder."""
    config = transformers.CompressedTensorsConfig(run_compressed=False)
    model = open_model(out, dtype=torch.float32, quantization_config=config)
    with torch.no_grad():
        return {name: value.float() for name, value in model.state_dict().items() if value.is_floating_point()}


def quantise(folder: str, setting: dict[str, Any], windows: list[list[int]]) -> Found:
    """See the module docstring."""
    original = read_weights(folder)
    out = tempfile.mkdtemp()
    try:
        compress(folder, setting, windows, out)
        stored, itemsize = stored_parts(out, setting)
        loaded = loaded_weights(out)
    finally:
        shutil.rmtree(out, ignore_errors=True)
    missing = [name for name, value in original.items() if is_linear(name, value) and name not in stored]
    notes = [f"left alone: {len(missing)} linears, such as {missing[0]}"] if missing else []
    changed = {name: loaded[name] for name in stored}
    # AWQ folds its scales into norms, or into the linear before.
    folded = [name for name in original if name not in stored and not torch.equal(original[name], loaded[name])]
    if folded:
        notes.append(f"changed too: {len(folded)} tensors, such as {folded[0]}")
    return Found(changed | {name: loaded[name] for name in folded}, stored, itemsize, notes)


if __name__ == "__main__":
    skip_pinning()
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    transformers.utils.logging.disable_progress_bar()
    serve("llm-compressor", ("llmcompressor", "compressed-tensors", "transformers", "torch"), quantise)
