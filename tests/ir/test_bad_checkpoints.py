"""Model folders that are no models, or damaged: each is refused with one exact message."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jettison.ir.checkpoint import Checkpoint
from jettison.ir.errors import CaptureError, UnsupportedError
from tests.ir.checkpoints import FOLDER, INDEX, SHARDS, SINGLE, one_tensor, raw_weights, write_model, write_shards

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
