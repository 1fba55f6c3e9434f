import copy

import pytest
import torch
from torch import nn

import normfree as nf


class Everything(nn.Module):
    """A layer of every kind, with and without scales of their own."""

    def __init__(self):
        super().__init__()
        self.conv = nf.WSConv2d(3, 6, 3, padding="same", stride=2, activation=None)
        self.up = nf.WSConvTranspose2d(6, 4, 4, 2, 1)
        self.linear = nf.WSLinear(4, 5, activation="tanh", learnable_gain=False)
        self.scale = nn.Parameter(torch.tensor(0.7))

    def forward(self, x):
        x = self.conv(x, output_scale=self.scale) + self.conv(x, output_scale=0.3)
        return self.linear(torch.tanh(self.up(torch.relu(x))).mean((2, 3)))


def everything():
    torch.manual_seed(0)
    return Everything().double()


def network():
    torch.manual_seed(0)
    return nf.create_model("nf_resnet26", num_classes=3, width=0.0625).double()


X = torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=torch.float64).reshape(2, 3, 32, 32).sin()


def gradients(model):
    model.zero_grad()
    model(X).sin().sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("make", [everything, network])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_are_the_same(make, layout):
    model = make().to(memory_format=layout)
    expected = gradients(copy.deepcopy(model))
    nf.recompute_standardization(model)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(gradients(copy.deepcopy(model)), expected, rtol=1e-10, atol=1e-12)
    nf.recompute_standardization(model, enable=False)
    torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-12)


def alive_after_forward(model):
    """Bytes of what the forward pass has made and something still holds."""
    from benchmarks.memory import AllocatedBytes

    with AllocatedBytes() as counter:
        for tensor in model.parameters():
            counter.watch(tensor)
        before = counter.now
        output = model(X)
        return counter.now - before, output


def test_standardized_weights_are_not_kept():
    model = network()
    weights = sum(m.weight.numel() * 8 for m in model.modules() if isinstance(m, nf.WSConv2d))
    plain, _ = alive_after_forward(model)
    model.eval().train()
    nf.recompute_standardization(model)
    lean, _ = alive_after_forward(model)
    assert plain - lean == pytest.approx(weights, rel=0.05)


@pytest.mark.parametrize("change", ["weight", "gain", "scale", "another weight"])
def test_a_change_before_the_backward_pass_is_an_error(change):
    model = everything()
    nf.recompute_standardization(model)
    loss = model(X).sum()
    with torch.no_grad():
        if change == "another weight":
            model.conv.weight = nn.Parameter(model.conv.weight * 2.0)
        else:
            (model.scale if change == "scale" else getattr(model.conv, change)).mul_(2.0)
    with pytest.raises(RuntimeError, match=r"changed between the forward and the backward|modified by an inplace"):
        loss.backward()


def test_beside_sharing_checkpointing_and_compilers():
    model = network()
    expected = gradients(copy.deepcopy(model))
    nf.recompute_standardization(model)
    with nf.shared_standardization(model):
        model(X).sin().sum().backward()
    torch.testing.assert_close({n: p.grad for n, p in model.named_parameters()}, expected, rtol=1e-10, atol=1e-12)
    model.set_grad_checkpointing()
    torch.testing.assert_close(gradients(model), expected, rtol=1e-10, atol=1e-12)
    torch._dynamo.reset()
    stem = copy.deepcopy(model.stem)
    compiled = torch.compile(stem, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(X), model.stem(X), rtol=1e-10, atol=1e-12)


def test_second_derivatives():
    layer = nf.WSConv2d(2, 3, 2).double()
    nf.recompute_standardization(layer)
    x = torch.randn(1, 2, 4, 4, dtype=torch.float64, requires_grad=True)

    def function(x, weight, gain):
        return layer(x)

    assert torch.autograd.gradgradcheck(function, (x, layer.weight, layer.gain))
