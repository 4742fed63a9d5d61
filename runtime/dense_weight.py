"""A floating-point weight as slabs of a streamed one are: rows in the dtype of the file, multiplied in the graph's."""

from __future__ import annotations

import copy
import threading
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from jettison.runtime.dense_linear import run_dense_linear
from jettison.runtime.packed_linear import SLAB_ROWS

_SCRATCH = threading.local()


class DenseWeight:
    """A weight `[N, K]`, or a slab of one; see `StoredWeight`. Rows are looked up elsewhere (`TableRows`).

    Args:
        values: `[N, K]` in the stored dtype, which may be another than x has.

    Attributes:
        whole_rows: Of the weight that this is a slab of; None if it is whole.
    """

    def __init__(self, values: Tensor) -> None:
        self.rows, self.columns = values.shape
        self.whole_rows: int | None = None
        self.dtype, self._values, self.nbytes = values.dtype, values, values.nbytes

    @classmethod
    def of_form(cls, form: Mapping[str, Any]) -> DenseWeight:
        """See `StoredWeight`."""
        dtype = getattr(torch, form["dtype"])
        return cls(torch.empty(form["rows"], form["columns"], dtype=dtype, device="meta"))

    @property
    def granule(self) -> int:
        """See `StoredWeight`."""
        return SLAB_ROWS

    @property
    def form(self) -> dict[str, int | str]:
        """See `StoredWeight`."""
        return {"rows": self.rows, "columns": self.columns, "dtype": str(self.dtype).removeprefix("torch.")}

    def layout(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """See `StoredWeight`."""
        return {"values": (self.dtype, (self.rows, self.columns))}

    def parts(self) -> dict[str, Tensor]:
        """See `StoredWeight`."""
        return {"values": self._values}

    def with_parts(self, parts: Mapping[str, Tensor]) -> DenseWeight:
        """See `StoredWeight`."""
        made = copy.copy(self)
        made._values = parts["values"]
        return made

    def rows_between(self, start: int, stop: int) -> DenseWeight:
        """See `StoredWeight`."""
        return DenseWeight(self._values[start:stop])

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """`x @ w.T + bias` in the dtype of x, into which the weight is converted first."""
        values = self._values
        if values.dtype != x.dtype:
            values = _scratch(x.dtype, values.numel()).view(values.shape).copy_(values)
        return run_dense_linear(x, values, bias, self.whole_rows)


def _scratch(dtype: torch.dtype, elements: int) -> Tensor:
    """Memory of this thread to convert into, valid until the next call; faulting pages in anew takes as long again."""
    held = getattr(_SCRATCH, "held", None)
    if held is None or held.nbytes < elements * dtype.itemsize:
        held = _SCRATCH.held = torch.empty(elements * dtype.itemsize, dtype=torch.uint8)
    return held[: elements * dtype.itemsize].view(dtype)
