"""RegNets with and without BatchNorm: parameter counts of the original, topology, signal, batch independence."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import normfree as nf
from normfree.models.regnet_layout import VARIANTS, RegNetLayout

NAMES = [f"b{level}" for level in range(9)]


def on_meta(name: str, **options: object) -> nf.models.network.ResidualNetwork:
    with torch.device("meta"):
        return nf.create_model(name, **options)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("name", "parameters"), [("nf_regnet_b0", 7_643_982), ("nf_regnet_b1", 9_067_818)])
def test_parameter_counts_measured_on_the_original(name: str, parameters: int) -> None:
    assert count(on_meta(name, num_classes=10)) == parameters


@pytest.mark.parametrize("level", range(6))
def test_rounded_widths_are_timms(level: int) -> None:
    from normfree._torchvision import import_timm

    timm = import_timm()
    with torch.device("meta"):
        theirs = timm.create_model(f"nf_regnet_b{level}")
    ours = on_meta(f"nf_regnet_b{level}", channel_multiple=8)
    skip_gains = len(ours.residual_blocks)
    assert count(ours) == count(theirs) + skip_gains
    assert ours.num_features == theirs.num_features


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_follows_the_table(name: str) -> None:
    layout = RegNetLayout(VARIANTS[name])
    plans = layout.plans
    assert [plan.out_channels for stage in layout.stages for plan in stage[:1]] == [
        int(0.75 * width) for width in VARIANTS[name].widths
    ]
    assert tuple(len(stage) for stage in layout.stages) == VARIANTS[name].depths
    assert [plan.stride for plan in plans] == [2 if plan.first_in_stage else 1 for plan in plans]
    for plan in plans:
        expanded = plan.in_channels * (2.25 if plan.index else 1.0)
        assert layout.mid_channels(plan) == int(expanded) // 8 * 8
    assert layout.final_channels == 1280 * plans[-1].out_channels // 440


@pytest.mark.parametrize("name", NAMES)
def test_the_twin_has_the_same_topology(name: str) -> None:
    nf_model, bn_model = on_meta(f"nf_regnet_{name}"), on_meta(f"bn_regnet_{name}")
    assert nf.batchnorm_twin(f"nf_regnet_{name}") == f"bn_regnet_{name}"
    shapes = [
        [(conv.weight.shape, conv.stride, conv.groups) for conv in model.modules() if isinstance(conv, nn.Conv2d)]
        for model in (nf_model, bn_model)
    ]
    assert sorted(map(str, shapes[0])) == sorted(map(str, shapes[1]))
    assert nf_model.feature_info == bn_model.feature_info
    names = [name for name, _ in bn_model.named_parameters()]
    assert not any("gain" in name for name in names)
    assert not any(conv.bias is not None for conv in bn_model.modules() if isinstance(conv, nn.Conv2d))


def test_the_data_configuration_travels_with_the_name_and_the_model() -> None:
    data = nf.data_config("nf_regnet_b3")
    assert (data.train_size, data.test_size) == (288, 320)
    model = on_meta("nf_regnet_b3")
    assert model.info.data == data
    assert model.head.dropout.p == 0.3


@pytest.mark.parametrize("name", ["nf_regnet_b0", "bn_regnet_b0"])
@pytest.mark.parametrize("options", [{}, {"padding": "same"}, {"stem": "small"}, {"shortcut": "strided"}])
def test_sizes_and_gradients(name: str, options: dict) -> None:
    model = nf.create_model(name, num_classes=3, width=0.25, **options)
    for size in (64, 49):
        output = model(torch.randn(2, 3, size, size))
        assert output.shape == (2, 3)
        assert torch.equal(output, torch.zeros(2, 3))  # the classifier starts at zero
    nn.init.normal_(model.head.classifier.weight)
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


def test_examples_never_meet() -> None:
    model = nf.create_model("nf_regnet_b0", num_classes=3, width=0.25).double()
    nn.init.normal_(model.head.classifier.weight)
    model.head.dropout.p = 0.0
    images = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    together = model(images)
    alone = torch.cat([model(image[None]) for image in images])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=1e-12)


def test_every_scalar_is_in_a_weight() -> None:
    """The branch with α, s and the gate's factor 2 multiplied onto activations, as the paper writes it."""
    torch.manual_seed(0)
    model = nf.create_model("nf_regnet_b0", width=0.25, skip_gain=0.75).double().eval()
    block = model.residual_blocks[2]
    x = torch.randn(2, block.conv0.in_channels, 9, 9, dtype=torch.float64)
    gamma = nf.gain("silu")
    activate = nn.functional.silu

    def conv(layer: nf.WSConv2d, z: torch.Tensor) -> torch.Tensor:
        weight = nf.standardize_weight(layer.weight, layer.gain)
        return nn.functional.conv2d(z, weight, layer.bias, layer.stride, layer.padding, 1, layer.groups)

    with torch.no_grad():
        z = conv(block.conv1, gamma * activate(conv(block.conv0, gamma * activate(x) / block.beta)))
        gate = block.channel_attention
        pooled = gate.expand(torch.relu(gate.reduce(z.mean((2, 3)))))
        z = 2.0 * torch.sigmoid(pooled)[:, :, None, None] * z
        expected = x + 0.2 * 0.75 * conv(block.conv2, gamma * activate(z))
        torch.testing.assert_close(block(x), expected, rtol=1e-12, atol=1e-12)


def test_the_variance_on_white_noise_is_what_the_original_shows() -> None:
    """Measured on the original, B0 at 96 px, behind the stem and behind the first three transitions.

    The pooled shortcut averages uncorrelated pixels, so that each transition divides the variance by up to 4.
    """
    torch.manual_seed(0)
    model = nf.create_model("nf_regnet_b0", padding="same", gain_source="published").eval()
    variances: list[float] = []

    def record(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
        variances.append(float(output.var(dim=(0, 2, 3)).mean()))

    model.stem.register_forward_hook(record)
    for stage in model.stages:
        stage[0].register_forward_hook(record)
    with torch.no_grad():
        model(torch.randn(8, 3, 96, 96))
    assert variances[:4] == pytest.approx([1.01, 0.269, 0.064, 0.012], rel=0.15)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="channel_multiple: expected one of 1, 8, got 4"):
        nf.create_model("nf_regnet_b0", channel_multiple=4)
    with pytest.raises(ValueError, match="width"):
        nf.create_model("nf_regnet_b0", width=0)
    with pytest.raises(ValueError, match="did you mean"):
        nf.create_model("nf_regnet_b9")
