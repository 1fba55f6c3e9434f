"""The normal distribution function and its inverse, in float64: torch has them, and importing SciPy takes a while."""

from __future__ import annotations

import numpy as np
import torch

from .grid import Array


def ndtr(x: Array) -> Array:
    """Φ(x)."""
    return torch.special.ndtr(torch.from_numpy(np.asarray(x, float))).numpy()


def log_ndtr(x: Array) -> Array:
    """ln Φ(x)."""
    return torch.special.log_ndtr(torch.from_numpy(np.asarray(x, float))).numpy()


def ndtri_exp(y: Array) -> Array:
    """The x with ln Φ(x) = y, to rounding in both tails: from 1 − e^y where that is the smaller part."""
    y = np.asarray(y, float)
    low = torch.special.ndtri(torch.from_numpy(np.exp(y))).numpy()
    high = -torch.special.ndtri(torch.from_numpy(-np.expm1(y))).numpy()
    return np.where(y < -np.log(2.0), low, high)
