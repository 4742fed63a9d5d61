"""Launches kernels: on a GPU as Triton compiles them, without one as its interpreter runs them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jettison.codegen.triton.interpreter import mend_products
from jettison.codegen.triton.kernels.base import COMPILE_OPTIONS, Kernel, Tuning
from jettison.codegen.triton.source import define
from jettison.ir.errors import UnsupportedError

INTERPRET = "TRITON_INTERPRET"


def choose_device() -> torch.device:
    """The GPU, or the CPU with Triton's interpreter: slow, and the same numbers.

    Raises:
        UnsupportedError: There is no GPU, and Triton was imported without its interpreter.
    """
    if torch.cuda.is_available():
        return torch.device("cuda")
    if "triton" not in sys.modules:
        os.environ.setdefault(INTERPRET, "1")
    if os.environ.get(INTERPRET) != "1":
        raise UnsupportedError(
            f"[triton] no GPU was found, and Triton is loaded without its interpreter. Set {INTERPRET}=1 to run "
            "kernels on the CPU (very slowly), or take --target onnx or torch."
        )
    mend_products()
    return torch.device("cpu")


class Launcher:
    """A kernel ready to be launched.

    Args:
        kernel: Which.
        tuning: Its tile sizes; default the kernel's own.
    """

    def __init__(self, kernel: Kernel, tuning: Tuning | None = None) -> None:
        self.kernel = kernel
        self.tuning = tuning or (kernel.widest() if os.environ.get(INTERPRET) == "1" else kernel.tunings()[0])
        self._function = _defined(kernel)
        launched = {"num_warps": self.tuning.warps, "num_stages": self.tuning.stages, **COMPILE_OPTIONS}
        self._options = {**dict(self.tuning.tiles), **launched}

    def __call__(self, *tensors: Tensor, sizes: Mapping[str, int]) -> None:
        """Launch.

        Args:
            *tensors: In the order of the kernel's pointers.
            sizes: See `Kernel.grid`.
        """
        integers = [sizes[name] for name, kind in self.kernel.parameters.items() if not kind.startswith("*")]
        grid = self.kernel.grid(self.tuning, sizes)
        self._function[grid](*tensors, *integers, **self._options)


@functools.cache
def _defined(kernel: Kernel) -> Any:
    return define(kernel.source(), kernel.name)
