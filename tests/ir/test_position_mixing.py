"""Whether tokens meet outside attention, found by running the graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettison.ir.position_mixing import position_mixer
from tests.helpers import export_tiny

WIDTH = 16


def shifted(x: Tensor, _: nn.Conv1d) -> Tensor:
    """Half of each token comes from the one before it, as in RWKV."""
    before = F.pad(x, (0, 0, 1, 0))[:, :-1]
    return torch.cat([before[..., : WIDTH // 2], x[..., WIDTH // 2 :]], -1)


def convolved(x: Tensor, convolution: nn.Conv1d) -> Tensor:
    padded = F.pad(x.transpose(1, 2), (2, 0))
    return x + convolution(padded).transpose(1, 2)


def averaged(x: Tensor, _: nn.Conv1d) -> Tensor:
    return x + x.cumsum(1) / torch.arange(1, x.shape[1] + 1)[:, None]


def written_out(x: Tensor, _: nn.Conv1d) -> Tensor:
    """An attention that no pass has recognised."""
    mask = torch.full((x.shape[1], x.shape[1]), float("-inf")).triu(1)
    return x + torch.softmax(x @ x.transpose(1, 2) + mask, -1) @ x


def alone(x: Tensor, _: nn.Conv1d) -> Tensor:
    return x + F.gelu(x)


def attending(x: Tensor, _: nn.Conv1d) -> Tensor:
    heads = x.view(*x.shape[:2], 2, WIDTH // 2).transpose(1, 2)
    out = torch.ops.jettison.attention(heads, heads, heads, None, None, None, None, 1.0, True, 0, 0.0)
    return x + out.transpose(1, 2).reshape(x.shape)


def choosing(x: Tensor, _: nn.Conv1d) -> Tensor:
    """A choice among values that are equal but for noise; rounding is such noise, and differs between rows."""
    noisy = 1.0 + 1e-6 * x.transpose(0, 1).cumsum(0)
    return x.scatter(-1, noisy.transpose(0, 1).topk(4, -1).indices, 0.0)


def rounded(dtype: torch.dtype) -> Callable[[Tensor, nn.Conv1d], Tensor]:
    """A hundredth of an earlier token, which may be rounding where values have been in bf16."""

    def mix(x: Tensor, _: nn.Conv1d) -> Tensor:
        by_position = x.to(dtype).transpose(0, 1)
        return (by_position + 0.01 * by_position.cumsum(0)).transpose(0, 1).to(torch.float32)

    return mix


class Mixing(nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.embed = nn.Embedding(61, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.convolution = nn.Conv1d(WIDTH, WIDTH, 3)
        self.head = nn.Linear(WIDTH, 61)
        self.mix = mix

    def forward(self, input_ids, position_ids):
        x = self.first(self.embed(input_ids)) + position_ids[..., None]
        return self.head(torch.tanh(self.mix(x, self.convolution)))


@pytest.mark.parametrize("mix", [shifted, convolved, averaged, written_out])
def test_the_first_value_that_holds_another_token_is_named(mix):
    program = export_tiny(Mixing(mix))
    node = position_mixer(program)
    nodes = list(program.entries["forward"].graph.nodes)
    first = next(number for number, each in enumerate(nodes) if each.meta.get("constant") == "first.weight")
    tanh = next(number for number, each in enumerate(nodes) if each.target is torch.ops.aten.tanh.default)
    assert first < nodes.index(node) < tanh


@pytest.mark.parametrize("mix", [alone, attending, choosing])
def test_a_model_that_only_attends_has_no_mixer(mix):
    program = export_tiny(Mixing(mix))
    before = [node.target for node in program.entries["forward"].graph.nodes]
    assert position_mixer(program) is None
    assert [node.target for node in program.entries["forward"].graph.nodes] == before


@pytest.mark.parametrize(("dtype", "is_seen"), [(torch.float32, True), (torch.bfloat16, False)])
def test_differences_of_the_size_of_rounding_are_none(dtype, is_seen):
    node = position_mixer(export_tiny(Mixing(rounded(dtype))))
    assert (node is not None) == is_seen


def test_equal_rows_at_either_end_of_the_vocabulary_hide_nothing():
    model = Mixing(shifted)
    with torch.no_grad():
        model.embed.weight[:3] = 0
        model.embed.weight[-3:] = 0
    assert position_mixer(export_tiny(model)) is not None
