"""NF4: levels, error, double quantisation of scales, bytes, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from jettison.ir.compare import assert_close
from jettison.ir.errors import ArtifactError, OptionError, UnsupportedError
from jettison.ir.ops import lut_embedding, lut_linear
from jettison.passes.formats.base import Grid
from jettison.passes.formats.nf4 import LEVELS, Nf4

FORMATS = [Nf4(group, double) for group in (32, 64, 128) for double in (True, False)]
every_format = pytest.mark.parametrize("nf4", FORMATS, ids=str)
WIDEST = max(high - low for low, high in itertools.pairwise(LEVELS)) / 2


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def scales_of(nf4: Nf4, parts: dict[str, Tensor], shape: tuple[int, int]) -> Tensor:
    """`[N, K]`: the stored scale of each weight."""
    return nf4.unpack(parts, shape)[1].scales.repeat_interleave(nf4.group, 1)[:, : shape[1]]


def test_levels_are_those_of_the_normal_distribution():
    assert len(LEVELS) == 16
    assert list(LEVELS) == sorted(LEVELS)
    assert (LEVELS[0], LEVELS[7], LEVELS[15]) == (-1.0, 0.0, 1.0)


def test_encode_by_hand():
    weight = 3 * torch.tensor(LEVELS).repeat(2).view(1, 32)
    parts = Nf4(32, double=False).encode(weight)
    assert parts["codes"].tolist() == [[[0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE] * 2]]
    assert parts["scales"].tolist() == [[3.0]]
    assert torch.equal(Nf4(32, double=False).decode(parts, (1, 32)), weight)


def test_every_ratio_is_rounded_to_the_nearest_level():
    levels = torch.tensor(LEVELS)
    borders = (levels[1:] + levels[:-1]) / 2
    ends = torch.arange(65) / 32 - 1
    near = torch.cat([levels, borders, ends])
    ratios = torch.cat([near, near.nextafter(near + 1), near.nextafter(near - 1), torch.linspace(-1, 1, 20001)])
    ratios = ratios.clamp(-1.01, 1.01).view(1, 1, -1)
    codes = Nf4().round(3 * ratios, Grid(torch.full((1, 1), 3.0)))
    # Where 3 * ratio is rounded the ratio that is seen may lie on the other side of a border.
    assert torch.equal(codes, torch.bucketize(3 * ratios / 3, borders).to(torch.uint8))


@pytest.mark.parametrize(
    ("nf4", "error"),
    [(Nf4(32, False), 0.0076), (Nf4(64, False), 0.0085), (Nf4(128, False), 0.0091), (Nf4(64), 0.0085)],
    ids=str,
)
def test_error_on_normal_weights(nf4: Nf4, error: float):
    weight = normal(512, 1024)
    decoded = nf4.decode(nf4.encode(weight), (512, 1024))
    assert float((weight - decoded).square().sum() / weight.square().sum()) == pytest.approx(error, rel=0.03)


def test_scales_in_8_bits_cost_next_to_nothing():
    planted = normal(256, 1024)
    planted.view(-1)[::6000] *= 100
    for weight in (normal(256, 1024), planted, normal(256, 1024) * torch.logspace(-2, 1, 1024)):
        plain, double = (Nf4(64, flag) for flag in (False, True))
        errors = [(f.decode(f.encode(weight), (256, 1024)) - weight).square().sum() for f in (plain, double)]
        assert errors[1] < 1.002 * errors[0]


@settings(deadline=None, max_examples=80)
@given(
    nf4=st.sampled_from(FORMATS),
    rows=st.integers(1, 6),
    columns=st.integers(1, 300),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
    exponent=st.integers(-30, 30),
    n_zeros=st.integers(0, 64),
    seed=st.integers(0, 2**16),
)
def test_bound_bytes_and_layout_hold_for_any_shape(
    nf4: Nf4, rows: int, columns: int, dtype: torch.dtype, exponent: int, n_zeros: int, seed: int
):
    scale = 1.0 if dtype is torch.float16 else 10.0**exponent
    weight = (normal(rows, columns, seed).double() * scale).to(dtype)
    weight[:, :n_zeros] = 0
    parts = nf4.encode(weight)
    assert {name: (tuple(p.shape), p.dtype) for name, p in parts.items()} == nf4.part_specs((rows, columns))
    assert nf4.bytes((rows, columns)) == sum(part.nbytes for part in parts.values())
    error = (nf4.decode(parts, (rows, columns)).double() - weight.double()).abs()
    stored = scales_of(nf4, parts, (rows, columns)).double()
    # A scale in 8 bits may fall short of the largest weight by half a step of its root.
    steps = parts["scale_steps"].double() if nf4.double else torch.zeros(rows, 1, dtype=torch.float64)
    bound = WIDEST * stored + steps * (stored.sqrt() + steps)
    assert bool((error <= 1.0001 * bound).all())
    assert not nf4.decode(parts, (rows, columns))[:, :n_zeros].any()


@every_format
def test_stored_scales_come_back_bit_for_bit(nf4: Nf4):
    weight = normal(40, 512) * torch.logspace(-3, 3, 40)[:, None]
    groups = nf4.split_groups(weight)
    grid = nf4.stored(nf4.fit(groups))
    assert torch.equal(nf4.stored(grid).scales, grid.scales)
    codes = nf4.round(groups, grid)
    parts = nf4.pack(codes, grid)
    assert torch.equal(nf4.decode(parts, (40, 512)), nf4.values(codes, grid).flatten(1))


@every_format
def test_zero_rows_constant_groups_and_an_outlier(nf4: Nf4):
    weight = normal(5, 3 * nf4.group)
    weight[0] = 0
    weight[1, : nf4.group] = 0
    weight[2] = -0.7
    weight[3, 5] = 1e6
    decoded = nf4.decode(nf4.encode(weight), tuple(weight.shape))
    assert not decoded[0].any()
    assert not decoded[1, : nf4.group].any()
    reason = "scales in 8 bits" if nf4.double else ""
    assert_close(decoded[2], weight[2], tolerance=1e-3 if nf4.double else None, reason=reason)
    assert decoded[3, 5] == pytest.approx(1e6, rel=1e-3)
    assert bool(torch.isfinite(decoded).all())
    if not nf4.double:
        assert torch.equal(decoded[2], weight[2])
        rest = decoded[3, nf4.group :] - weight[3, nf4.group :]
        assert float(rest.abs().max()) < 0.2 * float(weight[3, nf4.group :].abs().max())


@every_format
@pytest.mark.parametrize(("rows", "columns"), [(1, 200), (24, 1), (24, 256), (24, 200)])
def test_operators_read_the_parts(nf4: Nf4, rows: int, columns: int):
    weight, x = normal(rows, columns), normal(7, columns, seed=1)
    parts = nf4.encode(weight)
    scales = (parts["scale_codes"], parts["scale_steps"]) if nf4.double else (parts["scales"], None)
    decoded = nf4.decode(parts, (rows, columns))
    y = lut_linear(x, parts["codes"], parts["lut"], *scales, None, 4, nf4.group, columns)
    assert_close(y, x @ decoded.t())
    indices = torch.tensor([[0, rows - 1]])
    found = lut_embedding(indices, parts["codes"], parts["lut"], *scales, 4, nf4.group, columns)
    assert torch.equal(found, decoded[indices])


def test_bits_per_weight():
    assert Nf4(64, double=False).bytes((64, 1024)) == 64 * (512 + 16 * 4) + 64
    assert Nf4(64).bytes((64, 1024)) == 64 * (512 + 16 + 4) + 64
    assert Nf4(64).bits_per_weight((4096, 4096)) == pytest.approx(4 + 8 / 64 + 32 / 4096, abs=1e-4)


@every_format
def test_rows_and_strides_do_not_matter(nf4: Nf4):
    weight = normal(200, 13).t().to(torch.bfloat16)
    whole = nf4.encode(weight)
    by_row = [nf4.encode_rows(weight[row : row + 1], "w", row) for row in range(13)]
    for name, part in whole.items():
        assert torch.equal(part, by_row[0][name] if name == "lut" else torch.cat([each[name] for each in by_row]))


@pytest.mark.parametrize("value", [float("nan"), -float("inf"), 3e38])
def test_values_without_a_finite_scale_are_named(value: float):
    weight = normal(9, 100)
    weight[5, 98] = value
    with pytest.raises(UnsupportedError, match=r"^\[nf4\{group=64,double=true\}\] up_proj: entry \[5, 98\] is"):
        Nf4().encode(weight, "up_proj")


def test_bad_options_and_parts():
    with pytest.raises(OptionError, match=r"^\[nf4\] group=48: needs one of 32, 64, 128"):
        Nf4(48)  # type: ignore[arg-type]
    with pytest.raises(OptionError, match=r"^\[nf4\] double='yes': needs true or false"):
        Nf4(64, "yes")  # type: ignore[arg-type]
    with pytest.raises(ArtifactError, match=r"needs codes uint8\[4, 1, 32\], lut float32\[1, 16\], scale_codes"):
        Nf4().decode(Nf4(64, double=False).encode(normal(4, 64)), (4, 64))
