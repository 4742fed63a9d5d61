"""Encoded weights of finished layers in a folder, so that an interrupted run goes on behind the last of them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from jettison.ir.errors import ArtifactError
from jettison.passes.formats import WeightFormat, format_from_text


@dataclass(frozen=True)
class Encoded:
    """A weight in a format.

    Attributes:
        format: The format, as it was adapted to the weight.
        shape: `(N, K)` of the weight.
        parts: By name, in tensors that take no anonymous memory where they are large.
    """

    format: WeightFormat
    shape: tuple[int, int]
    parts: dict[str, Tensor]

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight `[N, K]`, decoded."""
        return self.format.decode(self.parts, self.shape).to(dtype)


@dataclass(frozen=True)
class FinishedLayers:
    """A folder with one file per input whose linears are done; made when the first is.

    Attributes:
        folder: Belongs to this alone.
        identity: Of everything that the weights depend on: model, pipeline, calibration, versions. Files of another one
            are of no use and go when the first is written.
    """

    folder: Path
    identity: str

    def load(self, step: str, names: Sequence[str]) -> tuple[dict[str, Encoded], Tensor | None] | None:
        """What `store` was given, mapped from its file; None where there is none, or not a whole one.

        Args:
            step: Text of the pass.
            names: Of the weights.
        """
        found = self.load_tensors(step, names)
        if found is None:
            return None
        tensors, described = found
        encoded = {
            name: Encoded(
                format_from_text(each["format"]),
                (each["shape"][0], each["shape"][1]),
                {part: tensors[f"{name}.{part}"] for part in each["parts"]},
            )
            for name, each in described.items()
        }
        return encoded, tensors.get("scales")

    def store(self, step: str, encoded: Mapping[str, Encoded], scales: Tensor | None) -> None:
        """Keep the weights of one input.

        Args:
            step: Text of the pass.
            encoded: By name.
            scales: Factors of their columns, if they have any.

        Raises:
            ArtifactError: The folder cannot be written to.
        """
        tensors = {f"{name}.{part}": each for name, found in encoded.items() for part, each in found.parts.items()}
        described = {
            name: {"format": found.format.name, "shape": list(found.shape), "parts": list(found.parts)}
            for name, found in encoded.items()
        }
        self.store_tensors(step, list(encoded), tensors | ({} if scales is None else {"scales": scales}), described)

    def load_tensors(self, step: str, names: Sequence[str]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """What `store_tensors` was given, mapped from its file; None where there is none, or not a whole one.

        Args:
            step: Text of the pass.
            names: Of the weights that it is about.
        """
        path = self._path(step, names)
        if self._stored_identity() != self.identity or not path.is_file():
            return None
        try:
            with safe_open(path, "pt") as stored:
                described = json.loads(stored.metadata()["weights"])
                return {key: stored.get_tensor(key) for key in stored.keys()}, described  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, KeyError, ValueError):
            return None

    def store_tensors(
        self, step: str, names: Sequence[str], tensors: Mapping[str, Tensor], described: Mapping[str, Any]
    ) -> None:
        """Keep tensors that belong to some weights.

        Args:
            step: Text of the pass.
            names: Of the weights.
            tensors: By name.
            described: What else there is to know, as JSON.

        Raises:
            ArtifactError: The folder cannot be written to.
        """
        path = self._path(step, names)
        try:
            if self._stored_identity() != self.identity:
                shutil.rmtree(self.folder, ignore_errors=True)
                self.folder.mkdir(parents=True)
                (self.folder / "identity").write_text(self.identity)
            # Whole or not at all: the run may end at any moment.
            unfinished = path.with_suffix(".unfinished")
            save_file(dict(tensors), unfinished, {"weights": json.dumps(described)})
            os.replace(unfinished, path)
        except (OSError, SafetensorError) as error:
            raise ArtifactError(
                f"[resume] {self.folder}: finished layers cannot be kept there ({error}). Free some space, or write "
                "the artifact somewhere else."
            ) from error

    def _stored_identity(self) -> str | None:
        try:
            return (self.folder / "identity").read_text()
        except (OSError, UnicodeDecodeError):
            return None

    def _path(self, step: str, names: Sequence[str]) -> Path:
        key = hashlib.sha256(json.dumps([step, sorted(names)]).encode()).hexdigest()[:16]
        return self.folder / f"{key}.safetensors"
