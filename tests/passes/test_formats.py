"""What holds for every weight format: its text, and that columns and whole rows are rounded alike."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from jettison.ir.errors import OptionError
from jettison.passes.formats import FORMATS, Bitmap, Grid, IntGroups, Lut, Nf4, WeightFormat, format_from_text
from jettison.passes.grammar import Spec, format_pipeline, parse_pipeline
from jettison.passes.options import build, describe, to_spec

ROUNDING = [
    IntGroups(8, 32), IntGroups(4, 64), IntGroups(4, 32, symmetric=True), IntGroups(3, 64), IntGroups(2, 128),
    IntGroups(4, 64, float_zeros=True), IntGroups(3, 32, float_zeros=True), Nf4(64, double=False), Nf4(32),
]  # fmt: skip
EVERY = [*ROUNDING, Bitmap(), Bitmap("int8", 64), Bitmap("float"), Lut(), Lut(4), Lut(2, False), Lut(8, True)]
every_format = pytest.mark.parametrize("weight_format", EVERY, ids=str)
rounding_format = pytest.mark.parametrize("weight_format", ROUNDING, ids=str)


def normal(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@every_format
def test_name_is_read_back(weight_format: WeightFormat):
    assert format_from_text(weight_format.name) == weight_format
    assert str(weight_format) == weight_format.name


@every_format
def test_pipeline_text_is_read_back(weight_format: WeightFormat):
    spec = to_spec(weight_format)
    assert FORMATS[spec.name] is type(weight_format)
    text = format_pipeline([spec])
    (parsed,) = parse_pipeline(text)
    assert build(type(weight_format), parsed, where=text, registries={WeightFormat: FORMATS}) == weight_format
    assert format_from_text(text) == weight_format


def test_only_three_bits_and_bitmaps_are_refused_on_onnx():
    refused = [each for each in EVERY if each.unsupported_on("onnx") is not None]
    assert refused == [
        each for each in EVERY if isinstance(each, Bitmap) or (isinstance(each, IntGroups) and each.bits == 3)
    ]
    assert all(each.unsupported_on("torch") is None for each in EVERY)
    assert [each for each in EVERY if not each.has_table] == [each for each in EVERY if isinstance(each, Bitmap)]


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_has_defaults_and_describes_its_options(name: str):
    made = build(FORMATS[name], Spec(name), where="", registries={})
    assert made == format_from_text(name)
    assert all(doc for *_, doc in describe(FORMATS[name]))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("int5{group=32}", "option 'bits' needs 8|4|3|2"),
        ("int4{group=48}", "option 'group' needs 32|64|128"),
        ("int4{groups=32}", "int has no option 'groups'"),
        ("float4", "unknown weight format 'float4'"),
        ("int4,int8", "needs one format"),
    ],
)
def test_a_text_that_is_no_format_is_refused(text: str, message: str):
    with pytest.raises(OptionError, match=message.replace("|", r"\|")):
        format_from_text(text)


@rounding_format
def test_columns_are_rounded_as_whole_groups_are(weight_format: WeightFormat):
    """What a method that goes column by column relies on."""
    weight = normal(5, 2 * weight_format.group)
    groups = weight_format.split_groups(weight)
    grid = weight_format.stored(weight_format.fit(groups))
    codes = weight_format.round(groups, grid)
    assert (codes.dtype, codes.shape) == (torch.uint8, groups.shape)
    for block in range(2):
        of_block = Grid(*(None if part is None else part[:, block : block + 1] for part in (grid.scales, grid.zeros)))
        if not isinstance(weight_format, Nf4) or not weight_format.double:
            of_block = weight_format.fit(groups[:, block : block + 1])
        for column in (0, 1, weight_format.group - 1):
            one = groups[:, block : block + 1, column : column + 1]
            rounded = weight_format.round(one, of_block)
            assert torch.equal(rounded, codes[:, block : block + 1, column : column + 1])
            assert weight_format.values(rounded, of_block).shape == one.shape
    parts = weight_format.pack(codes, grid)
    assert all(torch.equal(part, parts[name]) for name, part in weight_format.encode(weight).items())
    assert torch.equal(weight_format.values(codes, grid).flatten(1), weight_format.decode(parts, tuple(weight.shape)))
    unpacked, again = weight_format.unpack(parts, tuple(weight.shape))
    assert torch.equal(unpacked, codes)
    assert all(torch.equal(part, parts[name]) for name, part in weight_format.pack(unpacked, again).items())


@rounding_format
@pytest.mark.parametrize("columns", [1, 3, 20])
def test_a_grid_is_fitted_to_any_number_of_columns(weight_format: WeightFormat, columns: int):
    groups = normal(4, columns).unsqueeze(1)
    grid = weight_format.fit(groups)
    error = weight_format.values(weight_format.round(groups, grid), grid) - groups
    assert grid.scales.shape == (4, 1)
    assert float(error.abs().max()) <= 1.01 * float(grid.scales.abs().max())
