"""Palettes: found or refused, stored exactly, bytes, and what cannot be a palette."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jettison.ir.compare import assert_close
from jettison.ir.errors import ArtifactError, OptionError, UnsupportedError
from jettison.ir.ops import lut_embedding, lut_linear
from jettison.passes.formats.lut import Lut, palette


def palettised(rows: int, columns: int, count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """A matrix of `count` values, all of which occur."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(count, generator=generator).to(dtype)
    index = torch.randint(count, (rows, columns), generator=generator)
    index.view(-1)[:count] = torch.arange(count)
    return values[index]


def reader(weight: Tensor):
    return lambda start, stop: weight[start:stop]


def test_palette_finds_every_value_and_stops_early():
    weight = palettised(700, 1500, 200)
    found = palette(reader(weight), (700, 1500))
    assert found is not None
    assert torch.equal(found, weight.unique())
    read = []

    def watched(start: int, stop: int) -> Tensor:
        read.append((start, stop))
        return torch.randn(stop - start, 1500, generator=torch.Generator().manual_seed(start))

    assert palette(watched, (700, 1500)) is None
    assert read == [(0, 1)]


def test_palette_of_values_that_come_late():
    weight = torch.zeros(900, 1000)
    weight[899, 999] = 3.0
    weight[450, 7] = -0.0
    found = palette(reader(weight), (900, 1000))
    assert found is not None
    assert found.tolist() == [0.0, 3.0]
    weight[600] = torch.arange(1000.0)
    assert palette(reader(weight), (900, 1000)) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("count", "bits"), [(1, 2), (4, 2), (5, 4), (16, 4), (17, 8), (256, 8)])
@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (37, 301), (300, 1)])
def test_stored_exactly_in_the_fewest_bits(dtype: torch.dtype, count: int, bits: int, rows: int, columns: int):
    weight = palettised(rows, columns, count, dtype=dtype)
    bits = {True: 8, False: 4}[weight.unique().numel() > 16] if weight.unique().numel() > 4 else 2
    chosen = Lut(per_row=False).adapted(reader(weight), (rows, columns), "w")
    assert chosen.name == f"lut{{bits={bits},per_row=false}}"
    parts = Lut(per_row=False).encode(weight)
    assert {name: (tuple(p.shape), p.dtype) for name, p in parts.items()} == chosen.part_specs((rows, columns))
    assert chosen.bytes((rows, columns)) == sum(part.nbytes for part in parts.values())
    assert chosen.bytes((rows, columns)) == rows * -(-columns // 8) * bits + 4 * 2**bits
    for weight_format in (chosen, Lut()):
        assert torch.equal(weight_format.decode(parts, (rows, columns)), weight.to(torch.float32))


def test_neighbouring_numbers_stay_apart():
    # Their mean rounds to one of the two.
    one = torch.tensor([1.0, torch.finfo(torch.float32).eps + 1, 2 * torch.finfo(torch.float32).eps + 1])
    weight = one[torch.arange(64) % 3].view(4, 16)
    assert torch.equal(Lut().decode(Lut().encode(weight), (4, 16)), weight)


def test_tables_of_rows():
    # Sixteen multiples of a scale of each row, as a tool leaves them that rounds by rows.
    scale = torch.rand(50, 1, generator=torch.Generator().manual_seed(0)) + 0.1
    weight = torch.randint(-8, 8, (50, 500), generator=torch.Generator().manual_seed(1)) * scale
    weight[3] = 0
    weight[7] = 1.5
    chosen = Lut().adapted(reader(weight), (50, 500), "w")
    assert chosen.name == "lut{bits=4,per_row=true}"
    parts = Lut().encode(weight)
    assert parts["lut"].shape == (50, 16)
    assert torch.equal(chosen.decode(parts, (50, 500)), weight)
    x = torch.randn(3, 500, generator=torch.Generator().manual_seed(2))
    y = lut_linear(x, parts["codes"], parts["lut"], None, None, None, 4, 8, 500)
    assert_close(y, x @ weight.t())
    rows = lut_embedding(torch.tensor([[49, 3], [0, 49]]), parts["codes"], parts["lut"], None, None, 4, 8, 500)
    assert torch.equal(rows, weight[torch.tensor([[49, 3], [0, 49]])])
    by_row = [chosen.encode_rows(weight[row : row + 1], "w", row) for row in range(50)]
    assert all(torch.equal(torch.cat([each[name] for each in by_row]), parts[name]) for name in parts)


def test_short_rows_are_no_reason_for_tables():
    weight = torch.randn(64, 200, generator=torch.Generator().manual_seed(0))
    with pytest.raises(UnsupportedError, match="found more than 256 distinct values, up to 200 in a row"):
        Lut().encode(weight)
    assert torch.equal(Lut(per_row=True).decode(Lut(per_row=True).encode(weight), (64, 200)), weight)


def test_weights_of_any_strides():
    weight = palettised(40, 24, 16).t()
    assert torch.equal(Lut().decode(Lut().encode(weight), (24, 40)), weight)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_values_that_are_no_numbers_are_named(value: float):
    weight = palettised(9, 400, 16)
    weight[5, 98] = value
    with pytest.raises(UnsupportedError, match=r"^\[lut\S*\] up_proj: entry \[5, 98\] is .*needs a finite number"):
        Lut().encode(weight, "up_proj")


def test_too_many_values_are_refused_with_their_number():
    weight = palettised(40, 400, 30)
    message = r"^\[lut\{bits=4\}\] up_proj: found 30 distinct values, up to 30 in a row, needs at most 16 in all or in"
    with pytest.raises(UnsupportedError, match=message):
        Lut(bits=4).encode(weight, "up_proj")
    with pytest.raises(UnsupportedError, match=r"needs at most 4 in each row, because .*skip="):
        Lut(bits=2, per_row=True).encode(weight)
    with pytest.raises(UnsupportedError, match="needs a non-empty floating-point matrix"):
        Lut().encode(torch.zeros(4))
    with pytest.raises(OptionError, match="call `adapted`"):
        Lut().encode_rows(weight)


def test_parts_of_another_layout_are_refused():
    parts = Lut().encode(palettised(8, 64, 16))
    for bad in ({"codes": parts["codes"]}, {**parts, "lut": parts["lut"][:, :3]}, {**parts, "lut": parts["codes"]}, {}):
        with pytest.raises((ArtifactError, OptionError)):
            Lut().decode(bad, (8, 64))
        with pytest.raises(ArtifactError, match="needs codes"):
            Lut(4, False).decode(bad, (8, 64))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"bits": 3}, r"^\[lut\] bits=3: needs one of 2, 4, 8"), ({"per_row": 1}, r"^\[lut\] per_row=1: needs true")],
)
def test_options_are_validated(options: dict[str, object], message: str):
    with pytest.raises(OptionError, match=message):
        Lut(**options)  # type: ignore[arg-type]
