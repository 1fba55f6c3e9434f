"""Randomness by key: what is drawn for an example or a microbatch depends on its place in the run and nothing else."""

from __future__ import annotations

import numpy as np


def seed_for(*key: int) -> int:
    """A seed of 63 bits from non-negative integers, such as the run's seed, a purpose, an epoch and an index.

    Different keys give independent seeds; the same key gives the same seed on every machine.
    """
    return int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0] >> np.uint64(1))
