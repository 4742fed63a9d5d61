"""Machine code of the Triton kernels without a GPU: registers, spills, and instructions per weight.

    python benchmarks/kernel_code.py [--arch sm_90]

A linear layer on one row is limited by the memory only if its instructions keep up: a multiprocessor of an H100 issues
four instructions for 32 lanes in a cycle, and at full bandwidth (3.35 TB/s over 132 multiprocessors at 1.7 GHz) 15
bytes of weights arrive in it. `issue_share` is the part of the issue slots that decoding at that rate would take: above
1 the kernel cannot reach the bandwidth. Writes benchmarks/results/kernel_code.json.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import triton
from record import environment, write

from jettison.codegen.triton.ahead_of_time import compile_ahead
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.kernels.gemv import Gemv
from jettison.codegen.triton.kernels.weight_form import WeightForm

COLUMNS, ROWS = 4096, 14336
BYTES_PER_CYCLE, SLOTS_PER_CYCLE = 15.0, 128.0
BF16, HALF = torch.bfloat16, torch.float16
# Behind every kernel stands a jump to itself.
_LEAST_LOOP = 16
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P[0-9T]+ )?([A-Z0-9_]+)")
_LABEL, _BRANCH = re.compile(r"^(\.L_x_\d+):"), re.compile(r"BRA\S* .*`\((\.L_x_\d+)\)")


def instructions(cubin: bytes) -> tuple[Counter[str], bool]:
    """Instructions by name: of the longest loop, or of all where a row is one step and no loop is left; and which."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        lines = subprocess.run([tool, "-c", path], check=True, capture_output=True, text=True).stdout.splitlines()
    labels: dict[str, int] = {}
    longest: Counter[str] = Counter()
    for index, line in enumerate(lines):
        if found := _LABEL.match(line):
            labels[found[1]] = index
        jump = _BRANCH.search(line)
        if jump is not None and jump[1] in labels:
            body = Counter(name[1] for each in lines[labels[jump[1]] : index + 1] if (name := _INSTRUCTION.match(each)))
            longest = max(longest, body, key=lambda counted: counted.total())
    if longest.total() >= _LEAST_LOOP:
        return longest, True
    return Counter(name[1] for line in lines if (name := _INSTRUCTION.match(line))), False


def main() -> None:
    """Compile, count and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", default="sm_90")
    arguments = parser.parse_args()
    before = environment()
    gated = Epilogue(activation="silu", is_gated=True)
    kernels = [
        Gemv(WeightForm(HALF, bits, 128, has_offsets), COLUMNS, ROWS, BF16, eps, after)
        for bits in (8, 4, 3, 2)
        for has_offsets in (True, False)
        for eps, after in ((None, Epilogue()), (1e-5, gated))
    ]
    orders = [(kernel, tuning) for kernel in kernels for tuning in kernel.tunings()]
    rows: list[dict[str, Any]] = []
    for (kernel, tuning), compiled in zip(orders, compile_ahead(orders, [arguments.arch]), strict=True):
        counted, is_loop = instructions(compiled.cubin)
        halves = 2 if kernel.epilogue.is_gated else 1
        words = tuning["BLOCK_W"] if is_loop else kernel.weight.row_words(COLUMNS)
        codes = halves * tuning["BLOCK_N"] * words * kernel.weight.fields / (32 * tuning.warps)
        per_code = counted.total() / codes
        codes_per_cycle = BYTES_PER_CYCLE * 8 / kernel.weight.bits
        rows.append({
            **compiled.as_dict(), "tuning": str(tuning), "instructions_per_weight": round(per_code, 2),
            "issue_share": round(per_code * codes_per_cycle / SLOTS_PER_CYCLE, 2),
            "loop": dict(counted.most_common(8)),
        })  # fmt: skip
        print(rows[-1], flush=True)
    print(write("kernel_code", {"arch": arguments.arch, "columns": COLUMNS, "rows": ROWS, "kernels": rows}, before))


if __name__ == "__main__":
    main()
