"""Every operator's fake rule, schema and export: what holds whatever it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import jettison.ir.ops
from jettison.ir.ops import (
    attention,
    complete_logits,
    dequantize_slots,
    gated_activation,
    head_candidates,
    joint_attention,
    next_slots,
    quantize_slots,
    rotary_embedding,
    scored_attention,
    scored_joint_attention,
    selected_linear,
    sparse_mlp,
    windowed_attention,
    write_slots,
)
from jettison.ir.ops.gated_activation import ACTIVATIONS
from tests.ir.op_inputs import DISTINCT_ATTENTIONS, SLOTS, attention_args, joint_args, numbers


def heads_last(x: Tensor) -> Tensor:
    """The same values as a view of `[B, S, H, D]`, which is how a model's projections come."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def channels_outermost(x: Tensor) -> Tensor:
    """The same values with the channels of a head far apart, as nobody should lay them out."""
    return x.transpose(2, 3).contiguous().transpose(2, 3)


def windowed_args(batch: int = 2, heads: int = 4, steps: int = 3, dim: int = 8) -> tuple[Any, ...]:
    states = (numbers(batch, max(1, heads // 2), 6, dim, seed=index) for index in (4, 5))
    q = numbers(batch, heads, steps, dim, seed=1)
    k, v = (numbers(batch, max(1, heads // 2), steps, dim, seed=index) for index in (2, 3))
    total = torch.arange(batch) + steps + 4
    return q, k, v, *states, torch.full((batch,), steps), total, None, 0.5, 4, 0.0


def rotary_args(batch: int, heads: int, steps: int, dim: int, pairs: int, interleaved: bool) -> tuple[Any, ...]:
    angles = numbers(batch, steps, pairs, seed=2)
    return numbers(batch, heads, steps, dim, seed=1), angles.cos(), angles.sin(), interleaved


def sparse_args(*shape: int, is_full: bool = True) -> tuple[Any, ...]:
    indices = numbers(*shape, 3).topk(2, -1).indices
    gate, up, down = (numbers(12, 8, seed=seed) for seed in (1, 2, 3))
    rest = (numbers(12, seed=4), numbers(8, seed=5), numbers(4, 8, seed=6)) if is_full else (None, None, None)
    x = numbers(*shape, 8, seed=7)
    return x, indices, gate if is_full else None, up, rest[0], down, rest[1], rest[2], "silu", 4


SPLITS = ((1, 8), (4, 2), (1, 1))  # groups along the tokens and the channels of a slot
OPERATORS: dict[str, tuple[Any, list[tuple[Any, ...]]]] = {
    "attention": (attention, [attention_args(case) for case in DISTINCT_ATTENTIONS]),
    "complete_logits": (
        complete_logits,
        [
            (numbers(2, 9), torch.tensor([[3, 1, 8]] * 2), numbers(2, 3)),
            (numbers(2, 3, 9).bfloat16(), torch.tensor([[[4]] * 3] * 2), numbers(2, 3, 1).bfloat16()),
        ],
    ),
    "head_candidates": (
        head_candidates,
        [
            (numbers(2, 9), numbers(2, 8), None, 2, 3, 32),
            (numbers(2, 3, 700), numbers(2, 3, 40), numbers(2, 700).abs(), 2, 3, 32),
            (numbers(2, 3, 9).bfloat16(), numbers(2, 3, 40).bfloat16(), numbers(2, 9).abs(), 2, 30, 32),
            (numbers(1, 1, 9), numbers(1, 1, 8), None, 9, 0, 32),
            (numbers(1, 1, 9), numbers(1, 1, 8), None, 2, 3, 32),
        ],
    ),
    "gated_activation": (
        gated_activation,
        [(numbers(2, 3, 8, seed=1), numbers(2, 3, 8, seed=2), name) for name in ACTIVATIONS]
        + [(numbers(1, 2, 1, 8, seed=1), numbers(1, 2, 1, 8, seed=2), "silu")],
    ),
    "rotary_embedding": (
        rotary_embedding,
        [
            rotary_args(batch, heads, steps, dim, pairs, interleaved)
            for batch, heads, steps in ((2, 3, 5), (1, 1, 1), (2, 1, 5), (2, 3, 1), (1, 3, 5))
            for dim, pairs in ((8, 4), (8, 1), (2, 1))
            for interleaved in (False, True)
        ],
    ),
    "dequantize_slots": (dequantize_slots, [(*quantize_slots(numbers(2, 3, 4, 4, 8), 4, *SPLITS[0]), 4, 4, 1)]),
    "joint_attention": (joint_attention, [joint_args(), joint_args(1, 1, 1, 2), joint_args(stored=0)]),
    "next_slots": (next_slots, [(torch.ones(2, 7, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64))]),
    "quantize_slots": (quantize_slots, [(numbers(2, 3, 4, 4, 8), 2, *split) for split in SPLITS]),
    "scored_attention": (scored_attention, [attention_args(case) for case in DISTINCT_ATTENTIONS]),
    "scored_joint_attention": (scored_joint_attention, [joint_args(), joint_args(1, 1, 1, 2), joint_args(stored=0)]),
    "selected_linear": (
        selected_linear,
        [
            (numbers(2, 8), torch.zeros(2, 3, dtype=torch.int64), numbers(2, 8), None),
            (numbers(2, 3, 8), torch.tensor([[[4, 1]] * 3] * 2), numbers(5, 8), numbers(5)),
            (numbers(1, 1, 8).half(), torch.tensor([[[4]]]), numbers(5, 8).half(), None),
        ],
    ),
    "sparse_mlp": (
        sparse_mlp,
        [sparse_args(2, 3), sparse_args(7), sparse_args(1, is_full=False), sparse_args(2, 1, 3, is_full=False)],
    ),
    "windowed_attention": (windowed_attention, [windowed_args(), windowed_args(1, 1, 1, 2), windowed_args(2, 2, 9)]),
    "write_slots": (
        write_slots,
        [
            (numbers(2, 3, 6, 4), numbers(2, 3, 3, 4, seed=2), torch.tensor(slots))
            for slots in (*SLOTS.values(), [[[0, 5, 2]] * 3, [[1, 0, 4]] * 3])
        ],
    ),
}  # fmt: skip
LAYOUTS = {"contiguous": lambda x: x, "heads_last": heads_last, "channels_outermost": channels_outermost}


def test_every_operator_is_covered():
    apart = ("bitmap_linear", "quantized_", "low_rank_", "lut_", "experts", "sparse_linear")
    elsewhere = {name for name in jettison.ir.ops.__all__ if name.startswith(apart)}
    assert set(OPERATORS) == set(jettison.ir.ops.__all__) - elsewhere


def laid_out(args: tuple[Any, ...], layout: str) -> tuple[Any, ...]:
    return tuple(LAYOUTS[layout](a) if isinstance(a, Tensor) and a.dim() == 4 else a for a in args)


def as_tuple(out: Any) -> tuple[Tensor, ...]:
    return out if isinstance(out, tuple) else (out,)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_fake_rule_gives_the_shape_dtype_and_strides_of_the_real_one(name, layout):
    operator, calls = OPERATORS[name]
    for args in calls:
        args = laid_out(args, layout)
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        with mode:
            fake = as_tuple(operator(*fakes))
        real = as_tuple(operator(*args))
        assert len(fake) == len(real)
        for ours, theirs in zip(fake, real, strict=True):
            described = [(tuple(t.shape), t.stride(), t.dtype) for t in (ours, theirs)]
            assert described[0] == described[1]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPERATORS)
def test_schema_and_fake_rule_pass_opcheck(name, layout):
    operator, calls = OPERATORS[name]
    for args in calls[:3]:
        torch.library.opcheck(operator, laid_out(args, layout), test_utils=("test_schema", "test_faketensor"))


# How many arguments have a batch; those behind them are weights.
WITH_A_BATCH = {"sparse_mlp": 2}


class Calls(nn.Module):
    """One operator, with everything that has no batch fixed; a view behind it needs the right strides."""

    def __init__(self, operator: Any, args: tuple[Any, ...], given: int) -> None:
        super().__init__()
        self._operator, self._args, self._given = operator, args, given

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = iter(tensors)
        moving = [next(given) if isinstance(a, Tensor) else a for a in self._args[: self._given]]
        out = self._operator(*moving, *self._args[self._given :])
        return tuple(t.view(t.shape[0], -1) for t in as_tuple(out))


@pytest.mark.parametrize("name", OPERATORS)
def test_exports_with_a_dynamic_batch(name):
    operator, calls = OPERATORS[name]
    args = calls[0]
    count = WITH_A_BATCH.get(name, len(args))
    tensors = tuple(a for a in args[:count] if isinstance(a, Tensor))
    module = Calls(operator, args, count)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(module, tensors, dynamic_shapes=(tuple({0: batch} for _ in tensors),), strict=False)
    names = [str(node.target) for node in exported.graph.nodes if node.op == "call_function"]
    assert f"jettison.{name}.default" in names
    for rows in (1, 2, 5):
        given = tuple(torch.cat([tensor] * 3)[:rows].contiguous() for tensor in tensors)
        for ours, theirs in zip(exported.module()(*given), module(*given), strict=True):
            assert torch.equal(ours, theirs)
