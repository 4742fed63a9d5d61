"""Every operator against a naive definition written here; the quantised ones have a file of their own."""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from jettison.ir.compare import assert_close
from jettison.ir.ops import (
    attention,
    dequantize_slots,
    gated_activation,
    joint_attention,
    next_slots,
    quantize_slots,
    rotary_embedding,
    scored_attention,
    scored_joint_attention,
    windowed_attention,
    write_slots,
)
from jettison.ir.ops.attention import QUERY_ROWS
from jettison.ir.ops.gated_activation import ACTIVATIONS
from jettison.ir.ops.windowed_attention import resident_tokens
from jettison.ir.ops.write_slots import write_slots_
from tests.ir.op_inputs import (
    ATTENTION_CASES,
    DISTINCT_ATTENTIONS,
    SINKS,
    SLOTS,
    attention_args,
    joint_args,
    numbers,
)

# --- attention ---------------------------------------------------------------------------------------------------


def naive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    key_valid: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float = 0.5,
    causal: bool = True,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """One query and one head at a time, in fp64, over the list of keys it may see."""
    batch, heads, steps, _ = query.shape
    keys = key.shape[2]
    asked = query_positions if query_positions is not None else torch.arange(steps)[None]
    held = key_positions if key_positions is not None else torch.arange(keys)[None]
    out = torch.zeros(batch, heads, steps, value.shape[3], dtype=torch.float64)
    for row in range(batch):
        at = held[row % held.shape[0]].tolist()
        for step in range(steps):
            now = int(asked[row % asked.shape[0], step])
            seen = [slot for slot in range(keys) if at[slot] >= 0]
            seen = [slot for slot in seen if not causal or at[slot] <= now]
            seen = [slot for slot in seen if not window or now - at[slot] < window]
            seen = [slot for slot in seen if key_valid is None or key_valid[row, slot] != 0]
            for head in range(heads):
                group = head // (heads // key.shape[1])
                if not seen:
                    continue
                scores = key[row, group, seen].double() @ query[row, head, step].double() * scale
                scores = softcap * torch.tanh(scores / softcap) if softcap else scores
                weights = torch.exp(scores - scores.max())
                total = weights.sum()
                if sinks is not None:
                    total = total + torch.exp(sinks[head].double() - scores.max())
                out[row, head, step] = weights / total @ value[row, group, seen].double()
    return out


@pytest.mark.parametrize("case", ATTENTION_CASES)
def test_attention_is_what_the_naive_definition_says(case):
    args = attention_args(case)
    out = attention(*args)
    assert out.dtype == args[0].dtype
    assert_close(out, naive_attention(*args))


def test_a_query_that_sees_nothing_gets_zeros():
    for case in ("no_valid_key", "no_valid_key_softcap", "no_valid_key_sinks"):
        assert not attention(*attention_args(case)).any()


# --- windowed attention ------------------------------------------------------------------------------------------


def naive_resident(tokens: int, capacity: int, window: int) -> int:
    """Drop G tokens whenever one would not fit, from the documented formula read as an algorithm."""
    while tokens > capacity:
        tokens -= capacity - window + 1
    return tokens


@pytest.mark.parametrize(("capacity", "window"), [(4, 4), (6, 4), (7, 1), (64, 3), (5, 5)])
def test_resident_tokens_follows_the_documented_layout(capacity, window):
    tokens = torch.arange(200)
    expected = [naive_resident(count, capacity, window) for count in range(200)]
    assert resident_tokens(tokens, capacity, window).tolist() == expected
    for count, resident in enumerate(expected):
        assert min(count, window) <= resident <= capacity


