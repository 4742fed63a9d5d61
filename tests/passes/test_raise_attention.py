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
from jettison.ir.errors import CaptureError
from jettison.ir.program import Program, input_placeholders
from jettison.passes import raise_attention
from jettison.passes.pipeline import canonicalize
from jettison.passes.raise_attention import RaiseAttention
from jettison.passes.raise_written_attention import RaiseWrittenAttention
from tests.helpers import (
    EmbeddedWithPositions,
    assert_declines,
    assert_golden,
    assert_idempotent,
    assert_same_numbers,
    export_tiny,
    run_pass,
)

WIDTH, HEADS, HEAD_DIM = 16, 4, 4
LOWEST = torch.finfo(torch.float32).min
NOT_KNOWN = "the mask is not causal, sliding-window or padding: "
SHAPES = ((1, 1), (2, 7), (1, 33), (2, 64))


class SelfAttention(nn.Module):
    """`attend(query, key, value, positions)` over heads; positions are None where the model has no such input."""

    def __init__(self, attend: Callable[..., Tensor], key_heads: int = HEADS, **buffers: Tensor) -> None:
        super().__init__()
        self.attend = attend
        self.query = nn.Linear(WIDTH, HEADS * HEAD_DIM)
        self.key = nn.Linear(WIDTH, key_heads * HEAD_DIM)
        self.value = nn.Linear(WIDTH, key_heads * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor, positions: Tensor | None = None) -> Tensor:
        # Normalised, so that scores differ enough for a wrong factor to show.
        x = F.layer_norm(x, (WIDTH,))
        heads = [layer(x).unflatten(-1, (-1, HEAD_DIM)).transpose(1, 2) for layer in (self.query, self.key, self.value)]
        given = dict(self.named_buffers())
        return self.out(self.attend(*heads, positions, **given).transpose(1, 2).flatten(2))


class Padded(nn.Module):
    """A model that is told which tokens are real; `attend(query, key, value, attention_mask)`."""

    def __init__(self, attend: Callable[..., Tensor], layers: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, WIDTH)
        self.layers = nn.ModuleList(SelfAttention(attend) for _ in range(layers))

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x, attention_mask)
        return x


def export_attention(
    attend: Callable[..., Tensor], context: int = 64, key_heads: int = HEADS, **buffers: Tensor
) -> Program:
    """One layer of attention in canonical form."""
    body = SelfAttention(attend, key_heads, **buffers)
    program = export_tiny(EmbeddedWithPositions(body, width=WIDTH), context=context)
    canonicalize(program)
    return program


def export_padded(attend: Callable[..., Tensor], layers: int = 1) -> Program:
    program = export_tiny(Padded(attend, layers))
    canonicalize(program)
    return program


