"""Reading model folders: mapped values, no anonymous memory, hashes, and the cache of the hub."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jettison.ir.checkpoint import Checkpoint
from jettison.ir.errors import CaptureError
from tests.ir.checkpoints import FOLDER, SHARDS, SINGLE, one_tensor, raw_weights, write_model, write_shards

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
BIG_BYTES = 200 << 20
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is sampled from Linux's /proc")


def test_values_of_the_bundled_model_equal_load_file(tmp_path: Path) -> None:
    folder = shutil.copytree(TINY_LLAMA, tmp_path / "tiny-llama")
    checkpoint = Checkpoint.open(folder)
    expected = load_file(folder / SINGLE)
    assert set(checkpoint.names) == set(expected)
    for name, tensor in expected.items():
        assert torch.equal(checkpoint.tensor(name), tensor)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert checkpoint.dtype(name) == checkpoint.tensor(name).dtype == tensor.dtype
        assert checkpoint.nbytes(name) == tensor.nbytes
    assert checkpoint.total_bytes == sum(tensor.nbytes for tensor in expected.values())
    assert checkpoint.config == json.loads((folder / "config.json").read_text())
    assert checkpoint.generation_config == json.loads((folder / "generation_config.json").read_text())
    assert checkpoint.folder == folder
    assert checkpoint.tokenizer_files() == [folder / "tokenizer.json", folder / "tokenizer_config.json"]
    checkpoint.require_finite()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (5, 7)], ids=str)
def test_every_dtype_and_shape_comes_back(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.randint(0, 2, shape).to(dtype)
    checkpoint = Checkpoint.open(write_model(tmp_path / "m", {"odd": torch.ones(3, dtype=torch.bool), "w": tensor}))
    view = checkpoint.tensor("w")
    assert view.dtype == dtype
    assert view.is_contiguous()
    assert torch.equal(view, tensor)
    checkpoint.require_finite()


def test_names_follow_the_file_and_membership_works(tmp_path: Path) -> None:
    header = {
        "z": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "a": {"dtype": "F32", "shape": [1], "data_offsets": [1, 5]},  # not aligned, and still readable
    }
    folder = write_model(tmp_path / "m", quantization_config=None, quantization="none")  # which says: not quantised
    (folder / SINGLE).write_bytes(raw_weights(header, b"\x07" + struct.pack("<f", 2.5)))
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.names == ("z", "a")
    assert "z" in checkpoint
    assert "y" not in checkpoint
    assert checkpoint.generation_config == {}
    assert checkpoint.tensor("z").item() == 7
    assert checkpoint.tensor("a").item() == 2.5


def test_sharded_model_opens_with_tensors_the_index_leaves_out(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write_shards(tmp_path / "m"))
    assert checkpoint.names == ("a", "b", "extra")
    assert torch.equal(checkpoint.tensor("b"), torch.ones(3))
    assert checkpoint.total_bytes == 4 * (2 + 3 + 1)


def test_index_decides_when_two_shards_hold_a_name(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m")
    save_file({"a": torch.full((2,), 9.0), "b": torch.ones(3)}, folder / SHARDS[1])
    assert torch.equal(Checkpoint.open(folder).tensor("a"), torch.zeros(2))


def test_links_out_of_the_folder_open_as_in_the_hub_cache(tmp_path: Path) -> None:
    blobs = write_shards(tmp_path / "blobs")
    folder = tmp_path / "snapshot"
    folder.mkdir()
    for file in blobs.iterdir():
        (folder / file.name).symlink_to(Path("..") / "blobs" / file.name)
    checkpoint = Checkpoint.open(folder)
    assert torch.equal(checkpoint.tensor("b"), torch.ones(3))
    assert checkpoint.content_hash() == Checkpoint.open(blobs).content_hash()


def test_tokenizer_files_are_the_known_ones_and_no_code(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "additional_chat_templates").mkdir()
    wanted = ["additional_chat_templates/rag.jinja", "chat_template.jinja", "merges.txt", "qwen.tiktoken"]
    wanted += ["special_tokens_map.json", "tokenizer.model", "vocab.json"]
    for name in [*wanted, "tokenization_custom.py", "README.md", "optimizer.pt"]:
        (folder / name).write_text("x")
    found = Checkpoint.open(folder).tokenizer_files()
    assert [file.relative_to(folder).as_posix() for file in found] == wanted


def test_importing_and_opening_needs_neither_transformers_nor_the_hub(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    code = (
        "import sys; from jettison.ir.checkpoint import Checkpoint; Checkpoint.open(sys.argv[1]); "
        "sys.exit(bool({'transformers', 'huggingface_hub'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True)


def resident_bytes() -> dict[str, int]:
    status = Path("/proc/self/status").read_text().splitlines()
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in status if line.startswith("Rss")}


def growth(before: dict[str, int]) -> tuple[int, int]:
    """Anonymous and mapped growth in bytes; pages of a file on a RAM disk count as shared memory."""
    now = resident_bytes()
    return now["RssAnon"] - before["RssAnon"], sum(now[key] - before[key] for key in ("RssFile", "RssShmem"))


@pytest.fixture
def big_checkpoint(tmp_path: Path) -> Checkpoint:
    """One fp32 tensor of 200 MB in a sparse file, which takes no disk."""
    folder = write_model(tmp_path / "big")
    header = one_tensor(shape=[BIG_BYTES // 4], data_offsets=[0, BIG_BYTES])
    (folder / SINGLE).write_bytes(raw_weights(header))
    os.truncate(folder / SINGLE, len(raw_weights(header)) + BIG_BYTES)
    torch.aminmax(torch.ones(1 << 20))  # the thread pool starts here, not in the measurement
    return Checkpoint.open(folder)


@needs_proc
def test_reading_a_big_tensor_takes_no_anonymous_memory(big_checkpoint: Checkpoint) -> None:
    before = resident_bytes()
    tensor = big_checkpoint.tensor("w")
    assert growth(before)[1] < 4 << 20  # nothing is read before it is touched
    assert tensor.sum().item() == 0
    anonymous, mapped = growth(before)
    assert mapped > 0.9 * BIG_BYTES
    assert anonymous < 4 << 20
    copy = tensor.clone()
    assert growth(before)[0] > 0.9 * BIG_BYTES  # the measure does see a copy
    del copy


@needs_proc
def test_require_finite_and_hash_stream_in_a_few_megabytes(big_checkpoint: Checkpoint) -> None:
    before, peak = resident_bytes(), 0

    def sample(done_bytes: int, total_bytes: int) -> None:
        nonlocal peak
        peak = max(peak, growth(before)[0])

    big_checkpoint.require_finite(on_progress=sample)
    assert growth(before)[1] > 0.9 * BIG_BYTES
    big_checkpoint.content_hash(on_progress=sample)
    assert peak < 12 << 20  # zero where freed memory of an earlier test served


@needs_proc
def test_tensor_lies_in_a_mapping_of_its_file_and_outlives_the_checkpoint(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m")
    checkpoint = Checkpoint.open(folder)
    tensor = checkpoint.tensor("b")
    assert checkpoint.tensor("b").data_ptr() == tensor.data_ptr()
    del checkpoint
    mappings = [line.split(maxsplit=5) for line in Path("/proc/self/maps").read_text().splitlines()]
    files = []
    for extent, _permissions, *_rest, path in (mapping for mapping in mappings if len(mapping) == 6):
        low, high = (int(end, 16) for end in extent.split("-"))
        if low <= tensor.data_ptr() < high:
            files.append(path)
    assert files == [str(folder / SHARDS[1])]
    assert torch.equal(tensor, torch.ones(3))


def test_writing_into_a_view_leaves_the_file_alone(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    Checkpoint.open(folder).tensor("b").fill_(3)
    assert torch.equal(load_file(folder / SINGLE)["b"], torch.ones(4))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 1, 1023, 70_000, (1 << 20) - 1, 1 << 20, (1 << 20) + 12])
def test_one_nonfinite_value_is_found_anywhere(tmp_path: Path, dtype: torch.dtype, value: float, position: int) -> None:
    tensor = torch.linspace(-3, 3, (1 << 20) + 13).to(dtype)
    tensor[position] = value
    checkpoint = Checkpoint.open(write_model(tmp_path / "m", {"w": tensor}))
    with pytest.raises(CaptureError, match=rf"the first at index \[{position}\]"):
        checkpoint.require_finite()


def test_largest_finite_values_pass(tmp_path: Path) -> None:
    tensors = {str(t): torch.full((5000,), torch.finfo(t).max, dtype=t) for t in DTYPES[:4]}
    Checkpoint.open(write_model(tmp_path / "m", tensors)).require_finite()


def test_nonfinite_message_counts_and_places(tmp_path: Path) -> None:
    weight = torch.zeros(3, 5, dtype=torch.bfloat16)
    weight[1, 2] = float("nan")
    weight[1, 4] = weight[2, 0] = float("-inf")
    scalar = torch.tensor(float("nan"))
    folder = write_model(tmp_path / "m", {"model.norm": torch.ones(2), "model.up": weight, "scale": scalar})
    with pytest.raises(CaptureError) as error:
        Checkpoint.open(folder).require_finite(["model.up"])
    assert str(error.value) == (
        f"[checkpoint] {folder / SINGLE}: tensor 'model.up' bfloat16[3, 5]: found 1 NaN and 2 infinite values, the "
        "first at index [1, 2]; needed finite weights, because one such value spreads to every logit. The file is "
        "damaged or the training diverged: download it again, or use another checkpoint."
    )
    with pytest.raises(CaptureError, match=r"'scale' float32\[\]: found 1 NaN and 0 .* the first at index \[\]"):
        Checkpoint.open(folder).require_finite(["model.norm", "scale"])


def test_require_finite_reports_floating_bytes_to_the_end(tmp_path: Path) -> None:
    tensors = {"ids": torch.zeros(8, dtype=torch.int64), "w": torch.zeros((1 << 20) + 1), "v": torch.zeros(10)}
    calls: list[tuple[int, int]] = []
    Checkpoint.open(write_model(tmp_path / "m", tensors)).require_finite(on_progress=lambda *sizes: calls.append(sizes))
    total = 4 * ((1 << 20) + 11)
    assert len(calls) == 3
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)


def test_content_hash_is_the_documented_one_and_follows_content_only(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    calls: list[tuple[int, int]] = []
    digest = Checkpoint.open(folder).content_hash(on_progress=lambda *sizes: calls.append(sizes))
    files = ["config.json", SINGLE]
    lines = [f"{name}\0{hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n" for name in files]
    assert digest == hashlib.sha256("".join(lines).encode()).hexdigest()
    total = sum((folder / name).stat().st_size for name in files)
    assert calls[-1] == (total, total)
    moved = shutil.copytree(folder, tmp_path / "moved")
    (moved / "README.md").write_text("not part of the model")
    assert Checkpoint.open(moved).content_hash() == digest
    weights = bytearray((moved / SINGLE).read_bytes())
    weights[-1] ^= 1
    (moved / SINGLE).write_bytes(weights)
    assert Checkpoint.open(moved).content_hash() != digest
    (folder / "config.json").write_text('{"model_type": "mistral"}')
    assert Checkpoint.open(folder).content_hash() != digest


def test_content_hash_refuses_when_a_file_has_gone(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    checkpoint = Checkpoint.open(folder)
    (folder / SINGLE).unlink()
    with pytest.raises(CaptureError, match="a file that cannot be read"):
        checkpoint.content_hash()


def test_remote_code_is_refused_only_for_types_nobody_knows(tmp_path: Path) -> None:
    Checkpoint.open(write_model(tmp_path / "m", model_type="novel")).refuse_remote_code(set())
    folder = write_model(tmp_path / "m", model_type="novel", auto_map={"AutoModelForCausalLM": "modeling_novel.Novel"})
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.requires_remote_code
    checkpoint.refuse_remote_code({"llama", "novel"})
    Checkpoint.open(folder, allow_remote_code=True).refuse_remote_code({"llama"})
    with pytest.raises(CaptureError) as error:
        checkpoint.refuse_remote_code({"llama"})
    assert str(error.value) == (
        f"[checkpoint] {folder}/config.json: found auto_map, which asks to run Python files from the folder for "
        "model_type 'novel'; needed a model_type that transformers builds itself, because jettison does not run "
        "downloaded code. Upgrade transformers, choose a model it knows, or pass allow_remote_code=True after reading "
        "that code."
    )


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local cache of huggingface_hub."""
    import huggingface_hub.constants

    cache = tmp_path / "hub"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_hub_id_that_was_not_downloaded_names_the_command(hub_cache: Path) -> None:
    with pytest.raises(CaptureError) as error:
        Checkpoint.open("some-org/some-model")
    assert str(error.value) == (
        "[checkpoint] some-org/some-model: found no such folder, and no such model in the local Hugging Face cache; "
        f"needed {FOLDER}. A hub id must be downloaded first: hf download some-org/some-model --local-dir DIR"
    )


def test_hub_id_names_the_command_without_the_hub_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(CaptureError, match="hf download some-org/some-model --local-dir DIR"):
        Checkpoint.open("some-org/some-model")


def test_hub_id_opens_from_the_local_cache(hub_cache: Path) -> None:
    repository = hub_cache / "models--some-org--some-model"
    for part in ("refs", "snapshots"):
        (repository / part).mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abcd")
    folder = write_model(repository / "snapshots" / "0123abcd")
    checkpoint = Checkpoint.open("some-org/some-model")
    assert checkpoint.folder == folder
    assert torch.equal(checkpoint.tensor("b"), torch.ones(4))
