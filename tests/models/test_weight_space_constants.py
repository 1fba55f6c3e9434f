"""No activation map is multiplied by a scalar: every constant lives in a weight."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import normfree as nf

NORMALISER_FREE = ["nf_resnet26", "nf_seresnet26", "skipinit_resnet26", "fixup_resnet26"]
BATCH = 5  # no weight has so many output channels, so a 4-D tensor of this length is an activation map


class MapProducts(TorchDispatchMode):
    """Records every multiplication of an activation map by anything but a gate of shape (N, C, 1, 1)."""

    names = ("aten::mul", "aten::div", "aten::add", "aten::sub", "aten::addcmul", "aten::lerp", "aten::_foreach_mul")

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name.rstrip("_")
        tensors = [a for a in args if isinstance(a, torch.Tensor)]
        if name in self.names and any(self.is_map(tensor) for tensor in tensors):
            if name in ("aten::add", "aten::sub"):
                scaled = kwargs.get("alpha", 1) != 1 or len(args) > 2
            else:
                scaled = len(tensors) < len(args) or not any(self.is_gate(tensor) for tensor in tensors)
            if scaled:
                self.found.append(str(function))
        return function(*args, **kwargs)

    @staticmethod
    def is_map(tensor):
        return tensor.ndim == 4 and tensor.shape[0] == BATCH and tensor.shape[2] * tensor.shape[3] > 1

    @staticmethod
    def is_gate(tensor):
        return tensor.ndim == 4 and tensor.shape[0] == BATCH and tensor.shape[1] > 1 and tensor.shape[2:] == (1, 1)


def products(module, *inputs):
    with MapProducts() as recorder:
        module(*inputs)
    return recorder.found


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"padding": "same"}, {"shortcut": "avgpool"}, {"activation": "silu"}], ids=str)
@pytest.mark.parametrize("name", NORMALISER_FREE)
def test_no_activation_map_is_multiplied_by_a_scalar(name, options, training):
    model = nf.create_model(name, width=0.125, drop_rate=0.2, **options).train(training)
    assert products(model, torch.randn(BATCH, 3, 64, 64)) == []


@pytest.mark.parametrize("name", NORMALISER_FREE)
def test_nor_with_stochastic_depth(name):
    model = nf.create_model(name, width=0.125, stochastic_depth_rate=0.5)
    assert products(model, torch.randn(BATCH, 3, 64, 64)) == []


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * 2.0,
        lambda x: 2.0 * x,
        lambda x: x / 1.04,
        lambda x: x * torch.tensor(0.2),
        lambda x: x * torch.full((1, 1, 1, 1), 0.2),
        lambda x: x.clone().mul_(0.2),
        lambda x: torch.add(x, x, alpha=0.2),
        lambda x: torch.relu(x) * nn.Parameter(torch.tensor(0.2)),
        lambda x: x * torch.ones(1, x.shape[1], 1, 1),
    ],
)
def test_the_recorder_sees_products(function):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Function(function))
    assert products(model, torch.randn(BATCH, 3, 8, 8))


def test_the_recorder_lets_gates_and_sums_pass():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), Function(lambda x: x + x * x.mean((2, 3), keepdim=True) + 1.0))
    assert not products(model, torch.randn(BATCH, 3, 8, 8))
