"""The contract of a pass, and the driver that checks every pass every time."""

from __future__ import annotations

import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from jettison.ir.edit import Edit
from jettison.ir.errors import PassError, UnsupportedError
from jettison.ir.match import Miss
from jettison.ir.program import MissRecord, PassRecord, Program
from jettison.ir.text import program_text, window_text
from jettison.ir.verify import verify


@dataclass(frozen=True)
class Pass:
    """A rewrite of a program. Subclasses are frozen dataclasses whose fields are the options.

    A subclass gives `name`, `match` and `rewrite`, or overrides `transform` when it works on the program as a whole.

    Attributes:
        name: Text id, the file's name with dashes.
        entries: Entries it runs on; None means all.
        is_exact: Whether the program computes the same up to rounding of the compute dtype.
    """

    name: ClassVar[str]
    entries: ClassVar[tuple[str, ...] | None] = None
    is_exact: ClassVar[bool] = True

    @property
    def needs_calibration(self) -> bool:
        """Whether it runs the program on calibration tokens."""
        return False

    def unsupported_on(self, target: str) -> str | None:
        """Why a target (`onnx`, `torch`) cannot run what this pass makes, or None. Asked before any work is done."""

    def requires(self, program: Program) -> None:
        """Raise OptionError if the pass cannot run on `program` as it stands, naming the order that works."""

    def match(self, node: fx.Node, program: Program) -> Any | Miss | None:
        """Look at one node without changing anything.

        Returns:
            A small frozen dataclass that `rewrite` gets; a Miss with the reason when the node looked like this pass's
            kind and something stopped it; None when it is not its kind.
        """
        raise NotImplementedError(f"{type(self).__name__} overrides neither match nor transform")

    def find(self, program: Program, entry: str = "forward") -> tuple[list[Any], list[MissRecord]]:
        """Everything that `match` finds in an entry as it stands, in the order of the graph, and the misses."""
        sites, misses = [], []
        for node in program.entries[entry].graph.nodes:
            found = self.match(node, program)
            if isinstance(found, Miss):
                misses.append(MissRecord(describe_node(found.node), found.reason))
            elif found is not None:
                sites.append(found)
        return sites, misses

    def rewrite(self, match: Any, edit: Edit) -> None:
        """Change the graph, only through `edit`."""
        raise NotImplementedError(f"{type(self).__name__} overrides neither rewrite nor transform")

    def ensures(self, program: Program) -> str | None:
        """What is wrong with the result, or None."""

    def notes(self, record: PassRecord) -> list[str]:
        """What a user should know about the result beside figures and misses, in whole sentences."""
        return []

    def transform(self, program: Program) -> tuple[int, list[MissRecord]]:
        """Rewrite every match in every entry, in place.

        Returns:
            Number of rewrites, and the misses.
        """
        rewrites, misses = 0, []
        for entry in list(program.entries):
            if self.entries is not None and entry not in self.entries:
                continue
            edit = Edit(program, entry, self.name)
            in_entry = 0
            for node in list(edit.graph.nodes):
                if node._erased:
                    continue
                found = self.match(node, program)
                if isinstance(found, Miss):
                    misses.append(MissRecord(describe_node(found.node), found.reason))
                elif found is not None:
                    self.rewrite(found, edit)
                    in_entry += 1
            if in_entry:
                edit.eliminate_dead_code()
            rewrites += in_entry
        return rewrites, misses

    def run(self, program: Program, *, strict: bool = False) -> PassRecord:
        """Apply the pass in place and check that it kept its contract.

        Args:
            program: Changed in place.
            strict: Whether a miss is an error.

        Returns:
            The record, which is also appended to `program.history`.

        Raises:
            PassError: The pass broke its contract.
            UnsupportedError: `strict`, and the pass missed somewhere.
        """
        self.requires(program)
        before, known = program_text(program, by_identity=True), _node_contents(program)
        record = PassRecord(self.name, bytes_before=program.weight_bytes())
        started = time.perf_counter()
        record.rewrites, record.misses = self.transform(program)
        record.seconds = time.perf_counter() - started
        record.bytes_after = program.weight_bytes()
        record.where = _where(program, self.name, known)
        record.layers = _figures(program, known)
        verify(program, after=self.name)
        self._check_metadata(program, known)
        has_changed = program_text(program, by_identity=True) != before
        if has_changed != (record.rewrites > 0):
            raise PassError(
                f"[{self.name}] reports {record.rewrites} rewrites, but the graph text "
                f"{'changed' if has_changed else 'did not change'}."
            )
        wrong = self.ensures(program)
        if wrong is not None:
            raise PassError(f"[{self.name}] its result breaks its own promise: {wrong}")
        if strict and record.misses:
            listed = "\n".join(f"  {miss.node}: {miss.reason}" for miss in record.misses)
            raise UnsupportedError(
                f"[{self.name}] strict mode: {len(record.misses)} place(s) could not be rewritten:\n{listed}\n"
                "Exclude them (an option such as skip=), change the options, or drop --strict."
            )
        record.notes = self.notes(record)
        program.history.append(record)
        return record

    def _check_metadata(self, program: Program, known: dict[fx.Node, tuple[Any, Any, Any, Any]]) -> None:
        """Evaluate again what is new or reads something new: stale metadata misleads every later pass.

        Entries begin as copies of each other and layers are alike: what is computed from the same is evaluated once.
        """
        signatures = _Signatures()
        evaluated: dict[tuple[Any, str], str] = {}
        for name, entry in program.entries.items():
            edit = Edit(program, name, self.name)
            for node in entry.graph.nodes:
                old = known.get(node)
                is_same = old is not None and old[0] is node.target and old[1] is node.args and old[2] is node.kwargs
                has_same_operands = all(
                    operand in known and known[operand][3] is operand.meta["val"] for operand in node.all_input_nodes
                )
                if node.op != "call_function" or (is_same and has_same_operands):
                    continue
                kept = node.meta["val"]
                if not evaluated:
                    for each, (target, args, kwargs, value) in known.items():
                        if each.op == "call_function":
                            known_call = signatures.of_call(target, args, kwargs, lambda n: known[n][3])
                            evaluated[known_call] = _type_text(value)
                call = signatures.of_call(node.target, node.args, node.kwargs, lambda n: n.meta["val"])
                if evaluated.get(call) == _type_text(kept):
                    continue
                edit.refresh(node)
                evaluated[call] = _type_text(node.meta["val"])
                if _type_text(kept) != evaluated[call]:
                    raise PassError(
                        f"[{self.name}] {name}: metadata of {node.name} says {_type_text(kept)}, but it computes "
                        f"{evaluated[call]}.\n{window_text(entry, node)}"
                    )
                node.meta["val"] = kept


