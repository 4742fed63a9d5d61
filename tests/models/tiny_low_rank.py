"""Small models whose linears are factored, two linears in a row, in all the ways in which they meet."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from jettison.ir.program import Program
from jettison.passes.pipeline import prepare
from tests.helpers import export_tiny
from tests.models.tiny_feed_forward import ACTIVATIONS

WIDTH, NEURONS, HEAD_DIM = 16, 40, 8


def linear(columns: int, rows: int, rank: int | None, *, bias: bool) -> nn.Module:
    """Of a rank; whole for None."""
    if rank is None:
        return nn.Linear(columns, rows, bias=bias)
    return nn.Sequential(nn.Linear(columns, rank, bias=False), nn.Linear(rank, rows, bias=bias))


class Mlp(nn.Module):
    """A feed-forward layer.

    Args:
        activation: A key of `ACTIVATIONS`.
        gated: Whether there is a gate.
        bias: Whether all linears have one.
        up: Rank of the first linear and of the gate; None leaves them whole.
        down: Rank of the second linear.
        shared: Whether gate and up have one first factor.
        is_flat: Whether it reads tokens as rows.
    """

    def __init__(
        self, activation: str = "gelu", *, gated: bool = False, bias: bool = True, up: int | None = 5,
        down: int | None = 3, shared: bool = False, is_flat: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.activation, self.is_flat = ACTIVATIONS[activation], is_flat
        self.up, self.down = linear(WIDTH, NEURONS, up, bias=bias), linear(NEURONS, WIDTH, down, bias=bias)
        self.gate = linear(WIDTH, NEURONS, up, bias=bias) if gated else None
        if shared and isinstance(self.gate, nn.Sequential):
            self.gate[0] = self.up[0]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]) if self.is_flat else x
        hidden = self.up(rows)
        hidden = self.activation(hidden) if self.gate is None else self.activation(self.gate(rows)) * hidden
        return x + self.down(hidden).reshape(x.shape)


class Attention(nn.Module):
    """Self-attention; options of `jettison.attention` are those of the module.

    Args:
        heads: H.
        kv_heads: Hkv.
        ranks: Of queries, keys and values; None leaves one whole.
        bias: Whether all linears have one.
        shared: Whether the three have one first factor.
        rotated: Channels of a head that are rotated; 0 for none.
        interleaved: Layout of the rotation.
        scale: Factor on the scores.
        causal: Whether later tokens are hidden.
        window: Positions seen back.
        softcap: Bound of the scores.
        sinks: Whether each head has one.
        drops: Whether keys of token 5 are hidden.
    """

    def __init__(
        self, *, heads: int = 4, kv_heads: int = 4, ranks: tuple[int | None, ...] = (5, 3, 4), bias: bool = True,
        shared: bool = False, rotated: int = 0, interleaved: bool = False, scale: float = 0.4, causal: bool = False,
        window: int = 0, softcap: float = 0.0, sinks: bool = False, drops: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        counts = (heads, kv_heads, kv_heads)
        self.qkv = nn.ModuleList(
            linear(WIDTH, count * HEAD_DIM, rank, bias=bias) for count, rank in zip(counts, ranks, strict=True)
        )
        if shared:
            for each in self.qkv:
                each[0] = self.qkv[0][0]  # type: ignore[index]
        self.out = nn.Linear(heads * HEAD_DIM, WIDTH)
        self.sinks = nn.Parameter(torch.empty(heads)) if sinks else None
        self.rotated, self.interleaved, self.drops = rotated, interleaved, drops
        self.options = (scale, causal, window, softcap)

    def forward(self, x: Tensor, input_ids: Tensor) -> Tensor:
        heads = [each(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for each in self.qkv]
        if self.rotated:
            angles = torch.arange(x.shape[1])[None, :, None] * torch.arange(1, self.rotated // 2 + 1) * 0.3
            turn = (angles.cos(), angles.sin(), self.interleaved)
            heads[:2] = [torch.ops.jettison.rotary_embedding(each, *turn) for each in heads[:2]]
        valid = (input_ids != 5).long() if self.drops else None
        out = torch.ops.jettison.attention(*heads, None, None, valid, self.sinks, *self.options)
        return x + self.out(out.transpose(1, 2).flatten(2))


class Layers(nn.Module):
    """Layers over tokens."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(61, WIDTH), nn.ModuleList(layers)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x, input_ids) if isinstance(layer, Attention) else layer(x)
        return x


class Decoder(nn.Module):
    """Causal attention over shared key heads and a feed-forward layer, twice, in front of a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, WIDTH)
        options: dict[str, Any] = {"causal": True, "kv_heads": 2, "bias": False}
        self.layers = nn.ModuleList([Attention(**options), Mlp("silu", gated=True), Attention(**options), Mlp()])
        self.head = nn.Linear(WIDTH, 61, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) * (1 + position_ids[:, :, None])
        for layer in self.layers:
            x = layer(x, input_ids) if isinstance(layer, Attention) else layer(x)
        return self.head(x)


@torch.no_grad()
def factored(model: nn.Module, rank: int) -> nn.Module:
    """A model whose linears, but the head, are the best of their rank."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and name != "lm_head":
                pair = linear(child.in_features, child.out_features, rank, bias=child.bias is not None)
                left, values, right = torch.linalg.svd(child.weight.double(), full_matrices=False)
                root = values[:rank].sqrt()
                pair[0].weight.copy_(root[:, None] * right[:rank])  # type: ignore[index]
                pair[1].weight.copy_(left[:, :rank] * root)  # type: ignore[index]
                if child.bias is not None:
                    pair[1].bias.copy_(child.bias)  # type: ignore[index]
                setattr(parent, name, pair)
    return model.eval()


def encoder(*layers: nn.Module, dtype: torch.dtype = torch.float32) -> Program:
    """A prepared program of these layers."""
    program = export_tiny(Layers(*layers), kind="encoder", dtype=dtype)
    prepare(program)
    return program


MLPS: dict[str, dict[str, Any]] = {
    "gelu": {},
    "relu": {"activation": "relu", "bias": False},
    "sigmoid": {"activation": "sigmoid", "up": 1, "down": 1},
    "silu_gated": {"activation": "silu", "gated": True, "bias": False, "is_flat": True},
    "gelu_tanh_gated": {"activation": "gelu_tanh", "gated": True, "shared": True},
    "dense_down": {"down": None},
    "dense_up": {"up": None, "gated": True},
    "full_rank": {"up": 16, "down": 16},
}  # fmt: skip
ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "shared": {"shared": True, "ranks": (4, 4, 4), "bias": False},
    "padded": {"drops": True},
    "causal_gqa_rotated": {"causal": True, "kv_heads": 2, "rotated": 8, "bias": False},
    "partly_rotated": {"rotated": 4, "interleaved": True, "ranks": (1, 1, 1)},
    "window_softcap_sinks": {"window": 3, "causal": True, "softcap": 2.0, "sinks": True, "kv_heads": 1},
    "dense_query": {"ranks": (None, 3, 3), "drops": True},
    "padded_sinks": {"drops": True, "sinks": True},
}  # fmt: skip
