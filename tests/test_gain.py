import copy
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.stats import norm
from torch import nn

import normfree as nf
from normfree.activation import activation_names
from normfree.gain import PUBLISHED_GAINS

TABLE = {
    "relu": 1.7128585504496627,
    "silu": 1.787187222100442,
    "gelu": 1.7009262433633332,
    "elu": 1.2708434178501964,
    "tanh": 1.5925374197228304,
    "sigmoid": 4.801313372039962,
    "leaky_relu": 1.7048316271773365,
    "softplus": 1.9191259801076561,
    "relu6": 1.712858554972395,
    "selu": 1.0,
    "softsign": 2.337533363108539,
}
PUBLISHED = {
    "relu": 1.7139588594436646,
    "silu": 1.7881293296813965,
    "gelu": 1.7015043497085571,
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "leaky_relu": 1.70590341091156,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "softsign": 2.338853120803833,
    "softplus": 1.9203323125839233,
    "tanh": 1.5939117670059204,
    "log_sigmoid": 1.9193484783172607,
}
SELU_SCALE, SELU_ALPHA = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717

SCALAR_FUNCTIONS = {
    # written once more in plain Python, with the places where they are not smooth
    "identity": (lambda z: z, []),
    "relu": (lambda z: max(z, 0.0), [0]),
    "relu6": (lambda z: min(max(z, 0.0), 6.0), [0, 6]),
    "leaky_relu": (lambda z: z if z > 0 else 0.01 * z, [0]),
    "prelu": (lambda z: z if z > 0 else 0.25 * z, [0]),
    "elu": (lambda z: z if z > 0 else math.expm1(z), [0]),
    "celu": (lambda z: z if z > 0 else math.expm1(z), [0]),
    "selu": (lambda z: SELU_SCALE * (z if z > 0 else SELU_ALPHA * math.expm1(z)), [0]),
    "gelu": (lambda z: z * norm.cdf(z), []),
    "gelu_tanh": (lambda z: 0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))), []),
    "silu": (lambda z: z / (1 + math.exp(-z)), []),
    "mish": (lambda z: z * math.tanh(math.log1p(math.exp(z))), []),
    "sigmoid": (lambda z: 1 / (1 + math.exp(-z)), []),
    "log_sigmoid": (lambda z: -math.log1p(math.exp(-z)), []),
    "tanh": (math.tanh, []),
    "softplus": (lambda z: math.log1p(math.exp(z)), []),
    "softsign": (lambda z: z / (1 + abs(z)), [0]),
    "softshrink": (lambda z: math.copysign(max(abs(z) - 0.5, 0.0), z), [-0.5, 0.5]),
    "hardshrink": (lambda z: z if abs(z) > 0.5 else 0.0, [-0.5, 0.5]),
    "tanhshrink": (lambda z: z - math.tanh(z), []),
    "hardswish": (lambda z: z * min(max(z + 3, 0.0), 6.0) / 6, [-3, 3]),
    "hardsigmoid": (lambda z: min(max(z + 3, 0.0), 6.0) / 6, [-3, 3]),
    "hardtanh": (lambda z: min(max(z, -1.0), 1.0), [-1, 1]),
}


def expectation(function, kinks=()):
    edges = [-16.0, *sorted({*map(float, range(-15, 16)), *kinks}), 16.0]
    parts = [
        quad(lambda z: function(z) * norm.pdf(z), low, high, epsabs=1e-15, epsrel=1e-13)[0]
        for low, high in itertools.pairwise(edges)
    ]
    return math.fsum(parts)


def reference_gain(function, kinks=()):
    mean = expectation(function, kinks)
    return 1 / math.sqrt(expectation(lambda z: (function(z) - mean) ** 2, kinks))


@pytest.mark.parametrize("name", TABLE)
def test_table(name):
    assert nf.gain(name) == pytest.approx(TABLE[name], rel=1e-9)


def test_relu_closed_form():
    assert nf.gain("relu") == pytest.approx(math.sqrt(2 / (1 - 1 / math.pi)), rel=1e-15)


