import copy
import gc
import weakref

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
        for tensor in (*model.parameters(), X):
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


@pytest.mark.parametrize("change", ["weight", "gain", "scale"])
def test_a_change_before_the_backward_pass_is_an_error(change):
    model = everything()
    nf.recompute_standardization(model)
    loss = model(X).sum()
    with torch.no_grad():
        (model.scale if change == "scale" else getattr(model.conv, change)).mul_(2.0)
    with pytest.raises(RuntimeError, match=r"changed between the forward and the backward|modified by an inplace"):
        loss.backward()


def test_another_weight_before_the_backward_pass_does_not_matter():
    model = everything()
    expected = gradients(copy.deepcopy(model))["conv.weight"]
    nf.recompute_standardization(model)
    weight, loss = model.conv.weight, model(X).sin().sum()
    model.conv.weight = nn.Parameter(weight * 2.0)
    loss.backward()
    torch.testing.assert_close(weight.grad, expected, rtol=1e-10, atol=1e-12)


def test_functional_calls_and_parametrized_weights():
    class Doubled(nn.Module):
        def forward(self, weight):
            return 2.0 * weight

    for recomputes in (False, True):
        model = everything()
        nf.recompute_standardization(model, recomputes)
        values = {name: (0.5 * value.detach()).requires_grad_() for name, value in model.named_parameters()}
        loss = torch.func.functional_call(model, values, (X,)).sin().sum()
        functional = torch.autograd.grad(loss, list(values.values()))
        nn.utils.parametrize.register_parametrization(model.conv, "weight", Doubled())
        nn.utils.parametrize.register_parametrization(model.up, "gain", Doubled())
        found = (functional, gradients(model))
        if not recomputes:
            expected = found
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def recomputed_layers(monkeypatch, layer, images):
    """How often the layer standardizes in a forward and a backward pass."""
    calls = []
    standardize = layer._standardization()
    monkeypatch.setattr(type(layer), "_standardization", lambda self: lambda *raw: calls.append(1) or standardize(*raw))
    layer(images.requires_grad_()).sin().sum().backward()
    return len(calls)


@pytest.mark.parametrize(
    ("layer", "shape", "times"),
    [
        (lambda: nf.WSConv2d(128, 256, 3, padding=1), (2, 128, 16, 16), 1 + 1),  # 294 912 weights in 512 places
        (lambda: nf.WSConv2d(128, 256, 3, padding=1), (128, 23, 22), 1),  # 506 places
        (lambda: nf.WSConv2d(128, 256, 3, padding=1, stride=2), (2, 128, 16, 16), 1),  # 128
        (lambda: nf.WSConv2d(128, 224, 3, padding=1), (2, 128, 16, 16), 1),  # 258 048 weights
        (lambda: nf.WSConv2d(256, 512, 3, groups=2, padding="same", stride=2), (8, 256, 16, 16), 1 + 1),
        (lambda: nf.WSConv1d(512, 512, 1), (1, 512, 512), 1 + 1),
        (lambda: nf.WSConvTranspose2d(128, 128, 4, 2, 1), (2, 128, 16, 16), 1 + 1),
        (lambda: nf.WSLinear(512, 512), (4, 128, 512), 1 + 1),
        (lambda: nf.WSLinear(512, 512), (511, 512), 1),
    ],
)
def test_large_weights_that_are_applied_in_many_places_recompute_by_themselves(layer, shape, times, monkeypatch):
    layer = layer()
    assert recomputed_layers(monkeypatch, layer, torch.randn(shape)) == times
    monkeypatch.undo()
    nf.recompute_standardization(layer, False)
    assert recomputed_layers(monkeypatch, layer, torch.randn(shape)) == 1
    monkeypatch.undo()
    nf.recompute_standardization(layer)
    assert recomputed_layers(monkeypatch, layer, torch.randn(shape)) == 2


