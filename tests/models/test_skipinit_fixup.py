import math

import pytest
import torch
import torch.nn.functional as F

import normfree as nf


def perturbed(name, **options):
    torch.manual_seed(0)
    model = nf.create_model(name, num_classes=10, width=0.25, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize(("name", "count"), [("skipinit_resnet50", 1_479_466), ("fixup_resnet50", 1_472_940)])
def test_parameter_counts_of_the_original(name, count):
    model = nf.create_model(name, num_classes=10, width=0.25)
    assert sum(p.numel() for p in model.parameters()) == count


def conv(x, layer, bias=True):
    return F.conv2d(x, layer.weight, layer.bias if bias else None, layer.stride, layer.kernel_size[0] // 2)


def skipinit_reference(model, x):
    x = F.max_pool2d(conv(x, model.stem.conv), 3, 2, 1)
    for stage in model.stages:
        for block in stage:
            activated = torch.relu(x)
            skip = x if block.conv_shortcut is None else conv(activated, block.conv_shortcut)
            out = conv(activated, block.conv0)
            out = conv(torch.relu(out), block.conv1)
            out = conv(torch.relu(out), block.conv2)
            x = skip + block.skip_gain * out
    return model.head.classifier(torch.relu(x).mean((2, 3)))


def fixup_reference(model, x):
    x = conv(x, model.stem.conv) + model.stem.bias1.bias
    x = F.max_pool2d(torch.relu(x), 3, 2, 1)
    for stage in model.stages:
        for block in stage:
            biased = x + block.bias1a.bias
            out = torch.relu(conv(biased, block.conv0) + block.bias1b.bias)
            out = torch.relu(conv(out + block.bias2a.bias, block.conv1) + block.bias2b.bias)
            out = conv(out + block.bias3a.bias, block.conv2) * block.scale + block.bias3b.bias
            skip = biased if block.conv_shortcut is None else conv(biased, block.conv_shortcut)
            x = torch.relu(out + skip)
    return model.head.classifier(x.mean((2, 3)) + model.head.scalar_bias.bias)


@pytest.mark.parametrize(
    ("name", "reference"), [("skipinit_resnet26", skipinit_reference), ("fixup_resnet26", fixup_reference)]
)
def test_the_network_is_the_one_in_the_paper(name, reference):
    model = perturbed(name)
    x = torch.randn(2, 3, 61, 70, dtype=torch.float64)
    output, expected = model(x), reference(model, x)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    parameters = list(model.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(output.sin().sum(), parameters),
        torch.autograd.grad(expected.sin().sum(), parameters),
        rtol=1e-8,
        atol=1e-10,
    )


def test_skipinit_starts_as_the_identity():
    model = nf.create_model("skipinit_resnet26", width=0.125)
    block = model.stages[2][1]
    x = torch.randn(2, block.conv0.in_channels, 7, 7)
    assert torch.equal(block(x), x)
    block(x).sin().sum().backward()
    assert block.skip_gain.grad != 0
    assert model.stem.conv.bias is None
    assert block.conv0.bias is not None


def test_skipinit_has_he_weights():
    model = nf.create_model("skipinit_resnet26")
    for layer in (model.stages[1][0].conv0, model.stages[3][1].conv1, model.stages[2][0].conv_shortcut):
        fan_in = layer.weight[0].numel()
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.02)


def test_fixup_starts_at_zero_with_its_own_weights():
    model = nf.create_model("fixup_resnet50")
    assert not model(torch.randn(2, 3, 32, 32)).any()
    for stage in model.stages:
        for block in stage:
            mid = block.conv0.out_channels
            expected = math.sqrt(2 / mid) * 16**-0.25
            assert block.conv0.weight.std().item() == pytest.approx(expected, rel=0.05)
            assert block.conv1.weight.std().item() == pytest.approx(expected / 3, rel=0.05)
            assert not block.conv2.weight.any()
            assert block.scale.item() == 1.0
            if block.conv_shortcut is not None:
                shortcut = block.conv_shortcut
                expected = math.sqrt(2 / shortcut.out_channels)
                assert shortcut.weight.std().item() == pytest.approx(expected, rel=0.05)
    assert all(layer.bias is None for layer in model.modules() if isinstance(layer, torch.nn.Conv2d))


def test_fixup_blocks_start_as_the_identity_of_a_positive_signal():
    block = nf.create_model("fixup_resnet26", width=0.125).stages[0][1]
    x = torch.rand(2, block.conv0.in_channels, 5, 5)
    torch.testing.assert_close(block(x), x)
