import math

import pytest
import torch
import torch.nn.functional as F

import normfree as nf
from normfree.models.network import expected_stds, plan_stages
from normfree.models.resnet_layout import DEPTHS


def perturbed(name, **options):
    torch.manual_seed(0)
    model = nf.create_model(name, num_classes=10, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(
    ("name", "count"), [("nf_resnet50", 1_486_122), ("nf_seresnet50", 2_119_578), ("nf_resnet101", 2_682_939)]
)
def test_parameter_counts_of_the_original(name, count):
    model = nf.create_model(name, num_classes=10, width=0.25)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("depth", DEPTHS)
def test_depths_and_widths(depth):
    with torch.device("meta"):
        model = nf.create_model(f"nf_resnet{depth}")
    stages = {
        26: (2, 2, 2, 2),
        50: (3, 4, 6, 3),
        101: (3, 4, 23, 3),
        152: (3, 8, 36, 3),
        200: (3, 24, 36, 3),
        288: (24, 24, 24, 24),
        600: (50, 50, 50, 50),
    }[depth]
    assert tuple(len(stage) for stage in model.stages) == stages
    for stage, out, stride in zip(model.stages, (256, 512, 1024, 2048), (1, 2, 2, 2), strict=True):
        assert stage[0].conv1.stride == (stride, stride)
        assert all(block.conv1.stride == (1, 1) for block in stage[1:])
        assert all(block.conv2.out_channels == out and block.conv1.in_channels == out // 4 for block in stage)
        assert [block.conv_shortcut is not None for block in stage] == [True] + [False] * (len(stage) - 1)


def test_betas():
    plans = [plan for stage in plan_stages(64, (256, 512), (3, 2), (1, 2)) for plan in stage]
    variances = [beta**2 for beta in expected_stds(plans, 0.2)]
    assert variances == pytest.approx([1.0, 1.04, 1.08, 1.12, 1.04])
    variances = [beta**2 for beta in expected_stds(plans, 0.5)]
    assert variances == pytest.approx([1.0, 1.25, 1.5, 1.75, 1.25])


def test_stochastic_depth_rates_grow_with_the_index():
    model = nf.create_model("nf_resnet26", width=0.125, stochastic_depth_rate=0.4)
    rates = [block.stochastic_depth.rate for stage in model.stages for block in stage]
    assert rates == pytest.approx([0.4 * index / 8 for index in range(8)])


def standardized(conv, gamma=1.0):
    """One output channel at a time."""
    rows = []
    for unit, gain in zip(conv.weight, conv.gain, strict=True):
        centred = unit - unit.mean()
        rows.append(gain * centred / centred.square().sum().clamp(min=1e-4).sqrt())
    return gamma * torch.stack(rows)


def tf_pad(x, kernel, stride, value=0.0):
    total = [max((math.ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[2:]]
    top, left = (t // 2 for t in total)
    return F.pad(x, (left, total[1] - left, top, total[0] - top), value=value)


def plain_conv(x, conv, padding, weight=None):
    """Every weight standardized without γ: the scalars stand on the activations."""
    weight = standardized(conv) if weight is None else weight
    kernel, stride = conv.kernel_size[0], conv.stride[0]
    x = tf_pad(x, kernel, stride) if padding == "same" else F.pad(x, [kernel // 2] * 4)
    return F.conv2d(x, weight, conv.bias, stride)


def reference_forward(model, x, gamma, alpha, padding, shortcut="strided", activation=torch.relu):
    """The network as the paper writes it (section 3), with every scalar on the activation map."""

    def activate(x):
        return activation(x) * gamma

    x = plain_conv(x, model.stem.conv, padding)
    x = F.max_pool2d(tf_pad(x, 3, 2, -math.inf), 3, 2) if padding == "same" else F.max_pool2d(x, 3, 2, 1)
    variance = 1.0
    for stage in model.stages:
        for index, block in enumerate(stage):
            out = activate(x) / math.sqrt(variance)
            skip = x
            if index == 0:
                conv = block.conv_shortcut
                pooled = out
                if shortcut == "avgpool":
                    stride = block.conv1.stride[0]
                    pooled = F.avg_pool2d(out, stride, stride, ceil_mode=True) if stride > 1 else out
                    conv = conv if stride == 1 else conv[1]
                skip = plain_conv(pooled, conv, "none")
            out = plain_conv(out, block.conv0, padding)
            out = plain_conv(activate(out), block.conv1, padding)
            out = plain_conv(activate(out), block.conv2, padding)
            for se in (layer for layer in block.children() if isinstance(layer, nf.SqueezeExcite)):
                gate = torch.sigmoid(se.expand(torch.relu(se.reduce(out.mean((2, 3))))))
                out = 2.0 * out * gate[:, :, None, None]
            x = skip + alpha * block.skip_gain * out
            variance = (1.0 if index == 0 else variance) + alpha**2
    pooled = activate(x).mean((2, 3))
    return F.linear(pooled, model.head.classifier.weight, model.head.classifier.bias)


@pytest.mark.parametrize(
    ("name", "options", "activation"),
    [
        ("nf_resnet26", {}, torch.relu),
        ("nf_resnet26", {"padding": "same"}, torch.relu),
        ("nf_seresnet26", {"padding": "same", "alpha": 0.35}, torch.relu),
        ("nf_seresnet26", {"activation": "silu"}, F.silu),
        ("nf_resnet26", {"activation": "gelu", "gain_source": "published"}, F.gelu),
        ("nf_resnet26", {"shortcut": "avgpool"}, torch.relu),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
@pytest.mark.parametrize("training", [True, False])
def test_the_network_is_the_one_in_the_paper(name, options, activation, training):
    model = perturbed(name, width=0.25, **options).train(training)
    gamma = nf.gain(options.get("activation", "relu"), options.get("gain_source", "exact"))
    size = (64, 64) if options.get("shortcut") else (61, 70)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = reference_forward(
        model,
        x,
        gamma,
        options.get("alpha", 0.2),
        options.get("padding", "symmetric"),
        options.get("shortcut", "strided"),
        activation,
    )
    output = model(x)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(output.sin().sum(), parameters),
        torch.autograd.grad(expected.sin().sum(), parameters),
        rtol=1e-8,
        atol=1e-10,
    )


@pytest.mark.parametrize("name", ["nf_resnet26", "nf_seresnet26"])
def test_skip_gain_zero_makes_a_block_the_identity(name):
    model = nf.create_model(name, width=0.125, skip_gain=0.0)
    assert all(block.skip_gain.item() == 0.0 for stage in model.stages for block in stage)
    for block in (model.stages[0][1], model.stages[3][1]):
        x = torch.randn(2, block.conv0.in_channels, 7, 7)
        assert torch.equal(block(x), x)
        block(x).sin().sum().backward()
        assert block.skip_gain.grad != 0, "the branch must be able to start"


def test_skip_gain_starts_at_one_and_learns():
    model = nf.create_model("nf_resnet26", width=0.125)
    assert all(block.skip_gain.item() == 1.0 for stage in model.stages for block in stage)
    assert all(block.skip_gain.requires_grad for stage in model.stages for block in stage)


def test_initial_classifier():
    model = nf.create_model("nf_resnet26")
    assert model.head.classifier.weight.std().item() == pytest.approx(0.01, rel=0.01)
    assert not model.head.classifier.bias.any()


def test_average_pooled_shortcut_at_odd_sizes_counts_real_pixels_only():
    model = perturbed("nf_resnet26", width=0.125, shortcut="avgpool")
    pool = model.stages[1][0].conv_shortcut[0]
    x = torch.arange(15.0).reshape(1, 1, 3, 5)
    expected = torch.tensor([[3.0, 5.0, 6.5], [10.5, 12.5, 14.0]]).reshape(1, 1, 2, 3)
    torch.testing.assert_close(pool(x), expected)


def variances(model, x):
    """Average channel variance of the stem's output, of every block's and of every residual branch."""
    signal, residual = [], []
    x = model.stem(x)
    signal.append(x)
    for stage in model.stages:
        for block in stage:
            residual.append(block.branch(block.activation(x)) / (0.2 * block.skip_gain))
            x = block(x)
            signal.append(x)
    return [
        [float(a.transpose(0, 1).flatten(1).var(1, correction=0).mean()) for a in maps] for maps in (signal, residual)
    ]


@torch.no_grad()
def test_signal_at_64_pixels():
    signals, residuals = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        model = nf.create_model("nf_resnet50", padding="same", skip_gain=1.0)
        signal, residual = variances(model, torch.randn(4, 3, 64, 64))
        signals.append(signal)
        residuals.append(residual)
    signal, residual = torch.tensor(signals).mean(0).tolist(), torch.tensor(residuals).mean(0).tolist()
    assert signal[:5] == pytest.approx([0.366, 1.039, 1.077, 1.118, 1.033], rel=0.05)
    assert signal[-3:] == pytest.approx([0.838, 0.855, 0.873], rel=0.1)
    assert residual[0] == pytest.approx(0.96, rel=0.1)
    assert residual[-1] == pytest.approx(0.446, rel=0.2)


@torch.no_grad()
def test_he_weights_let_the_mean_grow():
    """The paper's foil: without standardization the squared mean grows with depth, with it it stays small."""
    ratios = {}
    for weights in ("he", "standardized"):
        torch.manual_seed(0)
        model = nf.create_model("nf_resnet50", width=0.25, weights=weights, skip_gain=1.0)
        x = model.forward_features(torch.randn(4, 3, 64, 64)).transpose(0, 1).flatten(1)
        ratios[weights] = float(x.mean(1).square().mean() / x.var(1).mean())
    assert ratios["he"] > 3 * ratios["standardized"]
    assert ratios["standardized"] < 0.5


@pytest.mark.parametrize("name", ["nf_seresnet26", "seresnetv2_26", "seresnetv2_26_relu_bn"])
def test_se_models_have_a_gate_in_every_block(name):
    model = nf.create_model(name, width=0.125)
    scale = 2.0 if name.startswith("nf") else 1.0
    for stage in model.stages:
        for block in stage:
            [gate] = [layer for layer in block.children() if isinstance(layer, nf.SqueezeExcite)]
            assert gate.scale == scale
            assert gate.reduce.out_features == block.conv2.out_channels // 4
