"""Examples never meet: neither outputs nor gradients of one depend on the others in the batch."""

import pytest
import torch

import normfree as nf

NORMALISER_FREE = [
    ("nf_resnet26", {}),
    ("nf_resnet26", {"padding": "same", "shortcut": "avgpool", "activation": "silu"}),
    ("nf_resnet26", {"weights": "he"}),
    ("nf_seresnet26", {"stem": "small"}),
    ("skipinit_resnet26", {}),
    ("fixup_resnet26", {}),
]


def initialised(name, **options):
    torch.manual_seed(0)
    model = nf.create_model(name, num_classes=5, width=0.125, **options).double()
    with torch.no_grad():  # the zeros of some families would hide their branches and classifiers
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def output_and_gradient(model, batch, index, seed=1):
    torch.manual_seed(seed)
    output = model(batch)[index]
    return output, torch.autograd.grad(output.sin().sum(), list(model.parameters()))


def largest_change(model):
    """How much the output and the gradient of one example change with its neighbours and their number."""
    batch = torch.randn(4, 3, 33, 32, dtype=torch.float64)
    others = torch.cat([3.0 + 2.0 * torch.randn(2, 3, 33, 32, dtype=torch.float64), batch[2:3], -batch[3:]])
    output, gradient = output_and_gradient(model, batch, 2)
    other_output, other_gradient = output_and_gradient(model, others, 2)
    changes = [output - other_output, *(a - b for a, b in zip(gradient, other_gradient, strict=True))]
    return max(change.detach().abs().max().item() for change in changes)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "options"), NORMALISER_FREE, ids=str)
def test_neighbours_do_not_matter(name, options, training):
    assert largest_change(initialised(name, **options).train(training)) < 1e-10


@pytest.mark.parametrize(("name", "options"), NORMALISER_FREE, ids=str)
def test_neighbours_do_not_matter_under_stochastic_depth(name, options):
    assert largest_change(initialised(name, stochastic_depth_rate=0.5, **options)) < 1e-10


@pytest.mark.parametrize(("name", "options"), NORMALISER_FREE, ids=str)
def test_the_number_of_neighbours_does_not_matter(name, options):
    model = initialised(name, **options)
    batch = torch.randn(4, 3, 33, 32, dtype=torch.float64)
    output, gradient = output_and_gradient(model, batch, 2)
    alone, gradient_alone = output_and_gradient(model, batch[2:3], 0)
    torch.testing.assert_close(output, alone, rtol=0, atol=1e-10)
    torch.testing.assert_close(gradient, gradient_alone, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["resnetv2_26", "resnetv2_26_relu_bn", "resnetv1_26"])
def test_they_do_with_batchnorm_in_training(name):
    assert largest_change(initialised(name)) > 1e-3


@pytest.mark.parametrize(("name", "options"), NORMALISER_FREE, ids=str)
def test_per_example_gradients(name, options):
    model = initialised(name, **options)
    parameters = {key: value.detach() for key, value in model.named_parameters()}
    batch = torch.randn(3, 3, 32, 32, dtype=torch.float64)

    def loss(parameters, example):
        return torch.func.functional_call(model, parameters, (example.unsqueeze(0),)).sin().sum()

    together = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, batch)
    for index in range(3):
        _, gradient = output_and_gradient(model, batch, index)
        for name_, value in zip(parameters, gradient, strict=True):
            torch.testing.assert_close(together[name_][index], value, rtol=1e-8, atol=1e-10)
