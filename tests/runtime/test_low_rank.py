"""Factored layers on the torch target: chunk by chunk against the program, and what is alive at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from jettison.ir import token_chunks
from jettison.ir.compare import assert_close, example_input_ids
from jettison.ir.interpret import run_entry
from jettison.ir.token_chunks import FEWEST, MOST, USUAL_CACHE_BYTES, chunk_tokens, even_chunks
from jettison.passes.fuse_low_rank import FuseLowRank
from jettison.runtime import low_rank_attention
from jettison.runtime.low_rank_attention import run_low_rank_attention
from jettison.runtime.low_rank_mlp import run_low_rank_mlp
from jettison.runtime.processor_cache import cache_bytes
from jettison.runtime.torch_executor import TorchExecutor
from tests.helpers import run_pass
from tests.models.tiny_low_rank import ATTENTIONS, MLPS, Attention, Mlp, encoder
from tests.runtime.allocations import Allocations


@pytest.fixture
def few(monkeypatch):
    """Chunks of four tokens."""
    for name in ("FEWEST", "MOST"):
        monkeypatch.setattr(token_chunks, name, 4)
    for name in ("FEWEST", "QUERY_ROWS"):
        monkeypatch.setattr(low_rank_attention, name, 4)


def check(layer, tolerance=None):
    before = encoder(layer)
    after, record = run_pass(FuseLowRank(), before)
    assert record.rewrites == 1
    executor = TorchExecutor(after)
    for batch, length in ((1, 1), (1, 13), (3, 2), (3, 7)):
        inputs = {"input_ids": example_input_ids(before, batch, length)}
        (out,) = executor.run("forward", inputs, {}).values()
        (expected,) = run_entry(before, "forward", inputs)
        assert_close(out, expected, what=f"batch {batch}, length {length}")


@pytest.mark.parametrize("chunk", ["whole", "few"])
@pytest.mark.parametrize("name", MLPS)
def test_feed_forward_layers(name, chunk, request):
    if chunk == "few":
        request.getfixturevalue("few")
    check(Mlp(**MLPS[name]))


@pytest.mark.parametrize("chunk", ["whole", "few"])
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attentions(name, chunk, request):
    if chunk == "few":
        request.getfixturevalue("few")
    check(Attention(**ATTENTIONS[name]))


@pytest.mark.usefixtures("few")
def test_positions_of_each_row():
    """Which a model with a cache of its own would give."""
    heads, steps, batch = 2, 6, 3
    inputs = [torch.randn(batch, steps, rank) for rank in (3, 2, 2)]
    factors = [part for x in inputs for part in (torch.randn(heads * 4, x.shape[-1]), None)]
    angles = torch.randn(batch, steps, 2)
    queries = torch.arange(steps)[None] + torch.arange(batch)[:, None]
    keys = queries.flip(1) - 1
    args = (
        *inputs,
        *factors,
        angles.cos(),
        angles.sin(),
        queries,
        keys,
        None,
        None,
        heads,
        heads,
        False,
        0.5,
        True,
        4,
        0.0,
    )
    assert_close(run_low_rank_attention(*args), torch.ops.jettison.low_rank_attention(*args))


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("gated", [True, False])
def test_nothing_as_large_as_the_neurons_of_all_tokens_is_made(gated):
    tokens, neurons, rank = 64, 32, 2
    x, wide = torch.randn(tokens, rank), torch.randn(neurons, rank)
    gate = (x, wide) if gated else (None, None)
    operands = (gate[0], x, gate[1], None, wide, torch.randn(neurons), torch.randn(rank, neurons), torch.randn(8, rank))
    with Allocations() as seen:
        out = run_low_rank_mlp(*operands, None, "silu")
    assert out.shape == (tokens, 8)
    # The result itself is the largest.
    assert seen.largest == out.nbytes
    with Allocations() as unfused:
        torch.ops.jettison.low_rank_mlp(*operands, None, "silu")
        torch.nn.functional.linear(x, wide)
    assert unfused.largest >= tokens * neurons * 4


@pytest.mark.usefixtures("few")
def test_queries_keys_and_values_of_all_rows_are_not_made():
    batch, steps, heads = 16, 4, 8
    x, wide = torch.randn(batch, steps, 2), torch.randn(heads * 8, 2)
    narrow = torch.randn(heads, 2)  # values of one channel: the result is small
    args = (x, x, x, wide, None, wide, None, narrow, None, None, None, None, None, None, None, heads, heads, False)
    with Allocations() as seen:
        run_low_rank_attention(*args, 0.5, False, 0, 0.0)
    assert seen.largest < batch * steps * heads * 8 * 4 / 2


def test_chunks_are_even_and_cover_every_token_once():
    for tokens in (0, 1, 4, 5, 9, 1023):
        chunks = list(even_chunks(tokens, 4))
        assert [i for start, stop in chunks for i in range(start, stop)] == list(range(tokens))
        sizes = {stop - start for start, stop in chunks[:-1]}
        assert len(sizes) <= 1
        assert max((stop - start for start, stop in chunks), default=0) <= 4
    assert list(even_chunks(513, 512)) == [(0, 257), (257, 513)]


def test_a_larger_cache_takes_more_tokens():
    assert chunk_tokens(1 << 20, 1 << 20) == FEWEST
    assert chunk_tokens(1, 1 << 30) == MOST
    assert chunk_tokens(1 << 14, 24 << 20) == 768


def test_the_largest_cache_of_data_counts(tmp_path: Path):
    for index, (kind, size) in enumerate((("Data", "32K"), ("Instruction", "64M"), ("Unified", "2048K"))):
        folder = tmp_path / f"index{index}"
        folder.mkdir()
        (folder / "type").write_text(f"{kind}\n")
        (folder / "size").write_text(f"{size}\n")
    (tmp_path / "index9").mkdir()
    assert cache_bytes(tmp_path) == 2 << 20
    assert cache_bytes(tmp_path / "nowhere") == USUAL_CACHE_BYTES
