from __future__ import annotations

import pytest
import torch
from torch import nn

from jettison.ir.match import is_call
from jettison.ir.ops import rotary_embedding
from jettison.passes.pipeline import canonicalize
from jettison.passes.raise_rotary_embedding import RaiseRotaryEmbedding
from tests.helpers import (
    EmbeddedWithPositions,
    assert_declines,
    assert_golden,
    assert_idempotent,
    assert_same_numbers,
    export_tiny,
    run_pass,
)

HEADS, DIM = 2, 8


class Rotations(nn.Module):
    """A function of `(heads [B, H, S, D], angles [B, S, D / 2])`; the frequencies stay fp32 in any graph dtype."""

    def __init__(self, function, layout="heads_first", rotated=DIM):
        super().__init__()
        self.function, self.layout = function, layout
        self.register_buffer("frequencies", torch.zeros(rotated // 2))

    def forward(self, x, position_ids):
        heads = x.view(*x.shape[:2], HEADS, DIM)
        heads = heads.transpose(1, 2) if self.layout == "heads_first" else heads
        return self.function(heads, position_ids[:, :, None] * self.frequencies)


def export_rotation(function, *, dtype=torch.float32, **options):
    """Traced and canonicalised, as the pass gets it."""
    program = export_tiny(EmbeddedWithPositions(Rotations(function, **options), width=HEADS * DIM), dtype=dtype)
    canonicalize(program)
    return program


def n_rotations(program):
    return sum(is_call(node, rotary_embedding) for entry in program.entries.values() for node in entry.graph.nodes)


def half_turned(x):
    first, second = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return torch.cat([-second, first], -1)


def half_turned_by_chunks(x):
    first, second = x.chunk(2, -1)
    return torch.cat((-second, first), dim=x.dim() - 1)


def half_turned_by_split(x):
    first, second = x.split(x.shape[-1] // 2, dim=-1)
    return torch.cat((-second, first), -1)


def pairs_turned(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def pairs_turned_by_reshape(x):
    return torch.stack([-x[..., 1::2], x[..., ::2]], x.dim()).reshape(x.shape)


def doubled(angles):
    return torch.cat([angles, angles], -1)


def repeated(angles):
    return angles.repeat_interleave(2, -1)


def rotate(x, angles, turned=half_turned, repeat=doubled, axis=1):
    cos, sin = (repeat(angles).cos().unsqueeze(axis), repeat(angles).sin().unsqueeze(axis))
    return x * cos + turned(x) * sin


def rotate_part(x, angles, width=4, **options):
    return torch.cat([rotate(x[..., :width], angles, **options), x[..., width:]], -1)


def test_golden_half(snapshot):
    before = export_rotation(rotate)
    after, record = assert_golden(snapshot, RaiseRotaryEmbedding(), before, "half")
    assert record.rewrites == 1
    assert_same_numbers(before, after)


def test_golden_interleaved(snapshot):
    before = export_rotation(lambda x, angles: rotate(x, angles, pairs_turned, repeated))
    after, record = assert_golden(snapshot, RaiseRotaryEmbedding(), before, "interleaved")
    assert record.rewrites == 1
    assert_same_numbers(before, after)


def test_golden_partial(snapshot):
    before = export_rotation(rotate_part, rotated=4)
    after, record = assert_golden(snapshot, RaiseRotaryEmbedding(), before, "partial")
    assert record.rewrites == 2
    assert_same_numbers(before, after)


def test_golden_heads_after_positions(snapshot):
    before = export_rotation(lambda x, angles: rotate(x, angles, axis=2), layout="positions_first")
    after, record = assert_golden(snapshot, RaiseRotaryEmbedding(), before, "heads_after_positions")
    assert record.rewrites == 1
    assert_same_numbers(before, after)


def sum_the_other_way(x, angles):
    cos, sin = doubled(angles).cos().unsqueeze(1), doubled(angles).sin().unsqueeze(1)
    return sin * half_turned(x) + cos * x


def scaled_and_cast(x, angles):
    """YaRN scales cosines and sines; every library casts them."""
    cos = (doubled(angles).double().cos() * 0.75).float()[:, None]
    sin = (doubled(angles).double().sin() * 0.75).float()[:, None]
    return (x * cos) + (half_turned(x) * sin)


def same_for_every_row(x, angles):
    """Angles `[S, D]`, without a batch."""
    cos, sin = doubled(angles[0]).cos(), doubled(angles[0]).sin()
    return x * cos + half_turned(x) * sin


def repeated_behind_the_heads(x, angles):
    """GPT-J: cosines and sines get the axis of the heads before they are repeated."""
    cos, sin = (angle[:, :, None, :].repeat_interleave(2, 3) for angle in (angles.cos(), angles.sin()))
    return x * cos + pairs_turned(x) * sin


def halves_rotated(x, cos, sin):
    """gpt-oss: the halves are rotated and then joined."""
    first, second = x.chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def half_angles_repeated(x, angles):
    """GLM: values that stand twice in the half layout are cut and repeated for the interleaved one."""
    cos, sin = (part.unsqueeze(1)[..., : DIM // 2] for part in (doubled(angles).cos(), doubled(angles).sin()))
    return x * repeated(cos) + pairs_turned(x) * repeated(sin)


@pytest.mark.parametrize(
    ("function", "layout"),
    [
        (lambda x, angles: rotate(x, angles, half_turned_by_chunks), "heads_first"),
        (lambda x, angles: rotate(x, angles, half_turned_by_split), "heads_first"),
        (lambda x, angles: rotate(x, angles, pairs_turned_by_reshape, repeated), "heads_first"),
        (lambda x, angles: rotate(x, angles, axis=-3), "heads_first"),
        (lambda x, angles: rotate(x, angles, pairs_turned, repeated, axis=2), "positions_first"),
        (sum_the_other_way, "heads_first"),
        (scaled_and_cast, "heads_first"),
        (same_for_every_row, "heads_first"),
        (repeated_behind_the_heads, "positions_first"),
        (half_angles_repeated, "heads_first"),
        (lambda x, angles: halves_rotated(x, angles.cos()[:, None], angles.sin()[:, None]), "heads_first"),
        (lambda x, angles: halves_rotated(x, angles.cos().unsqueeze(2), angles.sin().unsqueeze(2)), "positions_first"),
    ],
    ids=["chunks", "split", "pairs_reshaped", "negative_axis", "pairs_positions_first", "order", "scaled", "no_batch",
         "gpt_j", "glm", "gpt_oss", "gpt_oss_positions_first"],
)  # fmt: skip
def test_spellings(function, layout):
    before = export_rotation(function, layout=layout)
    after, record = run_pass(RaiseRotaryEmbedding(), before)
    assert record.rewrites == 1
    assert record.misses == []
    canonicalize(after)
    assert n_rotations(after) == 1
    assert_same_numbers(before, after)


@pytest.mark.parametrize(
    ("function", "layout"),
    [
        (lambda x, angles: rotate_part(x, angles, turned=pairs_turned, repeat=repeated), "heads_first"),
        (lambda x, angles: rotate_part(x, angles, axis=2), "positions_first"),
        (lambda x, angles: rotate_part(x, angles, turned=pairs_turned, repeat=repeated, axis=2), "positions_first"),
    ],
    ids=["pairs", "positions_first", "pairs_positions_first"],
)
def test_partial_rotations_become_one_operator(function, layout):
    before = export_rotation(function, layout=layout, rotated=4)
    after, record = run_pass(RaiseRotaryEmbedding(), before)
    assert record.rewrites == 2
    canonicalize(after)
    assert "aten.cat" not in str(after)
    assert_same_numbers(before, after)


def test_a_rotated_part_that_is_read_elsewhere_is_not_joined():
    def function(x, angles):
        rotated = rotate(x[..., :4], angles)
        return torch.cat([rotated, x[..., 4:]], -1) + rotated.repeat(1, 1, 1, 2)

    before = export_rotation(function, rotated=4)
    after, record = run_pass(RaiseRotaryEmbedding(), before)
    assert record.rewrites == 1
    assert_same_numbers(before, after)


def test_a_rotation_joined_with_another_value_is_not_partial():
    before = export_rotation(lambda x, angles: torch.cat([rotate(x[..., :4], angles), x[..., 3:]], -1), rotated=4)
    after, record = run_pass(RaiseRotaryEmbedding(), before)
    assert record.rewrites == 1
    assert_same_numbers(before, after)


def test_queries_and_keys_share_the_angles():
    before = export_rotation(lambda x, angles: rotate(x, angles) - rotate(x.sin(), angles))
    after, record = run_pass(RaiseRotaryEmbedding(), before)
    assert record.rewrites == 2
    canonicalize(after)
    assert str(after).count("aten.cos") == str(after).count("aten.sin(%") - 1 == 1
    assert_same_numbers(before, after)


@pytest.mark.parametrize("function", [rotate, lambda x, angles: rotate(x, angles, pairs_turned, repeated)])
def test_runs_twice_like_once(function):
    assert_idempotent(RaiseRotaryEmbedding(), export_rotation(function))


def test_bf16_with_angles_of_its_own_dtype():
    def function(x, angles):
        cos, sin = (part.to(x.dtype).unsqueeze(1) for part in (doubled(angles).cos(), doubled(angles).sin()))
        return x * cos + half_turned(x) * sin

    before = export_rotation(function, dtype=torch.bfloat16)
    after, record = run_pass(RaiseRotaryEmbedding(), before)
    assert record.rewrites == 1
    assert_same_numbers(before, after)


@pytest.mark.parametrize(
    "function", [rotate, lambda x, angles: halves_rotated(x, angles.cos()[:, None], angles.sin()[:, None])]
)
def test_declines_when_the_angles_widen_the_result(function):
    """bf16 * f32 is f32; the operator would return bf16."""
    program = export_rotation(function, dtype=torch.bfloat16)
    assert_declines(RaiseRotaryEmbedding(), program, reason="the rotation is not computed in the dtype of its operand")


@pytest.mark.parametrize(
    "function",
    [
        lambda x, angles: x * doubled(angles).cos() + half_turned(x) * doubled(angles).sin(),
        lambda x, angles: halves_rotated(x, angles.cos(), angles.sin()),
    ],
    ids=["whole", "halves"],
)
def test_declines_without_four_axes(function):
    program = export_rotation(lambda x, angles: function(x[:, 0], angles))
    assert_declines(RaiseRotaryEmbedding(), program, reason="the rotated value does not have four axes")


def angles_with_heads(x, angles):
    angles = doubled(angles[:, :, None])
    return x * angles.cos() + half_turned(x) * angles.sin()


@pytest.mark.parametrize(
    ("function", "layout"),
    [
        (lambda x, angles: x * doubled(angles).cos()[:, None] + half_turned(x) * 0.5, "heads_first"),
        (lambda x, angles: x * doubled(angles).cos()[:, None] + half_turned(x) * angles.sum(), "heads_first"),
        (angles_with_heads, "positions_first"),
        (lambda x, angles: halves_rotated(x, angles.cos()[:, None], angles.sum()), "heads_first"),
        (lambda x, angles: halves_rotated(x, angles.cos()[:, None], angles[..., :1].sin()[:, None]), "heads_first"),
    ],
    ids=["a_number", "not_an_angle", "repeated_with_heads", "halves", "halves_with_one_angle"],
)
def test_declines_when_angles_stand_elsewhere(function, layout):
    reason = "cosine and sine do not stand along the positions of [B, H, S, D] or [B, S, H, D]"
    assert_declines(RaiseRotaryEmbedding(), export_rotation(function, layout=layout), reason=reason)


@pytest.mark.parametrize(
    "function",
    [
        lambda x, angles: rotate(x, angles, repeat=lambda angles: torch.cat([angles, angles.flip(-1)], -1)),
        lambda x, angles: rotate(x, angles, repeat=lambda angles: doubled(angles) * (1 + angles.sum())),
        lambda x, angles: rotate(x, angles, repeat=repeated),
        lambda x, angles: rotate(x, angles, pairs_turned, doubled),
    ],
    ids=["two_angles", "scaled_by_a_value", "half_with_neighbours", "pairs_with_halves"],
)
def test_declines_when_a_pair_has_two_angles(function):
    reason = "cosine and sine are not visibly one angle per channel pair"
    assert_declines(RaiseRotaryEmbedding(), export_rotation(function), reason=reason)


def weighted(x, angles):
    cos, sin = doubled(angles).cos().unsqueeze(1), doubled(angles).sin().unsqueeze(1)
    return torch.add(x * cos, half_turned(x) * sin, alpha=2)


def weighted_halves(x, angles):
    (first, second), cos, sin = x.chunk(2, -1), angles.cos()[:, None], angles.sin()[:, None]
    return torch.cat([torch.sub(first * cos, second * sin, alpha=2), second * cos + first * sin], -1)


@pytest.mark.parametrize("function", [weighted, weighted_halves])
def test_is_not_interested_in_weighted_sums(function):
    assert_declines(RaiseRotaryEmbedding(), export_rotation(function), reason=None)


def test_is_not_interested_in_halves_that_are_not_rotated():
    def mirrored(x, angles):
        (first, second), cos, sin = x.chunk(2, -1), angles.cos()[:, None], angles.sin()[:, None]
        return torch.cat([second * cos - first * sin, first * cos + second * sin], -1)

    assert_declines(RaiseRotaryEmbedding(), export_rotation(mirrored), reason=None)


@pytest.mark.parametrize(
    "turned",
    [
        lambda x: torch.cat([x[..., 4:], -x[..., :4]], -1),
        lambda x: torch.cat([-x[..., :4], x[..., 4:]], -1),
        lambda x: torch.cat([-x[..., 2:], x[..., :2]], -1),
        lambda x: torch.stack([-x[..., ::2], x[..., 1::2]], -1).flatten(-2),
        lambda x: torch.cat([-x[..., 4:], x.sin()[..., :4]], -1),
    ],
    ids=["backwards", "not_swapped", "uneven", "pairs_not_swapped", "of_two_values"],
)
def test_is_not_interested_in_other_turns(turned):
    assert_declines(RaiseRotaryEmbedding(), export_rotation(lambda x, a: rotate(x, a, turned)), reason=None)


def test_is_not_interested_in_other_sums():
    other = export_rotation(lambda x, angles: x * doubled(angles).cos()[:, None] + x.sin() * x)
    assert_declines(RaiseRotaryEmbedding(), other, reason=None)
