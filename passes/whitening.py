"""The products of two thin matrices that stand best for a matrix, given what the matrix is multiplied with.

For `W [N, K]` and inputs whose second moment is `G = sum x x^T = S S^T`, the matrix of rank r that loses least,
`sum |W x - A B x|^2`, is `U U^T W`: U are the first r left singular vectors of `W S`, and what is lost is exactly the
sum of the squares of the other singular values. Half of a singular value goes to each factor: `A = U s` and
`B = U^T W / s` with `s = sqrt(sigma)`, so that neither has columns that stand out when it is rounded.

- Written as a projection of W, nothing is ever divided by S: a singular moment (dead channels, fewer tokens than
  channels) gives no infinity, and the full rank gives W back, also in directions that no token has. But channels
  that are always zero get columns of zeros, since nothing is known of them.
- The smaller side is factorised. `N <= K`: U are the eigenvectors of `W G W^T`, and S is not needed. `N > K`: with the
  eigenvectors Z of `S^T (W^T W) S`, `U = W S Z / sigma`, so that W is read a few rows at a time and may be mapped from
  a file.
- S is the Cholesky factor of G. Where G is singular, or nearly: its eigenvectors, with eigenvalues clamped from below.
- A rank far below the size takes a subspace iteration (oversampled, with power iterations) instead of all eigenvectors.

Source: SVD-LLM (arXiv 2403.07378), which divides by S; randomised range finder: Halko et al. (arXiv 0909.4061).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import TypeAlias

import torch
from torch import Tensor

from jettison.ir.constants import Constant

RowReader: TypeAlias = Callable[[int, int], Tensor]

# Of the largest eigenvalue: what smaller ones count as, and the smallest square of a pivot that Cholesky is trusted
# with. Sums of products in f32 are known to about this.
_FLOOR = 1e-8
# Singular values below this share of the largest are lost in the squares that eigenvalues are.
_SMALLEST = 1e-7
# The randomised path: vectors beyond the rank, power iterations, and the sizes where it is faster than the whole one.
_OVERSAMPLED, _ITERATIONS = 16, 4
_LARGE, _SMALL_SHARE = 1024, 8
_CHUNK_ENTRIES = 1 << 21


class Whitening:
    """The second moment of an input.

    Attributes:
        moment: `[K, K]` or, of independent channels, `[K]`; any floating dtype, not to be changed.
        dead: `[K] bool`, channels that are always zero.

    Args:
        moment: As above.
    """

    def __init__(self, moment: Tensor) -> None:
        self.moment = moment
        self._energies: dict[int, float] = {}
        self.dead = (moment.diagonal() if moment.dim() == 2 else moment) <= 0

    @cached_property
    def root(self) -> Tensor:
        """S with `S S^T` the moment: `[K, K] f64`, or `[K] f64`."""
        moment = self.moment.to(torch.float64)
        if moment.dim() == 1:
            return moment.clamp_min(0).sqrt()
        found, info = torch.linalg.cholesky_ex(moment)
        pivots = found.diagonal().square()
        if int(info) == 0 and float(pivots.min()) > _FLOOR * float(moment.diagonal().max()):
            return found
        values, vectors = torch.linalg.eigh(moment)
        return vectors * values.clamp_min(_FLOOR * float(values[-1])).sqrt()

    def energy(self, weight: Constant) -> float:
        """`sum |W x|^2`, to f32.

        Args:
            weight: W, `[N, K]`.
        """
        if weight.serial not in self._energies:
            total, moment = 0.0, self.moment.to(torch.float32)
            for start, stop in weight.row_chunks():
                rows = weight.rows(start, stop).to(torch.float32)
                met = rows * moment if moment.dim() == 1 else rows @ moment
                total += float((met * rows).sum(dtype=torch.float64))
            self._energies[weight.serial] = max(total, 0.0)
        return self._energies[weight.serial]

    def between(self, weight: Tensor) -> Tensor:
        """`weight @ moment` in f64, to the digits that the moment has.

        Args:
            weight: `[n, K] f64`.
        """
        if self.moment.dim() == 1:
            return weight * self.moment.to(torch.float64)
        return (weight.to(self.moment.dtype) @ self.moment).to(torch.float64)


class Spectrum:
    """The singular values of `W S`, and the best factors of W of any rank.

    Attributes:
        shape: `(N, K)` of W.
        total: Sum of all squares: `sum |W x|^2`.

    Args:
        rows: `rows(start, stop)` are rows of W, any floating dtype; asked for again when factors are.
        shape: `(N, K)`.
        whitening: Of what W is multiplied with.
        most: The largest rank that will be asked for; None for any.
        seed: Of the randomised path.
    """

    def __init__(
        self, rows: RowReader, shape: tuple[int, int], whitening: Whitening, most: int | None = None, seed: int = 0
    ) -> None:
        self.shape, self._rows, self._whitening = shape, rows, whitening
        self._square: Tensor | None = None
        self._projection: Tensor | None = None
        if self._is_wide:
            weight = self._read(0, shape[0])
            between = whitening.between(weight) @ weight.T
        else:
            self._square = torch.zeros(shape[1], shape[1], dtype=torch.float64)
            for start, stop in self._chunks():
                chunk = self._read(start, stop)
                self._square.addmm_(chunk.T, chunk)
            root = whitening.root
            left = root[:, None] * self._square if root.dim() == 1 else root.T @ self._square
            between = left * root if root.dim() == 1 else left @ root
        self._between = (between + between.T) / 2
        self.total = max(float(between.trace()), 0.0)
        size = len(between)
        is_few = most is not None and size >= _LARGE and (most + _OVERSAMPLED) * _SMALL_SHARE <= size
        self._drawn = most + _OVERSAMPLED if most is not None and is_few else None
        self._seed = seed

    @cached_property
    def _solved(self) -> tuple[Tensor, Tensor]:
        """Squares of the singular values and their vectors, from the largest on."""
        values, vectors = _leading(self._between, self._drawn, self._seed)
        return values.clamp_min(0), vectors

    @cached_property
    def energies(self) -> Tensor:
        """`[R] f64`, squares of the singular values from the largest on; only some of them where `most` is few.

        Without the vectors, which take four times as long, until somebody has asked for those.
        """
        if self._drawn is not None or "_solved" in self.__dict__:
            return self._solved[0]
        return torch.linalg.eigvalsh(self._between).flip(0).clamp_min(0)

    @property
    def _vectors(self) -> Tensor:
        return self._solved[1]

    @property
    def _is_wide(self) -> bool:
        return self.shape[0] <= self.shape[1]

    def _read(self, start: int, stop: int) -> Tensor:
        return self._rows(start, stop).to(torch.float64)

    def _chunks(self) -> list[tuple[int, int]]:
        step = max(1, _CHUNK_ENTRIES // self.shape[1])
        return [(start, min(start + step, self.shape[0])) for start in range(0, self.shape[0], step)]

    def lost(self, rank: int) -> float:
        """Share of `sum |W x|^2` that the best matrix of a rank loses."""
        if not self.total:
            return 0.0
        return min(1.0, max(0.0, 1 - float(self.energies[:rank].sum()) / self.total))

    def _scales(self, rank: int) -> tuple[Tensor, Tensor]:
        """Singular values and their roots, `[r] f64`; those that are nothing beside the largest count as more."""
        sigma = self.energies[:rank].sqrt()
        sigma = sigma.clamp_min(max(float(sigma[0]) * _SMALLEST, 1e-150))
        return sigma, sigma.sqrt()

    def factors(self, rank: int) -> tuple[Tensor, Tensor]:
        """The best factors.

        Args:
            rank: r, at most the smaller side of W, and `most`.

        Returns:
            A `[N, r]` and B `[r, K]`, f32.
        """
        rows = torch.empty(self.shape[0], rank)
        for start, stop in self._chunks():
            rows[start:stop] = self.rows(rank, start, stop)
        return rows, self.columns(rank)

    def rows(self, rank: int, start: int, stop: int) -> Tensor:
        """Rows `[start, stop)` of A, f32; see `factors`."""
        if self._is_wide:
            _, halves = self._scales(rank)
            return (self._vectors[start:stop, :rank] * halves).to(torch.float32)
        return (self._read(start, stop) @ self._projected(rank)).to(torch.float32)

    def columns(self, rank: int) -> Tensor:
        """B `[r, K] f32`; see `factors`."""
        _, halves = self._scales(rank)
        if self._square is None:
            columns = (self._vectors[:, :rank] / halves).T @ self._read(0, self.shape[0])
        else:
            columns = (self._projected(rank) / halves.square()).T @ self._square
        columns[:, self._whitening.dead] = 0
        return columns.to(torch.float32)

    def _projected(self, rank: int) -> Tensor:
        """What rows of W are multiplied with to give rows of A: `[K, r] f64`, of more rows than columns."""
        if self._projection is None or self._projection.shape[1] != rank:
            sigma, halves = self._scales(rank)
            root, leading = self._whitening.root, self._vectors[:, :rank] * (halves / sigma)
            made = root[:, None] * leading if root.dim() == 1 else root @ leading
            # Directions below the clamp are noise.
            self._projection = made * (self.energies[:rank].sqrt() >= sigma)
        return self._projection


def _leading(matrix: Tensor, drawn: int | None, seed: int) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a symmetric matrix `[n, n]` from the largest on, all or some; their vectors `[n, R]`."""
    if drawn is None:
        values, vectors = torch.linalg.eigh(matrix)
        return values.flip(0), vectors.flip(1)
    generator = torch.Generator().manual_seed(seed)
    basis = matrix @ torch.randn(len(matrix), drawn, generator=generator, dtype=torch.float64)
    for _ in range(_ITERATIONS):
        basis = matrix @ torch.linalg.qr(basis).Q
    basis = torch.linalg.qr(basis).Q
    values, turned = torch.linalg.eigh(basis.T @ matrix @ basis)
    return values.flip(0), basis @ turned.flip(1)
