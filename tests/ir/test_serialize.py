"""Saved programs: the same text, the same bytes, no weight read, and one exact error for every bad file."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import operator
import os
import struct
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from jettison.ir.capture import capture
from jettison.ir.constants import Constant, scratch_tensor
from jettison.ir.errors import ArtifactError, UnsupportedError, VerifyError
from jettison.ir.huggingface import open_checkpoint, source_from_model
from jettison.ir.placement import Placement
from jettison.ir.program import MissRecord, PassRecord, Program, input_placeholders
from jettison.ir.safetensors_file import ALIGNMENT, DTYPES, read_constants, write_constants
from jettison.ir.serialize import load_program, save_program
from jettison.passes.cache_kv import CacheKV
from jettison.passes.pipeline import apply, prepare
from jettison.passes.policies import Full, Window
from jettison.passes.quantize_weights import QuantizeWeights
from tests.helpers import Embedded, export_body, export_tiny

TINY_LLAMA = Path(__file__).parents[2] / "examples" / "models" / "tiny-llama"
PROGRAMS = (
    "captured", "prepared", "full", "window", "quantised", "encoder captured", "encoder prepared", "gpt2 captured",
    "gpt2 prepared", "literals",
)  # fmt: skip

needs_proc = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="memory is sampled from Linux's /proc")
Json = dict[str, Any]


@cache
def built(name: str) -> Program:
    """A program of each kind; not to be changed."""
    if name == "literals":
        return export_body(_literals)
    if name.endswith("prepared") or name in ("full", "window", "quantised"):
        before = {"full": "prepared", "window": "prepared", "quantised": "prepared"}.get(name)
        program = built(before or name.replace("prepared", "captured").strip()).copy()
        if before is None:
            prepare(program)
        passes = {"full": [CacheKV(Full())], "window": [CacheKV(Window(size=100))]}
        passes["quantised"] = [QuantizeWeights(bits=4, group=32, skip="mlp"), QuantizeWeights(bits=8), CacheKV(Full())]
        apply(program, passes.get(name, []))
        return program
    import transformers

    torch.manual_seed(0)
    if name == "captured":
        source = open_checkpoint(TINY_LLAMA)[1]
    elif name == "encoder captured":
        small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
        config = transformers.BertConfig(vocab_size=99, max_position_embeddings=64, **small)
        source = source_from_model(transformers.BertModel(config))
    else:
        config = transformers.GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=99, n_positions=64, bos_token_id=0, eos_token_id=0
        )
        source = source_from_model(transformers.GPT2LMHeadModel(config))
    source.eager = None
    return capture(source)


def _literals(_: Any, hidden: Tensor) -> Tensor:
    """A body whose graph has every kind of argument."""
    batch, length, width = hidden.shape
    filled = torch.full((batch, max(length * 3 // 2, 1), width), -math.inf, dtype=torch.float64)
    kept = hidden[:, torch.arange(length, device="cpu")]
    smooth = nn.functional.gelu(hidden.clamp(min=-math.inf, max=1e-30), approximate="tanh")
    smooth = smooth.clone(memory_format=torch.contiguous_format)
    zeros = torch.zeros((batch, length), dtype=torch.int64, layout=torch.strided, device="cpu")
    finite = torch.nan_to_num(filled.sum(1, keepdim=True), nan=0.5, posinf=math.inf, neginf=-0.0)
    return smooth + kept + finite.to(torch.float32) + zeros[..., None]


def saved(program: Program, folder: Path) -> tuple[Path, Path]:
    files = folder / "program.json", folder / "weights.safetensors"
    save_program(program, *files)
    return files


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """Files of a program with four nodes."""
    return saved(_small_program(), tmp_path)


@cache
def _small_program() -> Program:
    program = export_tiny(Embedded(nn.Sequential(nn.Linear(8, 8), nn.SiLU(), nn.Linear(8, 61))))
    program.pipeline = "quantize-weights{bits=4}"
    record = PassRecord("cache-kv", 2, [MissRecord("layer 1", "kept full")], 1.5, 10, 5, 1, math.inf, None)
    program.history = [record]
    return program


# ------------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_loaded_program_prints_as_the_saved_one(name: str, tmp_path: Path) -> None:
    program = built(name)
    loaded = load_program(*saved(program, tmp_path))
    assert str(loaded) == str(program)
    assert loaded.weight_bytes() == program.weight_bytes()
    assert (loaded.info, loaded.outputs, loaded.states, loaded.packed, loaded.pipeline) == (
        program.info, program.outputs, program.states, program.packed, program.pipeline,
    )  # fmt: skip
    assert loaded.history == [dataclasses.replace(record, seconds=0.0) for record in program.history]
    for entry in program.entries:
        made_by = [[n.meta.get("made_by") for n in p.entries[entry].graph.nodes if n.op == "call_function"]
                   for p in (program, loaded)]  # fmt: skip
        where = [[n.meta.get("where") for n in p.entries[entry].graph.nodes if n.op == "call_function"]
                 for p in (program, loaded)]  # fmt: skip
        assert made_by[0] == made_by[1]
        assert where[0] == where[1]
        assert list(input_placeholders(loaded.entries[entry])) == list(input_placeholders(program.entries[entry]))


@pytest.mark.parametrize("name", ["full", "quantised", "encoder prepared"])
def test_saving_a_loaded_program_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    files = saved(built(name), tmp_path)
    (tmp_path / "again").mkdir()
    again = saved(load_program(*files), tmp_path / "again")
    assert [path.read_bytes() for path in again] == [path.read_bytes() for path in files]


@pytest.mark.parametrize(
    "placement",
    [
        Placement(),
        Placement({"embed": "disk", "mlp": "disk"}, {"host": 1 << 30}, 1 << 26),
        Placement({"mlp": "host"}, {"device": 5, "host": 6, "disk": 7}, 1, {"past_key_values.0.key": "host"}),
    ],
)
def test_a_placement_is_saved_and_loaded(placement: Placement, tmp_path: Path) -> None:
    program = built("full").copy()
    tiers = {name: tier for part, tier in placement.tiers.items() for name in program.used_constants() if part in name}
    assert len(tiers) >= len(placement.tiers)
    placement = dataclasses.replace(placement, tiers=tiers)
    program.placement = placement
    loaded = load_program(*saved(program, tmp_path))
    assert loaded.placement == placement
    assert str(loaded) == str(program)
    assert str(loaded).count("\nstream @") == len(tiers)
    without = load_program(*saved(program, tmp_path), metadata=False)
    assert without.placement == placement


def test_a_program_without_a_placement_says_nothing_of_it(tmp_path: Path) -> None:
    files = saved(built("full"), tmp_path)
    assert "placement" not in json.loads(files[0].read_text())
    assert load_program(*files).placement is None


def test_how_long_passes_took_does_not_change_the_file(tmp_path: Path) -> None:
    program = _small_program().copy()
    first = saved(program, tmp_path)[0].read_bytes()
    program.history = [dataclasses.replace(record, seconds=99.0) for record in program.history]
    assert saved(program, tmp_path)[0].read_bytes() == first


@pytest.mark.parametrize("policy", [Full(), Window(size=100)])
def test_a_loaded_program_is_rewritten_like_the_saved_one(policy: Any, tmp_path: Path) -> None:
    loaded, program = load_program(*saved(built("prepared"), tmp_path)), built("prepared").copy()
    for each in (loaded, program):
        apply(each, [CacheKV(policy)])
    assert str(loaded) == str(program)


def test_symbols_are_equal_where_they_were_and_only_there(tmp_path: Path) -> None:
    entry = load_program(*saved(built("full"), tmp_path)).entries["decode"]
    sizes = {node.name: node.meta["val"].shape for node in input_placeholders(entry).values()}
    assert sizes["input_ids"] == sizes["position_ids"]
    assert sizes["attention_mask"][0] == sizes["input_ids"][0]
    assert str(sizes["attention_mask"][1]) != str(sizes["input_ids"][1])
    assert sizes["input_ids"][1].node.shape_env.var_to_range[sizes["input_ids"][1].node.expr].upper == 1024


def test_a_program_that_is_only_run_needs_no_metadata(tmp_path: Path) -> None:
    loaded = load_program(*saved(built("full"), tmp_path), metadata=False)
    assert all("val" not in node.meta for entry in loaded.entries.values() for node in entry.graph.nodes)
    assert (loaded.states, loaded.outputs) == (built("full").states, built("full").outputs)
    with pytest.raises(VerifyError, match="no metadata"):
        save_program(loaded, tmp_path / "x.json", tmp_path / "x.safetensors")


def test_loading_tiny_llama_takes_less_than_two_seconds(tmp_path: Path) -> None:
    files = saved(built("full"), tmp_path)
    started = time.process_time()
    load_program(*files)
    assert time.process_time() - started < 2.0
    started = time.process_time()
    load_program(*files, metadata=False)
    assert time.process_time() - started < 0.5


@needs_proc
def test_loading_reads_no_weight(tmp_path: Path) -> None:
    files = saved(built("captured"), tmp_path)
    loaded = load_program(*files)
    assert _resident_bytes(files[1]) == 0
    next(iter(loaded.constants.values())).value().sum()
    assert _resident_bytes(files[1]) > 0


def _resident_bytes(path: Path) -> int:
    """Bytes of a mapped file that are in memory for this process."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split(":", 1)[0].isidentifier():
            inside = line.endswith(f" {path}")
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