@pytest.mark.parametrize("name", SCALAR_FUNCTIONS)
def test_every_name_against_another_quadrature(name):
    assert nf.gain(name) == pytest.approx(reference_gain(*SCALAR_FUNCTIONS[name]), rel=1e-9)


def test_no_name_is_left_out():
    assert set(SCALAR_FUNCTIONS) | {"threshold"} == set(activation_names())


@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh", "tanh", "mish", "softplus"])
def test_smooth_functions_against_gauss_hermite(name):
    nodes, weights = np.polynomial.hermite_e.hermegauss(180)
    weights = weights / weights.sum()
    values = np.array([SCALAR_FUNCTIONS[name][0](z) for z in nodes])
    variance = weights @ (values - weights @ values) ** 2
    # the rule converges slowly for functions with poles near the real axis
    assert nf.gain(name) == pytest.approx(variance**-0.5, rel=1e-7)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_constants(name):
    assert nf.gain(name, source="published") == PUBLISHED[name]
    assert 0 <= nf.gain(name, source="published") / nf.gain(name) - 1 < 1e-3


def test_published_beyond_the_table():
    assert nf.gain(None, source="published") == nf.gain("identity", source="published") == 1.0
    assert nf.gain("Swish", source="published") == PUBLISHED["silu"]
    assert nf.gain("gelu_tanh", source="published") == PUBLISHED["gelu"]
    assert set(PUBLISHED_GAINS) == set(PUBLISHED) | {"identity", "gelu_tanh"}


@pytest.mark.parametrize("activation", ["mish", "leaky_relu(0.2)", nn.ReLU(), F.relu])
def test_published_refuses_what_was_never_published(activation):
    with pytest.raises(ValueError, match=r"source: 'published' constants exist for .*use source='exact'"):
        nf.gain(activation, source="published")


def test_unknown_source():
    with pytest.raises(ValueError, match=r"source: expected 'exact' or 'published', got 'sampled'"):
        nf.gain("relu", source="sampled")


slopes = st.floats(-3, 3).map(lambda value: round(value, 3))


@st.composite
def piecewise_linear(draw):
    """Kinks, then (slope, intercept) of every piece, which need not meet."""
    kinks = sorted(draw(st.lists(st.integers(-300, 300), min_size=1, max_size=4, unique=True)))
    pieces = [(draw(slopes), draw(slopes)) for _ in range(len(kinks) + 1)]
    return [kink / 100 for kink in kinks], pieces


def closed_form_moments(kinks, pieces):
    edges = [-math.inf, *kinks, math.inf]
    mean = second = 0.0
    for (slope, intercept), (low, high) in zip(pieces, itertools.pairwise(edges), strict=True):
        mass = norm.cdf(high) - norm.cdf(low)
        first = norm.pdf(low) - norm.pdf(high)
        square = mass + sum(s * e * norm.pdf(e) for s, e in ((1, low), (-1, high)) if math.isfinite(e))
        mean += slope * first + intercept * mass
        second += slope**2 * square + 2 * slope * intercept * first + intercept**2 * mass
    return mean, second


@settings(max_examples=40, deadline=None)
@given(piecewise_linear())
def test_piecewise_linear_functions_with_kinks_and_jumps_anywhere(function):
    kinks, pieces = function
    mean, second = closed_form_moments(kinks, pieces)
    if second - mean**2 < 1e-3:
        return

    def evaluate(x):
        piece = torch.bucketize(x, torch.tensor(kinks, dtype=x.dtype))
        table = torch.tensor(pieces, dtype=x.dtype)
        return table[piece, 0] * x + table[piece, 1]

    assert nf.gain(evaluate) == pytest.approx((second - mean**2) ** -0.5, rel=1e-9)


SMOOTH = [torch.tanh, F.silu, lambda x: x.relu() + 0.3 * x.sin(), lambda x: (x - 0.4).abs()]


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(SMOOTH), st.floats(0.01, 100), st.booleans(), st.floats(-10, 10))
def test_laws_of_scale_and_shift(function, scale, negative, shift):
    scale = -scale if negative else scale
    plain = nf.gain(function)
    assert nf.gain(lambda x: scale * function(x)) == pytest.approx(plain / abs(scale), rel=1e-8)
    assert nf.gain(lambda x: function(x) + shift) == pytest.approx(plain, rel=1e-8)


