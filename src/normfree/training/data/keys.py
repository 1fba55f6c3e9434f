"""Random numbers by key, many at a time: an example's depend on its place in the run and on nothing else."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch

from ..seeds import seed_for

ORDER, AUGMENTATION, MIXING, REPLACEMENT = 101, 102, 103, 104
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def order_seed(seed: int, epoch: int) -> int:
    """What the order of an epoch is drawn with."""
    return seed_for(seed, ORDER, epoch)


def permutation(length: int, seed: int, epoch: int) -> np.ndarray:
    """(length,) int64: the order of an epoch."""
    return np.random.default_rng(order_seed(seed, epoch)).permutation(length)


def example_keys(seed: int, epoch: int, positions: np.ndarray) -> np.ndarray:
    """(N,) uint64: a key for the example at each position of an epoch."""
    start = np.uint64(seed_for(seed, AUGMENTATION, epoch))
    return _mixed(start + positions.astype(np.uint64) * _GOLDEN)


def uniforms(keys: np.ndarray, count: int) -> np.ndarray:
    """(N, count) float64 in [0, 1): numbers drawn by each of N keys."""
    steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
    return (_mixed(keys[:, None] + steps) >> np.uint64(11)) * 2.0**-53


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's random numbers, from which torchvision draws, by a seed; afterwards they go on as if nothing was."""
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed takes 70 times as long, for devices not used here
    try:
        yield
    finally:
        torch.set_rng_state(state)