# -------------------------------------------------------------------------------------------------- what is not saved


def test_an_operator_of_another_library_is_refused(tmp_path: Path) -> None:
    library = torch.library.Library("stranger", "FRAGMENT")
    library.define("twice(Tensor x) -> Tensor")
    library.impl("twice", lambda x: x * 2, "CompositeExplicitAutograd")
    torch.library.register_fake("stranger::twice", torch.empty_like, lib=library)
    program = export_body(lambda _, hidden: torch.ops.stranger.twice(hidden))
    with pytest.raises(UnsupportedError, match=r"\[save\] body in forward calls stranger.twice.default"):
        saved(program, tmp_path)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        (torch.ops.aten.relu_.default, "writes to its input"),
        (torch.ops.aten._fused_dropout.default, "models do not need"),
        (operator.attrgetter, "neither an operator"),
        (torch.save, "neither an operator"),
    ],
)
def test_operators_outside_the_allow_list_are_refused(target: Any, reason: str, tmp_path: Path) -> None:
    program = _small_program().copy()
    node = next(node for node in program.entries["forward"].graph.nodes if node.op == "call_function")
    node.target = target
    with pytest.raises(UnsupportedError, match=reason):
        saved(program, tmp_path)


def test_a_size_as_a_literal_is_a_bug_of_the_pass_that_wrote_it(tmp_path: Path) -> None:
    program = _small_program().copy()
    nodes = [node for node in program.entries["forward"].graph.nodes if node.op == "call_function"]
    nodes[0].args = (nodes[0].args[0], nodes[0].meta["val"].shape[1])
    with pytest.raises(VerifyError, match="as a literal"):
        saved(program, tmp_path)


