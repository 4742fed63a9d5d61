"""What the tests of passes share: small traced programs, golden files, and the questions asked of every pass."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from syrupy.assertion import SnapshotAssertion
from syrupy.data import Snapshot, SnapshotCollection
from syrupy.extensions.single_file import SingleFileSnapshotExtension, WriteMode
from torch import Tensor, fx, nn

from jettison.ir.capture import capture_module
from jettison.ir.compare import assert_close, example_input_ids, run_program, usual_inputs
from jettison.ir.constants import Constant, Packed
from jettison.ir.diff import diff_text
from jettison.ir.edit import Edit
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.program import MissRecord, PassRecord, Program, input_placeholders
from jettison.passes.base import Pass
from jettison.passes.formats import WeightFormat, format_from_text
from jettison.passes.pipeline import prepare

SHAPES = ((1, 1), (2, 7), (3, 16))


def weight_values(count: int, seed: int) -> Tensor:
    """`[count] f64` in [-0.5, 0.5), from integer arithmetic: bit-identical on every machine and torch version.

    Golden files hold content hashes of weights, and no release of torch promises the values of its random generators.
    """
    bits = torch.arange(count, dtype=torch.int64) + seed * 1_000_003
    for shift, factor in ((16, 0x45D9F3B), (15, 0x2C1B3C6D), (16, 1)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    return (bits % 1021).double() / 1021 - 0.5


def set_weights(module: nn.Module) -> nn.Module:
    """Give every floating parameter and buffer fixed values: matrices small, vectors of norms near one."""
    with torch.no_grad():
        named = [*module.named_parameters(), *module.named_buffers()]
        for seed, (name, tensor) in enumerate(named):
            if not tensor.is_floating_point():
                continue
            values = weight_values(tensor.numel(), seed).reshape(tensor.shape)
            is_scale = tensor.dim() == 1 and not name.endswith("bias")
            # A power of two keeps the product exact.
            tensor.copy_((1 + values if is_scale else values / 2).to(tensor.dtype))
    return module


class Embedded(nn.Module):
    """Token ids to `body(hidden)`, where hidden is `[B, S, width]`: capture asks for a forward of token ids."""

    def __init__(self, body: nn.Module, width: int = 8, vocab: int = 61) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, width)
        self.body = body

    def forward(self, input_ids: Tensor) -> Any:
        return self.body(self.embed(input_ids))


class EmbeddedWithPositions(Embedded):
    """The same for a body that takes `(hidden, position_ids)`."""

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Any:
        return self.body(self.embed(input_ids), position_ids)


class Apply(nn.Module):
    """A function of hidden states (and of `self`, for its parameters) as a module.

    Parameters are given by name: `Apply(lambda self, x: x * self.scale, scale=(8,))`.
    """

    def __init__(self, function: Any, **parameters: tuple[int, ...]) -> None:
        super().__init__()
        self._function = function
        for name, shape in parameters.items():
            self.register_parameter(name, nn.Parameter(torch.empty(shape)))

    def forward(self, *inputs: Tensor) -> Any:
        return self._function(self, *inputs)


def export_tiny(
    module: nn.Module, *, kind: str | None = None, context: int = 64, dtype: torch.dtype = torch.float32
) -> Program:
    """Trace a small module, dynamic in batch and length, with the fixed weights of `set_weights`.

    Args:
        module: Its forward takes `input_ids`; see `Embedded` for those that do not.
        kind: `decoder`, `encoder`, or None: capture finds out whether tokens see later ones.
        context: Most positions.
        dtype: What the graph computes in.

    Returns:
        The program as captured: no pass has run.
    """
    return capture_module(set_weights(module), context=context, dtype=dtype, kind=kind)


def export_body(function: Any, **parameters: tuple[int, ...]) -> Program:
    """Trace a function of `(self, hidden [B, S, 8])`; see `Apply`."""
    return export_tiny(Embedded(Apply(function, **parameters)))


def run_pass(pass_: Pass, program: Program, *after: Pass) -> tuple[Program, PassRecord]:
    """Apply passes to a copy; the result and the record of the last one."""
    program = program.copy()
    for each in (pass_, *after):
        record = each.run(program)
    return program, record


class GoldenText(SingleFileSnapshotExtension):
    """Golden files that carry the name of the case: `golden/<test file without test_>/<case>.txt`."""

    _write_mode = WriteMode.TEXT
    file_extension = "txt"

    @classmethod
    def dirname(cls, *, test_location: Any) -> str:
        path = Path(test_location.filepath)
        return str(path.parent / "golden" / path.stem.removeprefix("test_"))

    @classmethod
    def get_snapshot_name(cls, *, test_location: Any, index: Any = 0) -> str:
        return str(index) if isinstance(index, str) else super().get_snapshot_name(test_location=test_location)

    @classmethod
    def matches_test_location(cls, *, test_location: Any, snapshot_location: str) -> bool:
        return str(Path(snapshot_location).parent) == cls.dirname(test_location=test_location)

    @classmethod
    def write_snapshot(cls, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            # Syrupy warns about names that do not begin with the name of the test; ours name the case.
            warnings.filterwarnings("ignore", r"\s*Can not relate snapshot", UserWarning)
            super().write_snapshot(**kwargs)

    def read_snapshot_collection(self, *, snapshot_location: str) -> SnapshotCollection:
        collection = SnapshotCollection(location=snapshot_location)
        collection.add(Snapshot(name=Path(snapshot_location).stem))
        return collection


def assert_golden(snapshot: SnapshotAssertion, pass_: Pass, program: Program, name: str) -> tuple[Program, PassRecord]:
    """Compare what a pass does to a program with a golden file, written anew by `make accept`.

    Args:
        snapshot: The fixture.
        pass_: Runs on a copy.
        program: The input.
        name: Of the case, and of the file.

    Returns:
        The rewritten program and the pass's record.
    """
    after, record = run_pass(pass_, program)
    before_text, after_text = str(program), str(after)
    misses = "".join(f"miss {miss.node}: {miss.reason}\n" for miss in record.misses)
    text = (
        f"{pass_.name}: {record.rewrites} rewrites\n{misses}"
        f"\n==== before ====\n{before_text}"
        f"\n==== diff ====\n{diff_text(before_text, after_text)}"
        f"\n==== after ====\n{after_text}"
    )
    # What comes out of a decomposition or of long sums, or is learned, is the same on no two machines.
    learned = r"past_key_values\.\S+|\S+\.predictor\.\S+|\S+\.(?:absent|errors|columns|rows|residual\.\w+):"
    computed = rf"(constant @(?:{learned}) \S+) #[0-9a-f]{{8}}"
    assert re.sub(computed, r"\1", text) == snapshot(name=name)
    return after, record


def assert_same_numbers(
    before: Program,
    after: Program,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    *,
    tolerance: float | None = None,
    reason: str = "",
    prefill: int | None = None,
) -> None:
    """Run both programs on several `(batch, length)` and compare every output, by `assert_close`."""
    for batch, length in shapes:
        input_ids = example_input_ids(before, batch, length)
        expected = run_program(before, input_ids)
        actual = run_program(after, input_ids, prefill=min(prefill, length) if prefill else None)
        assert len(actual) == len(expected)
        for name, ours, theirs in zip(before.outputs, actual, expected, strict=True):
            assert ours.dtype == theirs.dtype
            what = f"{name} at batch {batch}, length {length}"
            assert_close(ours, theirs, tolerance=tolerance, reason=reason, what=what)


@dataclass(frozen=True)
class StoreIn(Pass):
    """Store every matrix that a linear or an embedding reads in one weight format, and write the readers anew."""

    name: ClassVar[str] = "store-in"
    is_exact: ClassVar[bool] = False
    stored: WeightFormat
    skip: str = "^$"

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        rewrites = 0
        for entry_name, entry in program.entries.items():
            edit = Edit(program, entry_name, self.name)
            for node in list(entry.graph.nodes):
                if is_call(node, torch.ops.aten.linear.default, torch.ops.aten.embedding.default):
                    name = constant_name(arguments(node)["weight"])
                    if name is not None and not re.search(self.skip, name):
                        self._rewrite(node, name, edit)
                        rewrites += 1
            edit.eliminate_dead_code()
        for name in program.packed:
            program.constants.pop(name, None)
        return rewrites, []

    def _rewrite(self, node: fx.Node, name: str, edit: Edit) -> None:
        program, operands = edit.program, arguments(node)
        if name not in program.packed:
            weight = program.constants[name].value()
            chosen = self.stored.adapted(lambda start, stop: weight[start:stop], tuple(weight.shape), name)
            parts = {part: Constant(f"{name}.{part}", value) for part, value in chosen.encode(weight, name).items()}
            program.packed[name] = Packed(chosen.name, tuple(weight.shape), {p: c.name for p, c in parts.items()})
            program.constants.update({constant.name: constant for constant in parts.values()})
        packed = program.packed[name]
        chosen = format_from_text(packed.format)
        parts = {part: edit.constant(program.constants[constant]) for part, constant in packed.parts.items()}
        with edit.before(node):
            if is_call(node, torch.ops.aten.linear.default):
                new = chosen.call_linear(edit, operands["input"], parts, operands["bias"], packed.shape)
            else:
                new = chosen.call_embedding(edit, operands["indices"], parts, packed.shape)
        edit.replace(node, new)


def assert_declines(pass_: Pass, program: Program, *, reason: str | None) -> None:
    """The pass changes nothing; it says why with exactly this reason, or has nothing to say (None)."""
    after, record = run_pass(pass_, program)
    assert record.rewrites == 0
    assert str(after) == str(program)
    assert {miss.reason for miss in record.misses} == ({reason} if reason is not None else set())


def assert_idempotent(pass_: Pass, program: Program) -> None:
    """The pass fires, and a second run finds nothing left to do."""
    once, first = run_pass(pass_, program)
    assert first.rewrites > 0
    twice, second = run_pass(pass_, once)
    assert second.rewrites == 0
    assert str(twice) == str(once)


def calibrated(program: Program, rows: int = 6, length: int = 32, vocabulary: int = 61) -> Program:
    """Prepare a program and give it calibration batches."""
    prepare(program)
    wanted = input_placeholders(program.entries["forward"])
    places = torch.arange(rows * length)
    ids = (places * 7919 + places**2 * 31).reshape(rows, length) % vocabulary
    batches = [usual_inputs(part) for part in ids.split(4)]
    program.calibration = lambda: [{name: batch[name] for name in wanted} for batch in batches]
    return program
