"""Artifacts whose weights are streamed: stored once, the same model again, within their memory, and checked."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from safetensors import safe_open

import jettison
import jettison.bench
from jettison.artifact_files import PROGRAM_FILE, STREAM_FILE, STREAM_TABLE_FILE, WEIGHTS_FILE
from jettison.ir.constants import StreamedConstant
from jettison.ir.errors import ArtifactError, UnsupportedError
from jettison.ir.placement import Placement
from jettison.ir.program import MissRecord, Program
from jettison.ir.serialize import load_program
from jettison.passes.base import Pass
from jettison.passes.cache_kv import CacheKV
from jettison.passes.quantize_weights import QuantizeWeights
from jettison.runtime.device_store import DeviceStore, device_table_as_dict, device_table_from_dict
from jettison.runtime.triton_executor import TritonExecutor

RING = 1 << 20


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class OnDisk(Pass):
    """Stream every matrix."""

    name: ClassVar[str] = "on-disk"
    ring_bytes: int = RING
    only: str = ""

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        used = program.used_constants()
        names = [name for name, constant in used.items() if len(constant.shape) > 1 and self.only in name]
        program.placement = Placement(dict.fromkeys(names, "disk"), ring_bytes=self.ring_bytes)
        return len(names), []


@pytest.fixture(scope="module", params=[(), (QuantizeWeights(bits=4, group=32),)], ids=["dense", "int4"])
def passes(request: pytest.FixtureRequest) -> list[Pass]:
    return [*request.param, CacheKV()]


@pytest.fixture(scope="module")
def expected(two_layers: Path, passes: list[Pass]) -> str:
    return jettison.optimize(two_layers, passes, target="torch").generate("The captain", max_new_tokens=12)


@pytest.fixture(scope="module")
def saved(two_layers: Path, passes: list[Pass], expected: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Not to be changed. It has run before it was saved."""
    model = jettison.optimize(two_layers, [*passes, OnDisk()], target="torch")
    assert model.generate("The captain", max_new_tokens=12) == expected
    model.executor.stream.close()
    return model.save_pretrained(tmp_path_factory.mktemp("streamed") / "artifact")


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "artifact"))


def test_loading_gives_the_same_text(saved: Path, expected: str) -> None:
    model = jettison.load(saved, verify=True)
    assert model.generate("The captain", max_new_tokens=12) == expected
    assert model.executor.stream.statistics.restarts == 0
    model.executor.stream.close()