def test_an_argument_of_a_strange_type_is_refused(tmp_path: Path) -> None:
    program = _small_program().copy()
    node = next(node for node in program.entries["forward"].graph.nodes if node.op == "call_function")
    node.kwargs = {"x": torch.strided, "y": object()}
    with pytest.raises(UnsupportedError, match="an argument of type object"):
        saved(program, tmp_path)


# ----------------------------------------------------------------------------------------------------- the weight file


def _constants() -> dict[str, Constant]:
    generator = torch.Generator().manual_seed(0)
    constants = {
        code: Constant(code, torch.randint(0, 2, (3, 5 + number), generator=generator).to(dtype))
        for number, (code, dtype) in enumerate(DTYPES.items())
    }
    large = torch.randn(1500, 1100, generator=generator)
    constants["blocks"] = Constant("blocks", [large[:5].bfloat16(), large[7:20].bfloat16()], torch.float32)
    constants["transposed"] = Constant("transposed", large.T)
    constants["strided"] = Constant("strided", large[::2, ::3])
    constants["wide"] = Constant("wide", torch.randn(2, 3, 1 << 19, generator=generator).transpose(1, 2))
    constants["expanded"] = Constant("expanded", torch.randn(1, 64, generator=generator).expand(32, 64))
    constants["scalar"] = Constant("scalar", torch.tensor(2.5))
    constants["empty"] = Constant("empty", torch.empty(0, 4, dtype=torch.float64))
    return constants


