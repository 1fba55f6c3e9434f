"""Each rule of the theory against a Monte Carlo: one wide random layer, or the exact sum."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfree as nf
from normfree.signal.moments import ChannelMoments
from normfree.signal.predicted_trace import PredictedTrace
from normfree.signal.theory import State
from normfree.signal.theory.grid import Grid, Window

torch.set_num_threads(1)


def noise(shape, common=0.0, channel=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    means = torch.randn((1, shape[1], *(1,) * (len(shape) - 2)), generator=generator)
    means = (means - means.mean()) / means.std(correction=0)
    return x + common + channel**0.5 * means


def state_of(sizes, common=0.0, channel=0.0):
    state = State.noise(sizes)
    cells = state.grid.cells
    return State(state.grid, np.full(cells, common), np.full((cells, cells), channel), state.within, state.near)


def predicted(module, shape, state):
    trace = PredictedTrace(module, examples=shape[0])
    x = torch.empty(shape, device="meta")
    with torch.no_grad(), trace.hooks(), trace:
        trace.watch(x, state)
        output = module(x)
    assert not trace.notes
    moments = trace._moments(output, 1)
    return moments.average_squared_mean, moments.average_variance


def check(module, shape, common=0.0, channel=0.0, rel=0.05, rel_mean=0.2):
    torch.manual_seed(1)
    with torch.no_grad():
        moments = ChannelMoments.of(module(noise(shape, common, channel)), 1)
    squared_mean, variance = predicted(module, shape, state_of(shape[2:], common, channel))
    assert variance == pytest.approx(moments.average_variance, rel=rel)
    if common or channel:
        assert squared_mean == pytest.approx(moments.average_squared_mean, rel=rel_mean, abs=2e-3)


INPUTS = [(0.0, 0.0), (0.7, 0.0), (0.5, 0.3)]


@pytest.mark.parametrize(("common", "channel"), INPUTS)
@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "groups", "size"),
    [
        (1, 1, 0, 1, 1, 8),
        (3, 1, 1, 1, 1, 2),
        (3, 2, 1, 1, 1, 7),
        (3, 1, 2, 2, 1, 5),
        (5, 3, 2, 1, 4, 12),
        (4, 2, 1, 1, 1, 16),
        (3, 1, 0, 1, 1, 9),
    ],
)
def test_convolution(kernel, stride, padding, dilation, groups, size, common, channel):
    torch.manual_seed(0)
    arguments = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    for layer in (nn.Conv2d(256, 1024, kernel, **arguments), nf.WSConv2d(256, 1024, kernel, **arguments)):
        check(layer, (8, 256, size, size), common, channel)


def test_same_padding_with_a_stride_and_one_and_three_dimensions():
    torch.manual_seed(0)
    check(nf.WSConv2d(256, 1024, 3, stride=2, padding="same"), (8, 256, 6, 6), 0.5, 0.3)
    check(nf.WSConv1d(256, 1024, 5, padding=2), (8, 256, 20), 0.5, 0.3)
    check(nf.WSConv3d(128, 512, 3, padding=1), (4, 128, 4, 4, 4), 0.5, 0.3)


def test_the_valid_share_of_taps_is_exact():
    # 2-D, stride 1, kernel 3, padding 1: (3n − 2)² / (3n)² of the taps lie on the map
    for n in (1, 2, 3, 5, 7, 8, 14, 56, 100):
        window = Window((n, n), (n, n), (3, 3), (1, 1), (1, 1), (1, 1))
        valid = (window.table < Grid((n, n)).cells).mean(axis=1)
        assert Grid((n, n)).share @ valid == pytest.approx(((3 * n - 2) / (3 * n)) ** 2)


@pytest.mark.parametrize(("size", "kernel", "stride", "dilation", "pad"), [
    (23, 3, 2, 1, 1), (40, 5, 1, 2, 4), (17, 7, 2, 1, 3), (31, 4, 3, 1, 1)])  # fmt: skip
def test_the_valid_share_equals_a_convolution_of_ones(size, kernel, stride, dilation, pad):
    ones = F.conv2d(torch.ones(1, 1, size, size), torch.ones(1, 1, kernel, kernel), None, stride, pad, dilation)
    out = ones.shape[-1]
    window = Window((size,) * 2, (out,) * 2, (kernel,) * 2, (stride,) * 2, (dilation,) * 2, (pad,) * 2)
    assert Grid((out,) * 2).share @ window.coverage.sum(axis=1) == pytest.approx(float(ones.mean()))


def test_transposed_convolution():
    torch.manual_seed(0)
    check(nf.WSConvTranspose2d(256, 512, 4, stride=2, padding=1), (8, 256, 16, 16), rel=0.06)


def test_bias_and_linear():
    torch.manual_seed(0)
    layer = nn.Linear(512, 2048)
    nn.init.normal_(layer.bias, 0.3, 0.5)
    check(layer, (256, 512), 0.4, 0.2)


ACTIVATIONS = ["relu", "silu", "gelu", "tanh", "sigmoid", "elu", "leaky_relu(0.2)", "hardswish", "mish", "softplus"]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(("common", "channel"), INPUTS)
def test_activations(activation, common, channel):
    from normfree.activation import activation_module

    check(activation_module(activation), (64, 4096, 8), common, channel, rel=0.02)


def test_an_elementwise_function_of_ones_own():
    class Own(nn.Module):
        def forward(self, x):
            return x * torch.sigmoid(1.7 * x) + torch.sin(x).abs()

    check(Own(), (64, 4096, 8), 0.5, 0.3, rel=0.02)


@pytest.mark.parametrize("norm", [
    nn.BatchNorm2d(512), nn.GroupNorm(8, 512), nn.GroupNorm(1, 512), nn.InstanceNorm2d(512), nn.BatchNorm2d(512).eval(),
])  # fmt: skip
@pytest.mark.parametrize(("common", "channel"), INPUTS)
def test_norms(norm, common, channel):
    check(norm, (8, 512, 6, 6), common, channel)


def test_layer_norm_over_channels():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(1024)

        def forward(self, x):
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    check(Last(), (8, 1024, 5, 5), 0.5, 0.3)


POOLS = [
    nn.AvgPool2d(2), nn.AvgPool2d(3, 2, 1), nn.AvgPool2d(3, 2, 1, count_include_pad=False),
    nn.AvgPool2d(2, 2, ceil_mode=True),
    nn.MaxPool2d(2), nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 1, 1), nn.AdaptiveAvgPool2d(1), nn.AdaptiveAvgPool2d(3),
    nn.AdaptiveMaxPool2d(1), nn.ZeroPad2d(2), nn.Upsample(scale_factor=2),
    nn.Upsample(scale_factor=2, mode="bilinear"),
    nn.Flatten(),
]  # fmt: skip


@pytest.mark.parametrize("pool", POOLS, ids=str)
def test_pooling(pool):
    check(pool, (8, 1024, 9, 9), 0.5, 0.3, rel=0.06)


def test_pooling_of_correlated_neighbours():
    # 3×3 averages are correlated with their neighbours, and a second pooling feels it
    check(nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.AvgPool2d(2)), (16, 512, 16, 16), rel=0.05)
    check(nn.Sequential(nn.AvgPool2d(3, 1), nn.ReLU(), nn.AvgPool2d(2)), (16, 512, 16, 16), rel=0.04)
    check(nn.Sequential(nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 2, 1)), (16, 512, 16, 16), rel=0.12)
    check(nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.AvgPool2d(2)), (16, 512, 32, 32), rel=0.06)


def test_gates_additions_and_concatenations():
    class Sums(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.kind = kind
            self.one, self.two = nn.Conv2d(256, 1024, 1), nn.Conv2d(256, 1024, 1)

        def forward(self, x):
            a, b = self.one(x), self.two(x)
            if self.kind == "twice":
                return (a + b) + b  # what is shared counts double
            if self.kind == "gate":
                return a * torch.sigmoid(b)
            if self.kind == "minus":
                return F.relu(a) - F.relu(b)
            if self.kind == "function":
                return F.relu(F.relu(a) + b)  # not a Gaussian before the last ReLU
            return torch.cat([a, 3.0 * F.relu(b)], dim=1)

    torch.manual_seed(0)
    for kind in ("twice", "gate", "minus", "function", "cat"):
        check(Sums(kind), (16, 256, 6, 6), rel=0.06)


def test_squeeze_excite():
    torch.manual_seed(0)
    check(nf.SqueezeExcite(1024, 0.5), (16, 1024, 5, 5), 0.3, 0.2)


def test_trained_weights_are_taken_as_they_are():
    # a blur has covariances between its taps, and widens the correlation between neighbours
    torch.manual_seed(0)
    layer = nn.Conv2d(128, 512, 3, padding=1, bias=False)
    smooth = torch.tensor([1.0, 2.0, 1.0])
    with torch.no_grad():
        layer.weight.copy_(torch.randn(512, 128, 1, 1) * (smooth[:, None] * smooth[None, :]) / 16)
    check(nn.Sequential(layer, nn.AvgPool2d(2)), (16, 128, 12, 12), rel=0.05)


def test_mehlers_formula_against_bivariate_samples():
    generator = torch.Generator().manual_seed(0)
    u, v = torch.randn(2, 400_000, generator=generator, dtype=torch.float64)
    for rho, (mean, deviation) in itertools.product((0.2, 0.7, 0.95), ((0.0, 1.0), (0.8, 1.5))):
        grid = Grid(())
        state = State(grid, np.array([mean]), np.array([[rho * deviation**2]]),
                      np.array([(1 - rho) * deviation**2]), np.ones(()))  # fmt: skip
        result = state.map(lambda values: np.maximum(values, 0.0))
        x = mean + deviation * u
        y = mean + deviation * (rho * u + (1 - rho**2) ** 0.5 * v)
        covariance = float(((F.relu(x) - F.relu(x).mean()) * (F.relu(y) - F.relu(y).mean())).mean())
        assert result.cross[0, 0] == pytest.approx(covariance, rel=0.02)
        assert result.average_variance == pytest.approx(float(F.relu(x).var()), rel=0.02)