def _type_text(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return ", ".join(_type_text(item) for item in value)
    return f"{value.dtype}{list(value.shape)}" if isinstance(value, torch.Tensor) else str(value)


def _node_contents(program: Program) -> dict[fx.Node, tuple[Any, Any, Any, Any]]:
    """What the metadata of each node was computed from, and the metadata; fx makes new tuples on every change."""
    nodes = (node for entry in program.entries.values() for node in entry.graph.nodes)
    return {node: (node.target, node.args, node.kwargs, node.meta.get("val")) for node in nodes}


class _Signatures:
    """What decides which metadata a call has: its operator, and the types of its operands, strides included."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, str]] = {}  # with the value, so that no other takes its identity

    def of_call(self, target: Any, args: Any, kwargs: Any, value_of: Callable[[fx.Node], Any]) -> tuple[Any, str]:
        return target, repr(fx.map_arg((args, kwargs), lambda node: self._of_value(value_of(node))))

    def _of_value(self, value: Any) -> str:
        if id(value) not in self._known:
            self._known[id(value)] = value, self._text(value)
        return self._known[id(value)][1]

    def _text(self, value: Any) -> str:
        if isinstance(value, (tuple, list)):
            return f"({', '.join(map(self._text, value))})"
        if isinstance(value, FakeTensor):
            # Symbols have a meaning within the sizes that were traced together.
            return f"{id(value.fake_mode)} {_type_text(value)} {list(value.stride())} {value.storage_offset()}"
        return f"{type(value).__name__} {value}" if isinstance(value, torch.SymInt) else f"value {id(value)}"


def _where(program: Program, made_by: str, known: Container[fx.Node]) -> list[str]:
    """Weights that the nodes a pass made read; where they read none, the modules they stand in."""
    made = [
        node
        for entry in program.entries.values()
        for node in entry.graph.nodes
        if node.meta.get("made_by") == made_by and node not in known
    ]
    weights: dict[str, None] = {}
    for node in made:
        for operand in node.all_input_nodes:
            name = operand.meta.get("constant")
            if name is not None:
                dense = name.rpartition(".")[0]
                weights[dense if dense in program.packed else name] = None
    return list(weights or dict.fromkeys(node.meta["where"] for node in made if "where" in node.meta))


def _figures(program: Program, known: Container[fx.Node]) -> dict[str, dict[str, float]]:
    """What a pass has to say about single nodes that it made: what it left in `meta["figures"]`."""
    nodes = (node for entry in program.entries.values() for node in entry.graph.nodes)
    return {describe_node(n): n.meta["figures"] for n in nodes if "figures" in n.meta and n not in known}


def describe_node(node: fx.Node) -> str:
    """How messages and reports name a node: the module it came from, else the constant it reads."""
    names = [n.meta["constant"] for n in node.all_input_nodes if "constant" in n.meta]
    where = node.meta.get("where", "")
    target = getattr(node.target, "__name__", str(node.target)).removesuffix(".default")
    if "constant" in node.meta:
        return str(node.meta["constant"])
    if names:
        return names[0]
    return f"{where} ({target})" if where else target
