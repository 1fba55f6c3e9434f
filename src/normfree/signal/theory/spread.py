"""What is left of a finite width: how far the kernels of one network's layers scatter about the limit of many channels.

A layer that reads C channels through T taps hands on the sample covariances of those channels, not the expected ones.
For sites s = (example, position), write K̂(s, s') for the covariance over output channels that the inputs at hand give
a fresh layer, and v̂(s) = K̂(s, s). About their averages (K, v) they scatter, to first order in 1/width, with

    Q(d) = Cov[K̂(s, s'), K̂(s + d, s' + d)] / v²   of two sites of different examples,
    R(d) = Cov[v̂(s), v̂(s + d)] / v².

White noise read through F = C T weights has Q(0) = 1/F and R(0) = 2/F. An elementwise g with normalised Hermite
coefficients a_k (of the latent) turns the scatter into three things of its own order:

* E g(s) g(s') is Σ_k a_k² ρ^k, and the mean over ρ's scatter adds ½ F''(ρ) Q to K: **channel means** differ by
  that much even if all examples are independent. Rows with a fixed norm give all channels the same variance, and
  take 1/F off Q: of white noise nothing is left (``own`` below);
* the mean over channels at one site, m(s) = E_c g(x_c(s)), follows v̂(s): it has a variance over sites of
  (∂m/∂ln v)² R = a_2² R / 2, which all channels have in **common**. Rows that sum to zero cancel it;
* the mean and the second moment shift by ½ v² ∂²/∂v² of themselves times R, which is √24/8 a_4 R. Rows of a fixed
  norm take 2/F off here: a channel of white noise is exactly Gaussian, whatever the width.

The scatter that remains goes on: F'(ρ)² of Q, and (∂ln V/∂ln v)² of R, which is all of it for a rectifier.
Source: the 1/width expansion of kernels (Yaida 2020; Hanin and Nica 2020), here for convolutions and standardized rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .grid import Array

FOURTH = math.sqrt(24.0) / 8.0
"""½ v² d²/dv² E g(√v z) as a multiple of the fourth normalised Hermite coefficient."""


@dataclass(frozen=True, eq=False)
class Spread:
    """The scatter of an activation's kernels, relative to its average variance (squared), by offset.

    Attributes:
        pairs: Q.
        norms: R.
        common: variance over sites of the mean over channels, relative to the average variance.
        own: what channels of one group, or rows whose norms differ or do not, add to Q(0) of each other, but not to
            what all channels together hand on.
    """

    pairs: Array
    norms: Array
    common: Array
    own: float = 0.0

    def laid_out(self, shape: tuple[int, ...]) -> Spread:
        """With arrays of this shape."""
        pairs, norms, common = (values.reshape(shape) for values in (self.pairs, self.norms, self.common))
        return Spread(pairs, norms, common, self.own)

    @property
    def between_channels(self) -> float:
        """Q(0) as one channel's mean feels it."""
        return max(middle(self.pairs) + self.own, 0.0)


def middle(values: Array) -> float:
    """The element at offset 0."""
    return float(values[tuple(n // 2 for n in values.shape)])


def nothing(shape: Sequence[int]) -> Spread:
    """No scatter: an input, or an activation of which nothing is known."""
    zero = np.zeros(tuple(shape))
    return Spread(zero, zero, zero)


def at_offsets(values: Array, offsets: Array) -> Array:
    """Elements at integer offsets (..., axes), 0 beyond the last one."""
    centre = np.array([n // 2 for n in values.shape], dtype=int)
    index = offsets.astype(int) + centre
    inside = ((index >= 0) & (index < np.array(values.shape, dtype=int))).all(axis=-1)
    safe = np.where(inside[..., None], index, centre)
    return np.where(inside, values[tuple(np.moveaxis(safe, -1, 0))], 0.0)


def together(parts: Sequence[tuple[float, Spread | None]]) -> Spread | None:
    """Of a sum: each part with its variance.

    Covariances of the parts scatter independently: each was sampled by channels of its own. Norms go through
    branches undamped, so that a branch's scatter contains that of what it was computed from: the smaller is shared.
    """
    total = sum(level for level, _ in parts)
    known = [spread for _, spread in parts if spread is not None]
    if not known or total <= 0.0:
        return None
    if len({spread.pairs.shape for spread in known}) > 1:
        return None
    shape = known[0].pairs.shape
    shares = [(level / total, spread or nothing(shape)) for level, spread in parts]
    pairs = np.asarray(sum(share**2 * spread.pairs for share, spread in shares))
    norms = np.zeros(shape)
    for one, first in shares:
        for two, second in shares:
            norms = norms + one * two * np.minimum(first.norms, second.norms)
    common = np.asarray(sum(share * spread.common for share, spread in shares))
    return Spread(pairs, norms, common, sum(share**2 * spread.own for share, spread in shares))


def averaged_over(spread: Spread, counts: Array, offsets: Array, targets: Array, taps: int, level: float) -> Spread:
    """Of a mean over a window: K̂' is the mean of K̂ over all pairs of its positions.

    Args:
        spread: of the input.
        counts, offsets: how many pairs of a window's positions lie how far apart.
        targets: (number of offsets of the output, axes), in input pixels.
        taps: positions of a window.
        level: variance of the mean, relative to the input's.
    """
    shifted = offsets[None, :, :] + targets[:, None, :]
    pairs = (at_offsets(spread.pairs, shifted) * counts**2).sum(axis=1) / taps**4 / level**2
    excess = at_offsets(spread.norms - 2.0 * spread.pairs, shifted)
    norms = 2.0 * pairs + (excess * counts).sum(axis=1) / taps**4 / level**2
    common = (at_offsets(spread.common, shifted) * counts).sum(axis=1) / taps**2 / level
    return Spread(pairs, norms, common)
