import pytest
import torch
from torch import nn

import normfree as nf
from normfree.layers import ScaledBranch
from normfree.layers.standardized_weight import StandardizedWeight

MODELS = {
    "nf_resnet26": {},
    "nf_seresnet26": {"padding": "same", "stochastic_depth_rate": 0.2},
    "nf_ecaresnet26": {"gamma_placement": "weight", "eps_mode": "added"},
    "nf_regnet_b0": {"activation": "gelu"},
    "test_nfnet": {"stem_width": 8},
    "skipinit_resnet26": {"skip_gain": 0.3},
}


def randomised(module):
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module.double()


@pytest.mark.filterwarnings("ignore:.*fan-in of 1")
@pytest.mark.parametrize("name", MODELS)
def test_a_folded_network_is_the_network(name):
    model = randomised(nf.create_model(name, num_classes=5, width=0.125, **MODELS[name])).eval()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    folded = nf.fold(model)
    x = torch.randn(2, 3, 40, 48, dtype=torch.float64)
    expected = model(x)
    assert expected.abs().max() > 0
    torch.testing.assert_close(folded(x), expected, rtol=1e-10, atol=1e-11)
    torch.testing.assert_close(
        folded.forward_head(folded.forward_features(x), pre_logits=True),
        model.forward_head(model.forward_features(x), pre_logits=True),
    )
    assert not any(isinstance(module, StandardizedWeight) for module in folded.modules())
    assert all(module.skip_gain is None for module in folded.modules() if isinstance(module, ScaledBranch))
    assert not any(key.endswith(("gain", "skip_gain")) for key in folded.state_dict())
    assert not folded.training
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    torch.testing.assert_close(nf.fold(folded)(x), folded(x), rtol=0, atol=0)


def test_a_folded_network_trains():
    folded = nf.fold(randomised(nf.create_model("nf_resnet26", num_classes=5, width=0.125)))
    folded(torch.randn(2, 3, 32, 32, dtype=torch.float64)).sum().backward()
    assert all(parameter.grad is not None for parameter in folded.parameters())
    assert folded.training


def test_standard_padding_leaves_torchs_own_classes():
    folded = nf.fold(nf.create_model("nf_resnet26", num_classes=5, width=0.125))
    convs = [module for module in folded.modules() if isinstance(module, nn.Conv2d)]
    assert {type(conv) for conv in convs} == {nn.Conv2d}


LAYERS = {
    "conv1d": (lambda: nf.WSConv1d(4, 6, 3, 2, 1, groups=2), (2, 4, 9)),
    "conv2d": (lambda: nf.WSConv2d(4, 6, 3, 2, "same", dilation=2, groups=2, bias=False), (2, 4, 7, 8)),
    "reflect": (lambda: nf.WSConv2d(4, 6, 3, padding=1, padding_mode="reflect", learnable_gain=False), (2, 4, 5, 6)),
    "conv3d": (lambda: nf.WSConv3d(2, 3, 2, 2, "same"), (2, 2, 4, 3, 4)),
    "transpose1d": (lambda: nf.WSConvTranspose1d(4, 6, 3, 2, groups=2), (2, 4, 5)),
    "transpose2d": (lambda: nf.WSConvTranspose2d(4, 6, 4, 2, 1, 1, groups=2, dilation=3), (2, 4, 4, 5)),
    "transpose2d_same": (lambda: nf.WSConvTranspose2d(4, 6, 4, (2, 3), "same"), (2, 4, 4, 5)),
    "linear": (lambda: nf.WSLinear(5, 3, activation="silu"), (2, 5)),
    "scaled": (lambda: nf.ScaledConv2d(3, 4, 3, 2, 1, scale=0.5), (2, 3, 6, 5)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_folded_layer_is_the_layer(name):
    make, shape = LAYERS[name]
    layer = randomised(make())
    x = torch.randn(*shape, dtype=torch.float64)
    for folded in (nf.fold(layer), nf.fold(nn.Sequential(layer, nn.Identity()))):
        torch.testing.assert_close(folded(x), layer(x), rtol=1e-10, atol=1e-12)


def test_a_layer_used_twice_stays_one():
    layer = nf.WSLinear(4, 4)
    folded = nf.fold(nn.Sequential(layer, nn.ReLU(), layer))
    assert folded[0] is folded[2]
    assert type(folded[0]) is nn.Linear


def test_precision_frozen_parameters_and_memory_format():
    layer = nf.WSConv2d(4, 4, 3).to(torch.bfloat16).to(memory_format=torch.channels_last)
    layer.weight.requires_grad_(False)
    folded = nf.fold(nn.Sequential(layer))[0]
    assert folded.weight.dtype == torch.bfloat16
    assert folded.weight.is_contiguous(memory_format=torch.channels_last)
    assert not folded.weight.requires_grad
    assert folded.bias.requires_grad


def randomise(model):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))


class Scaling(nn.Module):
    """Passes a scale to layers of every kind, in an attribute, a list and a dictionary; to one layer it does not."""

    def __init__(self):
        super().__init__()
        self.conv = nf.WSConv2d(3, 4, 3, padding=1)
        self.same = nf.WSConv2d(4, 4, 3, stride=2, padding="same")
        self.several = nn.ModuleList([nf.WSConvTranspose2d(4, 4, 4, 2, 1), nf.WSConvTranspose2d(4, 4, 4, 2, "same")])
        self.named = nn.ModuleDict({"linear": nf.WSLinear(4, 2)})
        self.inner = nn.Sequential(nf.WSConv2d(4, 4, 1))

    def forward(self, x):
        scaled = {"output_scale": 0.3}
        x = self.inner(self.same(self.conv(x, output_scale=0.5), **scaled))
        for layer in self.several:
            x = layer(x, **scaled)
        return self.named["linear"](x.mean((2, 3)), output_scale=torch.tensor(0.7)) + self.named["linear"](x[..., 0, 0])


def test_modules_that_pass_a_scale():
    model = Scaling()
    randomise(model)
    x = torch.randn(2, 3, 8, 8)
    folded = nf.fold(model)
    torch.testing.assert_close(folded(x), model(x), rtol=1e-5, atol=1e-6)
    assert type(folded.inner[0]) is nn.Conv2d
    assert isinstance(folded.conv, nn.Conv2d)
    assert isinstance(folded.several[0], nn.ConvTranspose2d)
    assert not any(isinstance(module, nf.WSConv2d) for module in folded.modules())


def test_folded_fixup():
    model = nf.create_model("fixup_resnet26", num_classes=3, width=0.0625).eval()
    randomise(model)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(nf.fold(model)(x), model(x), rtol=1e-4, atol=1e-5)