class Rows:
    """Sequences of a ragged batch, fed to a windowed cache call by call."""

    def __init__(self, lengths: list[int], capacity: int, window: int, **options: Any) -> None:
        self.lengths, self.capacity, self.window, self.options = lengths, capacity, window, options
        batch, longest = len(lengths), max(lengths)
        self.query = numbers(batch, 4, longest, 8, seed=1)
        self.key = numbers(batch, 2, longest, 8, seed=2)
        self.value = numbers(batch, 2, longest, 8, seed=3)
        self.past_key = torch.zeros(batch, 2, capacity, 8)
        self.past_value = torch.zeros(batch, 2, capacity, 8)
        self.done = [0] * batch
        self.out = torch.full((batch, 4, longest, 8), float("nan"))

    def call(self, steps: list[int], columns: int) -> None:
        """Feed the next `steps[row]` tokens of each row, padded to `columns` with numbers that must not matter."""

        def padded(sequence: Tensor) -> Tensor:
            block = torch.full((len(steps), sequence.shape[1], columns, 8), 77.0)
            for row, count in enumerate(steps):
                block[row, :, :count] = sequence[row, :, self.done[row] : self.done[row] + count]
            return block

        total = [done + count for done, count in zip(self.done, steps, strict=True)]
        out, self.past_key, self.past_value = windowed_attention(
            padded(self.query), padded(self.key), padded(self.value), self.past_key, self.past_value,
            torch.tensor(steps), torch.tensor(total), self.options.get("sinks"), 0.5, self.window,
            self.options.get("softcap", 0.0),
        )  # fmt: skip
        for row, count in enumerate(steps):
            self.out[row, :, self.done[row] : total[row]] = out[row, :, :count]
        self.done = total
        self.check_layout()

    def check_layout(self) -> None:
        for row, total in enumerate(self.done):
            resident = naive_resident(total, self.capacity, self.window)
            for past, sequence in ((self.past_key, self.key), (self.past_value, self.value)):
                assert torch.equal(past[row, :, :resident], sequence[row, :, total - resident : total])

    def check_output(self) -> None:
        expected = naive_attention(
            self.query, self.key, self.value, sinks=self.options.get("sinks"), window=self.window,
            softcap=self.options.get("softcap", 0.0),
        )  # fmt: skip
        for row, length in enumerate(self.lengths):
            assert self.done[row] == length
            assert_close(self.out[row, :, :length], expected[row, :, :length])


WINDOWS = pytest.mark.parametrize(
    ("capacity", "window", "options"),
    [(4, 4, {}), (7, 4, {}), (6, 1, {}), (64, 5, {}), (7, 4, {"sinks": SINKS}), (7, 4, {"softcap": 0.7})],
    ids=["c_is_w", "c_above_w", "window_of_one", "never_full", "sinks", "softcap"],
)


@WINDOWS
def test_windowed_attention_in_one_go_is_full_attention_with_a_window(capacity, window, options):
    rows = Rows([23, 11, 3], capacity, window, **options)
    rows.call(rows.lengths, columns=23)
    rows.check_output()


@WINDOWS
def test_windowed_attention_step_by_step_is_full_attention_with_a_window(capacity, window, options):
    """Past the capacity several times, from a ragged first call."""
    rows = Rows([33, 29, 26], capacity, window, **options)
    rows.call([8, 4, 1], columns=8)
    for _ in range(25):
        rows.call([1, 1, 1], columns=1)
    rows.check_output()


@pytest.mark.parametrize("seed", range(8))
def test_windowed_attention_does_not_depend_on_how_the_calls_are_cut(seed):
    draw = random.Random(seed)
    window = draw.randint(1, 6)
    rows = Rows([draw.randint(1, 40) for _ in range(3)], window + draw.randint(0, 5), window)
    while rows.done != rows.lengths:
        columns = draw.randint(1, 9)
        left = [length - done for length, done in zip(rows.lengths, rows.done, strict=True)]
        rows.call([min(count, draw.randint(0, columns)) for count in left], columns)
    rows.check_output()


def test_windowed_attention_attends_in_blocks_of_rows():
    rows = Rows([QUERY_ROWS + 40], capacity=12, window=9)
    rows.call(rows.lengths, columns=QUERY_ROWS + 40)
    rows.check_output()


# --- write_slots -------------------------------------------------------------------------------------------------


