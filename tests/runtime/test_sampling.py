"""Sampling against the logits warpers of transformers, against probabilities, and against its own promises."""

from __future__ import annotations

import math

import pytest
import torch

from jettison.ir.errors import ArtifactError
from jettison.runtime import sampling
from jettison.runtime.sampling import Sampler, filter_scores


def random_logits(rows: int, vocab_size: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def scattered(logits: torch.Tensor, **filters: float) -> torch.Tensor:
    """What `filter_scores` keeps, back in vocabulary order with -inf elsewhere, `[B, V] f32`."""
    scores, tokens = filter_scores(logits, **filters)
    if tokens is None:
        return scores
    assert bool((scores[:, 1:] <= scores[:, :-1]).all()), "scores must descend"
    return torch.full_like(logits, -torch.inf).scatter(-1, tokens, scores)


def warped(logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> torch.Tensor:
    warpers = pytest.importorskip("transformers.generation.logits_process")
    processors = warpers.LogitsProcessorList()
    if temperature != 1.0:
        processors.append(warpers.TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(warpers.TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(warpers.TopPLogitsWarper(top_p))
    return processors(None, logits)


@pytest.mark.parametrize("vocab_size", [1, 7, 1024, 5003])
@pytest.mark.parametrize(
    "filters",
    [
        {},
        {"temperature": 0.7},
        {"temperature": 1.9, "top_k": 50},
        {"top_k": 1},
        {"top_k": 10**6},
        {"top_p": 0.9},
        {"top_p": 0.0},
        {"top_p": 0.999999, "temperature": 5.0},
        {"temperature": 0.5, "top_k": 40, "top_p": 0.8},
        {"temperature": 30.0, "top_k": 1500, "top_p": 0.95},
        {"temperature": 30.0, "top_p": 0.95},
    ],
    ids=str,
)
def test_filters_equal_transformers_warpers(filters, vocab_size):
    for seed in range(3):
        logits = random_logits(4, vocab_size, seed)
        torch.testing.assert_close(scattered(logits, **filters), warped(logits, **filters), rtol=0, atol=0)


def test_top_k_keeps_ties_as_transformers_does():
    logits = random_logits(6, 3000, seed=5).round()  # whole numbers: many tokens share the k-th score
    for top_k in (1, 5, 50):
        mine = scattered(logits, top_k=top_k)
        assert int((mine > -torch.inf).sum(-1).max()) > top_k
        torch.testing.assert_close(mine, warped(logits, top_k=top_k), rtol=0, atol=0)


def test_filters_leave_tokens_ruled_out_by_the_model_out():
    logits = random_logits(2, 40, seed=6)
    logits[:, 3:] = -torch.inf
    for filters in ({"top_k": 10}, {"top_p": 0.99}, {"top_k": 10, "top_p": 0.99}):
        torch.testing.assert_close(scattered(logits, **filters), warped(logits, **filters), rtol=0, atol=0)


def test_filters_do_not_change_the_logits_they_are_given():
    logits = random_logits(2, 5000, seed=7)
    before = logits.clone()
    filter_scores(logits, 0.5, 40, 0.9)
    filter_scores(logits, 0.5, 0, 0.9)
    assert torch.equal(logits, before)


def test_large_vocabulary_is_not_sorted(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("sorting 128k logits costs more than a decode step")

    logits = random_logits(1, 128_256, seed=8)
    monkeypatch.setattr(torch, "sort", refuse)
    for choice in ({"top_k": 50}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.9, "temperature": 0.6}):
        Sampler(1, do_sample=True, seed=0, **choice).choose(logits)
    Sampler(1).choose(logits)


def test_greedy_takes_the_best_token_and_ignores_the_sampling_options():
    logits = random_logits(5, 300, seed=9)
    assert Sampler(5, temperature=9.0, top_k=3).choose(logits) == logits.argmax(-1).tolist()
    assert Sampler(5).choose(logits, [4, 1]) == logits[[4, 1]].argmax(-1).tolist()


def test_top_k_of_one_is_greedy():
    logits = random_logits(5, 300, seed=10)
    assert Sampler(5, do_sample=True, top_k=1, seed=3).choose(logits) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 6}, {"top_p": 0.8}, {"temperature": 2.0, "top_k": 8, "top_p": 0.9}], ids=str
)
def test_draws_follow_the_filtered_probabilities(filters):
    rows = 20_000
    logits = random_logits(1, 12, seed=11, scale=1.5)
    drawn = Sampler(rows, do_sample=True, seed=0, **filters).choose(logits.expand(rows, -1))
    counted = torch.bincount(torch.tensor(drawn), minlength=12).double() / rows
    expected = scattered(logits, **filters).double().softmax(-1)[0]
    assert bool((counted[expected == 0] == 0).all())
    # Five standard deviations of a binomial frequency.
    assert bool(((counted - expected).abs() <= 5 * (expected * (1 - expected) / rows).sqrt()).all())


def test_equal_seeds_draw_equal_tokens_and_other_seeds_do_not():
    logits = random_logits(3, 1000, seed=12, scale=0.5)

    def draws(seed: int) -> list[list[int]]:
        sampler = Sampler(3, do_sample=True, seed=seed)
        return [sampler.choose(logits) for _ in range(8)]

    assert draws(5) == draws(5)
    assert draws(5) != draws(6)


def test_a_row_draws_the_same_whatever_the_rest_of_the_batch_does():
    logits = random_logits(4, 1000, seed=13, scale=0.5)
    full, alone = Sampler(4, do_sample=True, seed=1), Sampler(4, do_sample=True, seed=1)
    for step in range(6):
        others = logits if step % 2 else -logits
        together = torch.cat([others[:2], logits[2:3], others[3:]])
        assert full.choose(together)[2] == alone.choose(logits, [2])[0]
    first = Sampler(1, do_sample=True, seed=1)
    again = Sampler(4, do_sample=True, seed=1)
    assert [first.choose(logits[:1])[0] for _ in range(6)] == [again.choose(logits)[0] for _ in range(6)]


def test_equal_rows_of_a_batch_draw_different_tokens():
    logits = random_logits(1, 1000, seed=14, scale=0.1).expand(16, -1)
    assert len(set(Sampler(16, do_sample=True, seed=0).choose(logits))) > 8


def test_no_seed_follows_the_default_generator_of_torch():
    logits = random_logits(4, 1000, seed=15, scale=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        first = Sampler(4, do_sample=True).choose(logits)
        second = Sampler(4, do_sample=True).choose(logits)
        torch.manual_seed(4)
        assert Sampler(4, do_sample=True).choose(logits) == first
    assert first != second


def test_a_seed_leaves_the_default_generator_alone():
    state = torch.random.get_rng_state()
    Sampler(2, do_sample=True, seed=3).choose(random_logits(2, 50, seed=16))
    assert torch.equal(torch.random.get_rng_state(), state)


def test_the_largest_uniform_number_picks_a_token_with_a_probability(monkeypatch):
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    largest = math.nextafter(1.0, 0.0)
    monkeypatch.setattr(sampling.torch, "rand", lambda *a, **k: torch.tensor([largest], dtype=torch.float64))
    assert Sampler(1, do_sample=True, seed=0).choose(logits) == [1]
    monkeypatch.setattr(sampling.torch, "rand", lambda *a, **k: torch.zeros(1, dtype=torch.float64))
    assert Sampler(1, do_sample=True, seed=0).choose(logits) == [0]
    assert Sampler(1, do_sample=True, seed=0).choose(torch.tensor([[-torch.inf, 1.0, 0.0]])) == [1]


@pytest.mark.parametrize(
    "choice",
    [{}, {"do_sample": True}, {"do_sample": True, "top_k": 5, "top_p": 0.5}, {"do_sample": True, "top_p": 0.5}],
    ids=str,
)
def test_logits_that_are_not_numbers_are_refused(choice):
    logits = random_logits(3, 2000, seed=17)
    logits[2, 77] = torch.nan
    expected = (
        "[generate] row 2: the model's logits are not numbers (NaN), needs finite ones to choose a token: a weight is "
        "damaged, or an activation overflowed its dtype. Run `jettison verify` on the folder; if it passes, optimise "
        "again with float32 activations."
    )
    for rows in (None, [0, 2], [2]):
        with pytest.raises(ArtifactError) as caught:
            Sampler(3, seed=0, **choice).choose(logits, rows)
        assert str(caught.value) == expected
    assert len(Sampler(3, seed=0, **choice).choose(logits, [0, 1])) == 2
