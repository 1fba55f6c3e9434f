"""What the theory knows about an activation, and what an elementwise function makes of it.

**The ensemble.** In a wide random network an activation x_c(n, p), of channel c, example n and position p, is one
sample per channel of a process over (n, p). Its first two moments over channels are

* the common mean m(p) = E_c x_c(n, p),
* the covariance of two examples, K(p, p') = Cov_c(x_c(n, p), x_c(n', p')), n ≠ n': what is left of it after averaging
  over many examples is the variance over channels of the channel means,
* the excess covariance of two positions of one example, W(p, p') = Cov_c(x_c(n, p), x_c(n, p')) − K(p, p'), which
  is a matter of the distance between them: w(p) at distance 0, falling as ``near`` with the offset, to ``far``.

This is the kernel of a wide network (Lee et al. 2018; Garriga-Alonso et al. 2019) with its two arguments an example
and another one. The Signal Propagation Plot is read off it: averaged over positions p, p' and over N examples,

    average channel squared mean = mean of m(p) m(p') + K(p, p') + W(p, p') / N
    average channel variance     = mean of m(p)² + K(p, p) + w(p), minus the squared mean.

**The distribution.** A sum of many independent terms is Gaussian. What an elementwise function makes of it is a
function of that Gaussian, its latent, and stays known as such: as values at fixed nodes of a standard normal z, one
row for each cell. Two activations with the same latent (x and sigmoid(x), say) are combined exactly. The covariance
follows from Mehler's formula: with the coefficients a_k of a function in normalised Hermite polynomials,
Cov(f(z), g(z')) = Σ_{k≥1} a_k b_k ρ^k for latents of correlation ρ.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from .grid import Array, Grid
from .offsets import delta
from .quadrature import (
    HERMITE,
    NODES,
    WEIGHTS,
    is_gaussian,
    mehler,
    mehler_pairs,
    series,
    standardise,
    weighted_quantiles,
)
from .spread import FOURTH, Spread, middle

_TINY = 1e-30


@dataclass(eq=False)
class Latent:
    """The standard normal field behind an activation.

    Attributes:
        cross: (cells, cells), correlation of two examples.
        near: correlation of two positions of one example, by offset.
        far: the same beyond the last offset.
        spread: scatter of its kernels in a finite width.
    """

    cross: Array
    near: Array
    far: float
    spread: Spread | None = None


@dataclass(eq=False)
class State:
    """Statistics of an activation over channels, examples and positions; see the module's text.

    Attributes:
        grid: its positions.
        mean: (cells,), m.
        cross: (cells, cells), K.
        within: (cells,), w.
        near: W by offset, relative to w: 1 in the middle; odd sizes.
        far: W beyond the last offset, relative to w.
        shape: (nodes,), the standardised distribution's quantiles at the nodes; None for a Gaussian.
        scatter: variance over channels of the correlation of neighbours, by offset as ``near``; None for nothing.
        parts: which independent sources it is the sum of, and with what coefficient.
        padding: −∞ in front of and behind every axis, put there for a max-pool to come.
        simplex: entropy-like summary of attention weights: E[Σ_j a_j²] · positions; None for anything else.
        spread: scatter of the kernels in a finite width; None for none.
    """

    grid: Grid
    mean: Array
    cross: Array
    within: Array
    near: Array
    far: float = 0.0
    shape: Array | None = None
    parts: dict[State, float] = field(default_factory=dict, repr=False)
    scatter: Array | None = field(default=None, repr=False)
    padding: tuple[tuple[int, int], ...] = ()
    simplex: float | None = None
    spread: Spread | None = field(default=None, repr=False)
    _latent: Latent | None = field(default=None, repr=False)
    _values: Array | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        self.within = np.maximum(self.within, 0.0)
        self.cross = _clipped(self.cross, self.within)
        if not self.parts:
            self.parts = {self: 1.0}

    # making one

    @classmethod
    def noise(cls, sizes: Sequence[int]) -> State:
        """White noise: N(0, 1), independent everywhere."""
        grid = Grid(tuple(sizes))
        cells = grid.cells
        return cls(grid, np.zeros(cells), np.zeros((cells, cells)), np.ones(cells), delta(grid))

    @classmethod
    def constant(cls, value: float, sizes: Sequence[int] = ()) -> State:
        """The same number everywhere."""
        grid = Grid(tuple(sizes))
        cells = grid.cells
        return cls(grid, np.full(cells, float(value)), np.zeros((cells, cells)), np.zeros(cells), delta(grid))

    def with_moments(self, mean: Array, cross: Array, within: Array, **changes: object) -> State:
        """A new source on the same grid, Gaussian unless a ``shape`` is given."""
        options: dict[str, object] = {
            "near": self.near,
            "far": self.far,
            "scatter": self.scatter,
            "simplex": None,
            "spread": self.spread,
            **changes,
        }
        return State(self.grid, mean, cross, within, **options)  # type: ignore[arg-type]

    # moments

    @property
    def variance(self) -> Array:
        """(cells,): over channels and examples."""
        return np.maximum(np.diagonal(self.cross) + self.within, 0.0)

    @cached_property
    def second_moment(self) -> float:
        """Mean over positions of the second moment."""
        return float(self.grid.share @ (self.mean**2 + self.variance))

    @cached_property
    def average_variance(self) -> float:
        """Mean over positions of the variance over channels and examples."""
        return float(self.grid.share @ self.variance)

    @property
    def is_constant(self) -> bool:
        """Whether all channels and examples have the same value."""
        return self.average_variance <= 1e-24 * (1.0 + float(np.max(self.mean**2)))

    @cached_property
    def _pairs_at_offsets(self) -> Array:
        """Number of pairs of positions at every offset of ``near``."""
        counts = np.ones(())
        for size, length in zip(self.grid.sizes, self.near.shape, strict=True):
            axis = np.maximum(size - np.abs(np.arange(length) - length // 2), 0)
            counts = np.multiply.outer(counts, axis.astype(float))
        return counts

    def pooled_near(self) -> float:
        """Mean of the excess correlation over all pairs of positions."""
        counts, pairs = self._pairs_at_offsets, float(self.grid.positions) ** 2
        return float(((counts * self.near).sum() + (pairs - counts.sum()) * self.far) / pairs)

    def statistics(self, examples: int) -> tuple[float, float]:
        """Average channel squared mean and variance of a batch of so many examples."""
        share = self.grid.share
        squared_mean = float(share @ self.mean) ** 2 + float(share @ self.cross @ share) + self.chance(examples)
        squared_mean = max(squared_mean, 0.0)  # behind BatchNorm it is a difference of equals
        return squared_mean, max(self.second_moment - squared_mean, 0.0)

    def chance(self, examples: int) -> float:
        """What the excess covariance leaves in the squared channel means of so many examples: the mean of W, over N."""
        return float(self.grid.share @ np.sqrt(self.within)) ** 2 * self.pooled_near() / max(examples, 1)

    def near_at(self, offsets: Array) -> Array:
        """Excess correlation at integer offsets (..., axes): (...)."""
        centre = np.array([n // 2 for n in self.near.shape])
        index = offsets.astype(int) + centre
        inside = ((index >= 0) & (index < np.array(self.near.shape))).all(axis=-1)
        safe = np.where(inside[..., None], index, centre)
        return np.where(inside, self.near[tuple(np.moveaxis(safe, -1, 0))], self.far)

    # distribution

    @property
    def values(self) -> Array:
        """(cells, nodes): what the activation is at the nodes of its latent."""
        if self._values is None:
            shape = NODES if self.shape is None else self.shape
            self._values = self.mean[:, None] + np.sqrt(self.variance)[:, None] * shape
        return self._values

    @property
    def latent(self) -> Latent:
        """The Gaussian field that the values are a function of."""
        if self._latent is None:
            self._latent = self._invert()
        return self._latent

    def _invert(self) -> Latent:
        """The latent's correlations that give the covariances, the distribution being ``shape``."""
        deviation = np.sqrt(np.maximum(self.variance, _TINY))
        cross = np.clip(self.cross / np.outer(deviation, deviation), -1.0, 1.0)
        common, own = self._split()
        near, far = common + own * self.near, common + own * self.far
        if self.shape is not None:
            correlation = np.linspace(-1.0, 1.0, 201)
            covariance = mehler(HERMITE.T @ self.shape, 1.0, correlation)
            order = np.maximum.accumulate(covariance)
            cross = np.interp(cross, order, correlation)
            near, far = np.interp(near, order, correlation), float(np.interp(far, order, correlation))
        return Latent(cross, np.clip(near, -1.0, 1.0), float(np.clip(far, -1.0, 1.0)), self.spread)

    def _split(self) -> tuple[float, float]:
        """Shares of the average variance that two examples have in common, and that they have not."""
        total = max(self.average_variance, _TINY)
        own = float(self.grid.share @ self.within) / total
        return 1.0 - own, own

    def standardised(self) -> Array:
        """(nodes,): the average distribution's quantiles, with mean 0 and variance 1."""
        if self.shape is not None:
            return self.shape
        if self._values is None:
            return NODES
        average = np.sort(self.grid.share @ self._values) if _is_monotone(self._values) else self._quantiles()
        average = average - WEIGHTS @ average
        scale = np.sqrt(WEIGHTS @ average**2)
        return average / scale if scale > 0 else NODES

    def _quantiles(self) -> Array:
        values = self.grid.share @ self.values
        return weighted_quantiles(values, WEIGHTS)

    def sampling(self, shift: float = 0.0) -> tuple[Array, Array]:
        """What C independent channels add to C times the scatter of the kernels of x − m + shift, by offset.

        With V and c(d) the variance and the correlation, and u = V + shift², the covariance over channels of
        x(s) x(s') and x(s + d) x(s' + d) for two unrelated sites is V² c² + 2 shift² V c, relative to u² what is
        added to Q. That of x(s)² and x(s + d)², for R, follows from Mehler's formula, and is 2 V² c² + 4 shift² V c
        for a Gaussian. What unrelated sites share of it is one number for all of them, another network's another, and
        is taken out of R.
        """
        common, own = self._split()
        level = self.average_variance
        part = level / max(level + shift**2, _TINY)

        def gaussian(correlation: Array) -> Array:
            return part**2 * correlation**2 + 2.0 * part * (1.0 - part) * correlation

        pairs = gaussian(common + own * self.near)
        if self.shape is None and self._values is None:
            return pairs, 2.0 * (pairs - gaussian(np.asarray(common)))
        values = self.standardised() if self._values is None else self.grid.share @ self._values
        values = values - WEIGHTS @ values
        second = float(WEIGHTS @ values**2)
        if not second > 0.0:
            return pairs, 2.0 * (pairs - gaussian(np.asarray(common)))
        squares = (values * math.sqrt(part / second) + math.sqrt(1.0 - part)) ** 2
        terms = (squares @ HERMITE) ** 2
        terms[0] = 0.0
        tail, share = max(float(WEIGHTS @ (squares - 1.0) ** 2) - float(terms.sum()), 0.0), self.grid.share
        unrelated = series(terms, tail, np.clip(share @ self.latent.cross @ share, -1.0, 1.0))
        return pairs, series(terms, tail, self.latent.near) - unrelated

    # elementwise

    def map(self, function: Callable[[Array], Array]) -> State:
        """An elementwise function of the activation."""
        return elementwise(lambda values: function(values[0]), [self])

    def scaled(self, factor: float, shift: float = 0.0) -> State:
        """factor · x + shift: exact, and keeps everything that is known."""
        shape = self.shape
        if factor < 0 and shape is not None:
            shape = -shape  # a decreasing function of the same latent
        return State(
            self.grid,
            self.mean * factor + shift,
            self.cross * factor**2,
            self.within * factor**2,
            self.near,
            self.far,
            shape,
            {source: coefficient * factor for source, coefficient in self.parts.items()},
            self.scatter,
            self.padding,
            None,
            self.spread,
            self.latent,
            self.values * factor + shift,
        )


