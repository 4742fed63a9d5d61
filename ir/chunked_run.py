"""Run an entry over many batches of inputs at once, one stretch of nodes after the other.

Calibration looks at what a linear reads, changes the weight, and goes on with the changed one. Running all batches up
to there and stopping needs the values that cross that point, of every batch, and nothing else: about one layer's worth.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from jettison.ir.constants import SMALLEST_SCRATCH, Constant, scratch_tensor
from jettison.ir.interpret import embedding_of
from jettison.ir.match import constant_name, is_call
from jettison.ir.program import Program, output_node

aten = torch.ops.aten


class ChunkedRun:
    """An entry on its way over several batches.

    Attributes:
        weights: Called for the value of a constant, by name, instead of reading it: `[...]` in the graph's dtype. To be
            filled while the run stands still.
        products: Called with what a linear reads, by the name of its weight, instead of multiplying by it; the bias is
            added behind. To be filled likewise.

    Args:
        program: Its program; constants may be replaced in it while the run stands still.
        entry: Name of the entry.
        batches: Run-time inputs by name, for each batch.
        is_on_disk: Whether values that wait for the next stretch lie in unlinked files instead of anonymous memory.
    """

    def __init__(
        self, program: Program, entry: str, batches: Sequence[Mapping[str, Tensor]], *, is_on_disk: bool = False
    ) -> None:
        self.weights: dict[str, Callable[[], Tensor]] = {}
        self.products: dict[str, Callable[[Tensor], Tensor]] = {}
        self._is_on_disk = is_on_disk
        self._program, self._entry = program, entry
        self._nodes = list(program.entries[entry].graph.nodes)
        self._place = {node: index for index, node in enumerate(self._nodes)}
        self._last_use = {node: max((self._place[user] for user in node.users), default=-1) for node in self._nodes}
        self._inputs = batches
        self._held: list[dict[fx.Node, Any]] = [{} for _ in batches]
        self._next = 0

    def fork(self) -> ChunkedRun:
        """A run that stands where this one does and goes its own way; values are shared."""
        other = copy.copy(self)
        other.weights, other.products = dict(self.weights), dict(self.products)
        other._held = [dict(held) for held in self._held]
        return other

    def outputs(self) -> Iterator[Any]:
        """Compute every batch to the end, one after the other.

        Yields:
            The first output of each batch.
        """
        node = output_node(self._program.entries[self._entry]).args[0][0]
        for index in range(len(self._held)):
            single = copy.copy(self)
            single._held, single._inputs = [self._held[index]], [self._inputs[index]]
            found: list[Any] = []
            single.advance(node, found.append)
            yield found[0]

    @torch.no_grad()
    def advance(self, node: fx.Node, observe: Callable[[Any], object] | None = None) -> None:
        """Compute every batch up to a node, which is included.

        Args:
            node: Not before one that was asked for earlier, unless its value is still needed.
            observe: Called with its value in each batch, in order.
        """
        stop = self._place[node] + 1
        stretch, self._next = self._nodes[self._next : stop], max(self._next, stop)
        constants = self._constants(stretch)
        for held, inputs in zip(self._held, self._inputs, strict=True):
            for each in stretch:
                self._compute(each, held, inputs, constants)
            if self._is_on_disk:
                held.update({each: _on_disk(held[each]) for each in stretch if isinstance(held.get(each), Tensor)})
            if observe is not None:
                observe(held[node])

    def _constants(self, stretch: Sequence[fx.Node]) -> dict[fx.Node, Any]:
        """Values of the constants that a stretch reads, converted once for all batches; tables stay where they are."""
        values: dict[fx.Node, Any] = {}
        for node in stretch:
            for operand in node.all_input_nodes if node.op == "call_function" and node.users else ():
                name = operand.meta.get("constant")
                if name is None or operand in values or name in self.products:
                    continue
                constant = self._program.constants[name]
                is_table = all(is_call(user, aten.embedding.default) for user in operand.users if user in stretch)
                if name in self.weights:
                    values[operand] = self.weights[name]()
                else:
                    values[operand] = constant if is_table else constant.value()
        return values

    def _compute(
        self, node: fx.Node, held: dict[fx.Node, Any], inputs: Mapping[str, Tensor], constants: Mapping[fx.Node, Any]
    ) -> None:
        """Put the value of a node into `held`, and forget operands that nothing later reads."""

        def value(operand: fx.Node) -> Any:
            return constants[operand] if operand in constants else held[operand]

        if node.op == "placeholder":
            if "constant" not in node.meta:
                held[node] = inputs[node.meta.get("state", node.name)]
            return
        if node.op != "call_function" or not node.users:
            return
        product = self._product(node)
        table = constants.get(node.args[0]) if node.target is aten.embedding.default else None
        if isinstance(table, Constant):
            held[node] = embedding_of(table, value(node.args[1]))
        elif product is not None:
            made = product(value(node.args[0]))
            held[node] = made if len(node.args) < 3 or node.args[2] is None else made + value(node.args[2])
        else:
            args, kwargs = (fx.map_arg(given, value) for given in (node.args, node.kwargs))
            held[node] = node.target(*args, **kwargs)
        here = self._place[node]
        for operand in node.all_input_nodes:
            if self._last_use[operand] <= here:
                held.pop(operand, None)

    def _product(self, node: fx.Node) -> Callable[[Tensor], Tensor] | None:
        """What a linear is computed by, where that is not its weight."""
        if not self.products or not is_call(node, aten.linear.default):
            return None
        return self.products.get(constant_name(node.args[1]) or "")


def _on_disk(value: Tensor) -> Tensor:
    """A copy in an unlinked file, of values that are large."""
    if value.numel() * value.element_size() < SMALLEST_SCRATCH:
        return value
    return scratch_tensor(value.shape, value.dtype).copy_(value)
