"""Small decoders whose feed-forward layers are sparse: tokens and neurons are of a few kinds that fire together.

A token of kind `c` is large in the channels `c * WIDTH / KINDS` and following, and a neuron of kind `c` fires for those
alone. Weights come from integer arithmetic, see `set_weights`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettison.ir.capture import capture_module
from jettison.ir.compare import usual_inputs
from jettison.ir.program import Program, input_placeholders
from jettison.passes.pipeline import prepare
from tests.helpers import set_weights

WIDTH, KINDS, VOCAB, HEAD_DIM = 32, 8, 61, 16
CHANNELS = WIDTH // KINDS
ACTIVATIONS = {
    "relu": F.relu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sigmoid": torch.sigmoid,
}


class FeedForward(nn.Module):
    """Two linears and an activation; `gated` adds a third linear, `is_flat` a view of the tokens as rows."""

    def __init__(self, neurons: int, activation: str, *, gated: bool, bias: bool, is_flat: bool) -> None:
        super().__init__()
        self.activation, self.is_flat = ACTIVATIONS[activation], is_flat
        self.gate = nn.Linear(WIDTH, neurons, bias=False) if gated else None
        self.up, self.down = nn.Linear(WIDTH, neurons, bias=bias), nn.Linear(neurons, WIDTH, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]) if self.is_flat else x
        if self.gate is None:
            hidden = self.activation(self.up(rows))
        else:
            hidden = self.activation(self.gate(rows)) * self.up(rows)
        return self.down(hidden).reshape(x.shape)


class Block(nn.Module):
    """A feed-forward layer behind a norm, added to what it reads."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.norm2, self.mlp = nn.LayerNorm(WIDTH), mlp

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm2(x))


class AttentionBlock(Block):
    """The same with an attention, behind a norm, in front of it."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__(mlp)
        self.norm1 = nn.LayerNorm(WIDTH)
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        read = self.norm1(x)
        heads = [linear(read).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for linear in (self.q, self.k, self.v)]
        out = torch.ops.jettison.attention(*heads, None, None, None, None, 0.25, True, 0, 0.0)
        return super().forward(x + out.transpose(1, 2).flatten(2))


class Decoder(nn.Module):
    """Blocks over tokens and their positions."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        x = self.embed(input_ids) + self.positions(position_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def decoder(
    activation: str = "relu", *, layers: int = 1, neurons: int = 64, gated: bool = False, bias: bool = True,
    is_flat: bool = False, in_order: bool = True,
) -> nn.Module:  # fmt: skip
    """The module, with its weights; `in_order` makes neighbours of neurons of a kind."""
    mlps = [FeedForward(neurons, activation, gated=gated, bias=bias, is_flat=is_flat) for _ in range(layers)]
    return stacked(*map(AttentionBlock, mlps), in_order=in_order)


def stacked(*blocks: Block, in_order: bool = True) -> nn.Module:
    """A decoder of these blocks, with its weights."""
    return planted(set_weights(Decoder(*blocks)), in_order=in_order).eval()


@torch.no_grad()
def planted(model: Any, *, in_order: bool) -> Any:
    """Add the kinds to tokens and neurons."""
    model.embed.weight[torch.arange(VOCAB)] += _channels(torch.arange(VOCAB))
    for block in model.layers:
        neurons = torch.arange(block.mlp.down.weight.shape[1])
        # The channels of other kinds turn a neuron off.
        fires = 3 * _channels(neurons // (len(neurons) // KINDS) if in_order else neurons) - 1
        chooser = block.mlp.up if block.mlp.gate is None else block.mlp.gate
        chooser.weight += fires
    return model


def _channels(kinds: Tensor) -> Tensor:
    """`[N, WIDTH]`: ones in the channels of each kind."""
    return (torch.arange(WIDTH) // CHANNELS == kinds[:, None] % KINDS).float()


def token_ids(rows: int, length: int, seed: int = 0) -> Tensor:
    """`[rows, length] i64`."""
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def decoder_program(activation: str = "relu", *, kind: str | None = None, tokens: int = 128, **options: Any) -> Program:
    """The same as a prepared program with tokens to calibrate on; options are those of `decoder`."""
    return calibrated(decoder(activation, **options), kind=kind, tokens=tokens)


def calibrated(model: nn.Module, *, kind: str | None = None, tokens: int = 128) -> Program:
    """Capture a module, with tokens to calibrate on."""
    program = capture_module(model, context=64, dtype=torch.float32, kind=kind)
    prepare(program)
    batches = token_ids(tokens // 32, 32, seed=7).split(2)
    wanted = input_placeholders(program.entries["forward"])
    program.calibration = lambda: [{name: usual_inputs(batch)[name] for name in wanted} for batch in batches]
    return program
