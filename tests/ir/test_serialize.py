"""Saved programs: the same text, the same bytes, no weight read, and one exact error for every bad file."""

from __future__ import annotations

import dataclasses
import json
import operator
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from jettison.ir.errors import UnsupportedError, VerifyError
from jettison.ir.placement import Placement
from jettison.ir.program import input_placeholders
from jettison.ir.serialize import load_program, save_program
from jettison.passes.cache_kv import CacheKV
from jettison.passes.pipeline import apply
from jettison.passes.policies import Full, Window
from tests.helpers import export_body
from tests.ir.saved_programs import PROGRAMS, built, needs_proc, saved, small_program

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
    program = small_program().copy()
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
    program = small_program().copy()
    node = next(node for node in program.entries["forward"].graph.nodes if node.op == "call_function")
    node.target = target
    with pytest.raises(UnsupportedError, match=reason):
        saved(program, tmp_path)


def test_a_size_as_a_literal_is_a_bug_of_the_pass_that_wrote_it(tmp_path: Path) -> None:
    program = small_program().copy()
    nodes = [node for node in program.entries["forward"].graph.nodes if node.op == "call_function"]
    nodes[0].args = (nodes[0].args[0], nodes[0].meta["val"].shape[1])
    with pytest.raises(VerifyError, match="as a literal"):
        saved(program, tmp_path)


def test_an_argument_of_a_strange_type_is_refused(tmp_path: Path) -> None:
    program = small_program().copy()
    node = next(node for node in program.entries["forward"].graph.nodes if node.op == "call_function")
    node.kwargs = {"x": torch.strided, "y": object()}
    with pytest.raises(UnsupportedError, match="an argument of type object"):
        saved(program, tmp_path)
