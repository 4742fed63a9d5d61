"""Sampling against the logits processors of transformers, against probabilities, and against its own promises."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from jettison.ir.errors import ArtifactError
from jettison.runtime import sampling
from jettison.runtime.sampling import RepetitionPenalty, Sampler
from tests.models.tiny_models import tiny_model


def random_logits(rows: int, vocab_size: int, seed: int, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocab_size, generator=torch.Generator().manual_seed(seed)) * scale


def filtered(logits: torch.Tensor, penalty: RepetitionPenalty | None = None, **filters: Any) -> torch.Tensor:
    """What a draw chooses among, in vocabulary order with -inf elsewhere, `[B, V] f32`."""
    sampler = Sampler(len(logits), do_sample=True, seed=0, penalty=penalty, **filters)
    result = torch.full_like(logits, -torch.inf)
    for row, scores in enumerate(logits.numpy()):
        kept, tokens = sampler.candidates(row, scores)
        assert tokens is None or bool((np.diff(tokens) > 0).all()), "tokens must ascend"
        result[row, slice(None) if tokens is None else torch.from_numpy(tokens)] = torch.from_numpy(kept)
    return result


def warped(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: torch.Tensor | None = None,
) -> torch.Tensor:
    """The same by transformers, in the order in which its `generate` applies them."""
    process = pytest.importorskip("transformers.generation.logits_process")
    processors = process.LogitsProcessorList()
    if repetition_penalty != 1.0:
        processors.append(process.RepetitionPenaltyLogitsProcessor(repetition_penalty))
    if temperature != 1.0:
        processors.append(process.TemperatureLogitsWarper(temperature))
    if top_k:
        processors.append(process.TopKLogitsWarper(top_k))
    if top_p < 1.0:
        processors.append(process.TopPLogitsWarper(top_p))
    if min_p:
        processors.append(process.MinPLogitsWarper(min_p))
    return processors(seen, logits)


def test_transformers_applies_them_in_the_order_of_these_tests():
    transformers = pytest.importorskip("transformers")
    model = tiny_model("llama")
    config = transformers.GenerationConfig(
        do_sample=True, temperature=0.5, top_k=3, top_p=0.5, min_p=0.5, repetition_penalty=2.0
    )
    names = [type(processor).__name__ for processor in model._get_logits_processor(config, 4)]
    assert names == [
        "RepetitionPenaltyLogitsProcessor", "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper",
        "MinPLogitsWarper",
    ]  # fmt: skip


# --- filters --------------------------------------------------------------------------------------------------------


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
        {"min_p": 0.05},
        {"min_p": 1.0},
        {"temperature": 0.5, "top_k": 40, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.95, "min_p": 0.1},
        {"temperature": 30.0, "top_k": 1500, "top_p": 0.95},
        {"temperature": 30.0, "top_p": 0.95},
    ],
    ids=str,
)
def test_filters_equal_transformers_warpers(filters, vocab_size):
    for seed in range(3):
        logits = random_logits(4, vocab_size, seed)
        torch.testing.assert_close(filtered(logits, **filters), warped(logits, **filters), rtol=0, atol=0)


@pytest.mark.parametrize("scale", [0.01, 1.0, 4.0])
def test_flat_distributions_over_a_large_vocabulary_equal_transformers(scale):
    # A nucleus of so many tokens is found by buckets.
    logits = random_logits(2, 40_000, 3, scale)
    for filters in ({"top_p": 0.9}, {"top_p": 0.3, "min_p": 0.2}, {"top_k": 20_000, "top_p": 0.9}):
        torch.testing.assert_close(filtered(logits, **filters), warped(logits, **filters), rtol=0, atol=0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
    """Logits `[2, V]`, often with ties or tokens ruled out, tokens already seen `[2, S]`, and settings."""
    vocab_size = draw(st.sampled_from([2, 9, 64, 700, 2500]))
    logits = random_logits(2, vocab_size, draw(st.integers(0, 2**31)), draw(st.sampled_from([0.3, 2.0, 6.0])))
    quantum = draw(st.sampled_from([0.0, 0.25, 2.0]))
    logits = (logits / quantum).round() * quantum if quantum else logits
    if draw(st.booleans()):
        logits[:, draw(st.integers(1, vocab_size - 1)) :] = -torch.inf
    seen = draw(st.lists(st.integers(0, vocab_size - 1), min_size=1, max_size=12))
    settings = {
        "temperature": draw(st.sampled_from([1.0, 0.6, 1.7])),
        "top_k": draw(st.sampled_from([0, 1, 3, 50, 400])),
        "top_p": draw(st.sampled_from([1.0]) | st.floats(0.01, 0.999)),
        "min_p": draw(st.sampled_from([0.0]) | st.floats(0.001, 0.999)),
        "repetition_penalty": draw(st.sampled_from([1.0, 1.3, 0.8])),
    }
    return logits, torch.tensor([seen, seen[::-1]]), settings


@settings(max_examples=300, deadline=None)
@given(case=cases(), sort_at_most=st.sampled_from([0, 8192]))
def test_penalty_and_filters_together_equal_transformers(case, sort_at_most):
    logits, seen, options = case
    theirs = warped(logits, seen=seen, **options)
    # Where a rounding error in p decides, neither is wrong.
    for name, sign in (("top_p", 1), ("top_p", -1), ("min_p", 1), ("min_p", -1)):
        nudged = {**options, name: options[name] * (1 + sign * 1e-6)}
        if 0.0 < options[name] < 1.0:
            assume(torch.equal(warped(logits, seen=seen, **nudged).isinf(), theirs.isinf()))
    penalty = RepetitionPenalty(options.pop("repetition_penalty"), seen.tolist(), logits.shape[1])
    with mock.patch.object(sampling, "_SORT_AT_MOST", sort_at_most):
        ours = filtered(logits, penalty, **options)
    # As many of the same scores; which of those tied at the edge of the nucleus is unspecified in transformers.
    torch.testing.assert_close(ours.sort(-1).values, theirs.sort(-1).values, rtol=0, atol=0)
    edge = ours.masked_fill(ours.isinf(), torch.inf).amin(-1, keepdim=True)
    assert torch.equal(ours > edge, theirs > edge)


@pytest.mark.parametrize("top_p", [0.0, 0.25, 0.375, 0.5, 0.75])
@pytest.mark.parametrize("sort_at_most", [0, 8192])
def test_tied_tokens_fill_the_nucleus_in_the_order_of_their_ids(top_p, sort_at_most, monkeypatch):
    monkeypatch.setattr(sampling, "_SORT_AT_MOST", sort_at_most)
    logits = torch.full((1, 16), -torch.inf)
    logits[0, ::2] = 1.0  # eight tokens of probability 1/8: exact in binary
    ours = filtered(logits, top_p=top_p)
    assert (ours[0] == 1.0).nonzero().flatten().tolist() == list(range(0, 2 * max(1, int(8 * top_p)), 2))
    assert int((ours > 0).sum()) == int((warped(logits, top_p=top_p) > 0).sum())


def test_top_k_keeps_ties_as_transformers_does():
    logits = random_logits(6, 3000, seed=5).round()  # whole numbers: many tokens share the k-th score
    for top_k in (1, 5, 50):
        mine = filtered(logits, top_k=top_k)
        assert int((mine > -torch.inf).sum(-1).max()) > top_k
        torch.testing.assert_close(mine, warped(logits, top_k=top_k), rtol=0, atol=0)


def test_top_k_finds_best_tokens_wherever_they_stand():
    logits = random_logits(1, 6400, seed=5)
    columns = 6400 // sampling._COLUMN
    for places in (range(0, 6400, columns), range(40), range(6360, 6400)):
        raised = logits.clone()
        raised[0, list(places)] += 50.0
        torch.testing.assert_close(filtered(raised, top_k=30), warped(raised, top_k=30), rtol=0, atol=0)


def test_filters_leave_tokens_ruled_out_by_the_model_out():
    logits = random_logits(2, 40, seed=6)
    logits[:, 3:] = -torch.inf
    for filters in ({"top_k": 10}, {"top_p": 0.99}, {"top_k": 10, "top_p": 0.99}, {"min_p": 1e-9}):
        torch.testing.assert_close(filtered(logits, **filters), warped(logits, **filters), rtol=0, atol=0)


@pytest.mark.parametrize("do_sample", [False, True])
def test_choosing_does_not_change_the_logits(do_sample):
    logits = random_logits(2, 5000, seed=7)
    before = logits.clone()
    penalty = RepetitionPenalty(1.5, [[1, 2], [3]], 5000)
    Sampler(2, do_sample, 0.5, 40, 0.9, 0.01, seed=0, penalty=penalty).choose(logits)
    Sampler(2, do_sample, 0.5, 0, 0.9, seed=0).choose(logits)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("scale", [0.1, 3.0])
def test_large_vocabulary_is_not_sorted(monkeypatch, scale):
    def small_only(function: Any) -> Any:
        def checked(values: np.ndarray, *args: Any) -> np.ndarray:
            assert len(values) <= sampling._SORT_AT_MOST, "sorting 128k scores takes milliseconds"
            return function(values, *args)

        return checked

    logits = random_logits(1, 128_256, seed=8, scale=scale)
    for name in ("sort", "argsort", "partition"):
        monkeypatch.setattr(np, name, small_only(getattr(np, name)))
    for choice in ({"top_k": 50}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.9, "temperature": 0.6}, {"min_p": 0.05}, {}):
        Sampler(1, do_sample=True, seed=0, **choice).choose(logits)
    Sampler(1).choose(logits)


# --- repetition penalty ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", [1.3, 0.7, 1e6, 1e-6])
def test_penalty_equals_transformers_whatever_the_signs_and_repeats(penalty):
    logits = random_logits(3, 200, seed=18)
    logits[:, :3] = torch.tensor([0.0, -0.0, -torch.inf])
    prompts = [[0, 1, 2, 5, 5, 5], [7] * 6, [199, 198, 3, 2, 1, 0]]
    expected = warped(logits, repetition_penalty=penalty, seen=torch.tensor(prompts))
    mine = RepetitionPenalty(penalty, prompts, 200)
    actual = torch.stack([torch.from_numpy(mine.apply(row, scores)) for row, scores in enumerate(logits.numpy())])
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_chosen_tokens_count_for_their_own_row():
    penalty = RepetitionPenalty(2.0, [[0], [0]], 4)
    sampler = Sampler(2, penalty=penalty)
    logits = torch.tensor([[9.0, 8.0, 7.0, 3.0]])
    assert [sampler.choose(logits, [1])[0] for _ in range(4)] == [1, 2, 0, 0]  # 4.5 8 7 3, 4.5 4 7 3, 4.5 4 3.5 3
    assert sampler.choose(logits, [0]) == [1]


def test_penalised_tokens_beyond_the_logits_are_left_out():
    # A model may have embeddings for more tokens than it can say.
    penalty = RepetitionPenalty(2.0, [[2, 9]], 10)
    assert penalty.apply(0, np.array([1.0, 2.0, 3.0], dtype=np.float32)).tolist() == [1.0, 2.0, 1.5]


# --- choosing -------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_best_token_and_ignores_the_sampling_options():
    logits = random_logits(5, 300, seed=9)
    assert Sampler(5, temperature=9.0, top_k=3).choose(logits) == logits.argmax(-1).tolist()
    assert Sampler(5).choose(logits[[4, 1]], [4, 1]) == logits[[4, 1]].argmax(-1).tolist()


@pytest.mark.parametrize(
    "options",
    [{}, {"do_sample": True, "top_k": 8}, {"do_sample": True, "top_k": 40, "top_p": 0.9, "temperature": 0.7}],
    ids=str,
)
def test_the_best_tokens_are_enough(options):
    logits = random_logits(4, 1000, seed=21)
    whole, few = (Sampler(4, seed=3, **options) for _ in range(2))
    best = [each[:, : few.enough] for each in logits.sort(dim=1, descending=True, stable=True)]
    assert few.enough == options.get("top_k", 0) + 1
    for _ in range(5):
        assert few.choose_best(*best) == whole.choose(logits)
    assert few.choose_best(*(each[[2]] for each in best), [2]) == whole.choose(logits[[2]], [2])


def test_the_best_tokens_are_not_enough_for_what_looks_at_all():
    assert Sampler(1, do_sample=True, top_p=0.9, top_k=0).enough == 0
    assert Sampler(1, penalty=RepetitionPenalty(2.0, [[1]], 10)).enough == 0


def test_best_logits_that_are_no_numbers_are_refused():
    with pytest.raises(ArtifactError, match="row 1: the model's logits are not numbers"):
        Sampler(2).choose_best(torch.tensor([[1.0], [torch.inf]]), torch.tensor([[3], [4]]))


def test_top_k_of_one_is_greedy():
    logits = random_logits(5, 300, seed=10)
    assert Sampler(5, do_sample=True, top_k=1, seed=3).choose(logits) == logits.argmax(-1).tolist()


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_k": 6}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 2.0, "top_k": 8, "top_p": 0.9}],
    ids=str,
)
def test_draws_follow_the_filtered_probabilities(filters):
    rows = 20_000
    logits = random_logits(1, 12, seed=11, scale=1.5)
    drawn = Sampler(rows, do_sample=True, seed=0, **filters).choose(logits.expand(rows, -1))
    counted = torch.bincount(torch.tensor(drawn), minlength=12).double() / rows
    expected = filtered(logits, **filters).double().softmax(-1)[0]
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
        assert full.choose(together)[2] == alone.choose(logits[2:3], [2])[0]
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


def test_a_draw_is_the_inverse_of_the_cumulative_distribution(monkeypatch):
    logits = random_logits(1, 3000, seed=19)
    logits[0, :700] = logits[0, 900:1300] = logits[0, 2990:] = -torch.inf  # whole blocks without a probability
    cumulative = logits.double().softmax(-1).cumsum(-1)[0]
    sampler = Sampler(1, do_sample=True, seed=0)
    for uniform in [*torch.linspace(0, 1 - 1e-9, 500, dtype=torch.float64).tolist(), math.nextafter(1.0, 0.0)]:
        monkeypatch.setattr(sampling.torch, "rand", lambda *a, uniform=uniform, **k: torch.tensor([uniform]).double())
        (token,) = sampler.choose(logits)
        assert bool(logits[0, token] > -torch.inf)
        assert float(cumulative[token]) > uniform - 1e-6
        assert token == 0 or float(cumulative[token - 1]) <= uniform + 1e-6


@pytest.mark.parametrize(
    "choice",
    [
        {},
        {"do_sample": True},
        {"do_sample": True, "top_k": 5, "top_p": 0.5},
        {"do_sample": True, "top_p": 0.5},
        {"do_sample": True, "min_p": 0.5},
    ],
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
    for rows in ([0, 1, 2], [0, 2], [2]):
        with pytest.raises(ArtifactError) as caught:
            Sampler(3, seed=0, **choice).choose(logits[rows], rows)
        assert str(caught.value) == expected
    assert len(Sampler(3, seed=0, **choice).choose(logits[:2], [0, 1])) == 2