def naive_write(state: Tensor, values: Tensor, slots: Tensor) -> Tensor:
    new = state.clone()
    for row in range(slots.shape[0]):
        for column in range(slots.shape[1]):
            slot = int(slots[row, column])
            if slot >= 0:
                new[row, :, slot] = values[row, :, column].to(state.dtype)
    return new


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("case", SLOTS)
def test_write_slots_writes_each_value_at_its_slot(case, dtype):
    state, values = numbers(2, 3, 6, 4, seed=1).mul(20).to(dtype), numbers(2, 3, 3, 4, seed=2).mul(20)
    slots = torch.tensor(SLOTS[case])
    untouched = state.clone()
    new = write_slots(state, values, slots)
    assert torch.equal(new, naive_write(state, values, slots))
    assert torch.equal(state, untouched)
    assert write_slots_(state, values, slots) is state
    assert torch.equal(state, new)


# --- rotary_embedding --------------------------------------------------------------------------------------------


def naive_rotary(x: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Each channel pair is a complex number times a unit complex number."""
    out = x.double().clone()
    pairs = angles.shape[-1]
    for pair in range(pairs):
        first, second = (2 * pair, 2 * pair + 1) if interleaved else (pair, pair + pairs)
        turn = torch.polar(torch.ones_like(angles[..., pair]).double(), angles[..., pair].double())[:, None]
        turned = torch.complex(x[..., first].double(), x[..., second].double()) * turn
        out[..., first], out[..., second] = turned.real, turned.imag
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pairs", [4, 3, 1], ids=["all_channels", "partial", "one_pair"])
@pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
def test_rotary_embedding_turns_channel_pairs(interleaved, pairs, dtype):
    x, angles = numbers(2, 3, 5, 8, seed=1, dtype=dtype), numbers(2, 5, pairs, seed=2)
    out = rotary_embedding(x, angles.cos(), angles.sin(), interleaved)
    assert out.dtype == dtype
    assert_close(out, naive_rotary(x, angles, interleaved))
    assert torch.equal(out[..., 2 * pairs :], x[..., 2 * pairs :])


# --- gated_activation --------------------------------------------------------------------------------------------

NAIVE_ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: max(x, 0.0),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "silu": lambda x: x / (1 + math.exp(-x)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gated_activation_multiplies_the_activated_gate(activation, dtype):
    gate, up = numbers(2, 3, 8, seed=1, dtype=dtype), numbers(2, 3, 8, seed=2, dtype=dtype)
    activated = [NAIVE_ACTIVATIONS[activation](value) for value in gate.double().flatten().tolist()]
    expected = torch.tensor(activated, dtype=torch.float64).reshape(gate.shape) * up.double()
    out = gated_activation(gate, up, activation)
    assert out.dtype == dtype
    assert_close(out, expected)


# --- scored_attention, next_slots, slots of heads ----------------------------------------------------------------


@pytest.mark.parametrize("case", [case for case in DISTINCT_ATTENTIONS if case != "bf16"])  # probabilities come in fp32
@pytest.mark.parametrize("at_once", [1, 2, 1000])
def test_scored_attention_is_attention_and_what_each_key_received(case, at_once, monkeypatch):
    args = attention_args(case)
    query, key, value = args[:3]
    rows, heads, keys = query.shape[0], query.shape[1], key.shape[2]
    module = sys.modules["jettison.ir.ops.scored_attention"]  # the package has an operator of this name
    monkeypatch.setattr(module, "SCORE_BYTES", 4 * rows * heads * keys * at_once)
    out, received = scored_attention(*args)
    assert_close(out, attention(*args))
    # With one-hot values, what attention returns is the probability of each key.
    one_hot = torch.eye(keys, dtype=value.dtype).expand(rows, key.shape[1], keys, keys)
    probabilities = attention(query, key, one_hot, *args[3:])
    assert_close(received, probabilities.float().unflatten(1, (key.shape[1], -1)).sum((2, 3)))
    assert received.dtype == torch.float32


def test_next_slots_stand_behind_what_a_row_holds():
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    assert next_slots(mask, torch.zeros(2, 2, dtype=torch.int64)).tolist() == [[3, 4], [1, 2]]


def test_write_slots_of_every_head():
    state, values = numbers(1, 2, 4, 3), numbers(1, 2, 2, 3, seed=2)
    new = write_slots(state, values, torch.tensor([[[3, 0], [1, 2]]]))
    assert torch.equal(new[0, 0, [3, 0]], values[0, 0])
    assert torch.equal(new[0, 1, [1, 2]], values[0, 1])
    assert torch.equal(new[0, 0, [1, 2]], state[0, 0, [1, 2]])


# --- compressed slots --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("columns", [1, 2, 8])
def test_a_quantized_slot_is_within_half_a_step_of_what_it_was(bits, rows, columns):
    values = numbers(2, 3, 5, 4, 8) * 7 + 3
    codes, scales, zeros = quantize_slots(values, bits, rows, columns)
    assert codes.shape == (2, 3, 5, 4 * 8 * bits // 8)
    back = dequantize_slots(codes, scales, zeros, bits, 4, rows).reshape(values.shape)
    by_value = (
        scales.float().reshape(2, 3, 5, rows, 1, columns, 1).expand(2, 3, 5, rows, 4 // rows, columns, 8 // columns)
    )
    # Beside half a step, what fp16 rounds off a scale and a zero.
    bound = by_value.reshape(values.shape) / 2 + 2**-10 * values.abs().amax()
    assert ((back - values).abs() <= bound).all()
    if 8 * 4 // rows // columns > 1:
        assert not torch.equal(back, values)


def test_groups_do_not_touch_one_another():
    values = numbers(1, 1, 3, 4, 8)

    def back(given: Tensor, rows: int, columns: int) -> Tensor:
        return dequantize_slots(*quantize_slots(given, 2, rows, columns), 2, 4, rows).reshape(given.shape)

    louder = values.clone()
    louder[..., 3] *= 100  # a channel
    same = [channel for channel in range(8) if channel != 3]
    assert torch.equal(back(values, 1, 8)[..., same], back(louder, 1, 8)[..., same])
    assert not torch.equal(back(values, 4, 1)[..., same], back(louder, 4, 1)[..., same])
    louder = values.clone()
    louder[..., 2, :] *= 100  # a token of every slot
    assert torch.equal(back(values, 4, 1)[..., [0, 1, 3], :], back(louder, 4, 1)[..., [0, 1, 3], :])


def test_constant_groups_come_back_as_they_were():
    values = torch.full((1, 2, 3, 4, 8), -2.5)
    codes, scales, zeros = quantize_slots(values, 2, 1, 8)
    assert not codes.any()
    assert not scales.any()
    assert torch.equal(dequantize_slots(codes, scales, zeros, 2, 4, 1), values.flatten(2, 3))


def test_outliers_beyond_fp16_are_no_infinity():
    values = numbers(1, 1, 1, 4, 8)
    values[..., 0], values[..., 1] = 1e6, -1e6
    back = dequantize_slots(*quantize_slots(values, 4, 1, 8), 4, 4, 1)
    assert back.isfinite().all()


@pytest.mark.parametrize("steps", [1, 3])
def test_joint_attention_is_one_softmax_over_what_is_stored_and_what_is_not(steps):
    query, stored_key, stored_value, stored_tokens, key, value, slots, scale = joint_args(steps=steps)
    out = joint_attention(query, stored_key, stored_value, stored_tokens, key, value, slots, scale)
    expected_received = torch.zeros(2, 2, 9)
    for row in range(2):
        count, seen = int(stored_tokens[row]), slots[row]
        for step in range(steps):
            keys, values = (
                torch.cat([old[row, :, :count], new[row, :, : int(seen[step]) + 1]], 1).repeat_interleave(2, 0)
                for old, new in ((stored_key, key), (stored_value, value))
            )
            weights = ((query[row, :, step, None] @ keys.transpose(1, 2)) * scale).softmax(-1)
            assert torch.allclose(out[row, :, step], (weights @ values)[:, 0], atol=1e-6)
            by_slot = torch.zeros(2, 9).index_add(
                1, torch.arange(int(seen[step]) + 1), weights[:, 0, count:].unflatten(0, (2, 2)).sum(1)
            )
            expected_received[row] += by_slot
    scored, received = scored_joint_attention(query, stored_key, stored_value, stored_tokens, key, value, slots, scale)
    assert torch.allclose(scored, out, atol=1e-6)
    assert torch.allclose(received, expected_received, atol=1e-5)