def elementwise(function: Callable[[list[Array]], Array], states: Sequence[State]) -> State:
    """A function of activations that share one latent, or are constant.

    Args:
        function: takes (cells, nodes) arrays, one for each state, or (1, 1) ones.

    Raises:
        ValueError: two of them have different latents.
    """
    varying = [state for state in states if not state.is_constant]
    if not varying:
        largest = max(states, key=lambda state: state.grid.cells)
        with np.errstate(all="ignore"):
            values = function([np.broadcast_to(state.mean, largest.mean.shape)[:, None].copy() for state in states])
        mean = np.broadcast_to(np.asarray(values, float).reshape(-1), (largest.grid.cells,)).copy()
        return largest.with_moments(mean, np.zeros_like(largest.cross), np.zeros_like(largest.within))
    base = max(varying, key=lambda state: state.grid.cells)
    latent = base.latent
    if any(state.latent is not latent for state in varying):
        raise ValueError("these activations are not functions of one latent")
    with np.errstate(all="ignore"):
        shape = base.values.shape
        operands = [state.mean[:, None] if state.is_constant else state.values for state in states]
        values = np.asarray(function([np.broadcast_to(values, shape).copy() for values in operands]), float)
    return from_values(base, values, latent)


def from_values(base: State, values: Array, latent: Latent) -> State:
    """The state of a function of ``latent`` that is known by its values at the nodes."""
    coefficients = values @ HERMITE  # (cells, degrees + 1)
    mean = coefficients[:, 0]
    variance = ((values - mean[:, None]) ** 2) @ WEIGHTS
    tail = np.sqrt(np.maximum(variance - (coefficients[:, 1:] ** 2).sum(axis=1), 0.0))
    cross = mehler_pairs(coefficients, tail, latent.cross)
    share = base.grid.share
    squares = share @ coefficients[:, 1:] ** 2
    tail_square = float(share @ tail**2)
    terms = np.concatenate([[0.0], squares])
    common = float(share @ np.diagonal(cross))
    same = series(terms, tail_square, latent.near) - common
    far = float(series(terms, tail_square, np.array(latent.far)) - common)
    spread = None
    if latent.spread is not None and np.isfinite(values).all():
        mean, variance, cross, spread = _scattered(base, values, coefficients, terms, latent, variance, cross)
        same = same + spread.common * float(share @ variance)
    within = variance - np.diagonal(cross)
    own = max(float(share @ within), _TINY)
    near = np.asarray(same / own)
    near[tuple(n // 2 for n in near.shape)] = 1.0  # also for the () of a pooled activation
    return State(
        base.grid, mean, cross, within, near, far / own, None, {}, base.scatter, (), None, spread, latent, values
    )


def _scattered(
    base: State, values: Array, coefficients: Array, terms: Array, latent: Latent, variance: Array, cross: Array
) -> tuple[Array, Array, Array, Spread]:
    """Mean, variance and K with what the scatter of the latent's kernels adds, and the scatter that goes on.

    See :mod:`.spread`. Where K is not small, what scatters is a correlation, by (1 − ρ²)² Q.
    """
    spread, share = latent.spread, base.grid.share
    assert spread is not None
    norm = middle(spread.norms) + 2.0 * spread.own
    second = values**2 @ HERMITE[:, [2, 4]]  # of the square, by cells
    mean = coefficients[:, 0] + FOURTH * norm * coefficients[:, 4]
    moment = variance + coefficients[:, 0] ** 2 + FOURTH * norm * second[:, 1]
    shifted = np.maximum(moment - mean**2, 0.0)
    rho = float(np.clip(share @ latent.cross @ share, -1.0, 1.0))
    degree = np.arange(len(terms))
    bend = float((degree * (degree - 1) * terms)[2:] @ rho ** degree[:-2]) * (1.0 - rho**2) ** 2
    cross = cross + 0.5 * bend * spread.between_channels
    total = max(float(share @ shifted), _TINY)
    slope = float((degree * terms)[1:] @ rho ** degree[:-1]) / max(float(terms.sum()), _TINY)
    response = float(share @ (second[:, 0] - 2.0 * coefficients[:, 0] * coefficients[:, 2])) / math.sqrt(2.0) / total
    through = Spread(
        spread.pairs * slope**2,
        spread.norms * response**2,
        (terms[1] * spread.common + 0.5 * terms[2] * spread.norms) / total,
        spread.own * slope**2,
    )
    return mean, shifted, cross, through


def sum_shape(first: State, second: State) -> Array | None:
    """The standardised distribution of a sum of independent activations; None if it is Gaussian enough."""
    shapes = first.standardised(), second.standardised()
    if all(is_gaussian(shape) for shape in shapes):
        return None
    coarse = slice(0, None, 5)
    weights = WEIGHTS[coarse] / WEIGHTS[coarse].sum()
    deviations = [np.sqrt(state.average_variance) for state in (first, second)]
    values = np.add.outer(shapes[0][coarse] * deviations[0], shapes[1][coarse] * deviations[1]).reshape(-1)
    return standardise(weighted_quantiles(values, np.outer(weights, weights).reshape(-1)))


def _is_monotone(values: Array) -> bool:
    return bool((np.diff(values, axis=1) >= -1e-9).all())


def _clipped(cross: Array, within: Array) -> Array:
    """Without negative variances. Two examples may well differ in sign: removing a batch's mean makes them do so."""
    diagonal = np.diagonal(cross)
    if (diagonal < -within).any():
        cross = cross.copy()
        np.fill_diagonal(cross, np.maximum(diagonal, -within))
    return cross