def test_not_by_themselves_where_it_would_fail_or_free_nothing(monkeypatch):
    layer, images = nf.WSConv2d(128, 256, 3), torch.randn(2, 128, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        assert recomputed_layers(monkeypatch, layer, images) == 1
    with torch.autograd.graph.disable_saved_tensors_hooks("none here"):
        assert recomputed_layers(monkeypatch, layer, images) == 1
    per_example = torch.func.vmap(
        torch.func.grad(lambda p, x: torch.func.functional_call(layer, p, (x,)).sin().sum()), (None, 0)
    )
    parameters = {name: value.detach() for name, value in layer.named_parameters()}
    together = per_example(parameters, images)["weight"].sum(0)
    layer.zero_grad()
    layer(images).sin().sum().backward()
    torch.testing.assert_close(layer.weight.grad, together, rtol=1e-3, atol=1e-3)


def large():
    """A layer that recomputes by itself, and what it does so for."""
    torch.manual_seed(0)
    return nf.WSConv2d(128, 256, 3, padding=1), torch.randn(2, 128, 16, 16, requires_grad=True)


def test_an_input_that_is_overwritten_is_an_error_as_elsewhere():
    layer, images = large()
    read = images * 1.0
    loss = layer(read).sin().sum()
    read.relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


class Shifted(nf.WSConv2d):
    def effective_weight(self, output_scale=None):
        return super().effective_weight(output_scale) + 0.1


class Bounded(nf.WSConv2d):
    def _scaled_weight(self, scale):
        return super()._scaled_weight(scale).tanh()


class Overwriting(nf.WSConv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, weight.mul_(2.0), bias)


@pytest.mark.parametrize("kind", [Shifted, Bounded, Overwriting])
def test_layers_that_make_another_weight(kind):
    _, images = large()
    layer = kind(128, 256, 3, padding=1)
    found = torch.autograd.grad(layer(images).sin().sum(), [images, layer.weight])
    nf.recompute_standardization(layer, False)
    expected = torch.autograd.grad(layer(images).sin().sum(), [images, layer.weight])
    torch.testing.assert_close(found, expected)


def test_a_backward_pass_within_a_transform():
    layer, images = large()
    layer.to(memory_format=torch.channels_last)
    output = layer(images)
    upstream = torch.randn(2, *output.shape)
    together = torch.vmap(lambda u: torch.autograd.grad(output, images, u, retain_graph=True)[0])(upstream)
    singly = [torch.autograd.grad(output, images, u, retain_graph=True)[0] for u in upstream]
    torch.testing.assert_close(together, torch.stack(singly))


def test_no_graph_holds_the_layer():
    layer, images = large()
    layer.kept = []
    layer.register_forward_hook(lambda module, args, output: module.kept.append(output))
    layer(images)
    alive = weakref.ref(layer)
    del layer
    gc.collect()
    assert alive() is None


def test_sparse_input():
    layer = nf.WSLinear(256, 256)
    images = torch.randn(600, 256).relu()
    layer(images.to_sparse()).sin().sum().backward()
    found = layer.weight.grad
    layer.weight.grad = None
    layer(images).sin().sum().backward()
    torch.testing.assert_close(found, layer.weight.grad, rtol=1e-3, atol=1e-3)


def test_sharded_parameters_that_are_freed_in_between(tmp_path):
    """FSDP frees a gathered weight after the forward pass and gathers it again, in other memory, for the backward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    layer, images = nf.WSConv2d(128, 256, 3, padding=1), torch.randn(2, 128, 16, 16)
    model = nn.Sequential(layer, nn.ReLU(), nf.WSConv2d(256, 128, 3, padding=1))
    expected = copy.deepcopy(model)
    expected(images).sin().sum().backward()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for part in (model[0], model[2], model):
            fully_shard(part, mesh=mesh)
        model(images).sin().sum().backward()
        for sharded, whole in zip(model.parameters(), expected.parameters(), strict=True):
            torch.testing.assert_close(sharded.grad.full_tensor(), whole.grad, rtol=1e-5, atol=1e-5)
    finally:
        torch.distributed.destroy_process_group()


def test_bad_argument():
    with pytest.raises(ValueError, match="expected True, False or"):
        nf.recompute_standardization(nn.Linear(2, 2), "always")
    with pytest.raises(ValueError, match="got 1"):
        nf.recompute_standardization(nn.Linear(2, 2), 1)


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
