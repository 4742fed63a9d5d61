"""Optimise a decoder that is just a torch module, without transformers.

python examples/02_plain_module.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jettison

VOCABULARY, WIDTH, HEADS, CONTEXT = 256, 64, 4, 128


class Block(nn.Module):
    """Pre-norm attention and a gated MLP."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH, eps=1e-6), nn.RMSNorm(WIDTH, eps=1e-6)
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(WIDTH, 2 * WIDTH, bias=False), nn.Linear(WIDTH, 2 * WIDTH, bias=False)
        self.down = nn.Linear(2 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, S, E]` to `[B, S, E]`."""
        h = self.norm1(x)
        heads = [f(h).unflatten(2, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value)]
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Decoder(nn.Module):
    """Bytes in, bytes out; positions are an input, so that a cached step knows where it is."""

    context = CONTEXT

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        """`[B, S] i64` twice to logits `[B, S, V]`."""
        x = self.tokens(input_ids) + self.positions(position_ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def main() -> None:
    """Capture, quantise, and compare the two targets."""
    torch.manual_seed(0)
    module = Decoder()
    prompt = list(b"jettison")
    for target in ("torch", "onnx"):
        model = jettison.optimize(module, passes=[jettison.QuantizeWeights(bits=8)], target=target)
        print(target, model.generate(prompt, max_new_tokens=8), f"{model.report.weight_bytes:,} bytes")


if __name__ == "__main__":
    main()
