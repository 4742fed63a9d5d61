"""Reading model folders: mapped values, no anonymous memory, and one exact message for every bad folder."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from jettison.ir.checkpoint import Checkpoint
from jettison.ir.errors import CaptureError, UnsupportedError

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
BIG_BYTES = 200 << 20
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES += [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]

needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is sampled from Linux's /proc")


def write_model(folder: Path, tensors: dict[str, torch.Tensor] | None = None, **config: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    save_file({"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)} if tensors is None else tensors, folder / SINGLE)
    return folder


def write_shards(folder: Path, **weight_map: str) -> Path:
    """Tensor `a` in the first shard, `b` in the second; the index says what `weight_map` says."""
    write_model(folder)
    (folder / SINGLE).unlink()
    save_file({"a": torch.zeros(2)}, folder / SHARDS[0])
    save_file({"b": torch.ones(3), "extra": torch.ones(1)}, folder / SHARDS[1])
    index = {"metadata": {}, "weight_map": weight_map or {"a": SHARDS[0], "b": SHARDS[1]}}
    (folder / INDEX).write_text(json.dumps(index))
    return folder


def raw_weights(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def one_tensor(**fields: object) -> dict[str, object]:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | fields}


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


FOLDER = "a model folder with config.json and safetensors weights"

# What each of DAMAGE below is told, word for word: @ is the folder, a capitalised word one of ABBREVIATIONS.
CAPTURE_ERRORS = """
no-config: @: found no config.json among README.md, model.safetensors; needed FOLDER. Pass the folder that
    from_pretrained would load, or download the model again with all its files.
adapter: @: found a LoRA adapter (adapter_config.json); needed FOLDER. Merge it into its base model
    (peft: model.merge_and_unload().save_pretrained(DIR)) and pass that folder.
artifact: @: found an artifact that jettison made (jettison.json); needed the original model folder, because an artifact
    is already rewritten. Run it with jettison.load(), or pass the folder it was made from.
config-cut: @/config.json: found 19 bytes that do not parse (Unterminated string starting at at line 1); needed
    a JSON object. DAMAGED
config-binary: @/config.json: found 3 bytes that do not parse (not UTF-8 JSON); needed a JSON object. DAMAGED
config-nested: @/config.json: found 100,000 bytes that do not parse (not UTF-8 JSON); needed a JSON object. DAMAGED
config-list: @/config.json: found JSON of type list; needed a JSON object. DAMAGED
config-pipe: @/config.json: found something that is not a file; needed a regular file or a link to one. Replace it.
generation-config: @/generation_config.json: found 0 bytes that do not parse (Expecting value at line 1); needed
    a JSON object. DAMAGED
no-weights: @: found no weights; needed WEIGHTS. Download the model again with all its files.
no-index: @: found only model-00001-of-00002.safetensors, model-00002-of-00002.safetensors; needed WEIGHTS. Download the
    index if these are shards; rename a file that holds the whole model to model.safetensors.
dangling: @/SINGLE: found a file that cannot be read (No such file or directory); needed a readable file. Check that it
    is there, its permissions and the disk.
empty-file: @/SINGLE: found 0 bytes; needed at least the 8 of a safetensors header. DAMAGED
data-cut: @/SINGLE: found 73 bytes; needed 77 bytes, by its header. DAMAGED
data-long: @/SINGLE: found 78 bytes; needed 77 bytes, by its header. DAMAGED
header-cut: @/SINGLE: found 11 bytes; needed at least 1,008 for its header. DAMAGED
header-huge: @/SINGLE: found a header length of 100,000,001 bytes; needed at most 100,000,000. DAMAGED
header-garbage: @/SINGLE: found a header of 9 bytes that is not a JSON object; needed safetensors. DAMAGED
header-nested: @/SINGLE: found a header of 100,000 bytes that is not a JSON object; needed safetensors. DAMAGED
git-lfs: @/SINGLE: found a Git LFS pointer; needed the weights it stands for. Run 'git lfs pull' there, or download it.
no-tensors: @: found safetensors weights without tensors; needed weights. Download the model again.
entry-number: @/SINGLE: found tensor 'w' without a usable dtype, shape and data_offsets; needed HEADER. DAMAGED
size-negative: @/SINGLE: found tensor 'w' without a usable dtype, shape and data_offsets; needed HEADER. DAMAGED
size-boolean: @/SINGLE: found tensor 'w' without a usable dtype, shape and data_offsets; needed HEADER. DAMAGED
size-wrong: @/SINGLE: found tensor 'w' F32 [3] in 8 bytes; needed 12 bytes for that shape. DAMAGED
size-overflow: @/SINGLE: found tensor 'w' F32 [4611686018427387904, 4, 0] in 0 bytes; needed 0 bytes for that shape.
    DAMAGED
