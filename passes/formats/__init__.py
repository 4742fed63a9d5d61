"""Weight formats, by text id."""

from __future__ import annotations

import re
from dataclasses import replace

from jettison.ir.errors import OptionError
from jettison.passes.formats.base import Grid, WeightFormat
from jettison.passes.formats.bitmap import Bitmap
from jettison.passes.formats.int_groups import IntGroups
from jettison.passes.formats.lut import Lut
from jettison.passes.formats.nf4 import Nf4
from jettison.passes.grammar import Option, Scalar, parse_pipeline
from jettison.passes.options import build, lookup

FORMATS: dict[str, type[WeightFormat]] = {
    weight_format.id: weight_format for weight_format in (Bitmap, IntGroups, Lut, Nf4)
}

__all__ = ["FORMATS", "Bitmap", "Grid", "IntGroups", "Lut", "Nf4", "WeightFormat", "format_from_text"]


def format_from_text(text: str) -> WeightFormat:
    """Make the format that a text describes: the inverse of `WeightFormat.name`.

    The number of bits may be part of the name: `int4{group=32}` is `int{bits=4,group=32}`.

    Args:
        text: As stored with a packed weight, or as in a pipeline.

    Raises:
        OptionError: The text is malformed, or there is no such format or option.
    """
    specs = parse_pipeline(text)
    if len(specs) != 1:
        raise OptionError(f"weight format {text!r}: needs one format, such as int4{{group=32,symmetric=false}}.")
    spec = specs[0]
    numbered = re.fullmatch(r"(.*?)(\d+)", spec.name)
    if spec.name not in FORMATS and numbered is not None and numbered[1] in FORMATS:
        bits = Option("bits", Scalar(int(numbered[2])), spec.column)
        spec = replace(spec, name=numbered[1], options=(bits, *spec.options))
    cls = lookup(spec.name, FORMATS, "weight format", text, spec.column)
    return build(cls, spec, where=text, registries={WeightFormat: FORMATS})
