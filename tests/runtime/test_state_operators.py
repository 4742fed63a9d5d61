"""The in-place forms of operators on states, against the operators that define them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jettison.ir import ops
from jettison.ir.compare import assert_close
from jettison.ir.ops.windowed_attention import resident_tokens
from jettison.runtime.state_operators import SlotRange, attend_slots, slot_range, windowed_attention_, write_range_


def heads(rows: int, count: int, steps: int, seed: int) -> Tensor:
    return torch.randn(rows, count, steps, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("window", [0, 1, 7])
@pytest.mark.parametrize(("softcap", "with_sinks"), [(0.0, False), (2.0, False), (0.0, True)])
@pytest.mark.parametrize(
    "positions", [[[0]], [[40], [40]], [[40], [3]], [[0, 1, 2, 3]], [[9, 10, 11], [50, 51, 52]]], ids=str
)
def test_attend_slots(positions: list[list[int]], softcap: float, with_sinks: bool, window: int) -> None:
    rows, steps = len(positions), len(positions[0])
    query, key, value = heads(rows, 4, steps, 0), heads(rows, 2, 64, 1), heads(rows, 2, 64, 2)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    slots, options = torch.tensor(positions), (None, None, sinks, 0.3, True, window, softcap)
    expected = ops.attention(query, key, value, slots, *options)
    assert_close(attend_slots(query, key, value, slot_range(slots), *options), expected)


@pytest.mark.parametrize(("softcap", "with_sinks"), [(0.0, False), (2.0, False), (0.0, True)])
@pytest.mark.parametrize(
    ("before", "new", "steps"),
    [
        ([0], [1], 1), ([0], [9], 9), ([23], [1], 1), ([24], [1], 1), ([25], [3], 3), ([22], [5], 5), ([100], [40], 40),
        ([7, 24], [1, 1], 1), ([24, 24], [1, 1], 1), ([0, 0], [5, 2], 5), ([3, 30], [2, 2], 2),
    ],
    ids=str,
)  # fmt: skip
def test_windowed_attention_in_place(
    before: list[int], new: list[int], steps: int, softcap: float, with_sinks: bool
) -> None:
    """A window of 16 in 24 slots: before the first move, at it, behind it, and rows that differ."""
    rows, window, capacity = len(before), 16, 24
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if with_sinks else None
    past = heads(rows, 2, capacity, 3), heads(rows, 2, capacity, 4)
    new_tokens, total = torch.tensor(new), torch.tensor(before) + torch.tensor(new)
    tensors = heads(rows, 4, steps, 0), heads(rows, 2, steps, 1), heads(rows, 2, steps, 2)
    options = (new_tokens, total, sinks, 0.3, window, softcap)
    expected = ops.windowed_attention(*tensors, *past, *options)
    own = tuple(state.clone() for state in past)
    out, key, value = windowed_attention_(*tensors, *own, *options)
    assert key is own[0]
    assert value is own[1]
    for row, count in enumerate(new):
        assert_close(out[row, :, :count], expected[0][row, :, :count])
    for row, count in enumerate(resident_tokens(total, capacity, window).tolist()):
        assert torch.equal(key[row, :, :count], expected[1][row, :, :count])
        assert torch.equal(value[row, :, :count], expected[2][row, :, :count])


@pytest.mark.parametrize(
    ("slots", "expected"),
    [
        ([[7]], (7, 7, True)), ([[-1]], (-1, -1, False)), ([[3, 4, 5], [3, 4, 5]], (3, 5, True)),
        ([[3], [3]], (3, 3, True)), ([[3], [9]], (3, 9, False)), ([[3, 5, 4]], (3, 5, False)),
        ([[3, 4], [4, 5]], (3, 5, False)), ([[3, -1, 5]], (-1, 5, False)), ([[-1, 0, 1]], (-1, 1, False)),
    ],
    ids=str,
)  # fmt: skip
def test_slot_range(slots: list[list[int]], expected: tuple[int, int, bool]) -> None:
    tensor = torch.tensor(slots)
    assert slot_range(tensor) == SlotRange(tensor, *expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "slots", [[[5]], [[5], [5]], [[5], [2]], [[2, 3, 4], [2, 3, 4]], [[4, 3]], [[6, -1, 7]], [[-1]]], ids=str
)
def test_write_range(slots: list[list[int]], dtype: torch.dtype) -> None:
    rows, steps = len(slots), len(slots[0])
    state, values, where = heads(rows, 2, 8, 0).to(dtype), heads(rows, 2, steps, 1), torch.tensor(slots)
    expected = ops.write_slots(state, values, where)
    # As from a projection: heads behind positions.
    transposed = values.transpose(1, 2).contiguous().transpose(1, 2)
    for given in (values, transposed):
        own = state.clone()
        assert write_range_(own, given, slot_range(where)) is own
        assert torch.equal(own, expected)
