"""Tile sizes that were fastest on this GPU: measured once, kept in the user's cache and in artifacts.

A file is a JSON object of `gpu` and `triton`, which say what it was measured with, and `kernels`: by name, which holds
the operator, its sizes and types, the `tiles`, `warps` and `stages` of the fastest launch and its `microseconds`. It is
advice: what does not fit the kernels of this version is passed over, and wrong numbers make nothing but slow launches.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from jettison.codegen.triton.kernels.base import Tuning
from jettison.codegen.triton.launch import Stopwatch
from jettison.ir.errors import ArtifactError, UnsupportedError
from jettison.runtime.cache_folder import cache_folder
from jettison.runtime.session import Session
from jettison.runtime.triton_executor import TritonExecutor

# Rows of a batch that stands for those that decode together, and tokens of a prompt that stands for prompts.
_ROWS, _PROMPT = 4, 512
_STEPS = 2


def gpu_name() -> str:
    """Of the GPU here; `none` without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "none"


def tunings_path() -> Path:
    """The file of this GPU and version of Triton in the user's cache."""
    import triton

    slug = re.sub(r"[^a-z0-9]+", "-", f"{gpu_name()}-triton-{triton.__version__}".lower())
    return cache_folder() / "tunings" / f"{slug}.json"


def known_tunings(*documents: Mapping[str, Any] | None) -> dict[str, Tuning]:
    """Tunings by kernel of those documents that were measured with this GPU and Triton; later ones win."""
    import triton

    found: dict[str, Tuning] = {}
    for document in documents:
        if not isinstance(document, Mapping) or (document.get("gpu"), document.get("triton")) != (
            gpu_name(),
            triton.__version__,
        ):
            continue
        kernels = document.get("kernels")
        for name, each in kernels.items() if isinstance(kernels, dict) else ():
            tuning = _tuning(each)
            if tuning is not None:
                found[name] = tuning
    return found


def _tuning(entry: Any) -> Tuning | None:
    """What an entry says, or None if it is not sound."""
    try:
        return Tuning.of(int(entry["warps"]), int(entry["stages"]), **{
            str(name): int(size) for name, size in entry["tiles"].items()
        })  # fmt: skip
    except (TypeError, KeyError, ValueError, AttributeError):
        return None


def cached_tunings() -> dict[str, Any] | None:
    """The document of the user's cache, or None."""
    try:
        document = json.loads(tunings_path().read_text())
    except (OSError, ValueError):
        return None
    return document if isinstance(document, dict) else None


def stopwatch() -> Stopwatch:
    """Measures with the L2 cache flushed in between: a step meets each weight once.

    Raises:
        UnsupportedError: There is no GPU.
    """
    if not torch.cuda.is_available():
        raise UnsupportedError(
            "[tune] no GPU was found: which tile sizes are fastest can only be measured on the GPU that will run them. "
            "Do without; kernels have defaults."
        )
    from triton.testing import do_bench

    return lambda launch: 1e3 * do_bench(launch, warmup=5, rep=20, return_mode="median")


def measure(executor: TritonExecutor, watch: Stopwatch) -> dict[str, Any]:
    """Try all tunings of the kernels that prompts, single rows and batches launch; the executor keeps the fastest.

    Args:
        executor: Of a decoder.
        watch: What measures a launch.

    Returns:
        The document of the module's text.
    """
    import triton

    executor.measure(watch)
    try:
        prompt = [index % executor.info.vocab_size for index in range(min(_PROMPT, executor.info.context // 2))]
        for batch in (1, _ROWS):
            session = Session(executor, batch, min(len(prompt) + 64, executor.info.context))
            session.prefill([prompt] * batch)
            for step in range(_STEPS):
                session.decode([step % executor.info.vocab_size] * batch)
                session.decode_best([step % executor.info.vocab_size] * batch, 1)
    finally:
        executor.measure(None)
    kernels = {}
    for name, times in executor.measured.items():
        best = min(times, key=lambda tuning: times[tuning])
        kernels[name] = {"tiles": dict(best.tiles), "warps": best.warps, "stages": best.stages,
                         "microseconds": round(times[best], 2)}  # fmt: skip
    return {"gpu": gpu_name(), "triton": triton.__version__, "kernels": kernels}


def keep(document: Mapping[str, Any]) -> Path:
    """Add a document to the user's cache; kernels that it names are replaced.

    Returns:
        The file.

    Raises:
        ArtifactError: It cannot be written.
    """
    path = tunings_path()
    before = cached_tunings() or {}
    known = before.get("kernels")
    merged = {**document, "kernels": {**(known if isinstance(known, dict) else {}), **document["kernels"]}}
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            aside.write_text(json.dumps(merged, indent=1))
            os.replace(aside, path)
        finally:
            aside.unlink(missing_ok=True)
    except OSError as error:
        raise ArtifactError(
            f"[tune] {path}: cannot be written: {error.strerror or error}. Set JETTISON_CACHE to a folder that may be "
            "written to."
        ) from error
    return path