@pytest.mark.parametrize("slope", [-1.0, -0.3, 0.0, 0.2, 0.999, 3.0])
def test_leaky_slopes(slope):
    expected = reference_gain(lambda z: z if z > 0 else slope * z, [0])
    prelu = nn.PReLU(init=slope, dtype=torch.float64)
    multi = nn.PReLU(3, init=slope, dtype=torch.float64)
    for activation in (nn.LeakyReLU(slope), prelu, multi, f"leaky_relu({slope})", lambda x: F.leaky_relu(x, slope)):
        assert nf.gain(activation) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("alpha", [0.1, 0.5, 1.0, 2.0, 5.0])
def test_exponential_linear_alphas(alpha):
    elu = reference_gain(lambda z: z if z > 0 else alpha * math.expm1(z), [0])
    celu = reference_gain(lambda z: z if z > 0 else alpha * math.expm1(z / alpha), [0])
    assert nf.gain(nn.ELU(alpha)) == pytest.approx(elu, rel=1e-9)
    assert nf.gain(f"elu({alpha})") == pytest.approx(elu, rel=1e-9)
    assert nf.gain(nn.CELU(alpha)) == pytest.approx(celu, rel=1e-9)


@pytest.mark.parametrize(
    ("module", "function", "kinks"),
    [
        (nn.Threshold(0.37, -2.0), lambda z: z if z > 0.37 else -2.0, [0.37]),
        (nn.Hardtanh(-0.7, 1.3), lambda z: min(max(z, -0.7), 1.3), [-0.7, 1.3]),
        (nn.Softplus(beta=3.0), lambda z: math.log1p(math.exp(3 * z)) / 3 if 3 * z < 20 else z, [20 / 3]),
        (nn.Softshrink(0.123), lambda z: math.copysign(max(abs(z) - 0.123, 0), z), [-0.123, 0.123]),
        (nn.Sequential(nn.Tanh(), nn.LeakyReLU(0.1)), lambda z: math.tanh(z) * (1 if z > 0 else 0.1), [0]),
        (nn.RReLU(0.1, 0.3), lambda z: z if z > 0 else 0.2 * z, [0]),
        (nn.Dropout(0.5), lambda z: z, []),
        (nn.SiLU(inplace=True), SCALAR_FUNCTIONS["silu"][0], []),
    ],
    ids=lambda value: repr(value) if isinstance(value, nn.Module) else "",
)
def test_modules_at_their_parameters(module, function, kinks):
    assert nf.gain(module) == pytest.approx(reference_gain(function, kinks), rel=1e-9)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (torch.exp, 1 / math.sqrt(math.e**2 - math.e)),
        (torch.square, 1 / math.sqrt(2)),
        (torch.abs, 1 / math.sqrt(1 - 2 / math.pi)),
        (torch.sin, 1 / math.sqrt((1 - math.exp(-2)) / 2)),
        (lambda x: torch.sin(20 * x), math.sqrt(2)),
        (torch.sign, 1.0),
        (lambda x: x + 1000.0, 1.0),
        (lambda x: (x * x / 8).exp(), (math.sqrt(2) - 4 / 3) ** -0.5),
        (lambda x: x.pow(3), 1 / math.sqrt(15)),
    ],
)
def test_callables_with_known_moments(function, expected):
    assert nf.gain(function) == pytest.approx(expected, rel=1e-9)


def test_quantiser():
    steps = np.arange(-80, 81) / 8
    mass = norm.cdf(steps + 1 / 16) - norm.cdf(steps - 1 / 16)
    expected = float((mass * steps**2).sum()) ** -0.5
    assert nf.gain(lambda x: torch.round(x * 8) / 8) == pytest.approx(expected, rel=1e-9)


class Swish(nn.Module):
    def __init__(self):
        super().__init__()
        self.slope = nn.Parameter(torch.tensor(1.5))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x * torch.sigmoid(self.slope * x)


