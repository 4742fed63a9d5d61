"""Times grow with bytes and shrink with rates, and the longest roof is named."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from jettison.ir.cost import CallCost, NodeCost, Workload, call_costs
from jettison.ir.placement import Placement
from jettison.ir.roofline import ROW_READ_SECONDS, TYPICAL_CPU, Rates, node_seconds, predict, streamed_bytes
from jettison.passes.cache_kv import CacheKV
from tests.models.tiny_programs import tiny_program

RATES = Rates(
    read=1e9, products={"float32": 1e12, "bfloat16": 2e12}, weights={"float32": 1e9, "bfloat16": 1e9, "int4": 4e9},
    disk=1e8, copy=0.0, call_seconds=0.0,
)  # fmt: skip


def linear(rows=1, elements=1_000_000, form="float32", itemsize=4.0, name="w"):
    weights = {name: int(elements * itemsize)}
    return NodeCost(name, "linear", form, rows, weights, frozenset(), elements, operations=2 * rows * elements)


def call(*nodes):
    return CallCost("decode", 1, nodes, 0)


def seconds(node, rates=RATES):
    return predict([call(node)], rates).compute


def test_a_product_with_one_row_takes_as_long_as_its_bytes():
    assert seconds(linear()) == pytest.approx(4e-3)
    assert predict([call(linear())], RATES).bound_by == "memory"


def test_half_of_the_bytes_take_half_of_the_time():
    assert seconds(linear(itemsize=4)) == pytest.approx(2 * seconds(linear(itemsize=2)))


def test_a_kernel_that_reads_slower_than_memory_counts():
    slow = replace(RATES, weights={**RATES.weights, "float32": 1e8})
    assert seconds(linear(), slow) == pytest.approx(1e-2)


@pytest.mark.parametrize("itemsize", [4, 2, 0.5])
def test_products_turn_from_memory_to_arithmetic_at_the_batch_of_the_card(itemsize):
    """B = operations per second * bytes of a weight / (2 * bandwidth)."""
    turn = RATES.products["float32"] * itemsize / (2 * RATES.read)
    for rows, bound in ((0.9 * turn, "memory"), (1.1 * turn, "arithmetic")):
        rates = replace(RATES, weights={})
        assert predict([call(linear(round(rows), itemsize=itemsize))], rates).bound_by == bound


def test_codes_take_as_long_as_their_kernel_for_a_row_and_are_decoded_once_for_many():
    one = node_seconds(linear(1, form="int4", itemsize=0.5), RATES)
    assert one["decoding"] == pytest.approx(1e6 / 4e9)
    few, many = (seconds(linear(rows, form="int4", itemsize=0.5)) for rows in (4, 4000))
    assert few == pytest.approx(4 * one["decoding"])
    # Sixteen times decoding, and the product.
    assert many == pytest.approx(16 * one["decoding"] + 2 * 4000 * 1e6 / 2e12)
    # What kernels of eight bits decode is multiplied in fp32.
    bytes_ = replace(RATES, weights={**RATES.weights, "int8": 4e9})
    assert seconds(linear(4000, form="int8", itemsize=1), bytes_) == pytest.approx(4e-3 + 2 * 4000 * 1e6 / 1e12)


def test_what_was_measured_of_decoding_and_of_each_product_counts():
    measured = replace(RATES, decoding={"int4": 1e9})
    many = node_seconds(linear(64, form="int4", itemsize=0.5), measured)
    assert many["decoding"] == pytest.approx(1e6 / 1e9)
    assert many["arithmetic"] == pytest.approx(2 * 64 * 1e6 / 2e12)
    started = replace(RATES, starts={"float32": 1e-3, "int4": 5.0})
    assert seconds(linear(), started) == pytest.approx(seconds(linear()) + 1e-3)
    looked_up = replace(linear(), kind="embedding")
    assert seconds(looked_up, started) == pytest.approx(seconds(looked_up))


def test_weights_that_no_kernel_reads_are_decoded():
    rates = replace(RATES, weights={**RATES.weights, "decoded": 1e7})
    assert seconds(linear(form="table", itemsize=0.5), rates) == pytest.approx(1e6 / 1e7)


def test_every_operator_is_called():
    rates = replace(RATES, call_seconds=1e-3)
    nothing = NodeCost("x", "other")
    assert predict([call(nothing, nothing)], rates).compute == pytest.approx(2e-3)
    assert predict([call(nothing)], rates).bound_by == "calls"


def test_streams_run_beside_computing():
    placement = Placement({"a": "disk"}, {}, 1000)
    time = predict([call(linear(name="a"), linear(name="b"))], RATES, placement)
    assert time.disk == pytest.approx(4e-2)
    assert time.compute == pytest.approx(8e-3)
    assert time.bound_by == "disk"
    # Of the last slab, half of the ring.
    assert time.fill == pytest.approx(8e-3 * 500 / 4e6)
    assert time.seconds == pytest.approx(time.disk + time.fill)
    fast = replace(RATES, disk=1e12)
    assert predict([call(linear(name="a"))], fast, placement).bound_by == "memory"


def test_copies_to_a_device_carry_what_comes_from_disk_too():
    placement = Placement({"a": "disk", "b": "host"}, {}, 1000)
    rates = replace(RATES, copy=1e8, disk=1e9)
    time = predict([call(linear(name="a"), linear(name="b"))], rates, placement)
    assert time.disk == pytest.approx(4e-3)
    assert time.copy == pytest.approx(8e-2)
    assert time.bound_by == "copies"
    assert streamed_bytes(call(linear(name="a"), linear(name="b"), linear(name="c")), placement) == Counter(
        {"disk": 4_000_000, "host": 4_000_000, "device": 4_000_000}
    )


def test_rows_of_a_table_on_disk_are_waited_for():
    lookup = NodeCost("t", "embedding", "float32", 3, {"t": 300}, frozenset({"t"}), 75)
    with_disk = predict([call(lookup)], RATES, Placement({"t": "disk"}))
    assert with_disk.fill >= 3 * ROW_READ_SECONDS
    assert predict([call(lookup)], RATES).fill == 0


def test_time_is_monotone_in_rates_and_in_what_is_asked_for():
    program = tiny_program("llama", CacheKV())
    tiers = {"lm_head.weight": "disk"}

    usual = replace(TYPICAL_CPU, disk=1e7)

    def total(rates=usual, batch=1, context=64, placed=tiers):
        calls = call_costs(program, "decode", Workload(batch, context, 16))
        return predict(calls, rates, Placement(placed, {}, 4096)).seconds

    base = total()
    assert total(replace(usual, disk=usual.disk / 2)) > base
    assert total(replace(usual, call_seconds=1e-4)) > base
    slow = replace(usual, read=usual.read / 1e5)
    assert total(slow) > base
    assert total(slow, context=128) > total(slow)
    assert total(slow, batch=4) > total(slow)
    assert total(placed={}) < base
