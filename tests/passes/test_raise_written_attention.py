from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jettison.ir.capture import capture
from jettison.ir.compare import assert_close, run_program
from jettison.ir.program import Program
from jettison.passes.pipeline import canonicalize
from jettison.passes.raise_attention import RaiseAttention
from jettison.passes.raise_rotary_embedding import RaiseRotaryEmbedding
from jettison.passes.raise_written_attention import RaiseWrittenAttention
from tests.helpers import (
    Embedded,
    assert_declines,
    assert_golden,
    assert_idempotent,
    assert_same_numbers,
    export_body,
    export_tiny,
    run_pass,
)

WIDTH, HEADS, HEAD_DIM = 16, 4, 4
LOWEST = torch.finfo(torch.float32).min
NOT_KNOWN = "the mask is not causal, sliding-window or padding: "
SHAPES = ((1, 1), (2, 7), (1, 33))
REASON = "bf16 rounds scores before and after the softmax in the written form, and only once in the operator"


class SelfAttention(nn.Module):
    """`attend(query, key, value)` over heads of normalised hidden states."""

    def __init__(self, attend: Callable[..., Tensor], key_heads: int = HEADS) -> None:
        super().__init__()
        self.attend = attend
        self.query = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.key = nn.Linear(WIDTH, key_heads * HEAD_DIM)
        self.value = nn.Linear(WIDTH, key_heads * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        # Normalised, so that scores differ enough for a wrong factor to show.
        x = F.layer_norm(x, (WIDTH,))
        heads = [layer(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        return self.out(self.attend(*heads).transpose(1, 2).flatten(2))


class Several(nn.Module):
    """Attention of several kinds over the same keys and values, each with its own queries: one capture for all."""

    def __init__(self, attends: Iterable[Callable[..., Tensor]], key_heads: int = HEADS) -> None:
        super().__init__()
        self.attends = [*attends]
        self.queries = nn.ModuleList(nn.Linear(WIDTH, HEADS * HEAD_DIM) for _ in self.attends)
        self.key = nn.Linear(WIDTH, key_heads * HEAD_DIM)
        self.value = nn.Linear(WIDTH, key_heads * HEAD_DIM)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = F.layer_norm(x, (WIDTH,))
        layers = (*self.queries, self.key, self.value)
        *queries, key, value = (layer(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for layer in layers)
        attended = (attend(query, key, value) for attend, query in zip(self.attends, queries, strict=True))
        return {f"layer{number}": each.transpose(1, 2).flatten(2) for number, each in enumerate(attended)}


def export_attention(
    *attends: Callable[..., Tensor], key_heads: int = HEADS, dtype: torch.dtype = torch.float32
) -> Program:
    """One layer of attention, or several side by side, in canonical form."""
    body = SelfAttention(attends[0], key_heads) if len(attends) == 1 else Several(attends, key_heads)
    program = export_tiny(Embedded(body, width=WIDTH), dtype=dtype)
    canonicalize(program)
    return program


def raised(program: Program) -> list[tuple[Any, ...]]:
    """Key heads and attributes `(scale, causal, window, softcap)` of every raised attention."""
    nodes = program.entries["forward"].graph.nodes
    calls = [node for node in nodes if node.target is torch.ops.jettison.attention.default]
    return [(node.args[1].meta["val"].shape[1], *node.args[7:]) for node in calls]


def hidden(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).triu(1)


def bias(length: int) -> Tensor:
    return torch.full((length, length), LOWEST).triu(1)


def written(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    scores = query @ key.transpose(-1, -2) / math.sqrt(HEAD_DIM) + bias(query.shape[2])
    return scores.softmax(-1) @ value


def scale_query_before(query, key, value):
    scores = (query * 0.5) @ key.transpose(2, 3)
    return scores.masked_fill(hidden(query.shape[2]), -math.inf).softmax(-1) @ value


def scale_both(query, key, value):
    scores = (query / 2**0.5) @ (key.transpose(2, 3) * 0.5**0.5)
    return torch.where(~hidden(query.shape[2]), scores, LOWEST).softmax(-1) @ value


def scale_by_a_tensor(query, key, value):
    scores = query @ key.mT / torch.full([], 2.0)
    return torch.where(hidden(query.shape[2]), torch.full_like(scores, -1e9), scores).softmax(-1) @ value


def scale_after_the_mask(query, key, value):
    """CodeGen."""
    return ((bias(query.shape[2]) + query @ key.mT) / 2).softmax(-1) @ value


def constant_fill(query, key, value):
    """GPT-Neo."""
    fill = torch.tensor(LOWEST)
    return torch.where(~hidden(query.shape[2]), query @ key.mT * 0.5, fill).softmax(-1) @ value


def multiplied_and_added(query, key, value):
    """OpenAI GPT."""
    keep = (~hidden(query.shape[2])).float()
    return (query @ key.mT / 2 * keep + -1e4 * (1 - keep)).softmax(-1) @ value


def subtracted(query, key, value):
    return (query @ key.mT * 0.5 - 1e6 * hidden(query.shape[2]).float()).softmax(-1) @ value


def two_masks(query, key, value):
    length = query.shape[2]
    far = torch.arange(length)[None] <= torch.arange(length)[:, None] - 6
    return (query @ key.mT * 0.5 + bias(length)).masked_fill(far, LOWEST).softmax(-1) @ value


def clamped(query, key, value):
    """XGLM."""
    scores = query @ key.mT * 0.5 + bias(query.shape[2])
    return torch.max(scores, torch.tensor(LOWEST)).clamp_min(-1e30).softmax(-1) @ value


def transposed_key(query, key, value):
    """Keys laid out as columns from the start, as minGPT and OpenAI GPT do."""
    columns = key.transpose(1, 2).permute(0, 2, 3, 1)
    return (query @ columns * 0.5 + bias(query.shape[2])).softmax(-1) @ value


def float32_softmax(query, key, value):
    scores = query @ key.mT * 0.5 + bias(query.shape[2])
    return scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value


def merged(operand: Tensor) -> Tensor:
    return operand.reshape(-1, operand.shape[2], operand.shape[3])


def heads_merged(query, key, value):
    """XGLM: the mask is added with heads apart."""
    scores = torch.bmm(merged(query), merged(key).transpose(1, 2)) * 0.5
    scores = scores.view(-1, HEADS, *scores.shape[1:]) + bias(query.shape[2])
    weights = scores.flatten(0, 1).softmax(-1)
    return torch.bmm(weights, merged(value)).view(query.shape)


def mask_on_merged_heads(query, key, value):
    length = query.shape[2]
    scores = torch.bmm(merged(query), key.transpose(2, 3).flatten(0, 1)) * 0.5
    scores = scores + bias(length).expand(query.shape[0] * HEADS, -1, -1)
    return torch.bmm(scores.softmax(-1), merged(value)).view(query.shape)


def baddbmm_into_zeros(query, key, value):
    """GPT-NeoX Japanese."""
    length = query.shape[2]
    into = torch.zeros(query.shape[0] * HEADS, length, length)
    scores = torch.baddbmm(into, merged(query), merged(key).transpose(1, 2), beta=1.0, alpha=0.5)
    return (scores.view(-1, HEADS, length, length) + bias(length)).softmax(-1) @ value


def baddbmm_into_the_mask(query, key, value):
    length = query.shape[2]
    scores = torch.baddbmm(bias(length)[None], merged(query), merged(key).transpose(1, 2), beta=0.5, alpha=0.5)
    return torch.bmm(scores.softmax(-1), merged(value)).view(query.shape)


SPELLINGS = (
    written, scale_query_before, scale_both, scale_by_a_tensor, scale_after_the_mask, constant_fill,
    multiplied_and_added, subtracted, clamped, transposed_key, float32_softmax, heads_merged, mask_on_merged_heads,
    baddbmm_into_zeros, baddbmm_into_the_mask,
)  # fmt: skip


def softcapped(query, key, value):
    """Gemma 2."""
    scores = torch.tanh(query @ key.mT * 0.5 / 3.0) * 3.0
    return (scores + bias(query.shape[2])).softmax(-1) @ value


def repeat_kv(x: Tensor, count: int) -> Tensor:
    """As in transformers."""
    batch, heads, length, width = x.shape
    return x[:, :, None].expand(batch, heads, count, length, width).reshape(batch, heads * count, length, width)


def grouped(query, key, value):
    return written(query, repeat_kv(key, 2), repeat_kv(value, 2))


def test_golden_written(snapshot):
    before = export_attention(written)
    after, record = assert_golden(snapshot, RaiseWrittenAttention(), before, "written")
    assert record.rewrites == 1
    assert_same_numbers(before, after)


def test_golden_softcap(snapshot):
    before = export_attention(softcapped)
    after, record = assert_golden(snapshot, RaiseWrittenAttention(), before, "softcap")
    assert record.rewrites == 1
    assert raised(after) == [(4, 0.5, True, 0, 3.0)]
    assert_same_numbers(before, after)


def test_golden_grouped_heads(snapshot):
    before = export_attention(grouped, key_heads=2)
    after, record = assert_golden(snapshot, RaiseWrittenAttention(), before, "grouped_heads")
    assert record.rewrites == 2
    assert raised(after) == [(2, 0.5, True, 0, 0.0)]
    assert_same_numbers(before, after)


def test_raises_every_spelling():
    before = export_attention(*SPELLINGS)
    after, record = run_pass(RaiseWrittenAttention(), before)
    assert record.misses == []
    found = {attend.__name__: attributes for attend, attributes in zip(SPELLINGS, raised(after), strict=True)}
    assert found == {attend.__name__: (4, pytest.approx(0.5), True, 0, 0.0) for attend in SPELLINGS}
    assert "s1,s1]" not in str(after)
    assert_same_numbers(before, after, SHAPES)


def test_masks_add_up():
    before = export_attention(two_masks)
    after, record = run_pass(RaiseWrittenAttention(), before)
    assert record.misses == []
    assert raised(after) == [(4, 0.5, True, 6, 0.0)]
    assert_same_numbers(before, after, SHAPES)


def test_attends_to_everything_without_a_mask():
    before = export_attention(lambda query, key, value: (query @ key.mT).softmax(-1) @ value)
    after, _ = run_pass(RaiseWrittenAttention(), before)
    assert raised(after) == [(4, 1.0, False, 0, 0.0)]
    assert_same_numbers(before, after, SHAPES)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_factor_behind_the_softcap_belongs_to_it(sign):
    def attend(query, key, value):
        capped = torch.tanh(sign * (query @ key.mT)) * (sign * 0.7) * 2
        return (capped + bias(query.shape[2])).softmax(-1) @ value

    before = export_attention(attend)
    after, record = run_pass(RaiseWrittenAttention(), before)
    assert record.misses == []
    assert raised(after) == [(4, 1.4, True, 0, 1.4)]
    assert_same_numbers(before, after, SHAPES)


def test_computes_bf16_with_an_upcast_as_bf16():
    """GPT-J computes scores in fp32 whatever the model's dtype."""

    def attend(query, key, value):
        scores = query.float() @ key.float().mT * 0.5 + bias(query.shape[2])
        return scores.softmax(-1).to(value.dtype) @ value

    before = export_attention(attend, dtype=torch.bfloat16)
    after, record = run_pass(RaiseWrittenAttention(), before)
    assert record.misses == []
    assert "jettison.attention" in str(after)
    assert "f32[s0,4" not in str(after)
    assert_same_numbers(before, after, SHAPES, tolerance=3e-2, reason=REASON)


def rotated(x: Tensor) -> Tensor:
    angle = torch.arange(x.shape[2])[:, None] * torch.tensor([1.0, 0.1])
    cos, sin = torch.cat([angle, angle], -1).cos(), torch.cat([angle, angle], -1).sin()
    first, second = x[..., :2], x[..., 2:]
    return x * cos + torch.cat([-second, first], -1) * sin


def repeated_before_rotary(query, key, value):
    """Falcon's new decoder: heads repeated before they are split off, then rotated."""
    key, value = (
        operand.transpose(1, 2)[:, :, :, None].expand(-1, -1, -1, 2, -1).flatten(2, 3).transpose(1, 2)
        for operand in (key, value)
    )
    return written(rotated(query), rotated(key), value)


def interleaved(query, key, value):
    return written(query, key.repeat_interleave(2, 1), value.repeat_interleave(2, dim=1))


def one_head_expanded(query, key, value):
    key, value = (operand[:, :1].expand(-1, HEADS, -1, -1) for operand in (key, value))
    return written(query, key, value)


def one_head_repeated(query, key, value):
    key, value = (operand[:, :1].repeat(1, HEADS, 1, 1) for operand in (key, value))
    return written(query, key, value)


def unsqueezed_and_repeated(query, key, value):
    key, value = (operand.unsqueeze(2).repeat(1, 1, 2, 1, 1).flatten(1, 2) for operand in (key, value))
    return written(query, key, value)


def library_attention(query, key, value):
    return F.scaled_dot_product_attention(query, repeat_kv(key, 2), repeat_kv(value, 2), is_causal=True)


GROUPED = {
    grouped: 2,
    repeated_before_rotary: 2,
    interleaved: 2,
    one_head_expanded: 1,
    one_head_repeated: 1,
    unsqueezed_and_repeated: 2,
    library_attention: 2,
}


@pytest.fixture(scope="module")
def with_repeated_heads() -> Program:
    return export_attention(*GROUPED, key_heads=2)


@pytest.mark.parametrize("before_attention", [[], [RaiseRotaryEmbedding()]], ids=["rotary_written", "rotary_raised"])
def test_hands_repeated_heads_over_once(with_repeated_heads, before_attention):
    before = with_repeated_heads
    first, *others = [*before_attention, RaiseAttention(), RaiseWrittenAttention()]
    after, record = run_pass(first, before, *others)
    assert record.misses == []
    assert ("jettison.rotary_embedding" in str(after)) == bool(before_attention)
    found = {attend.__name__: attributes for attend, attributes in zip(GROUPED, raised(after), strict=True)}
    assert found == {attend.__name__: (heads, 0.5, True, 0, 0.0) for attend, heads in GROUPED.items()}
    assert_same_numbers(before, after, SHAPES)


def test_runs_twice_like_once():
    assert_idempotent(RaiseWrittenAttention(), export_attention(grouped, key_heads=2))


def test_a_router_is_no_attention():
    def experts(self, x):
        weights = (x @ self.router).softmax(-1)
        return (weights[..., None] * torch.stack([x, -x], -2)).sum(-2)

    assert_declines(RaiseWrittenAttention(), export_body(experts, router=(8, 2)), reason=None)


def test_a_softmax_over_queries_is_no_attention():
    program = export_attention(lambda query, key, value: (query @ key.mT).softmax(2) @ value)
    assert_declines(RaiseWrittenAttention(), program, reason=None)


def scores_of(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda query, key, value: change(query @ key.mT).softmax(-1) @ value


def weights_of(change: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    return lambda query, key, value: change((query @ key.mT).softmax(-1)) @ value


def weights_of_einsum(query, key, value):
    return torch.einsum("bhst,bhtd->bhsd", (query @ key.mT).softmax(-1), value)


def scores_of_einsum(query, key, value):
    return torch.einsum("bhsd,bhtd->bhst", query, key).softmax(-1) @ value


def shared_weights(query, key, value):
    weights = (query @ key.mT).softmax(-1)
    return weights @ value + weights.sum(-1, keepdim=True)


def cast_and_shared_weights(query, key, value):
    weights = (query @ key.mT).softmax(-1).double()
    return (weights @ value.double() + weights.sum(-1, keepdim=True)).float()


def content_bias(query, key, value):
    return (query @ key.mT + (query * value).sum(-1, keepdim=True)).softmax(-1) @ value


def content_bias_in_baddbmm(query, key, value):
    into = merged((query * value).sum(-1, keepdim=True))
    scores = torch.baddbmm(into, merged(query), merged(key).transpose(1, 2))
    return torch.bmm(scores.softmax(-1), merged(value)).view(query.shape)


def mask_before_softcap(query, key, value):
    return torch.tanh(query @ key.mT + bias(query.shape[2])).softmax(-1) @ value


def heads_stay_merged(query, key, value):
    out = torch.bmm(torch.bmm(merged(query), merged(key).transpose(1, 2)).softmax(-1), merged(value))
    return (out * 2).view(query.shape)


def scaled_values(query, key, value):
    return (query @ key.mT).softmax(-1) @ (value * 2)


def transposed_queries(query, key, value):
    return (query.mT.mT.transpose(2, 3) @ key).softmax(-1) @ value.transpose(2, 3) @ query.transpose(2, 3)


def wider_result(query, key, value):
    return ((query @ key.mT).softmax(-1).double() @ value.double()).float()


def heads_from_the_mask(query, key, value):
    scores = query[:, :1] @ key[:, :1].mT + bias(query.shape[2]).expand(HEADS, -1, -1)
    return scores.softmax(-1) @ value[:, :1]


def alibi(query, key, value):
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
    distance = torch.arange(query.shape[2])[None] - torch.arange(query.shape[2])[:, None]
    return (query @ key.mT + slopes * distance + bias(query.shape[2])).softmax(-1) @ value


BETWEEN = "stands between the product of queries and keys and the softmax"
DECLINES = (
    (weights_of_einsum, "aten.einsum stands between the softmax and the values"),
    (scores_of_einsum, f"aten.einsum {BETWEEN}"),
    (scores_of(torch.relu), f"aten.relu {BETWEEN}"),
    (scores_of(lambda scores: scores.clamp_min(0)), f"aten.clamp_min {BETWEEN}"),
    (scores_of(lambda scores: scores * scores), f"aten.mul.Tensor {BETWEEN}"),
    (scores_of(lambda scores: scores * 0.0), f"aten.mul.Tensor {BETWEEN}"),
    (scores_of(lambda scores: 1 / scores), f"aten.reciprocal {BETWEEN}"),
    (scores_of(lambda scores: scores.tanh().tanh()), f"aten.tanh {BETWEEN}"),
    (scores_of(lambda scores: scores.transpose(2, 3).transpose(1, 2).transpose(1, 2)), f"aten.transpose.int {BETWEEN}"),
    (weights_of(lambda weights: weights * 2), "aten.mul.Tensor stands between the softmax and the values"),
    (weights_of(torch.nan_to_num), "aten.nan_to_num stands between the softmax and the values"),
    (shared_weights, "the attention weights are used elsewhere"),
    (cast_and_shared_weights, "the attention weights are used elsewhere"),
    (content_bias, "something computed from the tokens is added to the scores"),
    (content_bias_in_baddbmm, "baddbmm adds something computed from the tokens to the scores"),
    (mask_before_softcap, "the mask comes before the softcap"),
    (heads_stay_merged, "heads stay merged with the batch behind the product"),
    (scaled_values, "queries or values are transposed or scaled right before their product"),
    (heads_from_the_mask, "the result is not [B, H, S, D] for the queries' B, H and S"),
    (wider_result, "queries and the result have different dtypes"),
    (alibi, f"{NOT_KNOWN}it adds 0.5 to scores, a position bias such as ALiBi"),
    (
        scores_of(lambda scores: scores.masked_fill(hidden(scores.shape[-1]), -100.0)),
        "masked scores become -100, which does not hide them (needed: at most -9984)",
    ),
    (
        scores_of(lambda scores: torch.where(hidden(scores.shape[-1]), scores.mean(-1, keepdim=True), scores)),
        "masked scores become a tensor, which does not hide them (needed: at most -9984)",
    ),
    (
        scores_of(lambda scores: scores * (1 - 0.5 * hidden(scores.shape[-1]).float())),
        f"{NOT_KNOWN}it multiplies scores of visible keys",
    ),
)


def test_declines_and_says_why():
    program = export_attention(*(attend for attend, _ in DECLINES))
    after, record = run_pass(RaiseWrittenAttention(), program)
    assert record.rewrites == 0
    assert str(after) == str(program)
    assert [miss.reason for miss in record.misses] == [reason for _, reason in DECLINES]


def tiled(query, key, value):
    return F.scaled_dot_product_attention(query, key.repeat(1, 2, 1, 1), value.repeat(1, 2, 1, 1), is_causal=True)


def tiled_by_expansion(query, key, value):
    key, value = (x[:, None].expand(-1, 2, -1, -1, -1).flatten(1, 2) for x in (key, value))
    return F.scaled_dot_product_attention(query, key, value, is_causal=True)


def repeated_differently(query, key, value):
    value = value[:, :1].expand(-1, HEADS, -1, -1)
    return F.scaled_dot_product_attention(query, repeat_kv(key, 2), value, is_causal=True)


TILES = "heads are repeated in tiles: neighbouring query heads read different key heads"


def test_leaves_heads_repeated_in_another_way():
    before = export_attention(tiled, tiled_by_expansion, repeated_differently, key_heads=2)
    after, record = run_pass(RaiseAttention(), before)
    assert record.rewrites == 3
    again, record = run_pass(RaiseWrittenAttention(), after)
    assert str(again) == str(after)
    different = "key heads are repeated 2 times and value heads 4 times"
    assert [miss.reason for miss in record.misses] == [TILES, TILES, different]
    assert_same_numbers(before, after, SHAPES)


def test_raises_gpt_j():
    transformers = pytest.importorskip("transformers", reason="GPT-J comes from the package transformers")
    from jettison.ir.huggingface import source_from_model

    config = transformers.GPTJConfig(
        vocab_size=97, n_embd=32, n_layer=1, n_head=4, n_positions=128, rotary_dim=4, bos_token_id=1, eos_token_id=2,
        initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GPTJForCausalLM(config).eval()
    program = capture(source_from_model(model))
    canonicalize(program)
    after, record = run_pass(RaiseWrittenAttention(), program)
    assert (record.rewrites, record.misses) == (1, [])
    assert [attributes[2:] for attributes in raised(after)] == [(True, 0, 0.0)]
    assert "softmax" not in str(after)
    assert "bool[" not in str(after)
    for length in (1, 7, 33):
        ids = torch.arange(2 * length).reshape(2, length) % 97
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
        assert_close(run_program(after, ids)[0], expected)
