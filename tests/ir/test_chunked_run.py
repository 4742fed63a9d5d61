from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from jettison.ir import chunked_run, constants
from jettison.ir.chunked_run import ChunkedRun
from jettison.ir.compare import usual_inputs
from jettison.ir.interpret import run_entry
from jettison.ir.match import is_call
from tests.helpers import export_tiny

aten = torch.ops.aten


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(61, 12)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        return F.linear(x + self.down(self.up(x).tanh()), self.embed.weight)


@functools.cache
def program():
    return export_tiny(Tied())


def batches():
    tokens = torch.arange(5 * 7).reshape(5, 7) % 61
    return [{"input_ids": usual_inputs(part)["input_ids"]} for part in tokens.split(2)]


def node_reading(weight):
    linears = [node for node in program().entries["forward"].graph.nodes if is_call(node, aten.linear.default)]
    return next(node for node in linears if node.args[1].meta["constant"] == weight)


def test_the_whole_way_is_the_program():
    expected = [run_entry(program(), "forward", batch)[0] for batch in batches()]
    for found, wanted in zip(ChunkedRun(program(), "forward", batches()).outputs(), expected, strict=True):
        assert torch.equal(found, wanted)


def test_observes_every_batch_in_order():
    run, seen = ChunkedRun(program(), "forward", batches()), []
    run.advance(node_reading("up.weight").args[0], seen.append)
    table = program().constants["embed.weight"].value()
    assert [value.shape[0] for value in seen] == [2, 2, 1]
    assert torch.equal(torch.cat(seen), table[torch.cat([batch["input_ids"] for batch in batches()])])


def test_holds_what_is_read_later_and_nothing_else():
    run = ChunkedRun(program(), "forward", batches())
    down = node_reading("down.weight")
    run.advance(down.args[0])
    # The embedding is added behind; what `up` returned is done with.
    assert {node.target for node in run._held[0]} == {down.args[0].target, aten.embedding.default}


@pytest.mark.parametrize("name", ["down.weight", "embed.weight"])
def test_goes_on_with_other_weights(name):
    changed = program().constants[name].value() * 1.5
    run = ChunkedRun(program(), "forward", batches())
    run.weights[name] = lambda: changed
    other = program().copy()
    other.constants[name] = type(other.constants[name])(name, changed)
    for found, batch in zip(run.outputs(), batches(), strict=True):
        assert torch.equal(found, run_entry(other, "forward", batch)[0])


def test_a_fork_leaves_the_run_where_it_was():
    run = ChunkedRun(program(), "forward", batches())
    run.advance(node_reading("down.weight").args[0])
    fork = run.fork()
    fork.weights["down.weight"] = lambda: torch.zeros(12, 20)
    changed, same = list(fork.outputs()), list(run.outputs())
    expected = [run_entry(program(), "forward", batch)[0] for batch in batches()]
    assert all(torch.equal(found, wanted) for found, wanted in zip(same, expected, strict=True))
    assert not any(torch.equal(found, wanted) for found, wanted in zip(changed, expected, strict=True))


@pytest.mark.parametrize("is_on_disk", [False, True])
def test_products_take_the_place_of_weights(is_on_disk, monkeypatch):
    """Twice the product, with the bias behind it; and values in files are the same values."""
    for module in (chunked_run, constants):
        monkeypatch.setattr(module, "SMALLEST_SCRATCH", 1)
    run = ChunkedRun(program(), "forward", batches(), is_on_disk=is_on_disk)
    run.advance(node_reading("down.weight").args[0])
    weight = program().constants["down.weight"].value()
    run.products["down.weight"] = lambda x: 2 * F.linear(x, weight)
    other = ChunkedRun(program(), "forward", batches())
    other.weights["down.weight"] = lambda: 2 * weight
    for found, wanted in zip(run.fork().outputs(), other.outputs(), strict=True):
        torch.testing.assert_close(found, wanted)
    held = [value for values in run._held for value in values.values()]
    assert held
    assert all(value.untyped_storage().filename is not None for value in held) or not is_on_disk
