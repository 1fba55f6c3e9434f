"""A batch, and what is asked for when one is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor


class Skipped(NamedTuple):
    """An example that could not be read."""

    name: str
    reason: str


class Batch(NamedTuple):
    """Images for one pass through the network.

    Attributes:
        images: (N, C, H, W) uint8.
        targets: (N,) int64.
        update: number of the update within the epoch; in evaluation, of the batch.
        microbatch: number of the microbatch within the update; in evaluation, 0.
        skipped: what could not be read on the way.
    """

    images: Tensor
    targets: Tensor
    update: int
    microbatch: int
    skipped: tuple[Skipped, ...] = ()


class Request(NamedTuple):
    """What goes into a batch.

    Attributes:
        items: the examples, as their source knows them.
        keys: (N,) uint64, by which each is augmented; None in evaluation, where what cannot be read is left out.
        spares: what may stand in for an example that cannot be read; None: any example of the source.
    """

    update: int
    microbatch: int
    items: Sequence[Any] | np.ndarray
    keys: np.ndarray | None
    spares: Sequence[Any] | None = None