def test_bench_says_what_was_streamed(saved: Path) -> None:
    model = jettison.load(saved)
    found = jettison.bench.bench(model, prompt_tokens=4, new_tokens=3, rounds=1)
    table = json.loads((saved / STREAM_TABLE_FILE).read_text())
    assert found["streamed_bytes_per_step"] == sum(
        -(-table["segments"][number]["bytes"] // 4096) * 4096 for number in table["order"]
    )
    assert found["stream_gb_per_s"] > 0
    assert 0 <= found["stream_overlap"] <= 1
    assert found["stream_restarts"] == 0
    model.executor.stream.close()


def test_streamed_weights_are_stored_once(saved: Path) -> None:
    table = json.loads((saved / STREAM_TABLE_FILE).read_text())
    with safe_open(saved / WEIGHTS_FILE, "pt") as weights:
        assert all("norm" in name or "rotary" in name for name in weights.keys())  # noqa: SIM118
    program = load_program(saved / "program.json", saved / WEIGHTS_FILE, metadata=False)
    streamed = [constant for constant in program.constants.values() if isinstance(constant, StreamedConstant)]
    assert program.placement is not None
    assert {constant.name for constant in streamed} == set(program.placement.tiers)
    stored = sum(constant.stored_bytes for constant in streamed)
    tied = sum(constant.stored_bytes for constant in streamed if "embed_tokens" in constant.name)
    # A packed table is there twice, as its kernel reads it and row by row; and blocks are padded.
    twice = tied if any("codes" in constant.name for constant in streamed) else 0
    size = (saved / STREAM_FILE).stat().st_size
    assert 0.9 * stored < size < stored + twice + 4096 * len(table["segments"])
    for asked in (lambda c: c.value(), lambda c: c.rows(0, 1), lambda c: c.digest):
        with pytest.raises(ArtifactError, match="this artifact streams it from disk"):
            asked(streamed[0])


def test_saving_again_gives_the_same_bytes(saved: Path, two_layers: Path, passes: list[Pass], tmp_path: Path) -> None:
    again = jettison.optimize(two_layers, [*passes, OnDisk()], target="torch").save_pretrained(tmp_path / "again")
    copy = jettison.load(saved).save_pretrained(tmp_path / "copy")
    for folder in (again, copy):
        for path in saved.rglob("*"):
            if path.is_file():
                assert (folder / path.relative_to(saved)).read_bytes() == path.read_bytes(), path.name


def test_a_gpu_is_given_weights_from_disk(small_model: Path, tmp_path: Path) -> None:
    passes = [QuantizeWeights(bits=4, group=32), CacheKV()]
    twin = jettison.optimize(small_model, passes, target="triton")
    model = jettison.optimize(small_model, [*passes, OnDisk(6 << 10, only="proj")], target="triton")
    folder = model.save_pretrained(tmp_path / "out")
    streamed = {name for name in model.executor.placement.tiers if "proj" in name}
    with safe_open(folder / WEIGHTS_FILE, "pt") as stored:
        assert streamed.isdisjoint(stored.keys())
    loaded = jettison.load(folder)
    expected = twin.generate([[5, 9, 3]], max_new_tokens=3)
    assert model.generate([[5, 9, 3]], max_new_tokens=3) == expected == loaded.generate([[5, 9, 3]], max_new_tokens=3)
    assert loaded.executor.stream.disk.statistics.bytes_taken > 3 * loaded.executor.stream.step_bytes
    measured = jettison.bench.bench(loaded, prompt_tokens=4, new_tokens=2, rounds=1)
    assert measured["streamed_bytes_per_step"] == loaded.executor.stream.step_bytes
    assert measured["stream_gb_per_s"] > 0
    again = loaded.save_pretrained(tmp_path / "again")
    assert (again / STREAM_FILE).read_bytes() == (folder / STREAM_FILE).read_bytes()
    for damage, message in (
        (lambda text: text.replace('"shape": [', '"shape": [1, ', 1), "damaged"),
        (lambda text: text.replace("device stream", "stream"), "needed version 1 of 'jettison device stream'"),
        (lambda text: re.sub(r'"segments": \[\n\s*\d', '"segments": [ -1', text), "ValueError: segment -1"),
        (lambda text: text.replace("down_proj", "down_prej"), r"does not hold \S*down_proj\S* f32 as the program"),
    ):
        table = device_table_as_dict(
            device_table_from_dict(json.loads((folder / STREAM_TABLE_FILE).read_text()), folder)
        )
        text = damage(json.dumps(table, indent=1))
        assert text != json.dumps(table, indent=1)
        with pytest.raises(ArtifactError, match=message):
            opened_with(folder, json.loads(text))


def opened_with(folder: Path, table: object) -> TritonExecutor:
    path = folder / STREAM_FILE
    store = DeviceStore(device_table_from_dict(table, path), path)
    return TritonExecutor(load_program(folder / PROGRAM_FILE, folder / WEIGHTS_FILE), store=store)


def test_what_a_gpu_cannot_stream_is_refused(small_model: Path, tmp_path: Path) -> None:
    model = jettison.optimize(small_model, [CacheKV(), OnDisk()], target="triton")
    with pytest.raises(UnsupportedError, match=r"embed.* on disk; only weights of linears"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_flipped_byte_is_found_before_text_comes(copied: Path) -> None:
    with (copied / STREAM_FILE).open("r+b") as file:
        file.seek(100)
        byte = file.read(1)
        file.seek(100)
        file.write(bytes([byte[0] ^ 255]))
    model = jettison.load(copied)
    with pytest.raises(ArtifactError, match=r"segment 0: found SHA-256 .* needed .* damaged"):
        model.generate([5, 6, 7], max_new_tokens=3)
    model.executor.stream.close()


def test_a_file_that_is_cut_off_or_gone(copied: Path) -> None:
    os.truncate(copied / STREAM_FILE, 4096)
    with pytest.raises(ArtifactError, match=rf"{STREAM_FILE}: 4,096 bytes, needed"):
        jettison.load(copied)
    (copied / STREAM_FILE).unlink()
    with pytest.raises(ArtifactError, match=rf"{STREAM_FILE}: missing"):
        jettison.load(copied)


def test_a_full_disk_leaves_nothing(two_layers: Path, tmp_path: Path) -> None:
    model = jettison.optimize(two_layers, [CacheKV(), OnDisk()], target="torch")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(ArtifactError, match=r"grew past the largest size allowed.*unfinished artifact was removed"):
            model.save_pretrained(tmp_path / "out")
        with pytest.raises(ArtifactError, match=r"bytes of streamed weights cannot be written: File too large"):
            model.generate([5], max_new_tokens=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


# --- memory ---------------------------------------------------------------------------------------------------------

_RUN = """
import json, resource, sys, torch
torch.set_num_threads(1)
import jettison
from jettison.bench import PeakMemory, status_bytes
model = jettison.load(sys.argv[1])
before, data = status_bytes("RssAnon"), status_bytes("VmData")
resource.setrlimit(resource.RLIMIT_DATA, (data + int(sys.argv[2]), -1))
with PeakMemory() as peak:
    model.generate([5, 6, 7, 8], max_new_tokens=4, eos_token_id=[])
    first = status_bytes("RssAnon")
    model.generate([5, 6, 7, 8], max_new_tokens=12, eos_token_id=[])
grown = status_bytes("RssAnon") - first
stream = model.executor.stream
print(json.dumps({"peak": peak.anon_bytes - before, "grown": grown,
                  "step": stream.statistics.bytes_taken // 16}))
"""


def test_memory_does_not_depend_on_what_is_streamed(tmp_path: Path) -> None:
    """163 MB pass through a ring of 16 MiB: sampled anonymous bytes, and a limit that the system enforces."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096, hidden_size=1024, intermediate_size=4096, num_hidden_layers=5, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    out = tmp_path / "artifact"
    jettison.optimize(model, [CacheKV(), OnDisk(16 << 20)], target="torch").save_pretrained(out)
    root = Path(__file__).resolve().parents[2]
    # Beside the ring: stacks of the threads and their part of the heap, which are reserved and not used.
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(out), str(96 << 20)], capture_output=True, text=True, cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert not done.returncode, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["step"] > 155e6
    assert 16e6 < found["peak"] < 48e6  # with libraries that are imported late
    assert abs(found["grown"]) < 4e6
