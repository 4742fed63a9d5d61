from __future__ import annotations

import itertools

import pytest
import torch

from jettison.passes import whitening
from jettison.passes.factorizers import ASVD, SVD, SVDLLM
from jettison.passes.methods.base import InputStatistics
from jettison.passes.whitening import Spectrum, Whitening

SHAPES = [(48, 64), (64, 48), (40, 40)]


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def spectrum(matrix, moment, **options):
    shape = (matrix.shape[0], matrix.shape[1])
    return Spectrum(lambda start, stop: matrix[start:stop], shape, Whitening(moment), **options)


def product(found, rank):
    rows, columns = found.factors(rank)
    return rows.double() @ columns.double()


def energy(values):
    return float(values.square().sum())


@pytest.mark.parametrize("shape", SHAPES)
def test_what_is_lost_is_the_sum_of_the_other_singular_values(shape):
    matrix, inputs = drawn(*shape), drawn(400, shape[1], seed=1) @ drawn(shape[1], shape[1], seed=2)
    moment = inputs.T @ inputs
    values = torch.linalg.svdvals(matrix @ torch.linalg.cholesky(moment))
    found = spectrum(matrix, moment)
    assert found.total == pytest.approx(energy(matrix @ inputs.T), rel=1e-9)
    for rank in (1, 7, 30, min(shape)):
        lost = energy((matrix - product(found, rank)) @ inputs.T)
        assert lost == pytest.approx(energy(values[rank:]), rel=1e-5, abs=1e-9 * found.total)
        assert found.lost(rank) == pytest.approx(energy(values[rank:]) / found.total, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("tokens", [1, 20, 400])
def test_the_full_rank_is_the_matrix_whatever_the_inputs(shape, tokens):
    """Fewer tokens than channels: most directions have no input, and are kept all the same."""
    matrix, inputs = drawn(*shape), drawn(tokens, shape[1], seed=1)
    made = product(spectrum(matrix, (inputs.T @ inputs).float()), min(shape))
    assert (made - matrix).norm() < 1e-5 * matrix.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_few_tokens_need_no_more_rank_than_they_are(shape):
    matrix, inputs = drawn(*shape), drawn(12, shape[1], seed=1)
    found = spectrum(matrix, inputs.T @ inputs)
    expected = inputs @ matrix.T
    for rank in (12, 20):
        made = product(found, rank)
        assert bool(made.isfinite().all())
        assert (inputs @ made.T - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("shape", SHAPES)
def test_dead_channels_get_columns_of_zeros(shape):
    matrix, inputs = drawn(*shape), drawn(400, shape[1], seed=1)
    dead = [0, 5, shape[1] - 1]
    inputs[:, dead] = 0
    for moment in ((inputs.T @ inputs).float(), inputs.abs().mean(0)):
        rows, columns = spectrum(matrix, moment).factors(9)
        assert bool(rows.isfinite().all())
        assert bool(columns.isfinite().all())
        assert bool((columns[:, dead] == 0).all())
        assert bool((columns.abs().sum(0) > 0).sum() == shape[1] - len(dead))


def test_no_input_at_all_gives_zeros_and_no_nan():
    for shape in SHAPES:
        found = spectrum(drawn(*shape), torch.zeros(shape[1], shape[1]))
        assert (found.total, found.lost(3)) == (0.0, 0.0)
        assert bool(product(found, 3).isfinite().all())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_of_low_rank_is_found_exactly(shape):
    matrix = drawn(shape[0], 5) @ drawn(5, shape[1], seed=3)
    inputs = drawn(400, shape[1], seed=1)
    found = spectrum(matrix, inputs.T @ inputs)
    for rank in (5, 11):
        assert (product(found, rank) - matrix).norm() < 1e-5 * matrix.norm()
    assert found.lost(4) > 1e-3


def test_errors_fall_with_the_rank():
    matrix, inputs = drawn(64, 48), drawn(200, 48, seed=1)
    found = spectrum(matrix, inputs.T @ inputs)
    lost = [energy((matrix - product(found, rank)) @ inputs.T) for rank in range(1, 49)]
    assert all(later < earlier for earlier, later in itertools.pairwise(lost))


def statistics(inputs):
    found = InputStatistics(inputs.shape[1])
    found.add(inputs.float())
    return found


def lost_by(method, matrix, inputs, rank):
    made = product(spectrum(matrix, method.second_moment(inputs.shape[1], statistics(inputs))), rank)
    return energy((matrix - made) @ inputs.T) / energy(matrix @ inputs.T)


def test_whitening_beats_scaling_and_nothing_on_correlated_inputs():
    matrix = drawn(64, 48)
    sizes = torch.linspace(-2, 2, 48, dtype=torch.float64).exp()
    inputs = (drawn(400, 12, seed=1) @ drawn(12, 48, seed=2) + 0.1 * drawn(400, 48, seed=3)) * sizes
    plain, scaled, whitened = (lost_by(method, matrix, inputs, 12) for method in (SVD(), ASVD(), SVDLLM()))
    assert whitened < 0.5 * scaled < 0.5 * plain


def test_without_correlation_all_are_the_same():
    matrix = drawn(64, 48)
    inputs = torch.linalg.qr(drawn(400, 48, seed=1)).Q
    first, *others = (lost_by(method, matrix, inputs, 12) for method in (SVD(), ASVD(alpha=0.0), SVDLLM()))
    assert others == pytest.approx([first, first], rel=1e-4)


def test_no_change_of_coordinates_matters_to_whitening_alone():
    matrix, inputs = drawn(64, 48), drawn(400, 48, seed=1)
    change = drawn(48, 48, seed=2)
    turned = matrix @ torch.linalg.inv(change)
    assert lost_by(SVDLLM(), turned, inputs @ change.T, 12) == pytest.approx(
        lost_by(SVDLLM(), matrix, inputs, 12), rel=1e-3
    )
    assert lost_by(SVD(), turned, inputs @ change.T, 12) > 1.1 * lost_by(SVD(), matrix, inputs, 12)


@pytest.mark.parametrize("shape", [(128, 160), (160, 128)])
def test_the_randomised_path_loses_as_little(shape, monkeypatch):
    """Singular values that fall slowly are the hard case."""
    monkeypatch.setattr(whitening, "_LARGE", 64)
    monkeypatch.setattr(whitening, "_SMALL_SHARE", 2)
    matrix, inputs = drawn(*shape), drawn(500, shape[1], seed=1) * torch.linspace(0.2, 1, shape[1], dtype=torch.float64)
    moment = inputs.T @ inputs
    whole, part = spectrum(matrix, moment), spectrum(matrix, moment, most=20, seed=3)
    assert len(part.energies) < len(whole.energies)
    lost = [energy((matrix - product(each, 20)) @ inputs.T) for each in (whole, part)]
    assert lost[0] < lost[1] < 1.01 * lost[0]
    assert part.lost(20) == pytest.approx(whole.lost(20), rel=0.01)
    again = spectrum(matrix, moment, most=20, seed=3)
    assert torch.equal(again.factors(20)[0], part.factors(20)[0])


def test_halves_of_the_singular_values_are_in_either_factor():
    for shape in SHAPES:
        inputs = drawn(400, shape[1], seed=1)
        found = spectrum(drawn(*shape), inputs.T @ inputs)
        rows, _ = found.factors(6)
        assert rows.norm(dim=0) == pytest.approx(found.energies[:6].pow(0.25).float(), rel=1e-4)
