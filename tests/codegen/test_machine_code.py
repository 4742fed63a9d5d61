"""Machine code that was compiled ahead is what Triton takes when a kernel is launched."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from jettison.codegen.triton.ahead_of_time import Compiled, compile_ahead
from jettison.codegen.triton.kernels.rotary_write import RotaryWrite
from jettison.codegen.triton.machine_code import StoredKernel, restore
from jettison.ir.errors import ArtifactError

BF16 = torch.bfloat16
KERNEL = RotaryWrite(4, 2, 32, 32, False, BF16, BF16)
ARCH = "sm_90"
# Launches without a GPU: a driver that says which one there is, and a launch that ends when the code is there.
LAUNCH = """
import sys
from pathlib import Path

import torch
from triton import knobs
from triton.runtime import driver

from jettison.codegen.triton.ahead_of_time import _Driver
from jettison.codegen.triton.kernels.base import COMPILE_OPTIONS
from jettison.codegen.triton.machine_code import StoredKernel, restore
from jettison.codegen.triton.source import define
from tests.codegen.test_machine_code import KERNEL


driver.set_active(_Driver("sm_90"))
if sys.argv[1]:
    print(restore([StoredKernel(KERNEL.name, Path(sys.argv[1]), Path(sys.argv[2]))]))
hits = []
knobs.compilation.listener = lambda cache_hit, **_: hits.append(cache_hit)
elements = {"*bf16": torch.bfloat16, "*fp32": torch.float32, "*i64": torch.int64}
given = [
    torch.empty(64, dtype=elements[kind]) if kind.startswith("*") else size
    for size, kind in zip((0,) * 9 + (1, 128, 128, 17, 64), KERNEL.parameters.values(), strict=True)
]
tuning = KERNEL.tunings()[0]
options = {"num_warps": tuning.warps, "num_stages": tuning.stages, **COMPILE_OPTIONS}
define(KERNEL.source(), KERNEL.name).warmup(*given, grid=(1,), **dict(tuning.tiles), **options)
print(hits)
"""


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return compile_ahead([(KERNEL, KERNEL.tunings()[0])], [ARCH])[0]


def stored(compiled: Compiled, folder: Path, **changed: str) -> StoredKernel:
    (folder / "k.cubin").write_bytes(compiled.cubin)
    (folder / "k.json").write_text(json.dumps({**json.loads(compiled.metadata), **changed}))
    return StoredKernel(compiled.name, folder / "k.cubin", folder / "k.json")


def test_a_launch_finds_it_whatever_the_sizes(compiled, tmp_path):
    files = stored(compiled, tmp_path)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).parents[2]
    lines = []
    for index, given in enumerate([(files.cubin, files.metadata), ("", "")]):
        environment |= {"TRITON_CACHE_DIR": str(tmp_path / str(index)), "PYTHONPATH": str(root)}
        done = subprocess.run(
            [sys.executable, "-c", LAUNCH, *map(str, given)], capture_output=True, text=True, check=False,
            env=environment,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        lines.append(done.stdout.split("\n")[:-1])
    assert lines == [["None", "[True]"], ["[False]"]]


def test_another_version_of_triton_does_not_use_it(compiled, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    reason = restore([stored(compiled, tmp_path, triton_version="3.0.0")])
    assert reason.startswith("they were compiled with Triton 3.0.0, and ")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("changed", [{"name": "another"}, {"hash": "../../x"}])
def test_notes_of_something_else_are_refused(compiled, tmp_path, changed):
    with pytest.raises(ArtifactError, match="notes of another kernel"):
        restore([stored(compiled, tmp_path, **changed)])


def test_notes_that_are_none_are_refused(compiled, tmp_path):
    kernel = stored(compiled, tmp_path)
    kernel.metadata.write_text("{")
    with pytest.raises(ArtifactError, match="not what Triton notes"):
        restore([kernel])
