"""Launches kernels: on a GPU as Triton compiles them, without one as its interpreter runs them."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from jettison.codegen.triton.interpreter import mend
from jettison.codegen.triton.kernels.base import COMPILE_OPTIONS, Kernel, Tuning
from jettison.codegen.triton.source import define
from jettison.ir.errors import UnsupportedError

INTERPRET = "TRITON_INTERPRET"
Stopwatch = Callable[[Callable[[], object]], float]
"""Microseconds of a launch."""


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
    mend()
    return torch.device("cpu")


class Launcher:
    """A kernel ready to be launched.

    Args:
        kernel: Which.
        tuning: Its tile sizes; default the kernel's own.

    Attributes:
        kernel: Which.
        tuning: Its tile sizes.
        stopwatch: While tunings are tried, what measures them.
        times: Microseconds of the tunings that were tried.
    """

    def __init__(self, kernel: Kernel, tuning: Tuning | None = None) -> None:
        self.kernel = kernel
        self.tuning = tuning or (kernel.widest() if os.environ.get(INTERPRET) == "1" else kernel.tunings()[0])
        self.stopwatch: Stopwatch | None = None
        self.times: dict[Tuning, float] = {}
        self._function = _defined(kernel)

    def largest(self, count: Callable[[Tuning], int]) -> int:
        """What scratch has to be made for: of the tuning, and of all of them while they are tried."""
        return max(map(count, [self.tuning, *(self.kernel.tunings() if self.stopwatch else ())]))

    def __call__(self, *tensors: Tensor, sizes: Mapping[str, int]) -> None:
        """Launch.

        Args:
            *tensors: In the order of the kernel's pointers.
            sizes: See `Kernel.grid`.
        """
        integers = [sizes[name] for name, kind in self.kernel.parameters.items() if not kind.startswith("*")]
        if self.stopwatch is not None and not self.times:
            self._try_all(self.stopwatch, [*tensors, *integers], sizes)
        self._launch(self.tuning, [*tensors, *integers], sizes)

    def _launch(self, tuning: Tuning, given: Sequence[Tensor | int], sizes: Mapping[str, int]) -> None:
        options = {"num_warps": tuning.warps, "num_stages": tuning.stages, **COMPILE_OPTIONS}
        self._function[self.kernel.grid(tuning, sizes)](*given, **dict(tuning.tiles), **options)

    def _try_all(self, stopwatch: Stopwatch, given: Sequence[Tensor | int], sizes: Mapping[str, int]) -> None:
        """Keep the fastest tuning. A launch may be repeated: kernels read nothing that they write."""
        for tuning in self.kernel.tunings():
            self.times[tuning] = stopwatch(functools.partial(self._launch, tuning, given, sizes))
        self.tuning = min(self.times, key=lambda tuning: self.times[tuning])


class Launchers:
    """A launcher for each kernel of a program.

    Args:
        tunings: By name of a kernel, where they are known.
    """

    def __init__(self, tunings: Mapping[str, Tuning] | None = None) -> None:
        self._tunings = dict(tunings or {})
        self._launchers: dict[str, Launcher] = {}
        self._stopwatch: Stopwatch | None = None

    def __call__(self, kernel: Kernel) -> Launcher:
        """The launcher of a kernel, with a known tuning if it is still one that the kernel has."""
        if kernel.name not in self._launchers:
            known = self._tunings.get(kernel.name)
            self._launchers[kernel.name] = Launcher(kernel, known if known in kernel.tunings() else None)
            self._launchers[kernel.name].stopwatch = self._stopwatch
        return self._launchers[kernel.name]

    def measure(self, stopwatch: Stopwatch | None) -> None:
        """From now on, try all tunings of a kernel at its next launch; None to stop."""
        self._stopwatch = stopwatch
        for launcher in self._launchers.values():
            launcher.stopwatch = stopwatch

    @property
    def measured(self) -> dict[str, dict[Tuning, float]]:
        """Microseconds of the tunings of each kernel that was launched meanwhile."""
        return {name: launcher.times for name, launcher in self._launchers.items() if launcher.times}


@functools.cache
def _defined(kernel: Kernel) -> Any:
    return define(kernel.source(), kernel.name)
