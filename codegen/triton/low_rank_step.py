"""What `fuse-low-rank` made one operator, as steps.

A feed-forward layer is a chain of products for the tokens of a decode step or of a short prompt, whose neurons are few.
Of a long prompt the neurons are many, and one kernel keeps them on chip. An attention is one kernel.
"""

from __future__ import annotations

import torch
from torch import fx

from jettison.codegen.triton.kernels.base import COMPUTED
from jettison.codegen.triton.kernels.epilogue import Epilogue
from jettison.codegen.triton.kernels.low_rank_attention import LowRankAttention, Masks
from jettison.codegen.triton.kernels.low_rank_mlp import FEW_TOKENS, LowRankMlp
from jettison.codegen.triton.steps import LowRankAttentionStep, LowRankMlpStep, Product
from jettison.ir.match import arguments, constant_name

_WEIGHTS = ("gate_rows", "gate_bias", "up_rows", "up_bias", "columns", "rows", "bias")
_THREE = ("query", "key", "value")
# What an attention may be given, in the order in which the kernel takes it.
_GIVEN = ("cos", "sin", "query_positions", "key_positions", "key_valid", "sinks")
# What a program holds of queries, keys and values of 256 channels spills, whatever the tiles.
_MOST_CHANNELS = 128


def low_rank_mlp_step(node: fx.Node, added: tuple[fx.Node, fx.Node] | None) -> LowRankMlpStep | str:
    """The step of a feed-forward layer, or why there is none.

    Args:
        node: A call of `jettison::low_rank_mlp`.
        added: The sum behind it and what it adds to the layer, or None.
    """
    read, value = arguments(node), node.meta["val"]
    if value.dtype not in COMPUTED:
        return f"kernels do not compute in {str(value.dtype).removeprefix('torch.')}"
    names = _constants(node, _WEIGHTS)
    if isinstance(names, str):
        return names
    sizes = {name: [int(size) for size in read[name].meta["val"].shape] for name in names}
    last, sums = _summing(names, sizes, value.dtype, has_residual=added is not None)
    gate_rank = sizes["gate_rows"][1] if "gate_rows" in names else 0
    kernel = LowRankMlp(
        sizes["up_rows"][1], gate_rank, sizes["up_rows"][0], sizes["columns"][0], value.dtype, read["activation"],
        "up_bias" in names, "gate_bias" in names, sums.epilogue,
    )  # fmt: skip
    nodes, inputs = [node], [each for each in (read["gate"], read["up"]) if each is not None]
    if added is not None:
        nodes, inputs = [*nodes, added[0]], [*inputs, added[1]]
    return LowRankMlpStep(
        nodes, inputs, [nodes[-1]], _why(kernel), _making(node, names, sizes), sums, last, kernel,
        tuple(names[name] for name in ("gate_rows", "up_rows") if name in names),
        tuple(names[name] for name in ("gate_bias", "up_bias") if name in names),
    )  # fmt: skip


def _constants(node: fx.Node, wanted: tuple[str, ...]) -> dict[str, str] | str:
    """Names of the weights and biases that are given, or why no kernel reads them."""
    read, dtype = arguments(node), node.meta["val"].dtype
    given = [name for name in wanted if read[name] is not None]
    names = {name: found for name in given if (found := constant_name(read[name])) is not None}
    if len(names) < len(given):
        return "a factor or a bias is computed"
    if any(read[name].meta["val"].dtype != dtype for name in given):
        return "a bias has another dtype than the weights"
    return names