gap: @/SINGLE: found tensor 'w' at byte 4 of the data; needed byte 0, because tensors lie back to back. DAMAGED
overlap: @/SINGLE: found tensor 'x' at byte 4 of the data; needed byte 8, because tensors lie back to back. DAMAGED
metadata: @/SINGLE: found __metadata__ that does not map names to text; needed HEADER. DAMAGED
index-cut: @/INDEX: found 1 bytes that do not parse (Expecting property name enclosed in double quotes at line 1);
    needed a JSON object. DAMAGED
index-map: @/INDEX: found no usable weight_map; needed a weight_map from tensor names to shard files. DAMAGED
shards-missing: @/INDEX: found 10 of 11 shards missing: s0.safetensors, s1.safetensors, s2.safetensors, s3.safetensors,
    s4.safetensors, s5.safetensors, s6.safetensors, s7.safetensors and 2 more; needed every shard that the index names.
    Download the missing files into the folder.
shards-swapped: @/INDEX: found tensor 'a' assigned to model-00002-of-00002.safetensors, which does not hold it; needed
    an index and shards of one model. Download the index and that shard again.
shard-above: @/INDEX: found shard '../x.safetensors', a path that can leave the folder; needed RELATIVE
shard-absolute: @/INDEX: found shard '/x.safetensors', a path that can leave the folder; needed RELATIVE
shard-windows: @/INDEX: found shard '..\\\\x.safetensors', a path that can leave the folder; needed RELATIVE
gptq-bits: @/config.json: found bits=5 in quantization_config; needed one of 2, 3, 4, 8 for gptq. Correct the file, or
    use the unquantised checkpoint that this one was made from.
gptq-dense: @: found quantization_config of gptq in config.json, and no tensor '.qweight'; needed packed weights, or no
    such settings. Download config.json and the weights again.
shard-pickled: @/INDEX: found shard 'pytorch_model.bin'; needed shards whose names end in .safetensors. DAMAGED
"""
UNSUPPORTED_ERRORS = """
gguf-and-config: @/q4.gguf: found GGUF weights, which llama.cpp reads; needed ORIGINAL
gguf-alone: @/q4.gguf: found GGUF weights, which llama.cpp reads; needed ORIGINAL
pickled: @: found only pickled weights (pytorch_model.bin); needed WEIGHTS, because pickles can run code and cannot be
    mapped. If you trust the files, convert them once, inside the folder: python -c "from transformers import
    OPTForCausalLM as M; M.from_pretrained('.').save_pretrained('.')"
pickled-hostile: @: found only pickled weights (consolidated.00.pth, model.pt); needed WEIGHTS, because pickles can run
    code and cannot be mapped. If you trust the files, convert them once, inside the folder: python -c
    "from transformers import AutoModel as M; M.from_pretrained('.').save_pretrained('.')"
tensorflow: @: found only tf_model.h5; needed WEIGHTS. Download the PyTorch form of the model, with safetensors weights.
bitsandbytes: @/config.json: found an already quantised checkpoint (quantization_config with quant_method
    'bitsandbytes'); QUANTISED
inner-fp8: @/config.json: found an already quantised checkpoint (text_config.quantization_config with quant_method
    'fp8'); QUANTISED
mlx: @/config.json: found an already quantised checkpoint (quantization); QUANTISED
packed-tensor: @/SINGLE: found an already quantised checkpoint (tensor 'model.up.qweight', of which config.json says
    nothing); QUANTISED
