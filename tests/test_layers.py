import copy
import inspect
import math
import pickle
import shutil
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

import normfree as nf
from normfree.activation import activation_module

CONVS = {
    1: (nf.WSConv1d, nn.Conv1d, F.conv1d),
    2: (nf.WSConv2d, nn.Conv2d, F.conv2d),
    3: (nf.WSConv3d, nn.Conv3d, F.conv3d),
}
TRANSPOSED = {
    1: (nf.WSConvTranspose1d, nn.ConvTranspose1d, F.conv_transpose1d),
    2: (nf.WSConvTranspose2d, nn.ConvTranspose2d, F.conv_transpose2d),
    3: (nf.WSConvTranspose3d, nn.ConvTranspose3d, F.conv_transpose3d),
}
NAMESAKES = [
    *((ours, theirs) for ours, theirs, _ in [*CONVS.values(), *TRANSPOSED.values()]),
    (nf.ScaledConv2d, nn.Conv2d),
    (nf.WSLinear, nn.Linear),
]
PAD_MODES = {"zeros": "constant", "reflect": "reflect", "replicate": "replicate", "circular": "circular"}

pytestmark = pytest.mark.filterwarnings("ignore:.*an output unit has a fan-in of 1", "ignore:Using padding='same'")


def example_layers():
    """(layer, input) of every kind, in float64, with nothing at its initial value."""
    torch.manual_seed(0)
    layers = {
        "conv1d": (nf.WSConv1d(4, 6, 3, 2, 1, groups=2), (2, 4, 9)),
        "conv2d": (nf.WSConv2d(4, 6, 3, 2, "same", dilation=2, groups=2), (2, 4, 7, 8)),
        "conv2d_reflect": (nf.WSConv2d(4, 6, 3, padding=1, padding_mode="reflect", learnable_gain=False), (2, 4, 5, 6)),
        "conv3d": (nf.WSConv3d(2, 3, 2, bias=False), (2, 2, 4, 3, 4)),
        "transpose1d": (nf.WSConvTranspose1d(4, 6, 3, 2, groups=2), (2, 4, 5)),
        "transpose2d": (nf.WSConvTranspose2d(4, 6, 4, 2, 1, 1, groups=2, dilation=3), (2, 4, 4, 5)),
        "transpose2d_same": (nf.WSConvTranspose2d(4, 6, 3, 2, "same"), (2, 4, 4, 5)),
        "transpose3d": (nf.WSConvTranspose3d(2, 3, 2, 2), (2, 2, 2, 3, 2)),
        "linear": (nf.WSLinear(5, 3, activation="silu"), (2, 5)),
        "scaled": (nf.ScaledConv2d(3, 4, 3, 2, 1, scale=0.5), (2, 3, 6, 5)),
        "squeeze_excite": (nf.SqueezeExcite(8), (2, 8, 3, 4)),
    }
    result = {}
    for name, (layer, shape) in layers.items():
        layer = layer.double()
        with torch.no_grad():
            for parameter in layer.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        result[name] = (layer, torch.randn(*shape, dtype=torch.float64))
    return result


LAYERS = list(example_layers())
WS_LAYERS = [name for name in LAYERS if name not in ("scaled", "squeeze_excite")]


@pytest.fixture
def layer_and_input(request):
    return example_layers()[request.param]


every_layer = pytest.mark.parametrize("layer_and_input", LAYERS, indirect=True)
every_ws_layer = pytest.mark.parametrize("layer_and_input", WS_LAYERS, indirect=True)


@pytest.mark.parametrize(("ours", "theirs"), NAMESAKES)
def test_signature_starts_with_the_namesakes(ours, theirs):
    assert issubclass(ours, theirs)
    expected = list(inspect.signature(theirs).parameters.values())
    found = list(inspect.signature(ours).parameters.values())
    assert [(p.name, p.default) for p in found[: len(expected)]] == [(p.name, p.default) for p in expected]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in found[len(expected) :])
    forward, reference = inspect.signature(ours.forward).parameters, inspect.signature(theirs.forward).parameters
    assert list(forward) == [*reference, "output_scale"]


