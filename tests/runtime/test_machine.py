"""What is measured is plausible, kept, and measured again where it does not fit."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch

from jettison.ir.errors import UnsupportedError
from jettison.ir.roofline import TYPICAL_GPU
from jettison.runtime import machine
from jettison.runtime.machine import gpu_rates, machine_rates, seconds_of

IDLE = 300 << 20


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """Small sizes, a cache of its own, no process; what was measured, in order."""
    monkeypatch.setenv("JETTISON_CACHE", str(tmp_path / "cache"))
    for name, size in (
        ("MEMORY_BYTES", 1 << 20), ("FILE_BYTES", 8 << 20), ("READ_BYTES", 1 << 20), ("WEIGHT_SHAPE", (128, 256)),
        ("WEIGHTS", 2), ("SMALL_WEIGHT", (64, 128)), ("SMALL_WEIGHTS", 2), ("MANY_ROWS", 32),
        ("PRODUCT_SHAPE", (32, 64, 64)), ("DECODED_SHAPE", (64, 128)), ("REPEATS", 2),
    ):  # fmt: skip
        monkeypatch.setattr(machine, name, size)
    monkeypatch.setattr(machine, "process_bytes", lambda: IDLE)
    measured: list[str] = []

    def noted(name: str) -> None:
        function = getattr(machine, name)

        def call(*arguments: object) -> object:
            measured.append(name)
            return function(*arguments)

        monkeypatch.setattr(machine, name, call)

    noted("memory_rate")
    noted("disk_rate")
    # Temporary folders of tests may be in memory.
    monkeypatch.setattr(machine, "mount_of", lambda folder: (str(folder), "ext4"))
    return measured


def only_file() -> Path:
    (path,) = (Path(os.environ["JETTISON_CACHE"]) / "machine").iterdir()
    return path


def test_rates_are_measured_once(quick: list[str], tmp_path: Path) -> None:
    first = machine_rates(tmp_path)
    assert quick == ["memory_rate", "disk_rate"]
    assert min(first.read, first.disk, first.call_seconds, *first.products.values(), *first.weights.values()) > 0
    assert {"float32", "bfloat16"} == set(first.products)
    assert {"float32", "bfloat16", "decoded"} <= set(first.weights)
    assert set(first.decoding) == set(first.starts) == set(first.weights) - {"decoded", "float32", "bfloat16"}
    assert min(first.decoding.values()) > 0
    assert min(first.starts.values()) >= 0
    assert (first.process_bytes, first.copy) == (IDLE, 0)
    assert machine_rates(tmp_path) == first
    assert quick == ["memory_rate", "disk_rate"]
    assert os.listdir(tmp_path) == ["cache"]


def test_another_file_system_is_measured_by_itself(quick: list[str], tmp_path: Path) -> None:
    first = machine_rates(tmp_path)
    (tmp_path / "other").mkdir()
    second = machine_rates(tmp_path / "other")
    assert quick == ["memory_rate", "disk_rate", "disk_rate"]
    assert (second.read, second.weights) == (first.read, first.weights)


def test_everything_is_measured_again_on_request(quick: list[str], tmp_path: Path) -> None:
    machine_rates(tmp_path)
    machine_rates(tmp_path, remeasure=True)
    assert quick == ["memory_rate", "disk_rate"] * 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda known: None,
        lambda known: [],
        lambda known: {**known, "format": 0},
        lambda known: {**known, "machine": {**known["machine"], "cpu": "another"}},
        lambda known: {**known, "figures": {**known["figures"], "read": -1.0}},
        lambda known: {**known, "figures": {**known["figures"], "read": "fast"}},
        lambda known: {**known, "figures": {**known["figures"], "products": {}}},
        lambda known: {**known, "figures": {**known["figures"], "starts": {"int4": -2.0}}},
        lambda known: {key: value for key, value in known.items() if key != "disks"},
    ],
)
def test_what_is_not_sound_is_measured_again(damage, quick: list[str], tmp_path: Path) -> None:
    machine_rates(tmp_path)
    path = only_file()
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    machine_rates(tmp_path)
    assert quick == ["memory_rate", "disk_rate"] * 2


def test_text_that_is_no_json_is_measured_again(quick: list[str], tmp_path: Path) -> None:
    machine_rates(tmp_path)
    only_file().write_text("{")
    machine_rates(tmp_path)
    assert len(quick) == 4


def test_without_a_cache_to_write_to_it_is_measured_each_time(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JETTISON_CACHE", str(tmp_path / "file" / "cache"))
    machine_rates(tmp_path)
    machine_rates(tmp_path)
    assert len(quick) == 4


def test_a_folder_in_memory_is_refused(quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "mount_of", lambda folder: ("/dev/shm", "tmpfs"))
    with pytest.raises(UnsupportedError, match=r"found tmpfs, a file system in memory; needed one on a disk.*TMPDIR"):
        machine_rates(tmp_path)
    assert quick == []


def test_a_folder_that_cannot_be_written_to_is_an_error_of_the_system(quick: list[str], tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        machine_rates(tmp_path / "missing")


def test_reads_without_direct_ones_are_buffered(
    quick: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine.os, "O_DIRECT", 1 << 62, raising=False)

    def refuse(path: object, flags: int, *more: object) -> int:
        if flags >= 1 << 62:
            raise OSError(22, "Invalid argument")
        return real(path, flags, *more)

    real = os.open
    monkeypatch.setattr(machine.os, "open", refuse)
    assert machine.disk_rate(tmp_path) > 0


def test_the_median_counts_and_the_first_call_does_not() -> None:
    times = iter([0.2, 0.01, 0.0, 0.1])

    def wait() -> None:
        import time

        time.sleep(next(times))

    assert 0.01 <= seconds_of(wait, 3) < 0.1


def test_a_process_takes_memory_before_it_holds_a_model(monkeypatch: pytest.MonkeyPatch) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("memory is read from Linux's /proc")
    assert 50 << 20 < machine.process_bytes() < 2 << 30
    monkeypatch.setattr(machine, "_IDLE", "raise SystemExit(3)")
    assert machine.process_bytes() == machine.TYPICAL_CPU.process_bytes


def test_without_a_gpu_rates_are_usual_ones(quick: list[str], tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU, whose rates are measured")
    cpu = machine_rates(tmp_path)
    rates, is_measured = gpu_rates(cpu)
    assert not is_measured
    assert (rates.disk, rates.copy, rates.read) == (cpu.disk, TYPICAL_GPU.copy, TYPICAL_GPU.read)