def test_the_library_reads_what_we_write_and_we_read_it_too(tmp_path: Path) -> None:
    constants, file = _constants(), tmp_path / "w.safetensors"
    counts: list[int] = []
    write_constants(file, constants, counts.append)
    theirs, ours = load_file(file), read_constants(file)
    assert set(theirs) == set(ours) == set(constants)
    for name, constant in constants.items():
        expected = torch.cat([block.contiguous() for block in constant.blocks]) if len(constant.blocks) > 1 else None
        expected = constant.blocks[0] if expected is None else expected
        for tensor in (theirs[name], ours[name]):
            assert (tensor.dtype, tuple(tensor.shape)) == (constant.stored_dtype, constant.shape)
            assert (
                tensor.contiguous()
                .reshape(-1)
                .view(torch.uint8)
                .equal(expected.contiguous().reshape(-1).view(torch.uint8))
            )
        assert Constant(name, ours[name], constant.dtype).digest == constant.digest
    assert sum(counts) == sum(constant.stored_bytes for constant in constants.values())
    assert max(counts) <= 4 << 20


def test_tensors_begin_at_cache_lines_where_the_format_allows(tmp_path: Path) -> None:
    constants, file = _constants(), tmp_path / "w.safetensors"
    write_constants(file, constants)
    tensors = read_constants(file)
    base = min(tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel())
    for name, tensor in tensors.items():
        if tensor.numel():
            step = tensor.itemsize if constants[name].stored_bytes % ALIGNMENT else ALIGNMENT
            assert (tensor.data_ptr() - base) % step == 0


def test_we_read_what_the_library_writes(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.int8), "c": torch.ones(2).bfloat16()}
    save_file(tensors, tmp_path / "w.safetensors")
    ours = read_constants(tmp_path / "w.safetensors")
    assert {name: tensor.tolist() for name, tensor in ours.items()} == {n: t.tolist() for n, t in tensors.items()}


@needs_proc
def test_writing_takes_a_few_megabytes_whatever_the_size(tmp_path: Path) -> None:
    def anonymous_bytes() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))

    weight = scratch_tensor((6000, 4000), torch.float32)  # 96 MB in a mapped file
    constants = {"plain": Constant("plain", weight), "transposed": Constant("transposed", weight.T)}
    before, most = anonymous_bytes(), 0
    ballast = torch.ones(16 << 20)
    assert anonymous_bytes() - before > 60 << 20  # the measure sees what is allocated
    del ballast
    before = anonymous_bytes()

    def sample(_: int) -> None:
        nonlocal most
        most = max(most, anonymous_bytes() - before)

    write_constants(tmp_path / "w.safetensors", constants, sample)
    assert most < 40 << 20
    read = read_constants(tmp_path / "w.safetensors")
    assert anonymous_bytes() - before < 40 << 20
    assert read["transposed"].shape == (4000, 6000)


@pytest.mark.parametrize(
    ("constant", "message"),
    [
        (Constant("__metadata__", torch.ones(1)), "reserves this name"),
        (Constant("w", torch.ones(2, dtype=torch.complex128)), "has the dtype torch.complex128"),
    ],
)
def test_what_the_format_cannot_hold_is_refused(constant: Constant, message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=message):
        write_constants(tmp_path / "w.safetensors", {constant.name: constant})
    assert not (tmp_path / "w.safetensors").exists()


def _raw(header: object, data: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def _one(**changes: object) -> Json:
    return {"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | changes}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (_raw(b"{}", length=99), "whole safetensors header"),
        (_raw(b"{}", length=1 << 40), "header length of 1,099,511,627,776"),
        (_raw(b"[]"), "header of type list"),
        (_raw(b"\xff{}"), "not JSON"),
        (_raw(b"[" * 200_000), "not JSON"),
        (_raw(_one(), b"\0" * 7), "found 76 bytes; needed 77"),
        (_raw(_one(), b"\0" * 9), "found 78 bytes; needed 77"),
        (_raw(_one(shape=[3]), b"\0" * 8), "as many as the shape takes"),
        (_raw(_one(shape=[0, 2**62, 2**62], data_offsets=[0, 0])), "as many as the shape takes"),
        (_raw(_one(shape=[True, 2]), b"\0" * 8), "a shape, two offsets"),
        (_raw(_one(dtype="F4"), b"\0" * 8), "a shape, two offsets"),
        (_raw(_one(data_offsets=[4, 12]), b"\0" * 12), "back to back"),
        (_raw({"w": None}), "a shape, two offsets"),
        (_raw(b" " + json.dumps(_one()).encode(), b"\0" * 8), "a multiple of 4"),
    ],
)
def test_a_damaged_weight_file_is_refused(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "w.safetensors"
    file.write_bytes(content)
    with pytest.raises(ArtifactError, match=message) as raised:
        read_constants(file)
    assert str(raised.value).startswith(f"[{file}] found ")


def test_a_weight_file_that_is_none_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("missing", "No such file"), (".", "not a file"), ("pipe", "not a file"), ("a\0b", "null")):
        with pytest.raises(ArtifactError, match=message):
            read_constants(f"{tmp_path}/{name}")


