"""Feed-forward layers in which something stands in the way of reading them by groups of neurons."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.tiny_feed_forward import WIDTH

NEURONS = 64


class Layer(nn.Module):
    """Linears to read, without a norm or an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, NEURONS)
        self.up, self.down = nn.Linear(WIDTH, NEURONS), nn.Linear(NEURONS, WIDTH)


class Shared(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x))) + self.up(x + 1).sum(-1, keepdim=True)


class Computed(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(F.relu(self.up(x)), self.down.weight + 0 * x.sum())


class ComputedBias(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(F.linear(x, self.up.weight, self.up.bias + 0 * x.sum())))


class Watched(Layer):
    def forward(self, x: Tensor) -> Tensor:
        hidden = F.relu(self.up(x))
        return x + self.down(hidden) + hidden.sum(-1, keepdim=True)


class WatchedGate(Layer):
    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate(x)
        return x + self.down(F.silu(gate) * self.up(x)) + gate.sum(-1, keepdim=True)


class BiasedGate(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Unlike(Layer):
    """Two linears of which one reads something else, and linears without an activation."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(F.silu(F.linear(x, self.gate.weight)) * self.up(x + 1))
        return x + F.linear(F.linear(x, self.up.weight + 1), self.down.weight + 1)


class Plain(Layer):
    """As it should be, but without an attention in front of it."""

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(x)))
