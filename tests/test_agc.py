"""Adaptive gradient clipping against a plain loop over units, on every kind of parameter."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import normfree as nf

CLIPPING, EPS = 0.02, 1e-3


@pytest.fixture(autouse=True, params=["singly", "together"])
def both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU, and as on other devices."""
    monkeypatch.setattr("normfree.agc.clipper._is_clipped_singly", lambda parameter: request.param == "singly")


class Zoo(nn.Module):
    """One of every kind of parameter; the classifier is the last linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3)
        self.grouped = nf.WSConv2d(6, 8, 3, groups=2)
        self.depthwise = nn.Conv1d(8, 8, 3, groups=8)
        self.transposed = nn.ConvTranspose2d(6, 4, 3)
        self.grouped_transposed = nf.WSConvTranspose1d(6, 9, 4, stride=2, groups=3)
        self.volume = nn.ConvTranspose3d(2, 3, 2, bias=False)
        self.linear = nf.WSLinear(5, 7)
        self.column = nn.Linear(1, 3)
        self.scalar = nn.Parameter(torch.tensor(0.3))
        self.vector = nn.Parameter(torch.randn(9))
        self.zero = nn.Parameter(torch.zeros(3, 4))
        self.classifier = nn.Linear(7, 3)


def with_gradients(model: nn.Module, seed: int = 0, size: float = 1.0) -> nn.Module:
    """Gradients from far below to far above the limit."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        scale = 10.0 ** (4.0 * torch.rand(parameter.shape[:1], generator=generator) - 4.0)
        noise = torch.randn(parameter.shape, generator=generator)
        gradient = noise * scale.reshape(-1, *(1,) * (parameter.ndim - 1)) if parameter.ndim else noise
        parameter.grad = (gradient * size).to(parameter.dtype)
    return model