@st.composite
def convolution_arguments(draw, dims):
    groups = draw(st.sampled_from([1, 2]))

    def per_axis(low, high):
        return draw(st.one_of(st.integers(low, high), st.tuples(*[st.integers(low, high)] * dims)))

    arguments = {
        "in_channels": groups * draw(st.integers(1, 2)),
        "out_channels": groups * draw(st.integers(1, 2)),
        "kernel_size": per_axis(1, 3),
        "stride": per_axis(1, 3),
        "dilation": per_axis(1, 2),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    return arguments, [draw(st.integers(5, 8)) for _ in range(dims)], per_axis


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 3]))
def test_convolution_is_a_drop_in(data, dims):
    arguments, size, per_axis = data.draw(convolution_arguments(dims))
    stride_one = arguments["stride"] in (1, (1,) * dims)
    arguments["padding"] = data.draw(st.sampled_from(["valid", "same"])) if stride_one else per_axis(0, 2)
    arguments["padding_mode"] = data.draw(st.sampled_from(list(PAD_MODES)))
    ours_class, theirs_class, _ = CONVS[dims]
    ours, theirs = ours_class(**arguments).double(), theirs_class(**arguments).double()
    assert ours.weight.shape == theirs.weight.shape
    with torch.no_grad():
        theirs.weight.copy_(ours.effective_weight())
        if ours.bias is not None:
            theirs.bias.copy_(ours.bias.normal_())
    x = torch.randn(2, arguments["in_channels"], *size, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x[0]), theirs(x[0]))


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 3]))
def test_transposed_convolution_is_a_drop_in(data, dims):
    arguments, size, per_axis = data.draw(convolution_arguments(dims))
    arguments["padding"] = per_axis(0, 1)
    ours_class, theirs_class, _ = TRANSPOSED[dims]
    ours = ours_class(**arguments).double()
    for kernel, spread, pad, length in zip(ours.kernel_size, ours.dilation, ours.padding, size, strict=True):
        assume((length - 1) + spread * (kernel - 1) + 1 - 2 * pad > 0)
    outpad = [data.draw(st.integers(0, step - 1)) for step in ours.stride]
    ours.output_padding = tuple(outpad)
    theirs = theirs_class(**arguments, output_padding=tuple(outpad)).double()
    with torch.no_grad():
        theirs.weight.copy_(ours.effective_weight())
        if ours.bias is not None:
            theirs.bias.copy_(ours.bias.normal_())
    x = torch.randn(2, arguments["in_channels"], *size, dtype=torch.float64)
    expected = theirs(x)
    torch.testing.assert_close(ours(x), expected)
    torch.testing.assert_close(ours(x[0]), expected[0])
    torch.testing.assert_close(ours(x, output_size=expected.shape[2:]), expected)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.sampled_from([1, 2, 3]), st.sampled_from(["zeros", "replicate", "circular"]))
