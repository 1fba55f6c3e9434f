"""Channel moments against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from normfree.signal.moments import ChannelMoments


def numpy_statistics(activation: Tensor, axis: int) -> tuple[float, float]:
    channels = np.moveaxis(activation.double().numpy(), axis, 0).reshape(activation.shape[axis], -1)
    return float((channels.mean(axis=1) ** 2).mean()), float(channels.var(axis=1).mean())


def assert_close(moments: ChannelMoments, expected: tuple[float, float], rtol: float = 1e-6) -> None:
    assert moments.average_squared_mean == pytest.approx(expected[0], rel=rtol, abs=1e-12)
    assert moments.average_variance == pytest.approx(expected[1], rel=rtol)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "axis"),
    [((4, 16, 17, 19), 1), ((4, 17, 19, 16), -1), ((4, 50, 24), 2), ((4, 24, 50), 1), ((4, 16, 3, 3), 1), ((7, 33), 1)],
)
@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_equals_numpy(shape: tuple[int, ...], axis: int, dtype: torch.dtype, offset: float) -> None:
    activation = (torch.randn(shape) * 2 + offset).to(dtype)
    assert_close(ChannelMoments.of(activation, axis), numpy_statistics(activation, axis))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "strided", "expanded"])
def test_any_memory_layout(layout: str) -> None:
    activation = torch.randn(4, 12, 10, 14) + torch.randn(12, 1, 1)
    if layout == "channels_last":
        activation = activation.to(memory_format=torch.channels_last)
    elif layout == "transposed":
        activation = activation.transpose(0, 3)
    elif layout == "strided":
        activation = activation[:, ::2, 1::3]
    else:
        activation = activation[:, :, :1].expand(-1, -1, 10, -1)
    assert_close(ChannelMoments.of(activation, 1), numpy_statistics(activation, 1))


@pytest.mark.parametrize("offset", [1e2, 1e3, 1e4])
def test_digits_survive_a_large_mean(offset: float) -> None:
    activation = torch.randn(8, 4, 32, 32) + offset
    assert_close(ChannelMoments.of(activation, 1), numpy_statistics(activation, 1))


@settings(max_examples=40, deadline=None)
@given(sizes=st.lists(st.integers(1, 5), min_size=1, max_size=5), mean=st.floats(-50, 50), seed=st.integers(0, 99))
def test_merging_batches_is_exact(sizes: list[int], mean: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randn(n, 6, 5, 4, generator=generator, dtype=torch.float64) + mean * n for n in sizes]
    merged = ChannelMoments.of(batches[0], 1)
    for batch in batches[1:]:
        merged = merged.merge(ChannelMoments.of(batch, 1))
    assert merged.count == sum(sizes) * 20
    assert_close(merged, numpy_statistics(torch.cat(batches), 1), rtol=1e-10)


def test_moments_of_different_channels_do_not_merge() -> None:
    with pytest.raises(ValueError, match="3 and of 4 channels"):
        ChannelMoments.of(torch.randn(2, 3), 1).merge(ChannelMoments.of(torch.randn(2, 4), 1))


def test_nan_and_infinite_values_are_counted() -> None:
    activation = torch.randn(2, 4, 8, 8)
    activation[0, 1, 2, 3:5] = float("nan")
    activation[1, 2, 0, 0] = float("-inf")
    moments = ChannelMoments.of(activation, 1)
    assert (moments.nan_count, moments.inf_count) == (2, 1)
    assert torch.isfinite(moments.mean[[0, 3]]).all()


def test_squares_beyond_float32_are_not_infinite_values() -> None:
    moments = ChannelMoments.of(torch.full((2, 4, 8, 8), 1e30), 1)
    assert (moments.nan_count, moments.inf_count) == (0, 0)
    assert moments.average_squared_mean == pytest.approx(1e60, rel=1e-6)


def test_one_element_per_channel_has_no_variance() -> None:
    assert ChannelMoments.of(torch.randn(1, 5), 1).average_variance == 0.0
