"""Functions of a standard normal, known by their values at fixed nodes: averages, covariances, quantiles."""

from __future__ import annotations

import math

import numpy as np

from .grid import Array
from .normal import ndtr

NODES = np.linspace(-7.5, 7.5, 241)
WEIGHTS = np.exp(-0.5 * NODES**2)
WEIGHTS /= WEIGHTS.sum()
_DEGREE = 32
_TAIL = 3 * _DEGREE
"""Power that the terms beyond the last degree are given together. For a function with a kink a_k² falls as
k^(-5/2), and then this power gives the sum the right derivative at ρ = 1."""


def _hermite() -> Array:
    """(nodes, degrees + 1): normalised Hermite polynomials times the nodes' weights."""
    columns = [np.ones_like(NODES), NODES]
    for k in range(2, _DEGREE + 1):
        columns.append((NODES * columns[-1] - np.sqrt(k - 1) * columns[-2]) / np.sqrt(k))
    return np.stack(columns, axis=1) * WEIGHTS[:, None]


HERMITE = _hermite()


def mehler(coefficients: Array, variance: float, correlation: Array) -> Array:
    """Cov(f(z), f(z')) for z, z' of the given correlations, from the coefficients and the variance of f."""
    squares = coefficients**2
    squares[0] = 0.0
    return series(squares, max(variance - float(squares.sum()), 0.0), correlation)


def series(terms: Array, tail: float, correlation: Array) -> Array:
    """Σ_k terms_k ρ^k, and what lies beyond the last degree."""
    total = np.zeros_like(correlation)
    for term in terms[::-1]:
        total = total * correlation + term
    return total + tail * np.sign(correlation) * np.abs(correlation) ** _TAIL


def mehler_pairs(coefficients: Array, tail: Array, correlation: Array) -> Array:
    """Cov(f(z), g(z')) for all pairs of functions: (n, degrees + 1), (n,) and (n, n) to (n, n)."""
    total = np.zeros_like(correlation)
    largest = float(np.abs(correlation).max(initial=0.0))
    if largest == 0.0:
        return total
    degree = coefficients.shape[1] - 1
    if largest < 0.5:  # later powers are below rounding
        degree = min(degree, math.ceil(-25.0 / math.log(largest)))
    for k in range(degree, 0, -1):
        column = coefficients[:, k]
        total += column[:, None] * column
        total *= correlation
    return (
        total if largest < 0.5 else total + np.outer(tail, tail) * np.sign(correlation) * np.abs(correlation) ** _TAIL
    )


def standardise(values: Array) -> Array | None:
    """Quantiles at the nodes shifted and scaled to mean 0 and variance 1; None if they are a Gaussian's."""
    values = values - WEIGHTS @ values
    scale = np.sqrt(WEIGHTS @ values**2)
    if not scale > 0:
        return None
    values = values / scale
    return None if is_gaussian(values) else values


def weighted_quantiles(values: Array, weights: Array) -> Array:
    """(nodes,): the quantiles of a weighted sample at the normal distribution's levels of the nodes."""
    order = np.argsort(values, kind="stable")
    level = np.cumsum(weights[order]) - 0.5 * weights[order]
    return np.interp(ndtr(NODES), level, values[order])


def is_gaussian(shape: Array) -> bool:
    """Whether quantiles at the nodes are the nodes themselves."""
    return bool(WEIGHTS @ (shape - NODES) ** 2 < 1e-6)
