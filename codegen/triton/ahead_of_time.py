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

from jettison.codegen.triton.kernels.base import COMPILE_OPTIONS, Kernel, Tuning
from jettison.codegen.triton.source import define
from jettison.ir.errors import CodegenError, OptionError

_ARCH = re.compile(r"sm_(\d{2,3})")
_OLDEST_ARCH = 80
# Addresses that the runtime hands over are multiples of this many bytes; loads are vectors because of it.
ALIGNMENT_BYTES = 16


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
    """

    name: str
    arch: str
    registers: int
    shared_bytes: int
    spill_bytes: int
    cubin: bytes

    def as_dict(self) -> dict[str, Any]:
        """What `inspect` lists."""
        fields = asdict(self)
        del fields["cubin"]
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


def _compile(order: dict[str, Any]) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = define(order["source"], order["name"])
    pointers = [index for index, kind in enumerate(order["signature"].values()) if kind.startswith("*")]
    source = ASTSource(
        fn=kernel,
        signature={**order["signature"], **dict.fromkeys(order["tiles"], "constexpr")},
        constexprs=order["tiles"],
        attrs={(index,): [["tt.divisibility", ALIGNMENT_BYTES]] for index in pointers},
    )
    target = GPUTarget("cuda", int(order["arch"].removeprefix("sm_")), 32)
    options = {"num_warps": order["warps"], "num_stages": order["stages"], **COMPILE_OPTIONS}
    compiled = triton.compile(source, target=target, options=options)
    cubin = compiled.asm["cubin"]
    used = resource_usage(cubin)
    return {"name": order["name"], "arch": order["arch"], "registers": used["REG"],
            "shared_bytes": max(used["SHARED"], compiled.metadata.shared),
            "spill_bytes": max(used["STACK"], used["LOCAL"]),
            "cubin": base64.b64encode(cubin).decode()}  # fmt: skip


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