fp8: @/SINGLE: found tensor 'model.up' of type F8_E4M3; needed DTYPES
unknown-dtype: @/SINGLE: found tensor 'w' of type Q7_K; needed DTYPES
"""
ABBREVIATIONS = {
    "DAMAGED": "The file is damaged or incomplete: download or copy it again.",
    "FOLDER": FOLDER,
    "WEIGHTS": "model.safetensors, or model.safetensors.index.json and its shards",
    "SINGLE": SINGLE,
    "INDEX": INDEX,
    "HEADER": "a valid safetensors header",
    "RELATIVE": "shard names relative to the folder, without '..'. Do not use this checkpoint unless you know where it "
    "comes from.",
    "ORIGINAL": "config.json and safetensors, because jettison quantises from the original weights. Download the model "
    "the GGUF file was made from, in its Hugging Face form.",
    "QUANTISED": "needed the original weights or one of the packings that jettison reads (GPTQ, AWQ (gemm) and "
    "compressed-tensors (pack-quantized)), because quantising twice adds up both errors. Use the unquantised "
    "checkpoint (bf16, fp16 or fp32) that this one was made from.",
    "DTYPES": "one of F64, F32, F16, BF16, I64, I32, I16, I8, U8, BOOL. Use the checkpoint in bf16, fp16 or fp32; one "
    "in other types is usually already quantised.",
}


def parse_messages(text: str) -> dict[str, str]:
    lines = text.strip().replace("\n    ", " ").splitlines()
    whole = re.compile(r"\b(" + "|".join(ABBREVIATIONS) + r")\b")
    messages = (whole.sub(lambda match: ABBREVIATIONS[match[0]], line).split(": ", 1) for line in lines)
    return {case: f"[checkpoint] {message}" for case, message in messages}


def replace(folder: Path, file: str, *names: str) -> None:
    """Put files of other names in the place of `file`."""
    (folder / file).unlink()
    for name in names:
        (folder / name).write_bytes(b"x")


def put(name: str, content: str | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def weights(header: object, data: bytes = b"", length: int | None = None) -> Callable[[Path], object]:
    return put(SINGLE, raw_weights(header, data, length))


def make_pipe(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def make_dangling(folder: Path) -> None:
    (folder / SINGLE).unlink()
    (folder / SINGLE).symlink_to("gone")


MANY_SHARDS = {f"t{i}": f"s{i}.safetensors" for i in range(10)} | {"a": SHARDS[0]}
OVERLAP = one_tensor() | {"x": one_tensor(data_offsets=[4, 12])["w"]}
FP8 = {"a": torch.ones(1), "model.up": torch.zeros(4).to(torch.float8_e4m3fn)}
DAMAGE: dict[str, Callable[[Path], object]] = {
    "no-config": lambda folder: replace(folder, "config.json", "README.md"),
    "adapter": lambda folder: replace(folder, "config.json", "adapter_config.json"),
    "artifact": put("jettison.json", "{}"),
    "config-cut": put("config.json", '{"model_type": "lla'),
    "config-binary": put("config.json", b"\xff\xfe\x00"),
    "config-nested": put("config.json", "[" * 100_000),
    "config-list": put("config.json", "[1]"),
    "config-pipe": make_pipe,
    "generation-config": put("generation_config.json", ""),
    "no-weights": lambda folder: replace(folder, SINGLE, "README.md", "training_args.bin"),
    "no-index": lambda folder: replace(folder, SINGLE, *SHARDS),
    "dangling": make_dangling,
    "empty-file": put(SINGLE, b""),
    "data-cut": weights(one_tensor(), b"1234"),
    "data-long": weights(one_tensor(), b"12345678+"),
    "header-cut": weights(b'{"w', length=1000),
    "header-huge": weights(b"<html>not found</html>", length=100_000_001),
    "header-garbage": weights(b"\x93\x01garbage"),
    "header-nested": weights(b"[" * 100_000),
    "git-lfs": put(SINGLE, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12\n"),
    "no-tensors": weights({}),
    "entry-number": weights({"w": 3}),
    "size-negative": weights(one_tensor(shape=[-2]), bytes(8)),
    "size-boolean": weights(one_tensor(shape=[True, 2]), bytes(8)),
    "size-wrong": weights(one_tensor(shape=[3]), bytes(8)),
    "size-overflow": weights(one_tensor(shape=[2**62, 4, 0], data_offsets=[0, 0])),
    "gap": weights(one_tensor(data_offsets=[4, 12]), bytes(12)),
    "overlap": weights(OVERLAP, bytes(12)),
    "metadata": weights({"__metadata__": 1} | one_tensor(), bytes(8)),
    "index-cut": lambda folder: put(INDEX, "{")(write_shards(folder)),
    "index-map": lambda folder: put(INDEX, '{"weight_map": {"a": 1}}')(write_shards(folder)),
    "shards-missing": lambda folder: write_shards(folder, **MANY_SHARDS),
    "shards-swapped": lambda folder: write_shards(folder, a=SHARDS[1], b=SHARDS[0]),
    "shard-above": lambda folder: write_shards(folder, a="../x.safetensors"),
    "shard-absolute": lambda folder: write_shards(folder, a="/x.safetensors"),
    "shard-windows": lambda folder: write_shards(folder, a="..\\x.safetensors"),
    "shard-pickled": lambda folder: write_shards(folder, a="pytorch_model.bin"),
    "gguf-and-config": lambda folder: replace(folder, SINGLE, "q4.gguf"),
    "gguf-alone": lambda folder: (replace(folder, SINGLE, "q4.gguf"), (folder / "config.json").unlink()),
    "pickled": lambda folder: replace(
        write_model(folder, architectures=["OPTForCausalLM"]), SINGLE, "pytorch_model.bin"
    ),
    "pickled-hostile": lambda folder: replace(
        write_model(folder, architectures=["os; os.system('x') #"]), SINGLE, "model.pt", "consolidated.00.pth"
    ),
    "tensorflow": lambda folder: replace(folder, SINGLE, "tf_model.h5"),
    "bitsandbytes": lambda folder: write_model(folder, quantization_config={"quant_method": "bitsandbytes"}),
    "gptq-bits": lambda folder: write_model(folder, quantization_config={"quant_method": "gptq", "bits": 5}),
    "gptq-dense": lambda folder: write_model(
        folder, quantization_config={"quant_method": "gptq", "bits": 4, "group_size": 128}
    ),
    "inner-fp8": lambda folder: write_model(folder, text_config={"quantization_config": {"quant_method": "fp8"}}),
    "mlx": lambda folder: write_model(folder, quantization={"group_size": 64, "bits": 4}),
    "packed-tensor": lambda folder: write_model(folder, {"model.up.qweight": torch.zeros(2, dtype=torch.int32)}),
    "fp8": lambda folder: write_model(folder, FP8),
    "unknown-dtype": weights(one_tensor(dtype="Q7_K")),
}
REFUSALS = [(CaptureError, *item) for item in parse_messages(CAPTURE_ERRORS).items()]
REFUSALS += [(UnsupportedError, *item) for item in parse_messages(UNSUPPORTED_ERRORS).items()]


@pytest.mark.parametrize(("family", "case", "message"), REFUSALS, ids=[case for _, case, _ in REFUSALS])
def test_bad_folder_is_refused(tmp_path: Path, family: type[Exception], case: str, message: str) -> None:
    folder = write_model(tmp_path / "m")
    DAMAGE[case](folder)
    with pytest.raises(family) as error:
        Checkpoint.open(folder)
    assert str(error.value) == message.replace("@", str(folder))


def test_every_damage_has_its_message() -> None:
    assert {case for _, case, _ in REFUSALS} == set(DAMAGE)


def test_unknown_tensor_lists_close_names(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m", {"model.norm.weight": torch.ones(1)})
    with pytest.raises(CaptureError) as error:
        Checkpoint.open(folder).tensor("model.norm.weights")
    assert str(error.value) == (
        f"[checkpoint] {folder}: found no tensor 'model.norm.weights' among 1 (close: model.norm.weight); needed that "
        "tensor, because the configuration calls for it. Check that config.json and the weights belong to the same "
        "model, or download both again."
    )


def test_path_to_a_file_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / "q4.gguf").touch()
    with pytest.raises(CaptureError, match=f"found a file; needed {FOLDER}. Pass the folder that holds it."):
        Checkpoint.open(folder / "config.json")
    with pytest.raises(CaptureError, match=f"found a file; needed {FOLDER}. Pass its folder: {folder}."):
        Checkpoint.open(folder / SINGLE)
    with pytest.raises(UnsupportedError, match="found GGUF weights"):
        Checkpoint.open(folder / "q4.gguf")


def test_what_only_the_library_refuses_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path / "m")
    (folder / SINGLE).write_bytes(raw_weights(one_tensor(extra=float("nan")), bytes(8)))  # not strictly JSON
    with pytest.raises(CaptureError, match=f"{folder / SINGLE}: found a file that cannot be mapped "):
        Checkpoint.open(folder)


@pytest.mark.parametrize("name", ["/no/such/place", "./gone", "a/b/c", "nul\0", "x" * 300])
def test_missing_folder_is_refused(name: str) -> None:
    with pytest.raises(CaptureError, match=r"no such folder|File name too long"):
        Checkpoint.open(name)


def test_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"found no config\.json: the folder is empty; needed"):
        Checkpoint.open(tmp_path)


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


@settings(max_examples=150, deadline=None, database=None)
@given(data=st.data())
def test_mutated_files_are_read_or_refused_but_never_crash(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        folder = write_model(Path(directory) / "m")
        content = bytearray((folder / SINGLE).read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.sampled_from(b'0129{}[]",:-tn\x00\xff'))
        end = data.draw(st.one_of(st.just(len(content)), st.integers(0, len(content))))
        (folder / SINGLE).write_bytes(content[:end])
        try:
            checkpoint = Checkpoint.open(folder)
        except (CaptureError, UnsupportedError):
            return
        for name in checkpoint.names:
            assert checkpoint.tensor(name).tolist() is not None  # every byte is there to be read
