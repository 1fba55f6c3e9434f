"""What the theory needs to know of a weight: second moments of its taps, and of their sums over channels.

For an output channel o that reads C channels (of its group) through T taps, write W_oct. Inputs of covariance v and
common mean m give Σ_c Σ_t W_oct x_c(t) the moments, over o,

    mean        Σ_t b_t m(t)                              b_t   = E_o Σ_c W_oct
    covariance  Σ_tt' A_tt' v(t, t') + B_tt' m(t) m(t')   A_tt' = E_o Σ_c W_oct W_oct'
                                                          B_tt' = E_o (Σ_c W_oct)(Σ_c W_oct'),

less the product of means. Independent zero-mean weights of variance σ² have A = B = C σ² 1 and b = 0. Rows that sum
to zero, with squares that sum to s², have A = s²/T · 1, B = s²/T · (1 − 1/T), and b = 0: a mean that all channels and
taps share is cancelled, and what zero padding leaves out of the sum shows in B alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from .declared import declared_moments
from .grid import Array

_NOISE = 6.0  # standard errors up to which a covariance between taps is put down to sampling
_WEAK = 0.04  # and the share of the diagonal up to which it is left out anyway
_TOGETHER = 0.05  # the same for the sum of all covariances


@dataclass(frozen=True)
class WeightMoments:
    """A, B and b of a weight, and the mean and the variance of the bias; see the module's text.

    ``pairs`` is A: (taps,) if it is diagonal, else (taps, taps). ``channels`` is C, 0 if unknown, in each of
    ``groups``. ``norm_scatter`` is the relative variance over output channels of a row's sum of squares: 2 / (C T) for
    Gaussian weights, 0 for rows of a fixed norm.
    """

    pairs: Array
    sums: Array
    mean: Array
    bias_mean: float = 0.0
    bias_variance: float = 0.0
    channels: int = 0
    groups: int = 1
    norm_scatter: float = 0.0

    @property
    def taps(self) -> Array:
        """(taps,): the mean over output channels of the squares that each tap holds."""
        return self.pairs if self.pairs.ndim == 1 else np.diagonal(self.pairs)

    def scaled(self, factor: float) -> WeightMoments:
        """Of the weight and the bias times a number."""
        square = factor**2
        return replace(
            self,
            pairs=self.pairs * square,
            sums=self.sums * square,
            mean=self.mean * factor,
            bias_mean=self.bias_mean * factor,
            bias_variance=self.bias_variance * square,
        )


class DeclaresWeight(Protocol):
    """A layer that can say what its weight does without having one: the initialisation that it declares."""

    weight: Tensor

    def declared_weight(self) -> tuple[float, bool]:
        """Mean over outputs of the sum of squares of a row, and whether rows sum to zero."""


def declares_weight(module: Any) -> TypeGuard[DeclaresWeight]:
    """Whether a module is a :class:`DeclaresWeight`: by its one method, which is much quicker than by the protocol."""
    return hasattr(type(module), "declared_weight")


def of_tensor(weight: Tensor) -> WeightMoments:
    """The moments of an actual weight: (out, in / groups, *kernel) or (out, in)."""
    rows = weight.detach().flatten(2) if weight.ndim > 2 else weight.detach().unsqueeze(2)
    rows = rows.float() if rows.dtype in (torch.float16, torch.bfloat16) else rows
    out, channels, taps = rows.shape
    sums = rows.sum(dim=1).double()
    flat = rows.transpose(1, 2).reshape(out, taps, channels)
    pairs = torch.einsum("otc,osc->ts", flat, flat).double().numpy() / out if taps <= 128 else None
    if pairs is None or _is_diagonal(pairs, out * channels):
        pairs = rows.square().sum(dim=(0, 1)).double().numpy() / out
    norms = rows.square().sum(dim=(1, 2)).double()
    level = float(norms.mean())
    return WeightMoments(
        pairs,
        (sums.T @ sums / out).numpy(),
        sums.mean(dim=0).numpy(),
        channels=channels,
        norm_scatter=float(norms.var(unbiased=False)) / level**2 if level > 0 else 0.0,
    )


def independent(
    row_squares: float, taps: int, channels: int, mean: float = 0.0, kurtosis: float = 3.0
) -> WeightMoments:
    """Of independent weights: ``row_squares`` is the expected sum of squares of a row, ``kurtosis`` a weight's."""
    diagonal = np.full(taps, row_squares / taps)
    common = np.full(taps, mean * channels)
    return WeightMoments(
        diagonal,
        np.diag(diagonal) + np.outer(common, common),
        common,
        channels=channels,
        norm_scatter=(kurtosis - 1.0) / (taps * channels),
    )


def zero_sum(row_squares: float, taps: int, channels: int) -> WeightMoments:
    """Of standardized weights, whose rows of N elements sum to zero: Cov(W_j, W_k) = s² (δ_jk − 1/N) / (N − 1)."""
    fan_in = taps * channels
    if fan_in == 1:
        return independent(0.0, 1, 1)
    pairs = channels * row_squares * (np.eye(taps) - 1.0 / fan_in) / (fan_in - 1)
    sums = np.eye(taps) * row_squares / taps - row_squares / taps**2
    return WeightMoments(np.diagonal(pairs) if _is_diagonal(pairs) else pairs, sums, np.zeros(taps), channels=channels)


def _is_diagonal(pairs: Array, samples: int | None = None) -> bool:
    """Whether taps are uncorrelated but for sampling noise: one by one, and all together."""
    diagonal = np.diagonal(pairs)
    if abs(pairs.sum() - diagonal.sum()) > _TOGETHER * diagonal.sum():
        return False
    off = np.abs(pairs - np.diag(diagonal)) / np.sqrt(np.maximum(np.outer(diagonal, diagonal), 1e-300))
    noise = _NOISE / math.sqrt(samples) if samples else 0.0
    return bool(off.max(initial=0.0) <= max(noise, _WEAK))


def of_declared(shape: tuple[int, ...], module: nn.Module | None) -> WeightMoments:
    """The moments of a weight on the meta device: what its layer declares, what was noted when it was initialised
    (:func:`.without_weights`), or torch's default.

    ``nn.Conv*d`` and ``nn.Linear`` draw weights and bias from U(−1/√fan-in, 1/√fan-in): variance 1 / (3 · fan-in).
    """
    taps, channels = math.prod(shape[2:]), shape[1]
    if declares_weight(module):
        row_squares, sums_to_zero = module.declared_weight()
        return zero_sum(row_squares, taps, channels) if sums_to_zero else independent(row_squares, taps, channels)
    own = getattr(module, "weight", None)
    noted = declared_moments(own) if isinstance(own, Tensor) else None
    if noted is not None:
        mean, variance = noted
        return independent(taps * channels * (variance + mean**2), taps, channels, mean)
    return independent(1.0 / 3.0, taps, channels, kurtosis=1.8)
