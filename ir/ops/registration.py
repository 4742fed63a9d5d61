"""How jettison's own operators are registered with PyTorch.

An operator has a schema, a plain-PyTorch reference that defines what it means on every device, and a fake rule that
returns the shape *and strides* the reference returns (a later `view` in a captured graph depends on both).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "jettison"
_LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")


def define_op(schema: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> torch._ops.OpOverload:
    """Register `schema` in namespace `jettison` and return its default overload.

    Args:
        schema: Name and signature without the namespace, e.g. `"write_slots(Tensor state, ...) -> Tensor"`.
        reference: The meaning, in plain PyTorch; runs on any device.
        fake: Shape rule; gets fake tensors and must not read values.

    Returns:
        The operator overload that stands in graphs as a node's target.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.jettison, name).default