def test_same_padding_against_explicit_padding(data, dims, mode):
    arguments, size, _ = data.draw(convolution_arguments(dims))
    ours_class, _, function = CONVS[dims]
    layer = ours_class(**arguments, padding="same", padding_mode=mode).double()
    x = torch.randn(2, arguments["in_channels"], *size, dtype=torch.float64)
    padding = []
    for length, taps, step, spread in zip(size, layer.kernel_size, layer.stride, layer.dilation, strict=True):
        total = max((math.ceil(length / step) - 1) * step + spread * (taps - 1) + 1 - length, 0)
        padding = [total // 2, total - total // 2, *padding]
    padded = F.pad(x, padding, mode=PAD_MODES[mode])
    expected = function(padded, layer.effective_weight(), layer.bias, layer.stride, 0, layer.dilation, layer.groups)
    output = layer(x)
    assert list(output.shape[2:]) == [math.ceil(n / s) for n, s in zip(size, layer.stride, strict=True)]
    torch.testing.assert_close(output, expected)


@settings(max_examples=60, deadline=None)
@given(st.data(), st.sampled_from([1, 2]))
def test_transposed_same_is_the_transpose_of_a_same_convolution(data, dims):
    arguments, size, _ = data.draw(convolution_arguments(dims))
    arguments["bias"] = False
    ours_class, _, _ = TRANSPOSED[dims]
    _, _, convolve = CONVS[dims]
    layer = ours_class(**arguments, padding="same").double()
    x = torch.randn(2, arguments["in_channels"], *size, dtype=torch.float64)
    output = layer(x)
    full = [length * step for length, step in zip(size, layer.stride, strict=True)]
    assert list(output.shape[2:]) == full

    def same_convolution(y):
        padding = []
        for length, taps, step, spread in zip(full, layer.kernel_size, layer.stride, layer.dilation, strict=True):
            total = max((length // step - 1) * step + spread * (taps - 1) + 1 - length, 0)
            padding = [total // 2, total - total // 2, *padding]
        return convolve(
            F.pad(y, padding), layer.effective_weight(), None, layer.stride, 0, layer.dilation, layer.groups
        )

    y = torch.zeros_like(output, requires_grad=True)
    (expected,) = torch.autograd.grad(same_convolution(y), y, x)  # the adjoint, by definition
    torch.testing.assert_close(output, expected)


def test_transposed_same_refuses_other_sizes():
    assert nf.WSConvTranspose2d(2, 2, 3, 2, "same", output_padding=(0, 0)).output_padding == (0, 0)
    for output_padding in (1, (0, 1)):
        with pytest.raises(ValueError, match=r"output_padding: padding='same' fixes the output size"):
            nf.WSConvTranspose2d(2, 2, 3, 2, "same", output_padding=output_padding)
    with pytest.raises(ValueError, match=r"output_size: padding='same' fixes"):
        nf.WSConvTranspose2d(2, 2, 3, 2, "same")(torch.randn(1, 2, 4, 4), output_size=[9, 9])
    with pytest.raises(ValueError, match=r"padding: expected numbers or 'same', got 'valid'"):
        nf.WSConvTranspose2d(2, 2, 3, padding="valid")


def test_linear_is_a_drop_in():
    ours, theirs = nf.WSLinear(6, 4).double(), nn.Linear(6, 4).double()
    with torch.no_grad():
        theirs.weight.copy_(ours.effective_weight())
        theirs.bias.copy_(ours.bias.normal_())
    for shape in [(6,), (3, 6), (2, 3, 6)]:
        x = torch.randn(*shape, dtype=torch.float64)
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    "bad", [{"padding": "full"}, {"padding_mode": "mirror"}, {"groups": 2}, {"padding": "same", "groups": 2}]
)
def test_what_torch_refuses_is_refused(bad):
    for layer in (nf.WSConv2d, nf.ScaledConv2d, nn.Conv2d):
        with pytest.raises((ValueError, ZeroDivisionError)):
            layer(**{"in_channels": 3, "out_channels": 4, "kernel_size": 3, **bad})(torch.zeros(1, 3, 5, 5))


def test_bad_activation_or_source():
    with pytest.raises(ValueError, match=r"activation: there is none called 'rleu'; did you mean relu"):
        nf.WSConv2d(3, 4, 3, activation="rleu")
    with pytest.raises(ValueError, match=r"source: expected 'exact' or 'published'"):
        nf.WSLinear(3, 4, gain_source="guessed")


@pytest.mark.parametrize("source", ["exact", "published"])
@pytest.mark.parametrize("activation", ["relu", "silu", None])
def test_the_weight_carries_gamma_and_scale(activation, source):
    layer = nf.WSConv2d(8, 4, 3, activation=activation, gain_source=source, scale=0.5).double()
    expected = (0.5 * nf.gain(activation, source)) ** 2
    squares = layer.effective_weight().flatten(1).square().sum(1)
    torch.testing.assert_close(squares, torch.full_like(squares, expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda activation: nf.WSConv1d(64, 32, 3, activation=activation), (200, 64, 30)),
        (lambda activation: nf.WSConv2d(64, 32, 3, groups=2, activation=activation), (32, 64, 12, 12)),
        (lambda activation: nf.WSConv3d(16, 32, 2, activation=activation), (16, 16, 8, 8, 8)),
        (lambda activation: nf.WSConvTranspose2d(64, 32, 4, 2, 1, activation=activation), (32, 64, 12, 12)),
        (lambda activation: nf.WSLinear(256, 64, activation=activation), (4000, 256)),
    ],
)
@pytest.mark.parametrize("activation", ["relu", "sigmoid"])
def test_unit_variance_and_zero_mean_behind_an_activation(make, shape, activation):
    torch.manual_seed(1)
    x = activation_module(activation)(torch.randn(*shape))
    with torch.no_grad():
        output = make(activation)(x)
    inside = output[(..., *[slice(2, -2)] * (len(shape) - 2))]
    channels = inside.transpose(0, 1).flatten(1)
    assert channels.mean(1).square().mean() < 0.01
    assert channels.var(1).mean() == pytest.approx(1.0, abs=0.05)


def test_initial_values():
    torch.manual_seed(0)
    layer = nf.WSConv2d(64, 128, 3, groups=2)
    assert layer.weight.std().item() == pytest.approx((32 * 9) ** -0.5, rel=0.02)
    assert torch.equal(layer.bias, torch.zeros(128))
    assert torch.equal(layer.gain, torch.ones(128))
    with torch.no_grad():
        layer.gain.fill_(3.0)
        layer.bias.fill_(3.0)
        layer.weight.fill_(0.0)
    layer.reset_parameters()
    assert torch.equal(layer.gain, torch.ones(128))
    assert torch.equal(layer.bias, torch.zeros(128))
    assert layer.weight.std().item() == pytest.approx((32 * 9) ** -0.5, rel=0.02)
    plain = nf.ScaledConv2d(64, 128, 3)
    assert plain.weight.std().item() == pytest.approx((2 / (64 * 9)) ** 0.5, rel=0.02)
    assert torch.equal(plain.bias, torch.zeros(128))
    # the sum of squares of every output unit lies far above eps
    transposed = nf.WSConvTranspose2d(64, 64, 4, 2)
    assert transposed.weight.square().sum().item() / 64 / 4 == pytest.approx(1.0, rel=0.05)


def test_learnable_gain():
    with_gain, without = nf.WSConv2d(3, 4, 3), nf.WSConv2d(3, 4, 3, learnable_gain=False)
    assert set(dict(with_gain.named_parameters())) == {"weight", "bias", "gain"}
    assert set(dict(without.named_parameters())) == {"weight", "bias"}
    assert "learnable_gain=False" in repr(without)
    assert "activation=relu" in repr(with_gain)
    without.load_state_dict(nn.Conv2d(3, 4, 3).state_dict())
    with torch.no_grad():
        with_gain.weight.copy_(without.weight)
        with_gain.gain.copy_(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    torch.testing.assert_close(
        with_gain.effective_weight(), without.effective_weight() * torch.tensor([1.0, 2, 3, 4]).reshape(4, 1, 1, 1)
    )


def test_fan_in_of_one_is_warned_of():
    for make in (
        lambda: nf.WSConv2d(4, 4, 1, groups=4),
        lambda: nf.WSLinear(1, 3),
        lambda: nf.WSConvTranspose2d(4, 4, 2, 2, groups=4),
        lambda: nf.WSConvTranspose2d(4, 4, 3, 2, groups=4),
    ):
        with pytest.warns(UserWarning, match=r"fan-in of 1"):
            make()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nf.WSConv2d(4, 4, 3, groups=4)
        nf.WSConvTranspose2d(4, 4, 4, 2, groups=4)
        nf.WSConvTranspose2d(4, 4, 3, 2, dilation=2, groups=4)
        nf.WSConvTranspose2d(8, 4, 1, 2, groups=4)


@every_layer
@pytest.mark.parametrize("kind", ["float", "scalar tensor", "one-element tensor"])
def test_output_scale_scales_the_output(layer_and_input, kind):
    layer, x = layer_and_input
    scale = {"float": 0.37, "scalar tensor": torch.tensor(0.37), "one-element tensor": torch.tensor([0.37])}[kind]
    torch.testing.assert_close(layer(x, output_scale=scale), layer(x) * 0.37, rtol=1e-7, atol=1e-7)


@every_layer
def test_gradients_by_finite_differences_and_double_backward(layer_and_input):
    layer, x = layer_and_input
    names = [name for name, _ in layer.named_parameters()]
    scale = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)

    def function(x, scale, *parameters):
        return torch.func.functional_call(
            layer, dict(zip(names, parameters, strict=True)), (x,), {"output_scale": scale}
        )

    inputs = (x[:1].clone().requires_grad_(), scale, *(p.detach().clone().requires_grad_() for p in layer.parameters()))
    assert torch.autograd.gradcheck(function, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@every_layer
def test_per_example_gradients(layer_and_input):
    layer, x = layer_and_input
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, example):
        return torch.func.functional_call(layer, parameters, (example.unsqueeze(0),)).sin().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, x)
    for index, example in enumerate(x):
        layer.zero_grad()
        layer(example.unsqueeze(0)).sin().sum().backward()
        for name, parameter in layer.named_parameters():
            torch.testing.assert_close(together[name][index], parameter.grad)


@every_layer
def test_copies_and_pickles_compute_the_same(layer_and_input):
    layer, x = layer_and_input
    expected = layer(x)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected, rtol=0, atol=0)
    torch.testing.assert_close(pickle.loads(pickle.dumps(layer))(x), expected, rtol=0, atol=0)
    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.normal_()
    assert not torch.equal(other(x), expected)
    other.load_state_dict(layer.state_dict())
    torch.testing.assert_close(other(x), expected, rtol=0, atol=0)


