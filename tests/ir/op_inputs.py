"""Inputs of operators: numbers, attention in all its forms, and slots of a cache."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from jettison.ir.ops.attention import QUERY_ROWS
from tests.helpers import weight_values


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Values in [-2, 2)."""
    return (4 * weight_values(math.prod(shape), seed)).reshape(shape).to(dtype)


def qkv(batch: int, heads: int, kv_heads: int, steps: int, keys: int, dtype: torch.dtype = torch.float32, dim: int = 8):
    return {
        "query": numbers(batch, heads, steps, dim, seed=1, dtype=dtype),
        "key": numbers(batch, kv_heads, keys, dim, seed=2, dtype=dtype),
        "value": numbers(batch, kv_heads, keys, dim, seed=3, dtype=dtype),
    }


ATTENTION_DEFAULTS = {
    "query_positions": None, "key_positions": None, "key_valid": None, "sinks": None,
    "scale": 0.5, "causal": True, "window": 0, "softcap": 0.0,
}  # fmt: skip
SINKS = numbers(4, seed=9)
# A ring buffer that has wrapped, a half-empty one, and an empty one, for three rows.
SLOT_POSITIONS = torch.tensor([[8, 9, 4, 5, 6, 7], [0, 1, 2, -1, -1, -1], [-1] * 6])
QUERY_POSITIONS = torch.tensor([[8, 9], [2, 3], [0, 1]])
ATTENTION_CASES: dict[str, dict[str, Any]] = {
    "causal": qkv(2, 4, 4, 7, 7),
    "one_token": qkv(1, 4, 4, 1, 1),
    "grouped_heads": qkv(2, 4, 2, 7, 7),
    "one_kv_head": qkv(2, 4, 1, 7, 7),
    "both_directions": qkv(2, 4, 2, 5, 5) | {"causal": False},
    "window": qkv(2, 4, 2, 9, 9) | {"window": 3},
    "window_of_one": qkv(1, 4, 4, 5, 5) | {"window": 1},
    "window_in_both_directions": qkv(1, 4, 4, 6, 6) | {"window": 2, "causal": False},
    "softcap": qkv(2, 4, 2, 7, 7) | {"softcap": 0.7},
    "softcap_and_window": qkv(2, 4, 2, 7, 7) | {"softcap": 0.7, "window": 3},
    "sinks": qkv(2, 4, 2, 7, 7) | {"sinks": SINKS},
    "sinks_softcap_window": qkv(2, 4, 2, 7, 7) | {"sinks": SINKS, "softcap": 0.7, "window": 3},
    "key_valid": qkv(2, 4, 2, 5, 5) | {"key_valid": torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 1]])},
    "bool_key_valid": qkv(2, 4, 2, 5, 5)
    | {"key_valid": torch.tensor([[True] * 5, [False] * 4 + [True]]), "causal": False},
    "no_valid_key": qkv(2, 4, 2, 3, 3) | {"key_valid": torch.zeros(2, 3, dtype=torch.int64)},
    "no_valid_key_softcap": qkv(2, 4, 2, 3, 3) | {"key_valid": torch.zeros(2, 3, dtype=torch.int64), "softcap": 0.7},
    "no_valid_key_sinks": qkv(2, 4, 2, 3, 3) | {"key_valid": torch.zeros(2, 3, dtype=torch.int64), "sinks": SINKS},
    "slots": qkv(3, 4, 2, 2, 6) | {"query_positions": QUERY_POSITIONS, "key_positions": SLOT_POSITIONS},
    "slots_window": qkv(3, 4, 2, 2, 6)
    | {"query_positions": QUERY_POSITIONS, "key_positions": SLOT_POSITIONS, "window": 3},
    "slots_sinks_softcap": qkv(3, 4, 2, 2, 6)
    | {"query_positions": QUERY_POSITIONS, "key_positions": SLOT_POSITIONS, "sinks": SINKS, "softcap": 0.7},
    "shared_positions": qkv(3, 4, 2, 2, 6)
    | {"query_positions": torch.tensor([[4, 5]]), "key_positions": torch.tensor([[5, 0, 1, 2, 3, 4]])},
    "values_of_another_width": qkv(2, 4, 2, 5, 5) | {"value": numbers(2, 2, 5, 3, seed=3)},
    "more_rows_than_a_block": qkv(1, 2, 1, QUERY_ROWS + 89, QUERY_ROWS + 89, dim=4) | {"window": 40},
    "more_rows_softcap": qkv(1, 2, 1, QUERY_ROWS + 3, 20, dim=4)
    | {"softcap": 0.7, "query_positions": torch.arange(QUERY_ROWS + 3)[None] % 23},
    "bf16": qkv(2, 4, 2, 7, 7, torch.bfloat16),
    "f16_softcap": qkv(2, 4, 2, 7, 7, torch.float16) | {"softcap": 0.7, "sinks": SINKS.half()},
}


# Of those, what differs in shapes, dtypes or arguments.
DISTINCT_ATTENTIONS = ("causal", "one_token", "values_of_another_width", "sinks", "slots", "bf16")


def attention_args(case: str) -> tuple[Any, ...]:
    given = ATTENTION_CASES[case]
    return (
        given["query"],
        given["key"],
        given["value"],
        *({**ATTENTION_DEFAULTS, **given}[k] for k in ATTENTION_DEFAULTS),
    )


def joint_args(batch: int = 2, heads: int = 4, steps: int = 3, dim: int = 8, stored: int = 5) -> tuple[Any, ...]:
    q = numbers(batch, heads, steps, dim, seed=1)
    k, v = (numbers(batch, max(1, heads // 2), 9, dim, seed=index) for index in (2, 3))
    stored_k, stored_v = (numbers(batch, max(1, heads // 2), stored, dim, seed=index) for index in (4, 5))
    slots = torch.arange(batch)[:, None] + torch.arange(steps)[None]
    return q, stored_k, stored_v, torch.arange(batch) + min(stored, 1), k, v, slots, 0.5


SLOTS = {
    "in_order": [[0, 1, 2], [3, 4, 5]],
    "scattered": [[5, 0, 3], [2, 4, 1]],
    "some_dropped": [[0, -1, 2], [-1, -1, 5]],
    "all_dropped": [[-1, -1, -1], [-7, -1, -1]],
}
