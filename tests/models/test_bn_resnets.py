import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfree as nf
from normfree._torchvision import import_timm, import_torchvision


def perturbed(name, **options):
    torch.manual_seed(0)
    model = nf.create_model(name, num_classes=10, width=0.25, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def copy_modules(pairs):
    for ours, theirs in pairs:
        state = theirs.state_dict()
        ours.load_state_dict({key: value.reshape(ours.state_dict()[key].shape) for key, value in state.items()})


def assert_same_function(ours, theirs, size):
    ours, theirs = ours.double(), theirs.double()
    for training in (True, False):
        torch.manual_seed(1)
        x = torch.randn(3, 3, *size, dtype=torch.float64)
        torch.testing.assert_close(ours.train(training)(x), theirs.train(training)(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(64, 64), (49, 75)])
def test_v1_is_torchvisions(size):
    import_torchvision()
    from torchvision.models.resnet import Bottleneck, ResNet

    theirs, ours = ResNet(Bottleneck, [2, 2, 2, 2], num_classes=10), nf.create_model("resnetv1_26", num_classes=10)
    nn.init.normal_(theirs.bn1.bias)
    pairs = [(ours.stem.conv, theirs.conv1), (ours.stem.norm.norm, theirs.bn1), (ours.head.classifier, theirs.fc)]
    for index, stage in enumerate(ours.stages):
        for block, other in zip(stage, getattr(theirs, f"layer{index + 1}"), strict=True):
            pairs += [(block.conv0, other.conv1), (block.conv1, other.conv2), (block.conv2, other.conv3)]
            pairs += [(block.norm0.norm, other.bn1), (block.norm1.norm, other.bn2), (block.norm2, other.bn3)]
            if other.downsample is not None:
                pairs += zip(block.shortcut, other.downsample, strict=True)
    copy_modules(pairs)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert_same_function(ours, theirs, size)


@pytest.mark.parametrize("size", [(64, 64), (49, 75)])
def test_v2_is_timms(size):
    import_timm()
    from timm.layers import BatchNormAct2d, create_conv2d
    from timm.models.resnetv2 import ResNetV2

    theirs = ResNetV2([2, 2, 2, 2], num_classes=10, conv_layer=create_conv2d, norm_layer=BatchNormAct2d)
    ours = nf.create_model("resnetv2_26", num_classes=10)
    pairs = [
        (ours.stem.conv, theirs.stem.conv),
        (ours.head.before_pool.norm, theirs.norm),
        (ours.head.classifier, theirs.head.fc),
    ]
    for stage, other_stage in zip(ours.stages, theirs.stages, strict=True):
        for block, other in zip(stage, other_stage.blocks, strict=True):
            pairs += [(getattr(block, f"conv{i}"), getattr(other, f"conv{i + 1}")) for i in range(3)]
            pairs += [(getattr(block, f"norm{i}").norm, getattr(other, f"norm{i + 1}")) for i in range(3)]
            if other.downsample is not None:
                pairs.append((block.conv_shortcut, other.downsample.conv))
    copy_modules(pairs)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert_same_function(ours, theirs, size)


def batch_norm(x, norm):
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
    shape = (1, -1, 1, 1)
    return (x - mean) / (variance + 1e-5).sqrt() * norm.weight.reshape(shape) + norm.bias.reshape(shape)


def conv(x, layer):
    return F.conv2d(x, layer.weight, None, layer.stride, layer.kernel_size[0] // 2)


@pytest.mark.parametrize("name", ["resnetv2_26", "resnetv2_26_relu_bn", "seresnetv2_26", "seresnetv2_26_relu_bn"])
def test_both_orders_against_an_explicit_forward(name):
    model = perturbed(name)

    def prepare(x, layers):
        if name.endswith("relu_bn"):
            return batch_norm(torch.relu(x), layers.norm)
        return torch.relu(batch_norm(x, layers.norm))

    x = torch.randn(3, 3, 64, 64, dtype=torch.float64)
    output = model(x)
    x = F.max_pool2d(conv(x, model.stem.conv), 3, 2, 1)
    for stage in model.stages:
        for block in stage:
            out = prepare(x, block.norm0)
            skip = x if block.conv_shortcut is None else conv(out, block.conv_shortcut)
            out = prepare(conv(out, block.conv0), block.norm1)
            out = prepare(conv(out, block.conv1), block.norm2)
            out = conv(out, block.conv2)
            for se in (layer for layer in block.children() if isinstance(layer, nf.SqueezeExcite)):
                gate = torch.sigmoid(se.expand(torch.relu(se.reduce(out.mean((2, 3))))))
                out = out * gate[:, :, None, None]
            x = skip + out
    expected = model.head.classifier(prepare(x, model.head.before_pool).mean((2, 3)))
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)


def test_he_weights_and_no_convolution_biases():
    for name in ("resnetv1_26", "resnetv2_26"):
        model = nf.create_model(name)
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d):
                assert layer.bias is None
        for layer in (model.stages[1][0].conv1, model.stages[3][1].conv0):
            assert layer.weight.std().item() == pytest.approx((2 / layer.weight[0].numel()) ** 0.5, rel=0.02)


@torch.no_grad()
def test_what_reaches_the_last_convolution_of_a_branch_in_both_orders():
    """ReLU-BN hands over mean 0 and variance 1; BN-ReLU the moments of a rectified normal, hence a mean shift."""
    torch.manual_seed(0)
    x = torch.randn(8, 64, 14, 14)
    variance, squared_mean = {}, {}
    for order in ("bn_relu", "relu_bn"):
        block = nf.create_model("resnetv2_26", width=0.25, order=order).stages[0][1]
        weight = block.conv2.weight
        out = block.branch(block.norm0(x)).transpose(0, 1).flatten(1) / (weight.var() * weight[0].numel()).sqrt()
        variance[order], squared_mean[order] = float(out.var(1).mean()), float(out.mean(1).square().mean())
    assert variance["relu_bn"] == pytest.approx(1.0, rel=0.1)
    assert squared_mean["relu_bn"] < 0.01
    assert variance["bn_relu"] == pytest.approx(0.5 - 0.5 / torch.pi, rel=0.2)
    assert squared_mean["bn_relu"] == pytest.approx(0.5 / torch.pi, rel=0.5)