def test_the_module_is_left_as_it_was():
    module = Swish()
    before, state = copy.deepcopy(module.state_dict()), torch.get_rng_state()
    expected = reference_gain(lambda z: z / (1 + math.exp(-1.5 * z)))
    assert nf.gain(module) == pytest.approx(expected, rel=1e-9)
    assert module.training
    assert module.slope.dtype == torch.float32
    assert module.slope.grad is None
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_module_class_and_none():
    assert nf.gain(nn.ReLU) == nf.gain("relu")
    assert nf.gain(None) == 1.0


def test_a_subclass_is_not_taken_for_its_parent():
    class Doubled(nn.ReLU):
        def forward(self, input):
            return 2 * super().forward(input)

    assert nf.gain(Doubled()) == pytest.approx(nf.gain("relu") / 2, rel=1e-9)


def test_by_name_on_the_meta_device():
    with torch.device("meta"):
        assert nf.gain("prelu(0.1)") == pytest.approx(nf.gain(nn.LeakyReLU(0.1)), rel=1e-9)
        assert nf.gain("mish") == pytest.approx(reference_gain(*SCALAR_FUNCTIONS["mish"]), rel=1e-9)
        with pytest.raises(ValueError, match=r"meta device"):
            nf.gain(nn.PReLU())


@pytest.mark.parametrize(
    "activation",
    [
        nn.Softmax(dim=1),
        nn.Softmax(dim=-1),
        nn.LogSoftmax(dim=1),
        nn.Softmax2d(),
        nn.LayerNorm(6),
        nn.InstanceNorm2d(2),
        lambda x: x - x.mean(),
        lambda x: x / x.norm(),
        lambda x: x.flip(0),
        lambda x: x.cumsum(-1),
        lambda x: torch.softmax(x.flatten(), 0).reshape(x.shape),
        lambda x: x * torch.arange(1, x.shape[1] + 1, dtype=x.dtype).reshape(1, -1, 1, 1),
    ],
)
def test_functions_that_mix_elements_are_refused(activation):
    with pytest.raises(ValueError, match=r"^activation: .* mixes elements or treats channels differently"):
        nf.gain(activation)


@pytest.mark.parametrize("activation", [nn.GLU(), nn.GLU(dim=1), lambda x: x.mean(), lambda x: x[:1]])
def test_functions_that_change_the_shape_are_refused(activation):
    with pytest.raises(ValueError, match=r"^activation: .* turns shape .* elementwise functions only"):
        nf.gain(activation)


@pytest.mark.parametrize(
    "activation", [lambda x: 0 * x, lambda x: torch.full_like(x, 3.0), nn.Threshold(100, 1.0), nn.Hardtanh(1, 1 + 1e-9)]
)
def test_constants_are_refused(activation):
    with pytest.raises(ValueError, match=r"^activation: .* has zero variance"):
        nf.gain(activation)


@pytest.mark.parametrize(
    "activation", [torch.reciprocal, torch.sqrt, lambda x: (x * x / 4).exp(), lambda x: x * math.inf, torch.tan]
)
def test_infinite_variance_is_refused(activation):
    with pytest.raises(ValueError, match=r"^activation: .*(not finite|may be infinite)"):
        nf.gain(activation)


def test_other_refusals():
    with pytest.raises(ValueError, match=r"^activation: .* is random"):
        nf.gain(lambda x: F.dropout(x, 0.5))
    with pytest.raises(ValueError, match=r"^activation: .* returned tuple, not a tensor"):
        nf.gain(lambda x: (x, x))
    with pytest.raises(ValueError, match=r"^activation: .* failed on a float64 tensor .* boom"):
        nf.gain(lambda x: 1 / 0 if x.dtype == torch.float32 else exec("raise RuntimeError('boom')"))
    with pytest.raises(ValueError, match=r"^activation: BatchNorm2d.* failed on a float64 tensor"):
        nf.gain(nn.BatchNorm2d(2))
    uneven = nn.PReLU(2)
    with torch.no_grad():
        uneven.weight[0] = 0.5
    with pytest.raises(ValueError, match=r"different slopes per channel"):
        nf.gain(uneven)
    with pytest.raises(ValueError, match=r"did you mean relu"):
        nf.gain("rleu")
    with pytest.raises(TypeError, match=r"activation: expected .* got float"):
        nf.gain(0.5)
