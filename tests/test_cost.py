import pytest
import torch
from torch import nn

import normfree as nf


def test_resnet50_is_the_published_one():
    cost = nf.model_cost(nf.create_model("resnetv1_50"))
    assert cost.parameters == 25_557_032
    assert cost.multiply_adds == pytest.approx(4.089e9, rel=1e-3)


@pytest.mark.parametrize(
    ("layer", "shape", "multiply_adds"),
    [
        (nf.WSConv2d(6, 8, 3, 2, "same", groups=2), (2, 6, 7, 9), 2 * 4 * 5 * 8 * 3 * 9),
        (nn.Conv1d(4, 5, 3), (3, 4, 10), 3 * 8 * 5 * 4 * 3),
        (nf.WSConvTranspose2d(3, 4, 4, 2), (1, 3, 5, 6), 5 * 6 * 3 * 4 * 16),
        (nf.WSLinear(7, 5), (3, 7), 3 * 7 * 5),
        (nn.Sequential(nn.ReLU(), nn.AvgPool2d(2)), (1, 2, 4, 4), 0),
    ],
)
def test_layers_by_hand(layer, shape, multiply_adds):
    cost = nf.model_cost(layer, shape)
    assert cost.multiply_adds == multiply_adds
    assert cost.parameters == sum(p.numel() for p in layer.parameters())


def test_the_count_is_linear_in_the_batch():
    model = nf.create_model("nf_resnet26", width=0.25)
    one, three = nf.model_cost(model, (1, 3, 64, 64)), nf.model_cost(model, (3, 3, 64, 64))
    assert three.multiply_adds == 3 * one.multiply_adds
    assert three.parameters == one.parameters


def test_an_nf_resnet_costs_what_its_twin_costs():
    free, twin = (nf.model_cost(nf.create_model(name)) for name in ("nf_resnet50", nf.batchnorm_twin("nf_resnet50")))
    assert free.multiply_adds == twin.multiply_adds


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_model_is_left_as_it_was(dtype):
    model = nf.create_model("resnetv2_26", width=0.25).to(dtype)
    model.stages[0].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    nf.model_cost(model, (1, 3, 32, 32))
    with pytest.raises(RuntimeError):
        nf.model_cost(model, (1, 5, 32, 32))
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
