"""What a finite width leaves of the kernels, against Monte Carlo over networks; and what is asked of it elsewhere."""

import math

import numpy as np
import pytest
import torch
from torch import nn

import normfree as nf
from normfree.signal.moments import ChannelMoments
from normfree.signal.predicted_trace import PredictedTrace
from normfree.signal.theory import State

torch.set_num_threads(1)


def states_of(modules, shape):
    """The state behind every module of a chain that reads white noise."""
    model = nn.Sequential(*modules)
    trace, x, states = PredictedTrace(model, examples=shape[0]), torch.empty(shape, device="meta"), []
    with torch.no_grad(), trace.hooks(), trace:
        trace.watch(x, State.noise(shape[2:]))
        for module in model:
            x = module(x)
            states.append(trace._state_of(x))
    return states


def test_the_part_that_all_channels_have_in_common():
    torch.manual_seed(0)
    modules = [nf.WSConv2d(3, 2048, 7, stride=2, bias=False), nn.MaxPool2d(3, 2), nn.ReLU()]
    with torch.no_grad():
        x = nn.Sequential(*modules)(torch.randn(8, 3, 70, 70))
    # of 2048 channels' mean at one site, the variance that is not theirs alone
    measured = float(x.mean(dim=1).var() - x.var(dim=1).mean() / x.shape[1])
    state = states_of(modules, (8, 3, 70, 70))[-1]
    centre = tuple(n // 2 for n in state.spread.common.shape)
    assert float(state.spread.common[centre]) * state.average_variance == pytest.approx(measured, rel=0.15)
    with torch.no_grad():
        passed = ChannelMoments.of(nf.WSConv2d(2048, 1024, 1, bias=False)(x), 1).average_variance
    predicted = states_of([*modules, nf.WSConv2d(2048, 1024, 1, bias=False)], (8, 3, 70, 70))[-1]
    assert predicted.average_variance == pytest.approx(passed, rel=0.006)


@pytest.mark.parametrize(("layer", "rel"), [(nf.WSConv2d, 0.15), (nn.Conv2d, 0.06)])
def test_channel_means_of_independent_examples(layer, rel):
    # 24 channels in, so that covariances scatter by 1/√24; many examples, so that nothing else is left of the means
    def build():
        return [layer(24, 24, 1, bias=False), nn.ReLU(), layer(24, 512, 1, bias=False), nn.ReLU()]

    squares, predicted = [], []
    with torch.no_grad():
        for seed in range(24):
            torch.manual_seed(seed)
            x = nn.Sequential(*build())(torch.randn(512, 24, 3, 3))
            moments = ChannelMoments.of(x, 1)
            squares.append(float(moments.mean.var(unbiased=False)) / moments.average_variance)
    for seed in range(24):
        torch.manual_seed(seed)
        state = states_of(build(), (512, 24, 3, 3))[-1]
        squared_mean, variance = state.statistics(512)
        predicted.append((squared_mean - float(state.mean[0]) ** 2) / variance)
    assert np.mean(predicted) == pytest.approx(np.mean(squares), rel=rel)  # first order in 1/24


def test_rows_of_a_fixed_norm_leave_no_channel_means_of_white_noise():
    torch.manual_seed(0)
    standardized = states_of([nf.WSConv2d(3, 512, 3, bias=False), nn.ReLU()], (8, 3, 12, 12))[-1]
    plain = states_of([nn.Conv2d(3, 512, 3, bias=False), nn.ReLU()], (8, 3, 12, 12))[-1]
    assert standardized.cross[0, 0] < 1e-4 * standardized.average_variance
    # uniform weights: relative variance of a row's squares 0.8 / 27, a quarter of it in the mean of a rectified channel
    expected = 0.2 / 27 / (2 * math.pi) / (0.5 - 0.5 / math.pi)
    assert plain.cross[0, 0] / plain.average_variance == pytest.approx(expected, rel=0.15)


def test_the_largest_of_positions_that_are_not_alike():
    # zero padding takes variance from the edge, position by position
    torch.manual_seed(0)
    modules = [nf.WSConv2d(3, 4096, 7, stride=2, padding=3, bias=False), nn.MaxPool2d(3, 2, 1)]
    with torch.no_grad():
        x = nn.Sequential(*modules)(torch.randn(64, 3, 24, 24))
    state = states_of(modules, (64, 3, 24, 24))[-1]
    assert state.mean.reshape(6, 6) == pytest.approx(x.mean(dim=(0, 1)).numpy(), rel=0.02)
    assert state.variance.reshape(6, 6) == pytest.approx(x.var(dim=(0, 1)).numpy(), rel=0.04)


@pytest.mark.parametrize("mean", [0.0, 0.37, -1.2])
def test_the_slope_of_relu_is_the_share_above_zero(mean):
    model = nn.ReLU()
    trace, x = PredictedTrace(model, gradients=True, examples=4), torch.empty((4, 64, 5), device="meta")
    state = State.noise((5,))
    with torch.no_grad(), trace.hooks(), trace:
        trace.watch(x, State(state.grid, np.full(5, mean), state.cross, state.within, state.near))
        model(x)
    (_, flows) = trace._flows[-1]
    assert flows[0][1].factor == pytest.approx(0.5 * math.erfc(-mean / math.sqrt(2.0)), abs=0.002)


@pytest.mark.parametrize("operation", [
    lambda x: torch.relu(x), lambda x: torch.nn.functional.gelu(x), lambda x: x * 2.0, lambda x: x + x,
    lambda x: x.mean(dim=(2, 3)), lambda x: x.mean(dim=(-1,), keepdim=True), lambda x: x[:, 0] @ torch.ones(9, 4),
    lambda x: torch.nn.functional.max_pool2d(x, 3, 2, 1),
    lambda x: torch.nn.functional.max_pool2d(x, 2, ceil_mode=True),
    lambda x: torch.nn.functional.conv2d(x, torch.ones(8, 3, 3, 3), None, 2, 1, 2, 2),
    lambda x: x.transpose(1, 3).relu(),
    lambda x: torch.nn.functional.linear(x[:, :, 0, 0], torch.ones(5, 6), torch.ones(5)), lambda x: x * torch.ones(9),
    lambda x: x + torch.ones(6, 1, 1, dtype=torch.float64),
])  # fmt: skip
def test_shapes_without_values_are_those_of_values(operation):
    class Model(nn.Module):
        def forward(self, x):
            return operation(x)

    trace, x = PredictedTrace(Model(), examples=2), torch.empty((2, 6, 11, 9), device="meta")
    with torch.no_grad(), trace.hooks(), trace:
        trace.watch(x, State.noise((11, 9)))
        result = Model()(x)
    expected = operation(torch.zeros(2, 6, 11, 9))
    assert (result.shape, result.dtype, result.stride()) == (expected.shape, expected.dtype, expected.stride())


def test_quantised_weights_are_refused():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = nn.Parameter(
        torch.quantize_per_tensor(model[2].weight.detach(), 0.1, 0, torch.qint8), requires_grad=False
    )
    with pytest.raises(ValueError, match=r"model: 2\.weight is quantised"):
        nf.predict_spp(model, (4, 8))


def test_small_weights_are_not_a_sample():
    with nf.without_weights():
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(4, 4))
    assert model[0].weight.is_meta
    assert model[2].weight.is_meta
    assert not model[0].bias.is_meta
    assert not model[1].weight.is_meta
