"""Program files that nobody wrote: each is refused, and none runs anything."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from jettison.ir.errors import ArtifactError
from jettison.ir.program import Program
from jettison.ir.serialize import load_program
from tests.ir.saved_programs import Json, saved, small_program


@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    """Files of a program with four nodes."""
    return saved(small_program(), tmp_path)


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
    program = small_program().copy()
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
    expected = _run(small_program(), ids)
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
        _FUZZ.append(saved(small_program(), factory.mktemp("fuzz")))
    return _FUZZ[0]