def low_rank_attention_step(node: fx.Node) -> LowRankAttentionStep | str:
    """The step of an attention, or why there is none.

    Args:
        node: A call of `jettison::low_rank_attention`.
    """
    read, value = arguments(node), node.meta["val"]
    if value.dtype not in COMPUTED:
        return f"kernels do not compute in {str(value.dtype).removeprefix('torch.')}"
    names = _constants(node, tuple(f"{name}_{part}" for name in _THREE for part in ("rows", "bias")))
    if isinstance(names, str):
        return names
    of = {name: read[name].meta["val"] for name in _GIVEN if read[name] is not None}
    angles = {of[name].dtype for name in ("cos", "sin") if name in of} or {torch.float32}
    if len(angles) > 1 or not angles <= set(COMPUTED):
        return "cosines and sines are not in one dtype that kernels compute in"
    if any(of[name].dtype != torch.int64 for name in ("query_positions", "key_positions") if name in of):
        return "positions are not int64"
    rows = [read[f"{name}_rows"].meta["val"].shape for name in _THREE]
    heads, kv_heads = read["heads"], read["kv_heads"]
    dim, value_dim = int(rows[0][0]) // heads, int(rows[2][0]) // kv_heads
    if max(dim, value_dim) > _MOST_CHANNELS:
        return f"heads of {max(dim, value_dim)} channels do not fit a tile: at most {_MOST_CHANNELS}"
    masks = Masks(read["causal"], read["window"], *(name in of for name in _GIVEN[2:5]))
    query_rank, key_rank, value_rank = (int(each[1]) for each in rows)
    query_bias, key_bias, value_bias = (f"{name}_bias" in names for name in _THREE)
    kernel = LowRankAttention(
        heads, kv_heads, dim, value_dim, (query_rank, key_rank, value_rank), (query_bias, key_bias, value_bias),
        2 * int(of["cos"].shape[-1]) if "cos" in of else 0, read["interleaved"], read["scale"], read["softcap"],
        "sinks" in of, masks, value.dtype, angles.pop(),
    )  # fmt: skip
    inputs = [*(read[name] for name in _THREE), *(read[name] for name in _GIVEN if read[name] is not None)]
    why = "heads are made on chip, those of keys and values anew for each tile and head of queries"
    return LowRankAttentionStep(
        [node], inputs, [node], why, kernel, tuple(names[f"{name}_rows"] for name in _THREE),
        tuple(names[f"{name}_bias"] for name in _THREE if f"{name}_bias" in names),
    )  # fmt: skip


def _why(kernel: LowRankMlp) -> str:
    why = f"up to {FEW_TOKENS} tokens are a chain of products; the neurons of more stay on chip"
    if kernel.copies > 1:
        why += f"; {kernel.width} sums of a token are cut in {kernel.copies}, and its neurons are made for each"
    return why


def _summing(
    names: dict[str, str], sizes: dict[str, list[int]], dtype: torch.dtype, *, has_residual: bool
) -> tuple[Product | None, Product]:
    """The last product, if the second linear is factored, and the one that reads the neurons."""
    bias = tuple(names[name] for name in ("bias",) if name in names)
    end = Epilogue(bool(bias), has_residual=has_residual)
    width, neurons = sizes["columns"]
    if "rows" not in names:
        return None, Product((names["columns"],), bias, neurons, width, dtype, end)
    last = Product((names["rows"],), bias, width, sizes["rows"][0], dtype, end)
    return last, Product((names["columns"],), (), neurons, width, dtype)


def _making(node: fx.Node, names: dict[str, str], sizes: dict[str, list[int]]) -> tuple[Product, ...]:
    """What makes the neurons of few tokens: one product where gate and up read the same."""
    read, dtype = arguments(node), node.meta["val"].dtype
    (neurons, up_rank), activation = sizes["up_rows"], read["activation"]
    biases = {half: tuple(names[name] for name in (f"{half}_bias",) if name in names) for half in ("gate", "up")}
    up_bias, gate_bias = biases["up"], biases["gate"]
    if "gate_rows" not in names:
        return (Product((names["up_rows"],), up_bias, up_rank, neurons, dtype, Epilogue(bool(up_bias), activation)),)
    if read["gate"] is read["up"] and bool(up_bias) == bool(gate_bias):
        both = Epilogue(bool(up_bias), activation, is_gated=True)
        weights = (names["gate_rows"], names["up_rows"])
        return (Product(weights, (*gate_bias, *up_bias), up_rank, neurons, dtype, both),)
    multiplied = Epilogue(bool(gate_bias), activation, has_factor=True)
    return (
        Product((names["up_rows"],), up_bias, up_rank, neurons, dtype, Epilogue(bool(up_bias))),
        Product((names["gate_rows"],), gate_bias, sizes["gate_rows"][1], neurons, dtype, multiplied),
    )
