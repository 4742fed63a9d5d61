"""Functions of a model: what takes several standard operators is written down once and called where it is needed.

ONNX Runtime inlines them when it loads a model. Without them every layer would repeat their operators, and the exporter
takes milliseconds for each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir
import torch
from onnx import parser
from torch import Tensor
from torch.onnx.ops import symbolic_multi_out

DOMAIN, VERSION = "jettison", 1
_TEXTS: dict[str, str] = {}


def define(name: str, text: str) -> None:
    """Make a function known.

    Args:
        name: Of its calls.
        text: In ONNX's textual syntax, from its name on.
    """
    _TEXTS[name] = f'<domain: "{DOMAIN}", opset_import: ["": 23]>\n{text}'


def call(
    name: str,
    operands: Sequence[Tensor],
    attributes: dict[str, Any],
    types: Sequence[tuple[torch.dtype, Sequence[int | torch.SymInt]]],
) -> Sequence[Tensor]:
    """Call a function while the exporter traces.

    Args:
        name: As defined.
        operands: Its inputs.
        attributes: Its attributes.
        types: Dtype and shape of each output.
    """
    return symbolic_multi_out(
        f"{DOMAIN}::{name}", operands, attributes, dtypes=[dtype for dtype, _ in types],
        shapes=[shape for _, shape in types], version=VERSION,
    )  # fmt: skip


def add_functions(model: onnx_ir.Model) -> None:
    """Give a model the functions that its nodes call."""
    for name in sorted({node.op_type for node in model.graph if node.domain == DOMAIN}):
        function = onnx_ir.serde.deserialize_function(parser.parse_function(_TEXTS[name]))
        model.functions[function.identifier()] = function