def masked(mask: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Attention under `mask(length, positions)`."""

    def attend(query: Tensor, key: Tensor, value: Tensor, positions: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, mask(query.shape[2], positions))

    return attend


def raised(program: Program) -> list[tuple[Any, ...]]:
    """Attributes `(scale, causal, window, softcap)` of every raised attention."""
    nodes = program.entries["forward"].graph.nodes
    return [node.args[7:] for node in nodes if node.target is torch.ops.jettison.attention.default]


def causal(length: int, positions: Tensor) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def causal_by_position(length: int, positions: Tensor) -> Tensor:
    return (positions[:, None, :] <= positions[:, :, None])[:, None]


def causal_added(length: int, positions: Tensor) -> Tensor:
    return torch.full((length, length), -math.inf).triu(1)


def causal_lowest(length: int, positions: Tensor) -> Tensor:
    hidden = torch.arange(length)[None] > torch.arange(length)[:, None]
    return torch.zeros(length, length).masked_fill(hidden, LOWEST)[None, None].expand(positions.shape[0], 1, -1, -1)


def packed_sequences(length: int, positions: Tensor) -> Tensor:
    """As transformers builds it: a jump in the positions begins another sequence."""
    starts = torch.diff(positions, prepend=positions[:, :1] - 1) != 1
    segment = starts.cumsum(-1)
    return (segment[:, :, None] == segment[:, None, :])[:, None] & causal_by_position(length, positions)


def window(size: int) -> Callable[..., Tensor]:
    def mask(length: int, positions: Tensor) -> Tensor:
        distance = torch.arange(length)[:, None] - torch.arange(length)[None]
        return (distance >= 0) & (distance < size)

    return mask


def everything(length: int, positions: Tensor) -> Tensor:
    return torch.zeros(length, length)


MASKS = {
    "bool": (causal, True, 0),
    "positions": (causal_by_position, True, 0),
    "minus_infinity": (causal_added, True, 0),
    "lowest": (causal_lowest, True, 0),
    "packed": (packed_sequences, True, 0),
    "window": (window(5), True, 5),
    "window_of_one": (window(1), True, 1),
    "everything": (everything, False, 0),
}


def test_golden_causal(snapshot):
    before = export_attention(masked(causal_lowest))
    after, record = assert_golden(snapshot, RaiseAttention(), before, "causal")
    assert record.rewrites == 1
    assert_same_numbers(before, after, SHAPES)


def test_golden_is_causal(snapshot):
    def attend(query, key, value, positions):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.3)

    before = export_attention(attend)
    after, record = assert_golden(snapshot, RaiseAttention(), before, "is_causal")
    assert record.rewrites == 1
    assert raised(after) == [(0.3, True, 0, 0.0)]
    assert_same_numbers(before, after, SHAPES)


def padding_attention(query, key, value, attention_mask):
    bias = (1.0 - attention_mask[:, None, None, :].float()) * -10000.0
    return F.scaled_dot_product_attention(query, key, value, bias)


def test_golden_padding(snapshot):
    before = export_padded(padding_attention)
    after, record = assert_golden(snapshot, RaiseAttention(), before, "padding")
    assert record.rewrites == 1
    assert_same_numbers(before, after, SHAPES)


class Several(nn.Module):
    """Layers of attention side by side, each with an output of its own: one capture for many cases."""

    def __init__(self, attends: Iterable[Callable[..., Tensor]]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SelfAttention(attend) for attend in attends)

    def forward(self, x: Tensor, positions: Tensor) -> dict[str, Tensor]:
        return {f"layer{number}": layer(x, positions) for number, layer in enumerate(self.layers)}


def export_several(attends: Iterable[Callable[..., Tensor]]) -> Program:
    program = export_tiny(EmbeddedWithPositions(Several(attends), width=WIDTH))
    canonicalize(program)
    return program


def test_recognises_a_mask_by_what_it_shows():
    before = export_several(masked(mask) for mask, _, _ in MASKS.values())
    after, record = run_pass(RaiseAttention(), before)
    assert record.misses == []
    found = dict(zip(MASKS, raised(after), strict=True))
    assert found == {name: (0.5, is_causal, size, 0.0) for name, (_, is_causal, size) in MASKS.items()}
    assert_same_numbers(before, after, SHAPES)


def test_leaves_nothing_of_the_mask():
    after, _ = run_pass(RaiseAttention(), export_attention(masked(packed_sequences)))
    assert "arange" not in str(after)
    assert "bool[" not in str(after)
    assert list(input_placeholders(after.entries["forward"])) == ["input_ids", "position_ids"]


def test_attends_to_everything_without_a_mask():
    def attend(query, key, value, positions):
        return F.scaled_dot_product_attention(query, key, value)

    before = export_attention(attend)
    after, _ = run_pass(RaiseAttention(), before)
    assert raised(after) == [(0.5, False, 0, 0.0)]
    assert_same_numbers(before, after, SHAPES)


def test_reads_a_mask_that_is_a_constant():
    def attend(query, key, value, positions, allowed):
        length = query.shape[2]
        return F.scaled_dot_product_attention(query, key, value, allowed[:length, :length])

    # Larger than the context, or its last row would be a length of its own.
    before = export_attention(attend, allowed=window(6)(80, torch.zeros(1)))
    after, _ = run_pass(RaiseAttention(), before)
    assert raised(after) == [(0.5, True, 6, 0.0)]
    assert "body.allowed" not in after.used_constants()
    assert_same_numbers(before, after, SHAPES)


def test_finds_a_window_longer_than_the_usual_probes():
    after, record = run_pass(RaiseAttention(), export_attention(masked(window(3000)), context=4096))
    assert record.misses == []
    assert raised(after) == [(0.5, True, 3000, 0.0)]


def test_a_window_beyond_the_context_is_none():
    after, _ = run_pass(RaiseAttention(), export_attention(masked(window(65)), context=64))
    assert raised(after) == [(0.5, True, 0, 0.0)]


def test_keeps_grouped_heads():
    def attend(query, key, value, positions):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    before = export_attention(attend, key_heads=2)
    after, record = run_pass(RaiseAttention(), before)
    assert record.rewrites == 1
    assert_same_numbers(before, after, SHAPES)


def test_a_key_head_for_all_queries():
    """Without `enable_gqa`, one head broadcasts."""

    def attend(query, key, value, positions):
        return F.scaled_dot_product_attention(query, key, value, causal(query.shape[2], positions))

    before = export_attention(attend, key_heads=1)
    after, record = run_pass(RaiseAttention(), before)
    assert record.rewrites == 1
    assert_same_numbers(before, after, SHAPES)


def causal_and_padding(query, key, value, attention_mask):
    length = query.shape[2]
    visible = torch.ones(length, length, dtype=torch.bool).tril() & (attention_mask != 0)[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, torch.zeros(()).masked_fill(~visible, LOWEST))


def query_padding_too(query, key, value, attention_mask):
    """Rows of padding see nothing here; nobody reads them."""
    real = attention_mask.bool()
    visible = real[:, None, None, :] & real[:, None, :, None]
    return F.scaled_dot_product_attention(query, key, value, visible)


def causal_minus_infinity(query, key, value, attention_mask):
    length = query.shape[2]
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1) | (attention_mask == 0)[:, None, None, :]
    return F.scaled_dot_product_attention(query, key, value, torch.zeros(()).masked_fill(hidden, -math.inf))


PADDING = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 0, 1, 1]])


@pytest.mark.parametrize(
    ("attend", "is_causal"),
    [
        (padding_attention, False),
        (causal_and_padding, True),
        (query_padding_too, False),
        (causal_minus_infinity, True),
    ],
)
def test_reads_padding_from_the_attention_mask(attend, is_causal):
    before = export_padded(attend)
    after, record = run_pass(RaiseAttention(), before)
    assert (record.rewrites, record.misses) == (1, [])
    assert raised(after) == [(0.5, is_causal, 0, 0.0)]
    ids = torch.arange(21).reshape(3, 7)
    (expected,), (actual,) = (run_program(p, ids, inputs={"attention_mask": PADDING}) for p in (before, after))
    assert_close(actual[PADDING != 0], expected[PADDING != 0])


def test_a_row_that_sees_nothing_is_finite_and_disturbs_no_other():
    """Left padding under a causal mask of minus infinity: softmax of an empty row must not reach a real token."""
    one_layer, two_layers = export_padded(causal_minus_infinity), export_padded(causal_and_padding, layers=2)
    for before in (one_layer, two_layers):
        after, record = run_pass(RaiseAttention(), before)
        assert record.misses == []
        ids, padding = torch.arange(7)[None], torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
        (padded,) = run_program(after, ids, inputs={"attention_mask": padding})
        (alone,) = run_program(after, ids[:, 3:])
        (expected,) = run_program(before, ids, inputs={"attention_mask": padding})
        assert padded.isfinite().all()
        assert_close(padded[:, 3:], expected[:, 3:])
        assert_close(padded[:, 3:], alone)


def test_layers_that_share_a_mask_share_its_proof(monkeypatch):
    proofs = []
    prove = raise_attention._prove
    monkeypatch.setattr(raise_attention, "_prove", lambda *args: proofs.append(args) or prove(*args))
    before = export_padded(causal_and_padding, layers=3)
    _, record = run_pass(RaiseAttention(), before)
    assert (record.rewrites, len(proofs)) == (3, 1)


def test_runs_twice_like_once():
    assert_idempotent(RaiseAttention(), export_attention(masked(causal)))


def alibi(length: int, positions: Tensor) -> Tensor:
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None]
    distance = torch.arange(length)[None] - torch.arange(length)[:, None]
    return slopes * distance + causal_added(length, positions)


def learned_bias(length: int, positions: Tensor) -> Tensor:
    return torch.full((length, length), 0.5) + causal_added(length, positions)


def other_heads_other_windows(length: int, positions: Tensor) -> Tensor:
    sizes = torch.tensor([1, 2, 3, 4])[:, None, None]
    distance = torch.arange(length)[:, None] - torch.arange(length)[None]
    return (distance >= 0) & (distance < sizes)


def chunks(length: int, positions: Tensor) -> Tensor:
    chunk = torch.arange(length) // 8
    return causal(length, positions) & (chunk[:, None] == chunk[None])


def both_sides(length: int, positions: Tensor) -> Tensor:
    return (torch.arange(length)[:, None] - torch.arange(length)[None]).abs() < 4


OTHER_MASKS = {
    alibi: "it adds -0.5 to scores, a position bias such as ALiBi",
    learned_bias: "it adds 0.5 to scores, a position bias such as ALiBi",
    other_heads_other_windows: "it differs between heads",
    chunks: "at length 33 query 8 does not see key 1",
    both_sides: "at length 5 query 0 does not see key 4",
}


def test_declines_other_masks():
    program = export_several(masked(mask) for mask in OTHER_MASKS)
    after, record = run_pass(RaiseAttention(), program)
    assert str(after) == str(program)
    assert [miss.reason for miss in record.misses] == [NOT_KNOWN + reason for reason in OTHER_MASKS.values()]


def test_declines_when_the_mask_depends_on_tokens():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(61, WIDTH)
            self.body = SelfAttention(lambda q, k, v, keep: F.scaled_dot_product_attention(q, k, v, keep))

        def forward(self, input_ids):
            return self.body(self.embed(input_ids), (input_ids != 0)[:, None, None, :])

    program = export_tiny(Model())
    canonicalize(program)
    assert_declines(RaiseAttention(), program, reason=f"{NOT_KNOWN}it depends on the values of input_ids")


def test_declines_when_a_window_is_too_long_to_look_at():
    program = export_attention(masked(window(9000)), context=16384)
    reason = "it would have to be run at length 9002 to tell (longest: 8192)"
    assert_declines(RaiseAttention(), program, reason=NOT_KNOWN + reason)


def test_declines_when_the_mask_cannot_be_computed_at_every_length():
    def attend(query, key, value, positions, table):
        keep = table[positions][:, None, None, :]
        return F.scaled_dot_product_attention(query, key, value, keep)

    program = export_attention(attend, table=torch.ones(20, dtype=torch.bool))
    _, record = run_pass(RaiseAttention(), program)
    assert record.rewrites == 0
    assert record.misses[0].reason.startswith(f"{NOT_KNOWN}index ")


def test_a_mask_that_depends_on_a_size_read_from_data_is_refused_at_capture():
    def attend(query, key, value, attention_mask):
        count = attention_mask.sum().item()
        keep = torch.arange(query.shape[2]) < count
        return F.scaled_dot_product_attention(query, key, value, keep[None, None, None])

    with pytest.raises(CaptureError, match="depends on the values of a tensor"):
        export_padded(attend)


def export_with(**arguments: Any) -> Program:
    """Attention with arguments that capture would refuse; `length` stands for the symbolic length."""
    program = export_attention(masked(causal))
    nodes = program.entries["forward"].graph.nodes
    length = next(n for n in nodes if n.target is torch.ops.aten.sym_size.int and n.args[1] == 1)
    call = next(n for n in nodes if n.target is torch.ops.aten.scaled_dot_product_attention.default)
    call.kwargs = {**call.kwargs, **{k: length if v == "length" else v for k, v in arguments.items()}}
    return program


def test_declines_dropout():
    program = export_with(dropout_p=0.1)
    assert_declines(RaiseAttention(), program, reason="attention drops weights at random")


def test_declines_when_the_scale_depends_on_the_length():
    program = export_with(scale="length")
    assert_declines(RaiseAttention(), program, reason="the scale is not a number in the graph")


def test_declines_when_heads_are_not_an_axis():
    def attend(query, key, value, positions):
        merged = [operand.transpose(1, 2).flatten(2) for operand in (query, key, value)]
        out = F.scaled_dot_product_attention(*merged, is_causal=True)
        return out.unflatten(-1, (HEADS, HEAD_DIM)).transpose(1, 2)

    program = export_attention(attend)
    assert_declines(RaiseAttention(), program, reason="queries have 3 axes, not [B, H, S, D]")


def test_declines_attention_over_another_axis():
    def attend(query, key, value, positions):
        heads_last = [operand.transpose(1, 2) for operand in (query, key, value)]
        return F.scaled_dot_product_attention(*heads_last, is_causal=True).transpose(1, 2)

    program = export_attention(attend)
    assert_declines(RaiseAttention(), program, reason="queries do not run over the batch and the whole sequence")


def test_declines_a_summary_of_the_keys():
    def attend(query, key, value, positions):
        return F.scaled_dot_product_attention(query, key[:, :, :1], value[:, :, :1])

    program = export_attention(attend)
    assert_declines(RaiseAttention(), program, reason="keys do not run over the batch and the whole sequence")


def test_declines_heads_that_form_no_groups():
    def attend(query, key, value, positions):
        return F.scaled_dot_product_attention(query, key[:, :1], value, is_causal=True)

    program = export_attention(attend)
    assert_declines(RaiseAttention(), program, reason="4 query, 1 key and 4 value heads do not form groups")


def falcon(**options: Any) -> tuple[nn.Module, Program]:
    transformers = pytest.importorskip("transformers", reason="Falcon comes from the package transformers")
    from jettison.ir.huggingface import source_from_model

    config = transformers.FalconConfig(
        vocab_size=97, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=2, initializer_range=0.2, **options,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.FalconForCausalLM(config).eval()
    program = capture(source_from_model(model))
    canonicalize(program)
    return model, program


@pytest.mark.parametrize(
    ("options", "key_heads"),
    [
        ({"multi_query": True}, 1),
        ({"multi_query": False}, 4),
        ({"new_decoder_architecture": True, "num_kv_heads": 2}, 2),
    ],
)
def test_raises_falcon(options, key_heads):
    model, program = falcon(alibi=False, **options)
    after, _ = run_pass(RaiseAttention(), program, RaiseWrittenAttention())
    assert raised(after) == [(8**-0.5, True, 0, 0.0)]
    calls = [n for n in after.entries["forward"].graph.nodes if n.target is torch.ops.jettison.attention.default]
    assert [node.args[1].meta["val"].shape[1] for node in calls] == [key_heads]
    for length in (1, 7, 33):
        ids = torch.arange(2 * length).reshape(2, length) % 97
        with torch.no_grad():
            expected = model(ids, use_cache=False).logits
        assert_close(run_program(after, ids)[0], expected)


def test_declines_falcon_with_alibi():
    _, program = falcon(alibi=True)
    reason = f"{NOT_KNOWN}it adds 0.0884 to scores, a position bias such as ALiBi"
    assert_declines(RaiseAttention(), program, reason=reason)
