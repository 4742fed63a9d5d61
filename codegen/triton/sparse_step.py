"""A sparse feed-forward layer as a step: `jettison::sparse_mlp` or `jettison::quantized_sparse_mlp` in two launches.

Each token reads the slabs that it names and no others, so results do not depend on the batch; that is right for the
few tokens of a decode step. Nothing waits for the device: indices stay there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from jettison.codegen.triton.kernels.base import COMPUTED
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.kernels.gather_down import GatherDown
from jettison.codegen.triton.kernels.gather_packed_down import GatherPackedDown
from jettison.codegen.triton.kernels.gather_up import TILE_ROWS, GatherUp
from jettison.codegen.triton.kernels.weight_form import WeightForm
from jettison.codegen.triton.steps import SparseMlpStep
from jettison.codegen.triton.word_layout import refusal, scale_dtype
from jettison.ir import ops
from jettison.ir.match import arguments, constant_name, is_call
from jettison.ir.packed_parts import PackedParts, sparse_parts_read

# What memory hands over at least: a shorter run of a row is read with its neighbours.
_SECTOR_BYTES = 32
Weights = dict[str, PackedParts | str]
"""`gate` (if there is one), `up` and `down`."""


def sparse_step(node: fx.Node, added: tuple[fx.Node, fx.Node] | None) -> SparseMlpStep | str:
    """The step of a layer, or why there is none.

    Args:
        node: A call of one of the operators.
        added: The sum behind it and what it adds to the layer, or None.
    """
    read, value = arguments(node), node.meta["val"]
    if value.dtype not in COMPUTED:
        return f"kernels do not compute in {str(value.dtype).removeprefix('torch.')}"
    if read["indices"] is None:
        return "every group is named: PyTorch's own kernels read all"
    kept, group = read["indices"].meta["val"].shape[-1], read["group"]
    if not isinstance(kept, int):
        return "how many groups a token names is not fixed"
    if group % TILE_ROWS:
        return f"groups of {group} neurons do not fill the tiles of the kernels: needed a multiple of {TILE_ROWS}"
    weights = _weights(node)
    vectors = {name: _names(read[name]) for name in ("up_bias", "absent", "down_bias")}
    if not weights or None in vectors.values():
        return "a weight, a bias or what stands in for groups is computed"
    forms = {name: _form(weight, value.dtype) for name, weight in weights.items()}
    reason = next((form for form in forms.values() if isinstance(form, str)), None)
    if reason is not None or forms.get("gate", forms["up"]) != forms["up"]:
        return reason or "gate and up are quantised in different forms"
    return _made(node, added, weights, vectors, forms)


def _made(
    node: fx.Node, added: tuple[fx.Node, fx.Node] | None, weights: Weights, vectors: dict[str, Any],
    forms: dict[str, Any],
) -> SparseMlpStep:  # fmt: skip
    read, dtype = arguments(node), node.meta["val"].dtype
    group, kept = read["group"], int(read["indices"].meta["val"].shape[-1])
    width = int(node.meta["val"].shape[-1])
    neurons = read["neurons"] if "neurons" in read else int(read["up"].meta["val"].shape[0])
    first = GatherUp(
        forms["up"], width, neurons, kept, group, dtype, read["activation"], "gate" in weights, bool(vectors["up_bias"])
    )
    after = Epilogue(bool(vectors["down_bias"]), has_residual=added is not None)
    second: GatherDown | GatherPackedDown = GatherDown(
        width, neurons, kept, group, dtype, bool(vectors["absent"]), after
    )
    why = "each token reads the slabs that it names"
    if forms["down"].bits:
        second = GatherPackedDown(
            forms["down"], width, neurons, kept, group, dtype, bool(vectors["absent"]), after
        )  # fmt: skip
        run = 4 * second.slab_words
        if run < _SECTOR_BYTES:
            why += f"; of down, {run} bytes of a row where memory hands over {_SECTOR_BYTES}"
    up = tuple(weights[name] for name in ("gate", "up") if name in weights)
    nodes, inputs = [node], [read["x"], read["indices"]]
    if added is not None:
        nodes, inputs = [*nodes, added[0]], [*inputs, added[1]]
    return SparseMlpStep(
        nodes, inputs, [nodes[-1]], why, up, weights["down"], vectors["up_bias"], vectors["absent"],
        vectors["down_bias"], first, second,
    )  # fmt: skip


def _weights(node: fx.Node) -> Weights:
    """The weights of a layer; nothing if one of them is computed."""
    if is_call(node, ops.quantized_sparse_mlp):
        return dict(sparse_parts_read(node))
    read = arguments(node)
    names = {name: constant_name(read[name]) for name in ("gate", "up", "down") if read[name] is not None}
    return {} if None in names.values() else {name: str(found) for name, found in names.items()}


def _names(operand: fx.Node | None) -> tuple[str, ...] | None:
    """The constant that an operand is, if it is given; None if it is computed."""
    if operand is None:
        return ()
    name = constant_name(operand)
    return None if name is None else (name,)


def _form(weight: PackedParts | str, dtype: torch.dtype) -> WeightForm | str:
    """The form of a weight, or why no kernel reads it."""
    if isinstance(weight, str):
        return WeightForm(dtype)
    reason = refusal(weight.bits, weight.group)
    return reason or WeightForm(scale_dtype(dtype), weight.bits, weight.group, weight.zeros is not None)
