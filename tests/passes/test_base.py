"""The driver catches a pass that does not keep its contract."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

from jettison.ir.constants import Constant
from jettison.ir.edit import Edit
from jettison.ir.errors import OptionError, PassError, UnsupportedError, VerifyError
from jettison.ir.match import Miss, is_call
from jettison.ir.program import MissRecord, copy_graph
from jettison.passes.base import Pass, describe_node
from tests.helpers import export_body, run_pass

aten = torch.ops.aten


def sines():
    return export_body(lambda self, x: (x.sin() * self.w).sin() + x.cos(), w=(8,))


@dataclass(frozen=True)
class SineToCosine(Pass):
    """Does what it says, and misses cosines."""

    name: ClassVar[str] = "sine-to-cosine"

    def match(self, node, program):
        if is_call(node, aten.cos.default):
            return Miss("it is a cosine already", node)
        return node if is_call(node, aten.sin.default) else None

    def rewrite(self, match, edit):
        with edit.before(match):
            edit.replace(match, edit.call(aten.cos.default, match.args[0]))


def test_a_pass_rewrites_every_match_and_reports_every_miss():
    program = sines()
    record = SineToCosine().run(program)
    assert record.rewrites == 2
    assert record.misses == [MissRecord("body (cos)", "it is a cosine already")]
    assert record.seconds > 0
    assert record.bytes_before == record.bytes_after == program.weight_bytes() == (61 * 8 + 8) * 4
    assert program.history == [record]
    assert record.as_dict()["misses"] == [{"node": "body (cos)", "reason": "it is a cosine already"}]
    assert str(program).count("aten.cos") == 3


def test_a_second_run_only_misses():
    program, _ = run_pass(SineToCosine(), sines())
    _, record = run_pass(SineToCosine(), program)
    assert record.rewrites == 0
    assert len(record.misses) == 3


def test_strict_makes_a_miss_an_error():
    program = sines()
    with pytest.raises(UnsupportedError, match=r"strict mode: 1 place\(s\).*\n +body \(cos\): it is a cosine already"):
        SineToCosine().run(program, strict=True)
    assert program.history == []


def test_strict_lets_a_pass_without_misses_through():
    program = export_body(lambda self, x: x.sin())
    assert SineToCosine().run(program, strict=True).rewrites == 1


@dataclass(frozen=True)
class ClaimsTooMuch(Pass):
    name: ClassVar[str] = "claims-too-much"

    def transform(self, program):
        return 1, []


@dataclass(frozen=True)
class ClaimsTooLittle(SineToCosine):
    name: ClassVar[str] = "claims-too-little"

    def transform(self, program):
        super().transform(program)
        return 0, []


@dataclass(frozen=True)
class SwapsAConstantSilently(Pass):
    name: ClassVar[str] = "swaps-a-constant-silently"

    def transform(self, program):
        old = program.constants["body.w"]
        program.constants["body.w"] = Constant("body.w", old.value() * 2)
        return 0, []


@dataclass(frozen=True)
class AddsAnInputSilently(Pass):
    name: ClassVar[str] = "adds-an-input-silently"

    def transform(self, program):
        edit = Edit(program, "forward", self.name)
        edit.input("extra", edit.dynamic_tensor([None], torch.float32))
        return 0, []


def test_a_pass_that_claims_rewrites_it_did_not_make_is_caught():
    with pytest.raises(PassError, match=r"claims-too-much\] reports 1 rewrites, but the graph text did not change"):
        ClaimsTooMuch().run(sines())


HIDING = (ClaimsTooLittle(), SwapsAConstantSilently(), AddsAnInputSilently())


@pytest.mark.parametrize("lying", HIDING, ids=[each.name for each in HIDING])
def test_a_pass_that_hides_its_rewrites_is_caught(lying):
    with pytest.raises(PassError, match=rf"{lying.name}\] reports 0 rewrites, but the graph text changed"):
        lying.run(sines())


@dataclass(frozen=True)
class BreaksItsPromise(SineToCosine):
    name: ClassVar[str] = "breaks-its-promise"

    def ensures(self, program):
        count = sum(is_call(node, aten.cos.default) for node in program.entries["forward"].graph.nodes)
        return f"{count} cosines are left" if count else None


def test_ensures_looks_at_the_result():
    with pytest.raises(PassError, match="breaks its own promise: 3 cosines are left"):
        BreaksItsPromise().run(sines())
    assert BreaksItsPromise().run(export_body(lambda self, x: x.exp())).rewrites == 0


@dataclass(frozen=True)
class LeavesNoMetadata(SineToCosine):
    name: ClassVar[str] = "leaves-no-metadata"

    def rewrite(self, match, edit):
        with edit.graph.inserting_before(match):
            edit.replace(match, edit.graph.call_function(aten.cos.default, match.args))


def test_the_verifier_runs_after_every_pass_and_names_it():
    with pytest.raises(VerifyError, match=r"\[leaves-no-metadata\] forward: .* has no metadata"):
        LeavesNoMetadata().run(sines())


@dataclass(frozen=True)
class LeavesStaleMetadata(SineToCosine):
    name: ClassVar[str] = "leaves-stale-metadata"

    def rewrite(self, match, edit):
        with edit.before(match):
            wide = edit.call(aten.to.dtype, match.args[0], torch.float64)
            cosine = edit.call(aten.cos.default, match.args[0])
        cosine.args = (wide,)
        edit.replace(match, cosine)


def test_stale_metadata_is_caught():
    with pytest.raises((VerifyError, PassError), match="leaves-stale-metadata"):
        LeavesStaleMetadata().run(export_body(lambda self, x: x.sin()))


@dataclass(frozen=True)
class Refuses(SineToCosine):
    name: ClassVar[str] = "refuses"

    def requires(self, program):
        raise OptionError("[refuses] comes first. Put it first.")


def test_requires_stops_a_pass_before_it_changes_anything():
    program = sines()
    before = str(program)
    with pytest.raises(OptionError, match="comes first"):
        Refuses().run(program)
    assert str(program) == before
    assert program.history == []


@dataclass(frozen=True)
class OnlyDecode(SineToCosine):
    name: ClassVar[str] = "only-decode"
    entries: ClassVar[tuple[str, ...] | None] = ("decode",)


def test_a_pass_runs_on_the_entries_it_names():
    program = sines()
    program.entries = {"prefill": program.entries["forward"], "decode": copy_graph(program.entries["forward"])}
    record = SineToCosine().run(program.copy())
    assert record.rewrites == 4
    assert len(record.misses) == 2
    one, record = run_pass(OnlyDecode(), program)
    assert record.rewrites == 2
    prefill, decode = str(one).split("entry decode")
    assert "aten.sin" in prefill
    assert "aten.sin" not in decode


@dataclass(frozen=True)
class FusesPairs(Pass):
    """Erases a node that comes later in the list being walked."""

    name: ClassVar[str] = "fuses-pairs"

    def match(self, node, program):
        if not is_call(node, aten.sin.default):
            return None
        user = next(iter(node.users))
        return (node, user) if is_call(user, aten.sin.default) else None

    def rewrite(self, match, edit):
        with edit.before(match[1]):
            edit.replace(match[1], edit.call(aten.exp.default, match[0].args[0]))


def test_a_node_erased_on_the_way_is_not_matched():
    program, record = run_pass(FusesPairs(), export_body(lambda self, x: x.sin().sin().sin() * 2))
    assert record.rewrites == 1
    assert str(program).count("aten.exp") == 1
    assert str(program).count("aten.sin") == 1


def test_a_pass_must_say_what_it_does():
    @dataclass(frozen=True)
    class Empty(Pass):
        name: ClassVar[str] = "empty"

    with pytest.raises(NotImplementedError, match="Empty overrides neither match nor transform"):
        Empty().run(sines())


def test_nodes_are_described_by_constant_module_or_operator():
    program = sines()
    nodes = {str(node.target): node for node in program.entries["forward"].graph.nodes}
    assert describe_node(nodes["aten.embedding.default"]) == "embed.weight"
    assert describe_node(nodes["body_w"]) == "body.w"
    assert "body (" in describe_node(nodes["aten.cos.default"])
    del nodes["aten.cos.default"].meta["where"]
    assert "(" not in describe_node(nodes["aten.cos.default"])
