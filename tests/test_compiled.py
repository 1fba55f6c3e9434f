"""Networks under torch.compile, and in channels_last: the same numbers, one graph, and no conversions on the way."""

import copy
import shutil
from collections import Counter

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import normfree as nf

TIGHT = {"rtol": 1e-10, "atol": 1e-10}


def narrow(name, **options):
    torch.manual_seed(0)
    model = nf.create_model(name, num_classes=3, width=0.0625, **options).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def assert_same_training(model, compiled, expected, x):
    for run in (compiled, expected):
        run(x).sin().sum().backward()
    torch.testing.assert_close(compiled(x), expected(x), **TIGHT)
    for (name, found), wanted in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found.grad, wanted.grad, **TIGHT, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    ("name", "options"), [("nf_resnet50", {}), ("nf_seresnet26", {}), ("nf_regnet_b0", {"drop_rate": 0.0})]
)
def test_a_network_is_one_graph(name, options):
    torch._dynamo.reset()
    model = narrow(name, **options)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    expected = copy.deepcopy(model)
    assert_same_training(model, compiled, expected, torch.randn(1, 3, 32, 32, dtype=torch.float64))
    assert counter.frame_count == 1


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler here")
def test_generated_kernels_compute_the_same():
    torch._dynamo.reset()
    full = narrow("nf_resnet26")
    model = nn.Sequential(full.stages[0][0], full.stages[1][0])
    compiled = torch.compile(model, fullgraph=True)
    x = torch.randn(1, full.stem.conv.out_channels, 8, 8, dtype=torch.float64)
    assert_same_training(model, compiled, copy.deepcopy(model), x)


class Copies(TorchDispatchMode):
    """Counts copies of more than a few numbers."""

    def __init__(self):
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
        if name in ("copy_", "clone", "_to_copy", "contiguous") and tensors[0].ndim > 1:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["nf_resnet26", "nf_regnet_b0"])
def test_channels_last_goes_through_without_conversions(name):
    model = narrow(name).to(memory_format=torch.channels_last)
    twin = nf.fold(model)
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64).to(memory_format=torch.channels_last)
    layouts = []
    for module in model.modules():
        if isinstance(module, nf.WSConv2d):
            module.register_forward_hook(lambda _, __, y: layouts.append(y.is_contiguous(memory_format=LAST)))
    counts = []
    for contender in (model, twin):
        contender.train()
        loss = contender(x).sin().sum()  # the first gradients take over memory, or copy it where layouts differ
        with Copies() as copies:
            loss.backward()
        with copies:
            contender(x)
        counts.append(copies.counts)
    assert all(layouts)
    assert counts[0] == counts[1]
    for parameter in model.parameters():
        assert parameter.ndim < 4 or parameter.grad.is_contiguous(memory_format=LAST)


LAST = torch.channels_last