# ------------------------------------------------------------------------------------------------------ bad programs


def _set(*path: Any) -> Callable[[Json], None]:
    """A change: the last of `path` becomes the value behind the others."""
    *way, last, value = path

    def change(document: Json) -> None:
        target: Any = document
        for key in way:
            target = target[key]
        target[last] = value

    return change


def _forward(*path: Any) -> Callable[[Json], None]:
    return _set("entries", "forward", *path)


def _delete(key: str) -> Callable[[Json], None]:
    return lambda document: document.pop(key)


def _add_input(name: str) -> Callable[[Json], None]:
    return _forward("inputs", name, {"dtype": "int64", "shape": [2]})


def _place(**fields: Any) -> Callable[[Json], None]:
    return _set("placement", {"tiers": {}, "limits": {}, "ring_bytes": 0, "states": {}, **fields})


NESTED: Any = "%input_ids"
for _ in range(20):
    NESTED = [NESTED]
TENSOR = {"dtype": "float32", "stored": "float32", "shape": [61, 8]}
LINEAR = ["%0", "@body.0.weight", "@body.0.bias"]
BAD: dict[str, tuple[Callable[[Json], None], str]] = {
    "other JSON": (_set("format", "x"), "JSON of something else"),
    "newer": (_set("version", 2), "written by a newer jettison"),
    "no version": (_set("version", None), "version: found None"),
    "version of another type": (_set("version", True), "version: found True"),
    "version zero": (_set("version", 0), "version: found 0"),
    "no entries": (_delete("entries"), "the file: found the keys"),
    "a key too many": (_set("x", 1), "the file: found the keys"),
    "info": (_set("info", "kind", "robot"), "a decoder or an encoder"),
    "info type": (_set("info", "context", "64"), "info: context: found '64'; needed int"),
    "info bool": (_set("info", "context", True), "info: context: found True; needed int"),
    "outputs": (_set("outputs", ["a", "a"]), "the name 'a' twice"),
    "pipeline": (_set("pipeline", None), "pipeline: found None; needed str"),
    "history": (_set("history", 0, "misses", [{"node": 1, "reason": ""}]), "node: found 1; needed str"),
    "history float": (_set("history", 0, "kl", {"float": "x"}), "a literal of a known kind"),
    "history number": (_set("history", 0, "seconds", 10**400), "64 bits"),
    "dtype": (_set("constants", "embed.weight", "dtype", "float99"), "dtype: found 'float99'; needed dtype"),
    "stored dtype": (_set("constants", "embed.weight", "stored", "int32"), "found torch.float32 .61, 8."),
    "constant shape": (_set("constants", "embed.weight", "shape", [8, 61]), "found torch.float32 .61, 8."),
    "negative size": (_set("constants", "embed.weight", "shape", [-1, 8]), "the size -1; needed a number"),
    "constant not in the file": (_set("constants", "x", TENSOR), "constant x: found no such tensor"),
    "constant not declared": (_forward("constants", 0, "x"), "the name 'x'; needed a constant"),
    "packed": (_set("packed", "w", {"format": "int4", "shape": [1], "parts": {"codes": "x"}}), "the name 'x'"),
    "packed parts": (_set("packed", "w", {"format": "int4", "shape": [1], "parts": {"codes": 1}}), "needed str"),
    "state shape": (_set("states", "s", {"name": "s", "shape": ["x"], "dtype": "int8"}), "the size 'x'"),
    "state name": (_set("states", "s", {"name": "t", "shape": [], "dtype": "int8"}), "the name 's'"),
    "state not declared": (_forward("states", "s", ["s0"]), "a state of the program"),
    "placement": (_set("placement", []), "placement: found list .*needed a table"),
    "placement of a constant that is none": (_place(tiers={"x": "disk"}), "the name 'x'; needed constants, states"),
    "placement on a tier that is none": (_place(tiers={"embed.weight": "tape"}), "the name 'tape'"),
    "placement of a state that is none": (_place(states={"s": "disk"}), "the name 's'"),
    "limit of a tier that is none": (_place(limits={"tape": 1}), "the name 'tape'"),
    "limit below zero": (_place(limits={"host": -1}), "placement: found a negative size"),
    "limit that is no number": (_place(limits={"host": "1GB"}), "limits: 'host': found '1GB'; needed int"),
    "limit that is a bool": (_place(limits={"host": True}), "limits: 'host': found True; needed int"),
    "ring below zero": (_place(ring_bytes=-4096), "placement: found a negative size"),
    "ring that is no number": (_place(ring_bytes=1.5), "ring_bytes: found 1.5; needed int"),
    "tier that is no text": (_place(tiers={"embed.weight": 1}), "needed str"),
    "a key of a placement too many": (_place(x=1), "placement: found the keys"),
    "entry name": (_set("entries", "x y", {}), "a name of small letters"),
    "entry": (_set("entries", "forward", []), "forward: found list .*needed a table"),
    "symbol range": (_set("symbols", "s1", {"min": 9, "max": 3, "hint": 5}), "2 <= min <= hint <= max"),
    "symbol of one value": (_set("symbols", "s1", {"min": 5, "max": 5, "hint": 5}), "min < max"),
    "symbol hint": (_set("symbols", "s1", "hint", 10**18), "2 <= min <= hint <= max"),
    "hint beyond memory": (_set("symbols", "s0", {"min": 2, "max": None, "hint": 2**62}), "hint <= 2..31"),
    "symbol type": (_set("symbols", "s1", "min", "2"), "min: found '2'; needed int"),
    "unknown symbol": (_forward("inputs", "input_ids", "shape", ["s0", "s9"]), "the size 's9'"),
    "input that is code": (_add_input("x, y=print(1)"), "needed the name of a tensor"),
    "input that is a keyword": (_add_input("lambda"), "needed the name of a tensor"),
    "input that is a builtin": (_add_input("print"), "needed the name of a tensor"),
    "input self": (_add_input("self"), "needed the name of a tensor"),
    "input torch": (_add_input("torch"), "needed the name of a tensor"),
    "input that looks like ASCII": (_add_input("\uff50rint"), "needed the name of a tensor"),
    "nodes": (_forward("nodes", [[]]), "forward: nodes: found list"),
    "unknown operator": (_forward("nodes", 0, "op", "aten.frobnicate.default"), "'aten.frobnicate.default' .unknown"),
    "operator of another library": (_forward("nodes", 0, "op", "prims.add.default"), "the operator 'prims.add"),
    "Python": (_forward("nodes", 0, "op", "os.system"), "the operator 'os.system' .unknown"),
    "Python's operator": (_forward("nodes", 0, "op", "operator.methodcaller"), "the operator 'operator.methodcaller'"),
    "attribute of a namespace": (_forward("nodes", 0, "op", "aten.__class__.__call__"), "unknown"),
    "attribute of an operator": (_forward("nodes", 0, "op", "aten.add.__class__"), "unknown"),
    "operator that is a keyword": (_forward("nodes", 0, "op", "aten.random.from"), "unknown"),
    "operator without overload": (_forward("nodes", 0, "op", "aten.add"), "unknown"),
    "operator that opens files": (_forward("nodes", 0, "op", "aten.from_file.default"), "models do not need"),
    "operator that writes": (_forward("nodes", 0, "op", "aten.relu_.default"), "writes to its input"),
    "operator that prints": (_forward("nodes", 0, "op", "aten._print.default"), "models do not need"),
    "operator of TorchScript": (_forward("nodes", 0, "op", "aten.save.default"), "of TorchScript"),
    "op of another type": (_forward("nodes", 0, "op", 3), "found 3; needed str"),
    "arguments": (_forward("nodes", 0, "args", "%input_ids"), "arguments that are not a list"),
    "undefined": (_forward("nodes", 1, "args", 0, "%77"), "a reference to '%77'; needed a value that is defined"),
    "defined later": (_forward("nodes", 0, "args", 0, "%1"), "a reference to '%1'; needed a value that is defined"),
    "nested": (_forward("nodes", 0, "args", NESTED), "nested without end"),
    "number": (_forward("nodes", 0, "args", [2**63]), "the number 9.223372e.18; needed 64 bits"),
    "large number": (_forward("nodes", 0, "args", [10**4000]), "64 bits"),
    "literal": (_forward("nodes", 0, "args", [{"pickle": "x"}]), "the argument .'pickle': 'x'."),
    "empty literal": (_forward("nodes", 0, "args", [{}]), "the argument {}"),
    "dtype literal": (_forward("nodes", 0, "args", [{"dtype": "float99"}]), "a literal of a known kind"),
    "device": (_forward("nodes", 0, "args", [{"device": "fpga:0"}]), "a literal of a known kind"),
    "too few arguments": (_forward("nodes", 1, "args", ["%0"]), "'weight' missing"),
    "too many arguments": (_forward("nodes", 1, "args", [*LINEAR, 1]), "4 positional arguments, where it takes 3"),
    "named twice": (_forward("nodes", 1, "kwargs", {"bias": None}), "'bias' unknown"),
    "code as a name": (_forward("nodes", 1, "kwargs", {"bias=print(1), x": None}), "unknown"),
    "arity": (_forward("nodes", 1, {"op": "operator.add", "args": [1]}), "where it takes 2"),
    "a list to multiply": (
        _forward("nodes", 1, {"op": "operator.mul", "args": [[1], 2]}),
        "operands that are no sizes",
    ),
    "a text to multiply": (_forward("nodes", 1, {"op": "operator.mul", "args": [{"str": "a"}, 2]}), "no sizes"),
    "an exponent": (_forward("nodes", 1, {"op": "operator.pow", "args": [9, 10**9]}), "operands that are no sizes"),
    "a power": (_forward("nodes", 1, {"op": "operator.pow", "args": [9, 64]}), "a size beyond 64 bits"),
    "shapes": (_forward("nodes", 1, "args", ["%input_ids", *LINEAR[1:]]), "aten.linear.default: found arguments"),
    "where": (_forward("nodes", 1, "where", ["x"]), "needed str"),
    "returns": (_forward("returns", []), "it returns .*needed 1 values"),
    "returns a literal": (_forward("returns", [1]), "it returns .1."),
    "returns an undefined value": (_forward("returns", ["%99"]), "a reference to '%99'"),
    "returns a size": (_forward("nodes", 3, {"op": "aten.sym_size.int", "args": ["%input_ids", 0]}), "returns SymInt"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_program_is_refused(case: str, small: tuple[Path, Path]) -> None:
    change, message = BAD[case]
    document = json.loads(small[0].read_text())
    change(document)
    small[0].write_text(json.dumps(document))
    with pytest.raises(ArtifactError, match=message) as raised:
        load_program(*small)
    text = str(raised.value)
    assert text.startswith(f"[{small[0]}] ")
    assert "jettison optimize" in text or "pip install -U" in text
    assert len(text) < 1500


@pytest.mark.parametrize("content", [b"", b"{", b"null", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 5000])
def test_text_that_is_no_program_is_refused(content: bytes, small: tuple[Path, Path]) -> None:
    small[0].write_bytes(content)
    with pytest.raises(ArtifactError, match="the file: found"):
        load_program(*small)


@pytest.mark.parametrize("part", [0.1, 0.5, 0.9, 0.999])
def test_a_truncated_program_is_refused(part: float, small: tuple[Path, Path]) -> None:
    content = small[0].read_bytes()
    small[0].write_bytes(content[: int(len(content) * part)])
    with pytest.raises(ArtifactError, match="bytes that are not JSON"):
        load_program(*small)


def test_a_program_file_that_is_none_is_refused(small: tuple[Path, Path]) -> None:
    os.mkfifo(small[0].with_name("pipe"))
    for name in ("missing", "pipe", ".", "a\0b"):
        with pytest.raises(ArtifactError, match="the file: found"):
            load_program(small[0].with_name("x").parent / name, small[1])


def test_a_constant_of_the_file_is_checked_before_it_is_used(small: tuple[Path, Path]) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(small[1]).items()}
    for wrong in (tensors["body.0.bias"].double(), tensors["body.0.bias"][:4], None):
        changed = dict(tensors)
        if wrong is None:
            del changed["body.0.bias"]
        else:
            changed["body.0.bias"] = wrong
        save_file(changed, small[1])
        with pytest.raises(ArtifactError, match=r"constant body\.0\.bias: found"):
            load_program(*small)


def test_names_of_constants_never_become_code(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    program = _small_program().copy()
    names = {
        "embed.weight": f"x=open({str(victim)!r}, 'w'), y",
        "body.0.weight": "lambda",
        "body.0.bias": "input_ids",
        "body.2.weight": "\u00b2 \n import os",
        "body.2.bias": "self",
    }
    program.constants = {names[name]: constant.renamed(names[name]) for name, constant in program.constants.items()}
    for node in program.entries["forward"].graph.nodes:
        if "constant" in node.meta:
            node.meta["constant"] = names[node.meta["constant"]]
    loaded = load_program(*saved(program, tmp_path))
    ids = torch.tensor([[1, 2, 3]])
    expected = _run(_small_program(), ids)
    assert torch.equal(_run(loaded, ids), expected)
    assert not victim.exists()


def _run(program: Program, ids: Tensor) -> Tensor:
    """Through the generated code, as the torch executor does."""
    module = program.entries["forward"]
    names = [node.meta.get("constant") for node in module.graph.nodes if node.op == "placeholder"]
    return module(*(program.constants[name].value() if name else ids for name in names))[0]


# -------------------------------------------------------------------------------------------------------------- fuzz

VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 70), st.sampled_from([2**31, 2**62, 2**63, -(2**64), 10**30]),
    st.floats(), st.text(max_size=4),
    st.sampled_from([
        "%0", "%1", "%input_ids", "@embed.weight", "@body.0.bias", "s0", "s1", "batch", "capacity", "float16", "int64",
        "aten.add.Tensor", "aten.view.default", "aten.sum.default", "aten.split.Tensor", "aten.nonzero.default",
        "aten.item.default", "aten.cat.default", "aten.randn.default", "aten.empty.memory_format", "operator.getitem",
        "operator.mul", "torch.sym_ite", "jettison.attention.default", "jettison.write_slots.default", "decoder",
    ]),
    st.sampled_from([
        [], {}, [[]], {"str": "x"}, {"float": "nan"}, {"dtype": "int8"}, {"device": "cuda"}, {"layout": "strided"},
        {"memory_format": "channels_last"}, ["%0", "%0"], [1, -1], ["s0", 8],
    ]),
)  # fmt: skip


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in children for place in _places(item, (*path, key)))]


