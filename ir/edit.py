"""Edit: the only door through which a pass changes a graph.

It keeps metadata fresh (every new node is evaluated on fake tensors), records which pass made each node, and counts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_flatten, tree_unflatten

from jettison.ir.constants import Constant
from jettison.ir.program import (
    Program,
    State,
    constant_placeholders,
    fake_mode_of,
    input_placeholders,
    output_node,
    placeholders,
    state_placeholders,
)


def placeholder_name(name: str) -> str:
    """A Python identifier for a constant or state name."""
    return "".join(letter if letter.isalnum() else "_" for letter in name)


class Edit:
    """Changes to one entry of a program, in place.

    Args:
        program: Its program.
        entry: Its name.
        made_by: The pass that makes the nodes.
        like: Another entry, whose sizes this one shares; for an entry that is empty yet.
    """

    def __init__(self, program: Program, entry: str, made_by: str, *, like: str | None = None) -> None:
        self.program = program
        self.entry_name = entry
        self.entry = program.entries[entry]
        self.graph = self.entry.graph
        self.made_by = made_by
        self._fake_mode = fake_mode_of(program.entries[like or entry])
        self._anchor: fx.Node | None = None

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """New nodes go before `node` inside this block."""
        previous, self._anchor = self._anchor, node
        try:
            yield
        finally:
            self._anchor = previous

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Insert a call and evaluate its metadata.

        Args:
            target: An operator overload or a function of `operator`.
            *args: Nodes and literals.
            **kwargs: Nodes and literals.

        Returns:
            The new node.
        """
        return self._insert(target, args, kwargs)

    def _insert(self, target: Any, args: Any, kwargs: Any, value: Any = None) -> fx.Node:
        """Insert a call whose metadata are `value`, or are evaluated."""
        if self._anchor is None:
            raise ValueError("Edit.call outside of `with edit.before(node)`")
        with self.graph.inserting_before(self._anchor):
            node = self.graph.call_function(target, args, kwargs)
        node.meta["made_by"] = self.made_by
        node.meta["val"] = self._evaluate(node) if value is None else value
        source = next((n.meta["where"] for n in node.all_input_nodes if "where" in n.meta), None)
        if source is not None:
            node.meta["where"] = source
        return node

    def _evaluate(self, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, lambda n: n.meta["val"])
        kwargs = fx.map_arg(node.kwargs, lambda n: n.meta["val"])
        # The dispatcher in Python knows symbolic sizes for operators that torch 2.11 composes in C++.
        with self._fake_mode, enable_python_dispatcher(), torch.no_grad():
            return node.target(*args, **kwargs)

    def inline(self, function: Callable[..., Any], *operands: fx.Node) -> Any:
        """Trace a function of tensors and insert what it does as a subgraph.

        Args:
            function: Takes one tensor per operand; plain torch operations and ours; returns a tree of tensors.
            *operands: Nodes whose metadata are the example values.

        Returns:
            The same tree, with nodes for tensors.
        """
        structure: list[Any] = []

        def flat(*values: Tensor) -> list[Tensor]:
            leaves, spec = tree_flatten(function(*values))
            structure[:] = [spec]
            return leaves

        with self._fake_mode, torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # deprecations inside torch
            traced = make_fx(flat, pre_dispatch=True)(*[operand.meta["val"] for operand in operands])
        mapping = dict(zip((n for n in traced.graph.nodes if n.op == "placeholder"), operands, strict=True))
        returned: list[fx.Node] = []
        for node in traced.graph.nodes:
            if node.op == "output":
                returned = [mapping[leaf] for leaf in node.args[0]]
            elif node.op == "call_function" and not node.users:
                continue
            elif node.op != "placeholder":
                args, kwargs = (fx.map_arg(a, lambda old: mapping[old]) for a in (node.args, node.kwargs))
                # Tracing has computed the metadata; the check behind the pass computes them again.
                mapping[node] = self._insert(node.target, args, kwargs, node.meta.get("val"))
        return tree_unflatten(returned, structure[0])

    def refresh(self, node: fx.Node) -> None:
        """Evaluate the metadata of `node` again, after one of its inputs changed type."""
        node.meta["val"] = self._evaluate(node)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Make every user of `old` read `new`, and erase `old`; its operands stay until dead code is eliminated."""
        old.replace_all_uses_with(new)
        if "where" in old.meta:
            new.meta.setdefault("where", old.meta["where"])
        self.graph.erase_node(old)

    def set_arguments(self, node: fx.Node, *args: Any) -> None:
        """Give a node other arguments and refresh its metadata."""
        node.args = args
        self.refresh(node)

    def erase(self, node: fx.Node) -> None:
        """Erase a node without users."""
        self.graph.erase_node(node)

    def eliminate_dead_code(self) -> int:
        """Erase every node whose value nobody reads; returns how many. Inputs and states stay, unread constants go."""
        erased = 0
        for node in reversed(list(self.graph.nodes)):
            is_removable = node.op == "call_function" or (node.op == "placeholder" and "constant" in node.meta)
            if is_removable and not node.users:
                self.graph.erase_node(node)
                erased += 1
        return erased

    def constant(self, constant: Constant) -> fx.Node:
        """The placeholder of a constant in this entry; the constant joins the program if it is new."""
        known = constant_placeholders(self.entry).get(constant.name)
        if known is not None:
            return known
        self.program.constants.setdefault(constant.name, constant)
        with self._fake_mode:
            value = torch.empty(constant.shape, dtype=constant.dtype)
        return self._placeholder(constant.name, "constant", value, [*constant_placeholders(self.entry).values()])

    def state(self, state: State, value: Tensor) -> fx.Node:
        """The placeholder of a state in this entry; `value` is its fake tensor."""
        known = state_placeholders(self.entry).get(state.name)
        if known is not None:
            return known
        self.program.states.setdefault(state.name, state)
        after = [*constant_placeholders(self.entry).values(), *state_placeholders(self.entry).values()]
        return self._placeholder(state.name, "state", value, after)

    def input(self, name: str, value: Tensor) -> fx.Node:
        """The placeholder of a run-time input; `value` is its fake tensor."""
        known = input_placeholders(self.entry).get(name)
        if known is not None:
            return known
        return self._placeholder(name, None, value, list(placeholders(self.entry)))

    def _placeholder(self, name: str, kind: str | None, value: Any, after: list[fx.Node]) -> fx.Node:
        first = next(iter(self.graph.nodes))
        point = self.graph.inserting_after(after[-1]) if after else self.graph.inserting_before(first)
        with point:
            node = self.graph.placeholder(placeholder_name(name))
        node.meta["val"] = value
        node.meta["made_by"] = self.made_by
        if kind is not None:
            node.meta[kind] = name
        return node

    def set_outputs(self, values: list[fx.Node]) -> None:
        """Return these values instead."""
        output_node(self.entry).args = (tuple(values),)

    def dynamic_tensor(self, sizes: list[int | torch.SymInt | None], dtype: torch.dtype, hint: int = 8) -> Tensor:
        """A fake tensor for a new input: None stands for a new symbol (`hint` is its trace-time size)."""
        from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

        real = torch.empty(
            [hint + i if size is None else 2 for i, size in enumerate(sizes)], dtype=dtype, device="meta"
        )
        context = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.DYNAMIC if size is None else DimDynamic.STATIC for size in sizes]
        )
        fresh = self._fake_mode.from_tensor(real, symbolic_context=context)
        shape = [fresh.shape[i] if size is None else size for i, size in enumerate(sizes)]
        with self._fake_mode:
            return torch.empty(shape, dtype=dtype)