@every_layer
def test_devices_and_dtypes(layer_and_input):
    layer, x = layer_and_input
    expected = layer(x)
    on_meta = copy.deepcopy(layer).to("meta")(x.to("meta"))
    assert on_meta.shape == expected.shape
    assert on_meta.device.type == "meta"
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        output = copy.deepcopy(layer).to(dtype)(x.to(dtype))
        assert output.dtype == dtype
        torch.testing.assert_close(output.double(), expected, rtol=tolerance, atol=tolerance)


@every_layer
def test_autocast(layer_and_input):
    layer, x = layer_and_input
    layer, x = layer.float(), x.float()
    expected = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
    torch.testing.assert_close(output.float(), expected, rtol=0.1, atol=0.1)
    output.float().square().sum().backward()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in layer.parameters())


@every_ws_layer
def test_autocast_runs_the_product_in_bfloat16(layer_and_input):
    layer, x = layer_and_input
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.float()(x.float()).dtype == torch.bfloat16


@every_layer
def test_compiles_as_one_graph(layer_and_input):
    layer, x = layer_and_input
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    expected, found = layer(x), compiled(x)
    torch.testing.assert_close(found, expected)
    parameters = list(layer.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found.sin().sum(), parameters), torch.autograd.grad(expected.sin().sum(), parameters)
    )


