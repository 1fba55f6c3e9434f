"""The Triton kernel against the formula: on a GPU, and on the CPU under Triton's interpreter."""

import copy
import importlib.util
import os
import subprocess
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn

import normfree as nf
from normfree.standardize.formula import composed
from normfree.standardize.together import Request, formula_only, may_launch, standardize_together

if importlib.util.find_spec("triton") is None:
    pytest.skip("there is no Triton here", allow_module_level=True)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_kernel = pytest.mark.skipif(DEVICE == "cpu" and not INTERPRETED, reason="see the interpreted run")


@pytest.mark.skipif(DEVICE == "cuda" or INTERPRETED, reason="runs itself once more, under the interpreter")
def test_under_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "NORMFREE_TRITON": "interpret"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    assert "passed" in run.stdout


SHAPES = [(3, 2), (5, 3, 3, 3), (4, 1, 7), (2, 1025, 1, 1), (1, 1100, 2), (6, 2, 2, 3, 2), (7, 1024)]


def requests(dtype, eps=1e-4, eps_mode="floor", channels_last=False):
    torch.manual_seed(0)
    found = []
    for number, shape in enumerate(SHAPES):
        weight = torch.randn(shape, dtype=torch.float64)
        weight = 0.5 + weight * torch.linspace(1e-3, 1, shape[0]).reshape(-1, *(1,) * (len(shape) - 1))
        gain = torch.randn(shape[0], dtype=torch.float64) if number % 3 else None
        scale = torch.randn((), dtype=torch.float64) if number % 2 else 1.7
        weight = weight.to(DEVICE, dtype)
        if channels_last and weight.ndim == 4:
            weight = weight.to(memory_format=torch.channels_last)
        learned = [t.to(DEVICE, dtype).requires_grad_() for t in (gain, scale) if isinstance(t, torch.Tensor)]
        gain = learned.pop(0) if gain is not None else None
        found.append(Request(weight.requires_grad_(), gain, learned.pop() if learned else scale, eps, eps_mode))
    return found


def leaves(some):
    return [t for r in some for t in (r.weight, r.gain, r.scale) if isinstance(t, torch.Tensor)]


def formula(request):
    full = request.weight.float() if request.weight.dtype.itemsize == 2 else request.weight
    result = composed(full, request.gain, request.scale, request.eps, request.eps_mode)
    return result.to(request.weight.dtype)


def exact_gradients(some, upstream):
    """Of the formula in float64, for the same numbers."""
    doubled = [
        Request(
            r.weight.detach().double().requires_grad_(),
            *(t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) else t for t in (r.gain, r.scale)),
            r.eps,
            r.eps_mode,
        )
        for r in some
    ]
    return torch.autograd.grad([formula(r) for r in doubled], leaves(doubled), [u.double() for u in upstream])


TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-11},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 1e-1, "atol": 1e-1},
}


@needs_kernel
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize(("eps", "eps_mode"), [(1e-4, "floor"), (1.0, "floor"), (1e-4, "added"), (1.0, "added")])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_many_weights_at_once(dtype, eps, eps_mode, channels_last):
    some = requests(dtype, eps, eps_mode, channels_last)
    found, expected = standardize_together(some), [formula(request) for request in some]
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
    assert [f.stride() for f in found] == [r.weight.stride() for r in some]
    upstream = [torch.randn_like(result, memory_format=torch.contiguous_format) for result in found]
    gradients = torch.autograd.grad(found, leaves(some), upstream)
    norm, (relative, rounding) = torch.linalg.vector_norm, (1e-10, 1e-14) if dtype == torch.float64 else (1e-5, 1e-6)
    summed = norm(torch.cat([u.flatten() for u in upstream]))  # in the gradient of one scale, and may cancel out there
    for gradient, exact in zip(gradients, exact_gradients(some, upstream), strict=True):
        assert norm(gradient - exact) <= relative * norm(exact) + rounding * summed


@needs_kernel
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_standardized_in_float32(dtype):
    some = requests(dtype, eps=1e-2)
    found, expected = standardize_together(some), [formula(request) for request in some]
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])


@needs_kernel
def test_second_derivatives():
    some = requests(torch.float64)[:3]

    def second(results):
        gradients = torch.autograd.grad(sum(r.sin().sum() for r in results), leaves(some), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in gradients), leaves(some))

    torch.testing.assert_close(
        second(standardize_together(some)), second([formula(r) for r in some]), rtol=1e-9, atol=1e-9
    )


@needs_kernel
def test_a_frozen_weight_and_an_unused_result():
    some = requests(torch.float64)[:4]
    some[1].weight.requires_grad_(False)
    wanted = [t for t in leaves(some) if t.requires_grad]
    results = [standardize_together(some), [formula(request) for request in some]]
    gradients = [torch.autograd.grad(r[0].sin().sum() + r[1].sin().sum(), wanted, allow_unused=True) for r in results]
    for found, expected in zip(*gradients, strict=True):
        expected = torch.zeros(()).to(found) if expected is None and found is not None else expected
        torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-10, atol=1e-11)


def network():
    """Stem, a transition block and an upsampling layer, which no kernel standardizes: few rows, as each is a launch
    of its own to the interpreter."""
    torch.manual_seed(0)
    block = nf.create_model("nf_resnet26", num_classes=3, width=0.015625).stages[1][0]
    model = nn.Sequential(OrderedDict(stem=nn.Sequential(nf.WSConv2d(3, block.conv0.in_channels, 3)), block=block))
    model.append(nf.WSConvTranspose2d(block.conv2.out_channels, 2, 2, 2))
    return model.double().to(DEVICE), torch.randn(1, 3, 8, 8, dtype=torch.float64, device=DEVICE)


@needs_kernel
def test_a_network_with_and_without_the_kernel(monkeypatch):
    model, x = network()
    shared, plain = copy.deepcopy(model), copy.deepcopy(model)
    assert may_launch(model.stem[0].weight, model.stem[0].gain, 1.0)
    with formula_only():
        assert not may_launch(model.stem[0].weight, model.stem[0].gain, 1.0)
    assert may_launch(model.stem[0].weight, model.stem[0].gain, 1.0)
    model(x).sin().sum().backward()
    with nf.shared_standardization(shared):
        shared(x).sin().sum().backward()
    monkeypatch.setenv("NORMFREE_TRITON", "0")
    assert not may_launch(model.stem[0].weight, model.stem[0].gain, 1.0)
    plain(x).sin().sum().backward()
    for contender in (model, shared):
        for found, expected in zip(contender.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-9, atol=1e-11)


@needs_kernel
def test_one_launch_for_all_layers(monkeypatch):
    from normfree.standardize import triton_kernel

    launches = []
    original = triton_kernel._launch
    monkeypatch.setattr(triton_kernel, "_launch", lambda *a, **k: launches.append(a[0]) or original(*a, **k))
    model, x = network()
    with nf.shared_standardization(model):
        for _ in range(2):
            model(x).sum().backward()
        assert len(launches) == 1
    assert len(launches) == 2


@needs_kernel
def test_compilers_see_the_formula():
    torch._dynamo.reset()
    layer = nf.WSConv2d(3, 4, 3).double().to(DEVICE)
    x = torch.randn(1, 3, 5, 5, dtype=torch.float64, device=DEVICE)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-10, atol=1e-12)
