"""What the kernels have in common: a name, parameters, a source, and the tile sizes that it may be launched with."""

from __future__ import annotations

import json
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from jettison.codegen.triton.source import HEADER, indented

# Types of elements in signatures of Triton, by dtype.
ELEMENTS = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.int32: "i32",
    torch.int16: "i16", torch.uint8: "u8",
}  # fmt: skip
# What kernels compute in.
COMPUTED = (torch.float32, torch.bfloat16, torch.float16)
# Said, because the default changes with Triton 3.10.
COMPILE_OPTIONS = {"enable_fp_fusion": True}
TRITON_TYPES = {
    torch.float32: "tl.float32", torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16", torch.int32: "tl.int32",
}  # fmt: skip


@dataclass(frozen=True)
class Tuning:
    """Tile sizes of a launch.

    Attributes:
        tiles: Value of each compile-time parameter.
        warps: Of a program.
        stages: Loads in flight in pipelined loops.
    """

    tiles: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 1

    @classmethod
    def of(cls, warps: int = 4, stages: int = 1, **tiles: int) -> Tuning:
        """From keywords."""
        return cls(tuple(tiles.items()), warps, stages)

    def __getitem__(self, name: str) -> int:
        return dict(self.tiles)[name]


class Kernel(ABC):
    """A kernel with everything fixed but sizes that grow and the tuning."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Of the function, unique among kernels."""

    @property
    @abstractmethod
    def parameters(self) -> dict[str, str]:
        """Type in Triton's signatures by parameter, in order; compile-time ones are those of the tunings."""

    @abstractmethod
    def body(self) -> str:
        """Lines of the function, indented."""

    @property
    @abstractmethod
    def title(self) -> str:
        """What it computes, one line."""

    @abstractmethod
    def tunings(self) -> list[Tuning]:
        """What may be the fastest; the first is the default."""

    def widest(self) -> Tuning:
        """For Triton's interpreter, which pays per program, whatever its size."""
        return self.tunings()[0]

    @abstractmethod
    def grid(self, tuning: Tuning, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Programs of a launch.

        Args:
            tuning: Tile sizes.
            sizes: Values of the integer parameters, and what else the kernel asks for by name.
        """

    def source(self) -> str:
        """The module that defines the kernel."""
        constants = [f"{name}: tl.constexpr" for name, _ in self.tunings()[0].tiles]
        arguments = textwrap.wrap(", ".join(self.parameters) + ",", 110) + [", ".join(constants) + ","] * bool(
            constants
        )
        signature = f"def {self.name}(\n{indented(arguments)}\n):"
        # One machine code for all sizes: what is compiled ahead is what runs.
        sizes = [name for name, kind in self.parameters.items() if not kind.startswith("*")]
        jit = f"@triton.jit(do_not_specialize={json.dumps(sizes)})" if sizes else "@triton.jit"
        return f'"""{self.title}"""\n\n{HEADER}\n\n{jit}\n{signature}\n{self.body()}\n'


def name_of(number: float) -> str:
    """A number as a part of the name of a kernel."""
    return f"{number:.6g}".replace(".", "p").replace("-", "m").replace("+", "")


def lines(*given: Any) -> list[str]:
    """Lines of a block; lists among them are opened, what is empty is left out."""
    flat: list[str] = []
    for each in given:
        flat.extend(each if isinstance(each, list) else [each] if each else [])
    return flat


def block(*given: Any, depth: int = 1) -> str:
    """Lines of a block as text."""
    return indented(lines(*given), depth)


def deeper(given: list[str]) -> list[str]:
    """Lines one level further in."""
    return ["    " + line for line in given]
