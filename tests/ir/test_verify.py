"""Every invariant of the table is broken once, and named; what every pass leaves behind is checked by it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from jettison.ir.constants import Constant, Packed
from jettison.ir.edit import Edit
from jettison.ir.errors import VerifyError
from jettison.ir.placement import Placement
from jettison.ir.program import Program, Retention, State, output_node, placeholders
from jettison.ir.verify import INVARIANTS, verify
from tests.helpers import export_body

aten = torch.ops.aten
PLACED = "a placement names what the program reads, weights as wholes"


def program() -> Program:
    return export_body(lambda self, x: (x * self.w).sin(), w=(8,))


def nodes(broken: Program):
    return list(broken.entries["forward"].graph.nodes)


def find(broken: Program, target):
    return next(node for node in nodes(broken) if node.target is target)


def call_a_module(broken: Program) -> None:
    graph = broken.entries["forward"].graph
    broken.entries["forward"].add_module("inner", nn.Identity())
    with graph.inserting_before(output_node(broken.entries["forward"])):
        graph.call_module("inner", (find(broken, aten.sin.default),)).meta["val"] = torch.zeros(1)


def use_before_definition(broken: Program) -> None:
    find(broken, aten.sin.default).append(find(broken, aten.mul.Tensor))


def write_to_an_input(broken: Program) -> None:
    mul = find(broken, aten.mul.Tensor)
    mul.target = aten.mul_.Tensor


def forget_metadata(broken: Program) -> None:
    del find(broken, aten.mul.Tensor).meta["val"]


def forget_a_constant(broken: Program) -> None:
    del broken.constants["body.w"]


def resize_a_constant(broken: Program) -> None:
    broken.constants["body.w"] = Constant("body.w", torch.zeros(9))


def recast_a_constant(broken: Program) -> None:
    broken.constants["body.w"] = Constant("body.w", torch.zeros(8), torch.float64)


def shuffle_placeholders(broken: Program) -> None:
    first, *_, last = placeholders(broken.entries["forward"])
    last.append(first)


def take_a_state(broken: Program, *returned: str) -> None:
    edit = Edit(broken, "forward", "test")
    state = edit.state(
        State("slots", ("batch", "capacity"), torch.float32), edit.dynamic_tensor([2, None], torch.float32)
    )
    with edit.before(output_node(edit.entry)):
        known = {
            "same": state,
            "other_dtype": edit.call(aten.to.dtype, state, torch.float64),
            "other_rank": edit.call(aten.unsqueeze.default, state, 0),
        }
    edit.set_outputs([*output_node(edit.entry).args[0], *(known[name] for name in returned)])


def take_an_unknown_state(broken: Program) -> None:
    take_a_state(broken, "same")
    del broken.states["slots"]


def drop_without_an_entry(broken: Program) -> None:
    take_a_state(broken, "same")
    broken.retentions["evict"] = Retention("evict", "slot_mask", 8, None, (0,))


def place_what_nothing_reads(broken: Program) -> None:
    broken.constants["other"] = Constant("other", torch.zeros(8))
    broken.placement = Placement({"other": "disk"})


def place_a_state_that_is_none(broken: Program) -> None:
    broken.placement = Placement(states={"slots": "host"})


def tear_a_weight_apart(broken: Program) -> None:
    scale, embed = (next(name for name in broken.constants if part in name) for part in ("body", "embed"))
    broken.packed["both"] = Packed("int4", (8, 8), {"codes": embed, "scales": scale})
    broken.placement = Placement({embed: "disk"})


BREAKAGES = {
    "call_a_module": (call_a_module, "graphs hold only calls of functions"),
    "use_before_definition": (use_before_definition, "values are defined before use"),
    "write_to_an_input": (write_to_an_input, "graphs are functional"),
    "forget_metadata": (forget_metadata, "every value has metadata"),
    "shuffle_placeholders": (shuffle_placeholders, "placeholders come in order"),
    "forget_a_constant": (forget_a_constant, "constants exist with the type the graph sees"),
    "resize_a_constant": (resize_a_constant, "constants exist with the type the graph sees"),
    "recast_a_constant": (recast_a_constant, "constants exist with the type the graph sees"),
    "state_not_returned": (lambda p: take_a_state(p), "every state taken is returned"),
    "state_returned_twice": (lambda p: take_a_state(p, "same", "same"), "every state taken is returned"),
    "state_of_another_dtype": (lambda p: take_a_state(p, "other_dtype"), "every state taken is returned"),
    "state_of_another_rank": (lambda p: take_a_state(p, "other_rank"), "every state taken is returned"),
    "unknown_state": (take_an_unknown_state, "every state taken is returned"),
    "drop_without_an_entry": (drop_without_an_entry, "states that tokens leave have the entries that move them"),
    "place_what_nothing_reads": (place_what_nothing_reads, PLACED),
    "place_a_state_that_is_none": (place_a_state_that_is_none, PLACED),
    "tear_a_weight_apart": (tear_a_weight_apart, PLACED),
}


def test_a_captured_program_holds_every_invariant():
    verify(program())


def test_a_returned_state_is_fine():
    sound = program()
    take_a_state(sound, "same")
    verify(sound)


def test_a_placement_of_whole_weights_is_fine():
    sound = program()
    sound.placement = Placement(dict.fromkeys(sound.used_constants(), "disk"))
    verify(sound)


def test_every_invariant_is_broken_once():
    assert {invariant for _, invariant in BREAKAGES.values()} == {name for name, _ in INVARIANTS}


@pytest.mark.parametrize("name", BREAKAGES)
def test_a_broken_invariant_is_named(name):
    breakage, invariant = BREAKAGES[name]
    broken = program()
    breakage(broken)
    with pytest.raises(VerifyError) as caught:
        verify(broken, after="some-pass")
    message = str(caught.value)
    assert message.startswith("[some-pass] forward: ")
    assert f"broken invariant: {invariant}\n" in message
    assert "\n-> " in message
    assert "bug in jettison" in message


def test_the_message_shows_the_offender_among_its_neighbours():
    broken = program()
    forget_metadata(broken)
    with pytest.raises(VerifyError) as caught:
        verify(broken)
    lines = str(caught.value).splitlines()
    marked = [line for line in lines if line.startswith("-> ")]
    assert len(marked) == 1
    assert "aten.mul.Tensor(%0, %body.w)" in marked[0]
    assert any("aten.sin" in line for line in lines)
