"""The oracle of every policy that drops tokens: a full cache whose dropped keys are masked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from jettison.ir.match import arguments, is_call
from jettison.ir.ops import attention
from jettison.ir.program import Program
from jettison.runtime.session import Session


class RecordingSession(Session):
    """A session that writes down which keys the queries of each call can see.

    Attributes:
        seen: By row: for every query position, the positions that each layer and key head holds, `[layers, Hkv]` sets.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.seen: list[list[list[list[set[int]]]]] = [[] for _ in range(self.batch)]

    def _run(
        self, entry: str, tokens: Tensor, first_row: int, wanted: list[int], states: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        given = self.states if states is None else states
        for index in range(tokens.shape[0]):
            row = first_row + index
            own = {name: state[index : index + 1] for name, state in given.items()}
            held = self._positions(row, own)
            for step in range(tokens.shape[1]):
                start = self.lengths[row]
                new = set(range(start, start + step + 1))
                self.seen[row].append([[kept | new for kept in layer] for layer in held])
        return super()._run(entry, tokens, first_row, wanted, states)

    def _positions(self, row: int, states: Mapping[str, Tensor]) -> list[list[set[int]]]:
        by_layer = []
        for layer in range(sum(name.endswith(".key") for name in states)):
            name = f"past_key_values.{layer}.positions"
            if name not in states:
                heads = states[f"past_key_values.{layer}.key"].shape[1]
                by_layer.append([set(range(self.lengths[row])) for _ in range(heads)])
                continue
            (kept,) = [kept for kept in self.kept if name in kept.names]
            count = kept.held[row]
            derived = self.lengths[row] - count + torch.arange(count)
            noted = states[name][0, :, :count]
            positions = torch.where(noted > 0, noted - 1, derived)
            heads = [set(head.tolist()) for head in positions]
            assert all(len(head) == count for head in heads), "a token is held twice"
            by_layer.append(heads)
        return by_layer


def masked_logits(
    program: Program, row: Sequence[int], seen: Sequence[Sequence[Sequence[set[int]]]], *, first: int = 0
) -> Tensor:
    """Logits `[S, V]` of a whole sequence where every query sees what a recorded session let it see.

    Args:
        program: With `forward`, captured and prepared.
        row: Token ids.
        seen: `RecordingSession.seen` of the row.
        first: How many first tokens are seen at the distance that they have among the tokens seen, not at the true
            one; for keys rotated by halves, all channels, with the base 10,000.
    """
    length = len(row)
    visible = torch.zeros(len(seen[0]), len(seen[0][0]), length, length, dtype=torch.bool)
    for query, layers in enumerate(seen):
        for layer, heads in enumerate(layers):
            for head, positions in enumerate(heads):
                visible[layer, head, query, list(positions)] = True
    inputs = {
        "input_ids": torch.tensor([list(row)]),
        "position_ids": torch.arange(length)[None],
        "attention_mask": torch.ones(1, length, dtype=torch.int64),
        "logits_positions": torch.arange(length)[None],
    }
    entry = program.entries["forward"]
    values = [
        program.constants[node.meta["constant"]].value() if "constant" in node.meta else inputs[node.name]
        for node in entry.graph.nodes
        if node.op == "placeholder"
    ]
    return _Masked(entry, visible, first).run(*values)[0][0]


class _Masked(fx.Interpreter):
    def __init__(self, entry: fx.GraphModule, visible: Tensor, first: int) -> None:
        super().__init__(entry)
        self.visible, self.layer, self.first = visible, 0, first

    def run_node(self, n: fx.Node) -> Any:
        if not is_call(n, attention):
            return super().run_node(n)
        operands = {
            name: self.env[value] if isinstance(value, fx.Node) else value for name, value in arguments(n).items()
        }
        query, key, value = operands["query"], operands["key"], operands["value"]
        groups = query.shape[1] // key.shape[1]
        scores = query @ key.repeat_interleave(groups, 1).transpose(2, 3) * operands["scale"]
        visible = self.visible[self.layer].repeat_interleave(groups, 0)
        if self.first:
            # The key head does not matter to a policy that goes by position.
            missing = torch.arange(len(visible[0])) + 1 - visible[0].sum(-1)
            nearer = _turned(query, -missing) @ key[:, :, : self.first].repeat_interleave(groups, 1).transpose(2, 3)
            scores[..., : self.first] = nearer * operands["scale"]
        self.layer += 1
        return scores.masked_fill(~visible, -torch.inf).softmax(-1) @ value.repeat_interleave(groups, 1)


def _turned(x: Tensor, positions: Tensor) -> Tensor:
    """`[B, H, S, D]` rotated on by some positions `[S]`."""
    half = x.shape[-1] // 2
    angles = positions[:, None].double() * 10_000.0 ** -(torch.arange(half) / half)
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    left, right = x[..., :half], x[..., half:]
    return torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