@pytest.mark.skipif(shutil.which("g++") is None, reason="the default backend needs a C++ compiler")
def test_compiles_with_the_default_backend():
    layer, x = nf.WSConv2d(3, 4, 3, 2, "same"), torch.randn(2, 3, 7, 8)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x), rtol=1e-4, atol=1e-5)


def test_built_on_the_meta_device_and_in_another_dtype():
    for factory in ({"device": "meta"}, {"dtype": torch.float64}):
        for layer in (
            nf.WSConv2d(3, 4, 3, **factory),
            nf.WSConvTranspose2d(3, 4, 3, **factory),
            nf.WSLinear(3, 4, **factory),
        ):
            for parameter in layer.parameters():
                assert parameter.device.type == factory.get("device", "cpu")
                assert parameter.dtype == factory.get("dtype", torch.float32)


def test_channels_last_computes_the_same():
    layer = nf.WSConv2d(8, 8, 3, padding=1)
    x = torch.randn(2, 8, 6, 6)
    expected = layer(x)
    output = layer.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
    torch.testing.assert_close(output, expected)


def test_empty_batch():
    layer = nf.WSConv2d(3, 4, 3)
    layer(torch.zeros(0, 3, 5, 5)).sum().backward()
    assert all(not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize(("channels", "ratio", "hidden"), [(8, 0.25, 2), (9, 0.5, 4), (2, 0.25, 1)])
@pytest.mark.parametrize("size", [(), (5,), (4, 5), (2, 3, 4)])
def test_squeeze_excite_against_its_formula(channels, ratio, hidden, size):
    layer = nf.SqueezeExcite(channels, ratio, scale=2.0).double()
    assert layer.reduce.out_features == hidden
    x = torch.randn(3, channels, *size, dtype=torch.float64)
    for example, output in zip(x, layer(x), strict=True):
        pooled = example.reshape(channels, -1).mean(1)
        inner = torch.relu(layer.reduce.weight @ pooled + layer.reduce.bias)
        gate = 2.0 / (1.0 + torch.exp(-(layer.expand.weight @ inner + layer.expand.bias)))
        for channel in range(channels):
            torch.testing.assert_close(output[channel], example[channel] * gate[channel])


@pytest.mark.parametrize("ratio", [0.0, -1.0, math.nan])
def test_squeeze_excite_refuses_a_bad_ratio(ratio):
    with pytest.raises(ValueError, match=r"ratio: expected a positive number"):
        nf.SqueezeExcite(8, ratio)


def depth_case(rate, batch_independent=True):
    torch.manual_seed(0)
    branch = nn.Sequential(nf.WSConv2d(3, 3, 3, padding=1), nn.Tanh(), nf.WSConv2d(3, 3, 3, padding=1)).double()
    x = torch.randn(8, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    return nf.StochasticDepth(rate, batch_independent), branch, x


@pytest.mark.parametrize("batch_independent", [True, False])
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.95])
def test_stochastic_depth_equals_a_masked_branch(rate, batch_independent):
    layer, branch, x = depth_case(rate, batch_independent)
    for seed in range(6):
        torch.manual_seed(seed)
        output = layer(x, branch, x.tanh())
        torch.manual_seed(seed)
        keep = torch.rand(8) >= rate
        expected = x + branch(x.tanh()) * keep.double().reshape(8, 1, 1, 1)
        torch.testing.assert_close(output, expected)
        wanted = [x, *branch.parameters()]
        torch.testing.assert_close(
            torch.autograd.grad(output.sin().sum(), wanted), torch.autograd.grad(expected.sin().sum(), wanted)
        )


