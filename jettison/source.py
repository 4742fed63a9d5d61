"""What `optimize` is given: a model folder or a module, and the files that belong to it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from jettison.ir.capture import capture, capture_module
from jettison.ir.checkpoint import Checkpoint
from jettison.ir.errors import OptionError
from jettison.ir.packing_config import QUANTIZATION_KEYS
from jettison.ir.program import Program
from jettison.ir.progress import track

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class ModelSource:
    """A model before optimisation.

    Attributes:
        name: For the report: the folder's name, or the class.
        program: The captured program.
        config: Contents of config.json, or an empty dict.
        generation_config: Contents of generation_config.json, or an empty dict.
        tokenizer_files: Files to copy into an artifact, with their path relative to the folder.
        folder: The model folder, if there is one.
        module: The module, if it was given one.
        content_hash: SHA-256 of config and weights, if there is a folder.
        weight_bytes: Bytes of the weights as stored.
        calibration_sha256: Of the text that passes were calibrated or checked on, if one was given.
    """

    name: str
    program: Program
    config: dict[str, Any] = field(default_factory=dict)
    generation_config: dict[str, Any] = field(default_factory=dict)
    tokenizer_files: list[tuple[Path, Path]] = field(default_factory=list)
    folder: Path | None = None
    module: nn.Module | None = None
    content_hash: str | None = None
    weight_bytes: int = 0
    calibration_sha256: str | None = None


def open_source(model: nn.Module | str | Path, *, dtype: str = "float32", context: int | None = None) -> ModelSource:
    """Capture a model folder or a module.

    Args:
        model: A Hugging Face folder, a transformers model, or a module whose forward takes `input_ids`.
        dtype: What the graph computes in: `float32`, `bfloat16` or `float16`.
        context: Most positions of a sequence: fewer than the model has, or for a module that does not say.

    Raises:
        CaptureError: The model cannot be read or captured.
        OptionError: An unknown dtype.
    """
    if dtype not in DTYPES:
        raise OptionError(f"[optimize] dtype={dtype!r}: needed one of {', '.join(DTYPES)}.")
    if isinstance(model, nn.Module):
        return _from_module(model, DTYPES[dtype], context)
    return _from_folder(Path(model), DTYPES[dtype], context)


def _from_folder(folder: Path, dtype: torch.dtype, context: int | None) -> ModelSource:
    from jettison.ir.huggingface import source_from_checkpoint

    checkpoint = Checkpoint.open(folder)
    with track("check weights", checkpoint.total_bytes) as advance:
        checkpoint.require_finite(on_progress=_advancing(advance))
    with track("hash weights", checkpoint.total_bytes) as advance:
        content_hash = checkpoint.content_hash(on_progress=_advancing(advance))
    with track("capture", 1) as advance:
        program = capture(source_from_checkpoint(checkpoint), dtype)
        advance(1)
    if context is not None:
        if not 1 <= context <= program.info.context:
            raise OptionError(
                f"[optimize] context={context}: needs 1 to {program.info.context}, the positions that "
                f"{program.info.name} was made for. Leave it out for the most."
            )
        program.info = replace(program.info, context=context)
    files = [(path, path.relative_to(checkpoint.folder)) for path in checkpoint.tokenizer_files()]
    return ModelSource(
        checkpoint.folder.name,
        program,
        # What is packed is in our layout now, which readers of the artifact's config.json must not take for the tool's.
        {key: value for key, value in checkpoint.config.items() if key not in QUANTIZATION_KEYS},
        checkpoint.generation_config,
        tokenizer_files=files,
        folder=checkpoint.folder,
        content_hash=content_hash,
        weight_bytes=checkpoint.total_bytes,
    )


def _advancing(advance: Any) -> Any:
    """A progress function of (done, total) from one of increments."""
    done = 0

    def report(now: int, total: int) -> None:
        nonlocal done
        advance(now - done)
        done = now

    return report


def _from_module(module: nn.Module, dtype: torch.dtype, context: int | None) -> ModelSource:
    with track("capture", 1) as advance:
        if hasattr(module, "config") and hasattr(module, "set_attn_implementation"):
            from jettison.ir.huggingface import source_from_model

            program = capture(source_from_model(module), dtype)
            config = json.loads(module.config.to_json_string(use_diff=False))
            generation = getattr(module, "generation_config", None)
            generation_config = {} if generation is None else json.loads(generation.to_json_string())
        else:
            program = capture_module(module, context=context, dtype=dtype)
            config, generation_config = {}, {}
        advance(1)
    return ModelSource(
        type(module).__name__, program, config, generation_config, module=module, weight_bytes=program.weight_bytes()
    )
