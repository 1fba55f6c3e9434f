"""Mean and variance of every channel of an activation: one pass, merged exactly over batches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20  # what is read twice should still be in the cache the second time
_COLUMN_CHUNK_ELEMENTS = 1 << 18  # the squares of a chunk are written out
_SHORTEST_PLANE = 16  # below this, summing along planes is slower than summing across them
_CANCELLATION = 30.0  # squared mean over variance from which float32 sums are not accurate enough


@dataclass
class ChannelMoments:
    """Moments of an activation, per channel over the batch and all positions, in float64 on the CPU.

    Attributes:
        count: elements per channel.
        mean: (C,), the channel means.
        squared_deviation: (C,), sums of squared deviations from the channel means.
        nan_count, inf_count: elements that are NaN, and infinite.
    """

    count: int
    mean: Tensor
    squared_deviation: Tensor
    nan_count: int = 0
    inf_count: int = 0

    @classmethod
    def of(cls, activation: Tensor, channel_axis: int) -> ChannelMoments:
        """The moments of one activation of any floating dtype and memory layout, on any device.

        Sums run in the activation's precision (float32 at least) over single planes, and in float64 beyond; where
        the mean is so large that this would lose digits, a second pass in float64 takes the deviations themselves.
        """
        planes = _planes(activation.detach(), channel_axis)
        count = planes.shape[0] * planes.shape[2]
        first, second = _sums(planes)
        mean = first / max(count, 1)
        deviation = np.maximum(second - first * mean, 0.0)
        total_mean, total_deviation = float(mean @ mean) * count, float(deviation.sum())
        if not math.isfinite(total_mean + total_deviation):
            return cls._of_non_finite(planes, count)
        mean_of_channels = torch.from_numpy(mean)
        if total_mean > _CANCELLATION * total_deviation:
            return cls(count, mean_of_channels, _squared_deviation(planes, mean_of_channels))
        return cls(count, mean_of_channels, torch.from_numpy(deviation))

    @classmethod
    def _of_non_finite(cls, planes: Tensor, count: int) -> ChannelMoments:
        nan, inf = int(planes.isnan().sum()), int(planes.isinf().sum())
        total = sum((chunk.double().sum(dim=(0, 2)).cpu() for chunk in _chunks(planes)), start=torch.zeros(()).double())
        mean = total / max(count, 1)
        return cls(count, mean, _squared_deviation(planes, mean), nan, inf)

    def merge(self, other: ChannelMoments) -> ChannelMoments:
        """The moments of both samples together (Chan et al. 1979).

        Raises:
            ValueError: the channel counts differ.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"moments of {len(self.mean)} and of {len(other.mean)} channels cannot be merged")
        count = self.count + other.count
        delta = other.mean - self.mean
        share = other.count / max(count, 1)
        return ChannelMoments(
            count,
            self.mean + delta * share,
            self.squared_deviation + other.squared_deviation + delta.square() * (self.count * share),
            self.nan_count + other.nan_count,
            self.inf_count + other.inf_count,
        )

    @property
    def variance(self) -> Tensor:
        """(C,), in population form: divided by the count."""
        return self.squared_deviation / max(self.count, 1)

    @property
    def average_squared_mean(self) -> float:
        """Mean over channels of the squared channel mean."""
        return float(self.mean.square().mean())

    @property
    def average_variance(self) -> float:
        """Mean over channels of the channel variance."""
        return float(self.variance.mean())


def _planes(activation: Tensor, channel_axis: int) -> Tensor:
    """(before, C, after): the activation in the order in which it lies in memory, without a copy where it is dense."""
    axis = channel_axis % activation.ndim
    order = sorted(range(activation.ndim), key=activation.stride, reverse=True)
    place = order.index(axis)
    sizes = [activation.shape[dim] for dim in order]
    return activation.permute(order).reshape(math.prod(sizes[:place]), sizes[place], math.prod(sizes[place + 1 :]))


def _chunks(planes: Tensor, elements: int = _CHUNK_ELEMENTS) -> Iterator[Tensor]:
    per_row = max(1, planes.shape[1] * planes.shape[2])
    yield from planes.split(max(1, elements // per_row))


def _sums(planes: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Per channel, (C,), the sums of the elements and of their squares, in float64.

    What is left behind the passes over the activation is small, and NumPy's small operations cost less than torch's.
    """
    channels, length = planes.shape[1:]
    first, second = np.zeros(channels), np.zeros(channels)
    along = length >= _SHORTEST_PLANE
    for chunk in _chunks(planes, _CHUNK_ELEMENTS if along else _COLUMN_CHUNK_ELEMENTS):
        if chunk.dtype in (torch.float16, torch.bfloat16):
            chunk = chunk.float()
        if along:
            sums, norms = chunk.sum(dim=2), torch.linalg.vector_norm(chunk, dim=2)
            first += sums.cpu().numpy().sum(axis=0, dtype=np.float64)
            second += np.square(norms.cpu().numpy(), dtype=np.float64).sum(axis=0)
        else:
            columns = chunk.reshape(chunk.shape[0], -1)
            sums, squares = columns.sum(dim=0), columns.square().sum(dim=0)
            first += sums.cpu().numpy().reshape(channels, length).sum(axis=1, dtype=np.float64)
            second += squares.cpu().numpy().reshape(channels, length).sum(axis=1, dtype=np.float64)
    return first, second


def _squared_deviation(planes: Tensor, mean: Tensor) -> Tensor:
    total = torch.zeros_like(mean)
    centre = mean.to(planes.device).reshape(1, -1, 1)
    for chunk in _chunks(planes, _COLUMN_CHUNK_ELEMENTS):
        total = total + (chunk.double() - centre).square().sum(dim=(0, 2)).cpu()
    return total