def test_stochastic_depth_computes_the_kept_examples_alone():
    layer, branch, x = depth_case(0.5)
    batches = []
    branch.register_forward_hook(lambda module, args, output: batches.append(args[0]))
    for seed in range(5):
        torch.manual_seed(seed)
        layer(x, branch, x)
        torch.manual_seed(seed)
        keep = torch.rand(8) >= 0.5
        assert torch.equal(batches[-1], x[keep])


@pytest.mark.parametrize(
    ("size", "memory_format"),
    [
        ((6,), torch.contiguous_format),
        ((6, 5), torch.contiguous_format),
        ((6, 5), torch.channels_last),
        ((4, 3, 5), torch.contiguous_format),
        ((4, 3, 5), torch.channels_last_3d),
    ],
)
def test_stochastic_depth_keeps_the_memory_format(size, memory_format):
    layer = nf.StochasticDepth(0.5)
    x = torch.randn(8, 3, *size, dtype=torch.float64).to(memory_format=memory_format).requires_grad_()
    seen = []

    def branch(part):
        seen.append(part)
        return part.tanh()

    for seed in range(4):
        torch.manual_seed(seed)
        output = layer(x, branch, x)
        (gradient,) = torch.autograd.grad(output.sin().sum(), x)
        for tensor in (seen[-1], output, gradient):
            assert tensor.is_contiguous(memory_format=memory_format)
        torch.manual_seed(seed)
        keep = (torch.rand(8) >= 0.5).double().reshape(8, 1, *(1 for _ in size))
        expected = x + keep * x.tanh()
        torch.testing.assert_close(output, expected)
        torch.testing.assert_close(gradient, torch.autograd.grad(expected.sin().sum(), x)[0])


def test_stochastic_depth_drops_at_its_rate():
    layer = nf.StochasticDepth(0.3)
    x = torch.zeros(20_000, 1)
    kept = layer(x, lambda part: part + 1.0, x)
    assert set(kept.unique().tolist()) == {0.0, 1.0}, "kept branches are not rescaled"
    assert kept.mean().item() == pytest.approx(0.7, abs=0.015)


def test_stochastic_depth_off():
    layer, branch, x = depth_case(0.9)
    torch.testing.assert_close(layer.eval()(x, branch, x), x + branch(x))
    layer, branch, x = depth_case(0.0)
    state = torch.get_rng_state()
    torch.testing.assert_close(layer.train()(x, branch, x), x + branch(x))
    assert torch.equal(torch.get_rng_state(), state)


def test_stochastic_depth_leaves_zero_gradients_where_every_example_is_dropped():
    layer, branch, x = depth_case(0.999)
    torch.testing.assert_close(layer(x, branch, x), x, rtol=0, atol=0)
    layer(x, branch, x).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in branch.parameters())


def test_stochastic_depth_under_compile_and_vmap():
    layer, branch, x = depth_case(0.5)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: layer(x, branch, x), backend="eager", fullgraph=True)
    torch.manual_seed(3)
    output = compiled(x)
    torch.manual_seed(3)
    keep = (torch.rand(8) >= 0.5).double().reshape(8, 1, 1, 1)
    torch.testing.assert_close(output, x + keep * branch(x))

    def one(example):
        return layer(example.unsqueeze(0), branch, example.unsqueeze(0)).squeeze(0)

    output = torch.func.vmap(one, randomness="different")(x)
    kept = torch.tensor([not torch.equal(a, b) for a, b in zip(output, x, strict=True)])
    torch.testing.assert_close(output, x + kept.double().reshape(8, 1, 1, 1) * branch(x))
    assert 0 < kept.sum() < 8


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1.5, math.nan])
def test_stochastic_depth_refuses_a_bad_rate(rate):
    with pytest.raises(ValueError, match=r"rate: expected a probability in \[0, 1\)"):
        nf.StochasticDepth(rate)
