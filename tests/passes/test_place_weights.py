from __future__ import annotations

import functools
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jettison.api import parse_passes, pipeline_text, with_cache
from jettison.ir.cost import Workload
from jettison.ir.errors import OptionError
from jettison.ir.placement import READ_AHEAD_BYTES, Placement
from jettison.ir.roofline import TYPICAL_CPU, TYPICAL_GPU
from jettison.passes.cache_kv import CacheKV
from jettison.passes.formats import IntGroups
from jettison.passes.merge_qkv_projections import MergeQkvProjections
from jettison.passes.pipeline import apply, prepare
from jettison.passes.place_weights import PlaceWeights
from jettison.passes.placement.memory import needs_of, step_of
from jettison.passes.placement.units import find_units
from jettison.passes.quantize_weights import QuantizeWeights
from tests.helpers import StoreIn, assert_golden, assert_idempotent, assert_same_numbers, export_tiny, run_pass
from tests.models.tiny_mixture import mixture_program
from tests.models.tiny_programs import tiny_program

WORK = {"context": 64, "prompt": 16}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(32, 72), nn.Linear(72, 32, bias=False)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(x)))


class Encoder(nn.Module):
    """A table that is looked up, three layers and a head of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(61, 32)
        self.layers = nn.ModuleList([Layer() for _ in range(3)])
        self.head = nn.Linear(32, 61, bias=False)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


@functools.cache
def encoder():
    program = export_tiny(Encoder(), kind="encoder")
    prepare(program)
    return program


def room(program, share, reserve=1000, **work):
    """Bytes of main memory that a share of the weights fits in, and the bytes of the process."""
    work = Workload(**{"batch": 1, **WORK, **work})
    units, _ = find_units(program, step_of(program, work))
    needs = needs_of(program, work, units, reserve)
    return needs.total + round(share * sum(unit.memory_bytes for unit in units))


def placing(program, share, **options):
    return PlaceWeights(host=room(program, share), reserve=1000, **{**WORK, **options})


def llama(*passes, **options):
    return tiny_program("llama", *passes, CacheKV(), **options)


# ---------------------------------------------------------------------------------------------------------- the graph


@pytest.mark.parametrize(
    ("name", "share", "formats"), [("half", 0.5, None), ("quantised", 0.65, IntGroups(4, 32)), ("all", 1.0, None)]
)
def test_golden(snapshot, name, share, formats):
    program = encoder()
    if formats is not None:
        program, _ = run_pass(StoreIn(formats), program)
    after, record = assert_golden(snapshot, placing(program, share), program, name)
    assert after.placement is not None
    assert record.rewrites == len(after.placement.tiers)
    # Only the lines that say where weights are.
    lines = [line for line in str(after).splitlines() if not line.startswith("stream ")]
    assert lines == str(program).splitlines()
    assert_same_numbers(program, after)


def test_the_record_says_what_is_where():
    program = llama()
    after, record = run_pass(placing(program, 0.5), program)
    tiers = after.placement.tiers
    assert set(tiers.values()) == {"disk"}
    assert after.placement.limits == {"host": room(program, 0.5)}
    assert set(record.layers) == set(tiers)
    streamed = sum(after.constants[name].nbytes for name in tiers)
    assert sum(figures["bytes"] for figures in record.layers.values()) == streamed
    assert f"({streamed:,} bytes) are on the disk" in record.notes[1]
    taken, limit = (
        int(number.replace(",", "")) for number in re.findall(r"take ([\d,]+) of ([\d,]+)", record.notes[0])[0]
    )
    assert taken <= limit == room(program, 0.5)
    assert (record.bytes_before, record.misses) == (record.bytes_after, [])


def test_a_second_run_changes_nothing():
    program = llama()
    assert_idempotent(placing(program, 0.5), program)


def test_other_limits_place_anew():
    program = llama()
    half = placing(program, 0.5)
    after, record = run_pass(half, program, placing(program, 1.0))
    assert after.placement.tiers == {}
    assert record.rewrites > 0
    assert str(after) == str(program)


def test_parts_of_a_packed_weight_and_joint_weights_are_together():
    program = llama(QuantizeWeights(bits=4, group=32))
    after, _ = run_pass(placing(program, 0.6), program)
    placement = after.placement
    for packed in after.packed.values():
        assert len({placement.of(part) for part in packed.parts.values()}) == 1
    for layer in range(2):
        read_together = [f"model.layers.{layer}.self_attn.{name}_proj.weight.codes" for name in "qkv"]
        assert len({placement.of(name) for name in read_together}) == 1
    assert set(placement.tiers.values()) == {"disk"}


def test_merged_projections_are_streamed():
    program = llama(MergeQkvProjections())
    after, record = run_pass(placing(program, 0.5), program)
    assert record.misses == []
    assert any("qkv_proj" in name for name in after.placement.tiers)


def test_a_tied_table_stays_with_its_head():
    program = tiny_program("gpt2", CacheKV())
    units, _ = find_units(program, step_of(program, Workload(1, 64, 16)))
    table = next(unit for unit in units if unit.name.endswith("wte.weight"))
    assert not table.is_table
    assert table.read_bytes == table.memory_bytes
    places = next(unit for unit in units if unit.name.endswith("wpe.weight"))
    assert places.is_table
    after, _ = run_pass(placing(program, 0.95), program)
    assert places.name in after.placement.tiers


def test_scales_that_a_tied_packed_table_holds_twice_count_twice():
    program = tiny_program("gpt2", QuantizeWeights(bits=4, group=32), CacheKV())
    units, _ = find_units(program, step_of(program, Workload(1, 64, 16)))
    table = next(unit for unit in units if "wte" in unit.name)
    sizes = {name.rpartition(".")[2]: program.constants[name].nbytes for name in table.constants}
    assert table.memory_bytes == sum(sizes.values()) + sizes["scales"] + sizes.get("zeros", 0)


def test_a_copy_keeps_its_placement():
    program = llama()
    after, _ = run_pass(placing(program, 0.5), program)
    assert after.copy().placement == after.placement


# -------------------------------------------------------------------------------------------------------------- misses


def test_experts_stay():
    program = mixture_program(16)
    after, record = run_pass(PlaceWeights(host=room(program, 0.9, **WORK), reserve=1000, **WORK), program)
    reasons = {miss.reason for miss in record.misses}
    assert reasons == {"jettison.experts reads it, and only weights of linears and embeddings are streamed"}
    assert len(record.misses) == 4
    assert not any("gate_up" in name or "down" in name for name in after.placement.tiers)


def test_three_bits_stay():
    program, _ = run_pass(StoreIn(IntGroups(3, 32)), encoder())
    _, record = run_pass(PlaceWeights(host=10**9, **WORK), program)
    assert {miss.reason for miss in record.misses} == {"no kernel reads 3-bit weights as they are"}


def test_floating_point_zero_points_of_eight_bits_stay():
    program, _ = run_pass(StoreIn(IntGroups(8, 32, float_zeros=True)), encoder())
    _, record = run_pass(PlaceWeights(host=10**9, **WORK), program)
    assert {miss.reason for miss in record.misses} == {"no kernel reads zero points in floating point with these bits"}


def test_a_matrix_that_a_linear_multiplies_stays():
    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(61, 8)
            self.left, self.right = nn.Parameter(torch.zeros(5, 8)), nn.Parameter(torch.zeros(9, 8))

        def forward(self, input_ids):
            return self.embed(input_ids).sum(-1)[..., None, None] + F.linear(self.left, self.right)

    program = export_tiny(Weights(), kind="encoder")
    _, record = run_pass(PlaceWeights(host=10**9, **WORK), program)
    assert ("left", "a linear multiplies it as its input") in {(miss.node, miss.reason) for miss in record.misses}


# ------------------------------------------------------------------------------------------------------------- targets


def gpu_program(*passes):
    program = llama(*passes)
    program.target = "triton"
    return program


def test_a_gpu_is_given_weights_from_host_memory_and_then_from_disk():
    program = gpu_program()
    needs = room(program, 0.6, reserve=0) + TYPICAL_GPU.process_bytes
    after, record = run_pass(PlaceWeights(device=needs, **WORK), program)
    assert set(after.placement.tiers.values()) == {"host"}
    assert after.placement.limits == {"device": needs}
    assert "are on the host" in record.notes[1]
    beside = TYPICAL_CPU.process_bytes + READ_AHEAD_BYTES
    both, record = run_pass(PlaceWeights(device=needs, host=beside + 20_000, **WORK), gpu_program())
    there = {
        tier: sum(program.constants[name].nbytes for name, found in both.placement.tiers.items() if found == tier)
        for tier in ("host", "disk")
    }
    assert 0 < there["host"] <= 20_000 < there["disk"]
    assert "are on the disk" in record.notes[2]
    message = refused(gpu_program(), device=needs, host=beside + 20_000, disk=10_000, **WORK)
    enough = int(re.search(r"bytes, [\d,]+ more. Give disk=(\d+)", message)[1])
    placed, _ = run_pass(PlaceWeights(device=needs, host=beside + 20_000, disk=enough, **WORK), gpu_program())
    on_disk = {name for name, tier in placed.placement.tiers.items() if tier == "disk"}
    assert sum(program.constants[name].nbytes for name in on_disk) <= enough


def test_what_one_launch_reads_is_in_one_place():
    program = gpu_program(QuantizeWeights(bits=4, group=32))
    units, misses = find_units(program, step_of(program, Workload(1, 64, 16)))
    launches = {
        frozenset(re.findall(r"layers\.0\.\w+\.(\w+)_proj", " ".join(unit.constants))): unit
        for unit in units
        if any("layers.0." in name for name in unit.constants)
    }
    assert set(launches) == {frozenset(each) for each in (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))}
    assert [miss.node for miss in misses if "embed" in miss.node], "what is looked up stays on a GPU"
    assert all(unit.slab_bytes == unit.memory_bytes for unit in units), "a launch reads it whole"


def test_throughput_says_which_block_is_fastest():
    program = llama()
    _, record = run_pass(placing(program, 3.0, objective="throughput"), program)
    assert re.search(r"A block of \d+ batches of \d+ rows would generate [\d,.]+ tokens per second", record.notes[-1])
    assert "not executed yet" in record.notes[-1]
    _, encoding = run_pass(placing(encoder(), 0.5, objective="throughput"), encoder())
    assert encoding.notes[-1].startswith("An encoder generates nothing")


# --------------------------------------------------------------------------------------------------------------- order


def test_a_cache_is_made_before_weights_are_placed():
    passes = with_cache(parse_passes("merge-qkv-projections,place-weights{host=2GiB}"), llama())
    assert (
        pipeline_text(passes).replace("host=2GiB", "").startswith("merge-qkv-projections,cache-kv{policy=full},place-")
    )


def test_placing_before_the_cache_is_refused():
    program = tiny_program("llama")
    with pytest.raises(OptionError, match=r"before cache-kv: needs the decode step.*Put place-weights last"):
        PlaceWeights(host=1 << 30).run(program)


def test_nothing_comes_behind_it():
    program = llama()
    with pytest.raises(OptionError, match=r"\[quantize-weights\] behind place-weights: .*Put place-weights last"):
        apply(program, [placing(program, 0.5), QuantizeWeights(bits=8)])


# -------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": 0}, "host=0: needs bytes above 0"),
        ({"device": -1}, "device=-1: needs bytes above 0"),
        ({"disk": True}, "disk=True: needs bytes above 0"),
        ({"reserve": 1.5}, "reserve=1.5: needs bytes above 0"),
        ({"batch": 0}, "batch=0: needs at least 1"),
        ({"context": 0}, "context=0: needs at least 1"),
        ({"prompt": -3}, "prompt=-3: needs at least 1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(OptionError, match=re.escape(message)):
        PlaceWeights(**options)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (None, {}, "found no host; needed host=BYTES alone"),
        ("torch", {"device": 5}, "found no host"),
        ("torch", {"device": 5, "host": 5}, "found device=5"),
        ("triton", {"host": 5}, "needs device=BYTES"),
        ("torch", {"host": 5, "context": 4096}, "context=4096: needs at most 128"),
    ],
)
def test_options_that_do_not_fit_the_target(target, options, message):
    program = llama()
    program.target = target
    with pytest.raises(OptionError, match=re.escape(message)):
        PlaceWeights(**options).run(program)


def refused(program, **options):
    with pytest.raises(OptionError) as caught:
        PlaceWeights(**options).run(program)
    return str(caught.value)


def test_too_little_memory_names_what_is_missing_and_what_would_do():
    program = llama()
    text = refused(program, host=150_000, reserve=1000, context=128, prompt=16, batch=4)
    missing, needed = (
        int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:bytes are m|are taken)", text)
    )
    assert needed == 150_000 + missing
    for what in ("process 1,000", "states", "activations", "weights that cannot be streamed", "buffers"):
        assert what in text
    assert f"Give host={needed} at least." in text
    assert "kivi" in text
    assert "quantize-weights" in text
    # Each remedy works.
    context, batch = (int(re.search(rf"take {key}=(\d+)", text)[1]) for key in ("context", "batch"))
    for changed in ({"host": needed}, {"context": context}, {"batch": batch}):
        given = {"host": 150_000, "reserve": 1000, "context": 128, "prompt": 16, "batch": 4, **changed}
        PlaceWeights(**{**given, "prompt": min(16, given["context"])}).run(program.copy())
    for worse in ({"host": needed - 1}, {"context": context + 1}, {"batch": batch + 1}):
        refused(program.copy(), **{"host": 150_000, "reserve": 1000, "context": 128, "prompt": 16, "batch": 4, **worse})


def test_a_process_that_does_not_fit_has_no_other_remedy():
    text = refused(llama(), host=1 << 20, context=64)
    assert f"process {TYPICAL_CPU.process_bytes:,}" in text
    assert "context=" not in text.partition("Give")[2]
    assert "batch=" not in text


def test_a_full_disk_is_named():
    program = llama()
    text = refused(program, host=room(program, 0.4), reserve=1000, disk=10, **WORK)
    needed = int(re.search(r"Give disk=(\d+)", text)[1])
    assert f"{needed - 10:,} more" in text
    placed, _ = run_pass(PlaceWeights(host=room(program, 0.4), reserve=1000, disk=needed + 5000, **WORK), program)
    assert placed.placement.limits["disk"] == needed + 5000


def test_a_placement_is_pinned_where_nothing_is_said():
    placement = Placement({"a": "disk"})
    assert (placement.of("a"), placement.of("b")) == ("disk", "device")