def units(module: nn.Module, name: str, tensor: Tensor) -> Iterator[tuple[slice | int, ...]]:
    """The index of every unit in a parameter."""
    if tensor.ndim < 2:
        yield (...,)
    elif name == "weight" and isinstance(module, (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
        per_group = module.in_channels // module.groups
        for group in range(module.groups):
            for output in range(module.out_channels // module.groups):
                yield (slice(group * per_group, (group + 1) * per_group), output)
    else:
        for row in range(tensor.shape[0]):
            yield (row,)


def clip_by_loop(model: nn.Module, left_out: set[int] = frozenset()) -> None:
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in left_out or parameter.grad is None:
                continue
            for unit in units(module, name, parameter):
                largest = CLIPPING * max(float(parameter.detach()[unit].double().norm()), EPS)
                norm = float(parameter.grad[unit].double().norm())
                if norm > largest:
                    parameter.grad[unit] *= largest / norm


def assert_same_gradients(got: nn.Module, expected: nn.Module) -> None:
    for (name, a), b in zip(got.named_parameters(), expected.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if a.grad is not None:
            assert torch.allclose(a.grad, b.grad, rtol=1e-5, atol=1e-9), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_kind_of_parameter_as_the_loop_does_it(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = with_gradients(Zoo().to(dtype))
    expected = copy.deepcopy(model)
    for copied, parameter in zip(expected.parameters(), model.parameters(), strict=True):
        copied.grad = parameter.grad.clone()
    nf.adaptive_gradient_clip_(model, CLIPPING, EPS)
    clip_by_loop(expected, {id(p) for p in expected.classifier.parameters()})
    assert_same_gradients(model, expected)


def twins(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    other = copy.deepcopy(model)
    return with_gradients(model), with_gradients(other)


def test_what_is_excluded() -> None:
    got, expected = twins(Zoo())
    nf.adaptive_gradient_clip_(got, CLIPPING, EPS, exclude=None)
    clip_by_loop(expected)
    assert_same_gradients(got, expected)
    got, expected = twins(Zoo())
    nf.adaptive_gradient_clip_(got, CLIPPING, EPS, exclude=[got.conv, got.scalar])
    clip_by_loop(expected, {id(p) for p in (expected.conv.weight, expected.conv.bias, expected.scalar)})
    assert_same_gradients(got, expected)


def test_a_models_own_classifier_is_left_alone() -> None:
    model = nf.create_model("nf_seresnet26", num_classes=3, width=0.125)
    got, expected = twins(model)
    nf.adaptive_gradient_clip_(got, CLIPPING, EPS)
    clip_by_loop(expected, {id(p) for p in expected.get_classifier().parameters()})
    assert_same_gradients(got, expected)
    model.reset_classifier(0)
    nf.adaptive_gradient_clip_(model, CLIPPING, EPS)  # there is none to leave alone


def test_parameters_alone_and_missing_gradients() -> None:
    got, expected = twins(nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3)))
    got[0].bias.grad = expected[0].bias.grad = None
    nf.adaptive_gradient_clip_(got.parameters(), CLIPPING, EPS)
    clip_by_loop(expected)
    assert_same_gradients(got, expected)
    nf.adaptive_gradient_clip_(got[0].weight)
    nf.adaptive_gradient_clip_([])


def test_a_parameter_that_is_named_twice_is_clipped_once() -> None:
    got, expected = twins(nn.Linear(5, 4))
    nf.adaptive_gradient_clip_([*got.parameters(), *got.parameters()], CLIPPING, EPS)
    clip_by_loop(expected)
    assert_same_gradients(got, expected)


def test_channels_last_gradients_keep_their_layout() -> None:
    got, expected = twins(nn.Sequential(nn.Conv2d(4, 6, 3)))
    gradient = got[0].weight.grad.contiguous(memory_format=torch.channels_last)
    got[0].weight.grad = gradient
    nf.adaptive_gradient_clip_(got, CLIPPING, EPS)
    clip_by_loop(expected)
    assert_same_gradients(got, expected)
    assert got[0].weight.grad is gradient
    assert gradient.is_contiguous(memory_format=torch.channels_last)


def test_half_precision_norms_do_not_overflow() -> None:
    linear = nn.Linear(1000, 2, bias=False).to(torch.float16)
    linear.weight.grad = torch.full_like(linear.weight, 1000.0)
    nf.adaptive_gradient_clip_(linear.parameters(), 0.01)
    norm = linear.weight.grad.double().norm(dim=1)
    torch.testing.assert_close(norm, 0.01 * linear.weight.detach().double().norm(dim=1), rtol=1e-2, atol=0)


def test_a_step_that_would_explode_does_not() -> None:
    def after_one_step(clip: bool) -> float:
        torch.manual_seed(0)
        model = nf.create_model("nf_resnet26", num_classes=4, width=0.125)
        images, labels = torch.randn(4, 3, 32, 32), torch.arange(4)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        if clip:
            nf.AdaptiveGradientClipping(optimizer, model, clipping=0.01)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        (nn.functional.cross_entropy(model(images), labels) * 1e4).backward()
        optimizer.step()
        return max(
            float((parameter.detach() - before[name]).norm() / before[name].norm().clamp(min=1e-3))
            for name, parameter in model.named_parameters()
            if not name.startswith("head")
        )

    assert after_one_step(clip=False) > 10.0
    assert after_one_step(clip=True) <= 0.01 * 1.001


def test_the_hook_clips_before_each_step_until_removed() -> None:
    model = Zoo()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    clipping = nf.AdaptiveGradientClipping(optimizer, model, CLIPPING, EPS)
    for _ in range(2):
        expected = copy.deepcopy(model)
        with_gradients(model), with_gradients(expected)
        clip_by_loop(expected, {id(p) for p in expected.classifier.parameters()})
        optimizer.step()
        assert_same_gradients(model, expected)
    clipping.remove()
    unclipped = copy.deepcopy(model)
    with_gradients(model), with_gradients(unclipped)
    optimizer.step()
    assert_same_gradients(model, unclipped)


def test_only_the_optimisers_parameters_are_clipped() -> None:
    model = Zoo()
    optimizer = torch.optim.SGD(model.conv.parameters(), lr=1.0)
    nf.AdaptiveGradientClipping(optimizer, model, CLIPPING, EPS)
    expected = copy.deepcopy(model)
    with_gradients(model), with_gradients(expected)
    clip_by_loop(expected, {id(p) for n, p in expected.named_parameters() if not n.startswith("conv.")})
    optimizer.step()
    assert_same_gradients(model, expected)
    with pytest.raises(ValueError, match="none of the model's parameters"):
        nf.AdaptiveGradientClipping(optimizer, nn.Linear(2, 2))


def test_bad_arguments() -> None:
    model = Zoo()
    for options in ({"clipping": 0.0}, {"eps": -1.0}, {"exclude": "head"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            nf.adaptive_gradient_clip_(model, **options)
    with pytest.raises(TypeError, match="expected a model or parameters, got int"):
        nf.adaptive_gradient_clip_([1])
