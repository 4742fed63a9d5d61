"""Kernels to machine code without a GPU; as a program it reads orders from standard input and answers on the output.

A process of its own: one in which kernels are interpreted cannot compile them, and a compiler that dies must not take
its user along.
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from jettison.codegen.triton.kernels.base import COMPILE_OPTIONS, ELEMENTS, Kernel, Tuning
from jettison.codegen.triton.source import define
from jettison.ir.errors import CodegenError, OptionError

_ARCH = re.compile(r"sm_(\d{2,3})")
_OLDEST_ARCH = 80
_DTYPES = {f"*{element}": dtype for dtype, element in ELEMENTS.items()}


@dataclass(frozen=True)
class Compiled:
    """A kernel as machine code.

    Attributes:
        name: Of the kernel.
        arch: Such as `sm_90`.
        registers: Of a thread.
        shared_bytes: Of a program, what is asked for at launch included.
        spill_bytes: Of a thread: what did not fit into registers.
        cubin: The code.
        metadata: What Triton notes beside it, JSON: how to launch it, and in `hash` what it was made of.
    """

    name: str
    arch: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    cubin: bytes
    metadata: str

    def as_dict(self) -> dict[str, Any]:
        """What `inspect` lists."""
        fields = asdict(self)
        del fields["cubin"], fields["metadata"]
        return fields


def check_archs(archs: Sequence[str]) -> None:
    """Check names of architectures.

    Raises:
        OptionError: One of them is none.
    """
    for arch in archs:
        found = _ARCH.fullmatch(arch)
        if found is None or int(found[1]) < _OLDEST_ARCH:
            raise OptionError(f"[arch] {arch!r}: needed architectures from sm_{_OLDEST_ARCH} on, such as sm_80,sm_90.")


def compile_ahead(kernels: Sequence[tuple[Kernel, Tuning]], archs: Sequence[str]) -> list[Compiled]:
    """Compile kernels for architectures that need not be there.

    Args:
        kernels: Each with the tile sizes that it is launched with.
        archs: Such as `sm_90`.

    Raises:
        CodegenError: One does not compile.
    """
    orders = [
        {"name": kernel.name, "source": kernel.source(), "signature": kernel.parameters, "tiles": dict(tuning.tiles),
         "warps": tuning.warps, "stages": tuning.stages, "arch": arch}
        for kernel, tuning in kernels
        for arch in archs
    ]  # fmt: skip
    if not orders:
        return []
    share = -(-len(orders) // min(os.cpu_count() or 1, len(orders)))
    parts = [orders[start : start + share] for start in range(0, len(orders), share)]
    with ThreadPoolExecutor(len(parts)) as pool:
        return [compiled for part in pool.map(_compile_all, parts) for compiled in part]


def _compile_all(orders: Sequence[dict[str, Any]]) -> list[Compiled]:
    """Compile in a process of its own."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    process = subprocess.run(
        [sys.executable, "-m", "jettison.codegen.triton.ahead_of_time"], input=json.dumps(orders), text=True,
        capture_output=True, env=environment, check=False,
    )  # fmt: skip
    results = [json.loads(line) for line in process.stdout.splitlines() if line.startswith("{")]
    if process.returncode or len(results) != len(orders):
        order = orders[min(len(results), len(orders) - 1)]
        reason = (process.stderr.strip().splitlines() or ["no message"])[-1]
        raise CodegenError(f"[triton] kernel {order['name']} does not compile for {order['arch']}: {reason}.")
    return [Compiled(**{**each, "cubin": base64.b64decode(each["cubin"])}) for each in results]


class _Driver:
    """Says which GPU there is, where there is none: Triton asks nothing else until it launches."""

    def __init__(self, arch: str) -> None:
        self._capability = int(arch.removeprefix("sm_"))

    def get_current_device(self) -> int:
        return self._capability  # compiled kernels are known by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._capability, 32)


def _compile(order: dict[str, Any]) -> dict[str, Any]:
    """Compile as a launch would, so that a launch finds what was compiled; see `machine_code`."""
    from triton.runtime import driver

    driver.set_active(_Driver(order["arch"]))
    # Pointers are as aligned as the tensors of PyTorch; of sizes the value does not matter.
    given = [_DTYPES[kind] if kind.startswith("*") else 0 for kind in order["signature"].values()]
    options = {"num_warps": order["warps"], "num_stages": order["stages"], **COMPILE_OPTIONS}
    kernel = define(order["source"], order["name"])
    compiled = kernel.warmup(*given, grid=(1,), **order["tiles"], **options)
    cubin = compiled.asm["cubin"]
    used = resource_usage(cubin)
    return {"name": order["name"], "arch": order["arch"], "registers": used["REG"],
            "shared_bytes": max(used["SHARED"], compiled.metadata.shared),
            "spill_bytes": max(used["STACK"], used["LOCAL"]),
            "cubin": base64.b64encode(cubin).decode(), "metadata": _metadata(compiled)}  # fmt: skip


def _metadata(compiled: Any) -> str:
    """As Triton's cache holds it."""
    path = next(path for name, path in compiled.metadata_group.items() if name.endswith(".json"))
    return Path(path).read_text()


def resource_usage(cubin: bytes) -> dict[str, int]:
    """What the disassembler in Triton's package says of a kernel: REG, STACK, SHARED, LOCAL and more."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory(prefix="jettison-") as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        shown = subprocess.run([tool, "--dump-resource-usage", path], check=True, capture_output=True, text=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", shown)}


def main() -> None:
    """Compile what standard input orders, and print a line for each."""
    for order in json.load(sys.stdin):
        sys.stdout.write(json.dumps(_compile(order)) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