@st.composite
def mutated(draw: st.DrawFn, document: Json) -> Json:
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.sampled_from([path for path in _places(document) if path]))
        owner: Any = document
        for key in place[:-1]:
            owner = owner[key]
        action = draw(st.sampled_from(["set", "delete", "copy", "rename"]))
        if action == "delete":
            del owner[place[-1]]
        elif action == "copy" and isinstance(owner, list):
            owner.append(copy.deepcopy(owner[place[-1]]))
        elif action == "rename" and isinstance(owner, dict):
            owner[draw(st.text(max_size=3))] = owner.pop(place[-1])
        else:
            owner[place[-1]] = copy.deepcopy(draw(VALUES))  # a later change must not reach the one that is drawn again
    return document


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_mutated_program_loads_or_is_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    files = _fuzz_files(tmp_path_factory)
    changed = files[0].with_name("changed.json")
    changed.write_text(json.dumps(data.draw(mutated(json.loads(files[0].read_text())))))
    for metadata in (False, True):
        try:
            program = load_program(changed, files[1], metadata=metadata)
        except ArtifactError as error:
            assert str(changed) in str(error)  # noqa: PT017 (either way is right)
        else:
            assert not metadata or str(program).startswith("program ")


@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_flipped_bytes_load_or_are_refused(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    files = _fuzz_files(tmp_path_factory)
    which = data.draw(st.integers(0, 1))
    content = bytearray(files[which].read_bytes())
    # The header of the weight file; its data may hold anything.
    limit = len(content) if which == 0 else 8 + int.from_bytes(content[:8], "little")
    for position in data.draw(st.lists(st.integers(0, limit - 1), min_size=1, max_size=3)):
        content[position] = data.draw(st.integers(0, 255))
    changed = list(files)
    changed[which] = files[which].with_name("flipped")
    changed[which].write_bytes(content)
    try:
        load_program(changed[0], changed[1], metadata=False)
    except ArtifactError as error:
        assert str(tmp_path_factory.getbasetemp()) in str(error)  # noqa: PT017 (either way is right)


_FUZZ: list[tuple[Path, Path]] = []


def _fuzz_files(factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    if not _FUZZ:
        _FUZZ.append(saved(_small_program(), factory.mktemp("fuzz")))
    return _FUZZ[0]
