import copy
import pickle
import threading

import pytest
import torch
from torch import nn

import normfree as nf
from normfree.layers import standardized_weight


@pytest.fixture
def calls(monkeypatch):
    calls = []
    original = standardized_weight.standardize_weight
    monkeypatch.setattr(standardized_weight, "standardize_weight", lambda *a, **k: calls.append(1) or original(*a, **k))
    return calls


def small():
    return nf.create_model("nf_resnet26", num_classes=5, width=0.0625).double().eval()


def plainly(model, x):
    """What the model computes where nothing can be kept."""
    return copy.deepcopy(model)(x).detach()


X = torch.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=torch.float64).reshape(2, 3, 32, 32).sin()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_nothing_is_standardized_twice(calls, mode):
    model = small()
    expected = plainly(model, X)
    calls.clear()
    with mode():
        first = model(X)
        count = len(calls)
        assert count == sum(isinstance(module, nf.WSConv2d) for module in model.modules())
        assert torch.equal(model(X), first)
    assert len(calls) == count
    torch.testing.assert_close(first, expected, rtol=1e-12, atol=1e-14)
    with torch.no_grad():
        assert torch.equal(model(X), first)
    assert len(calls) == count


CHANGES = {
    "weight": lambda model: model.stages[1][0].conv1.weight.mul_(torch.linspace(0, 1, 3)),
    "through detach": lambda model: model.stages[1][0].conv1.weight.detach()[0].zero_(),
    "gain": lambda model: model.stages[1][0].conv1.gain.mul_(2.0),
    "skip gain": lambda model: model.stages[1][0].skip_gain.mul_(2.0),
    "optimiser": lambda model: stepped(model),
    "state dict": lambda model: model.load_state_dict(small().state_dict()),
    "assigned state dict": lambda model: model.load_state_dict(small().state_dict(), assign=True),
    "new memory": lambda model: setattr(model.stem.conv.weight, "data", torch.randn(4, 3, 7, 7).double()),
    "precision and back": lambda model: model.half().double(),
    "through data, then eval": lambda model: (model.stem.conv.weight.data.copy_(torch.randn(4, 3, 7, 7)), model.eval()),
    "memory format": lambda model: model.to(memory_format=torch.channels_last),
    "initialised anew": lambda model: model.stem.conv.reset_parameters(),
    "another parameter": lambda model: setattr(
        model.stem.conv, "weight", nn.Parameter(torch.randn(4, 3, 7, 7).double())
    ),
}


def stepped(model):
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    torch.optim.AdamW(model.parameters(), 0.1).step()
    model.zero_grad()


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change):
    model = small()
    with torch.no_grad():
        model(X)
        CHANGES[change](model)
        torch.testing.assert_close(model(X), plainly(model, X), rtol=1e-10, atol=1e-12)


def test_scales_given_at_the_call():
    layer = nf.WSConv2d(3, 4, 3).eval()
    x = torch.randn(1, 3, 5, 5)
    with torch.no_grad():
        expected = layer(x)
        for scale in (0.5, torch.tensor(0.5), 0.25, torch.tensor(0.25), None, nn.Parameter(torch.tensor(2.0))):
            factor = 1.0 if scale is None else float(scale)
            for _ in range(2):
                torch.testing.assert_close(layer(x, output_scale=scale), expected * factor)
        scale = torch.tensor(1.0)
        layer(x, output_scale=scale)
        torch.testing.assert_close(layer(x, output_scale=scale.fill_(3.0)), expected * 3.0)


def test_a_caller_may_overwrite_what_it_got():
    layer = nf.WSLinear(3, 4).eval()
    with torch.no_grad():
        expected = layer.effective_weight().clone()
        layer.effective_weight().zero_()
        assert torch.equal(layer.effective_weight(), expected)


def test_autograd_and_transforms_never_meet_it():
    model = small()
    with torch.no_grad():
        model(X)
    model(X).sum().backward()
    assert model.stem.conv.weight.grad.abs().sum() > 0
    with torch.inference_mode():
        model.eval()(X)
    model(X).sum().backward()
    parameters = {name: 1.1 * p.detach() for name, p in model.named_parameters()}
    with torch.no_grad():
        kept = model(X)
        other = torch.func.functional_call(model, parameters, (X,))
        stacked = {name: torch.stack([p, p]) for name, p in parameters.items()}
        both = torch.func.vmap(lambda p: torch.func.functional_call(model, p, (X,)))(stacked)
        torch.testing.assert_close(both[1], other)
        assert not torch.allclose(other, kept)
        assert torch.equal(model(X), kept)


def test_compiled_evaluation():
    torch._dynamo.reset()
    model = small()
    with torch.no_grad():
        expected = model(X)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(X), expected, rtol=1e-10, atol=1e-12)
        model.stem.conv.weight.mul_(torch.linspace(0, 1, 7))
        torch.testing.assert_close(compiled(X), plainly(model, X), rtol=1e-10, atol=1e-12)


def test_copies_and_pickles_leave_it_behind():
    model = small()
    empty = len(pickle.dumps(model))
    with torch.no_grad():
        expected = model(X)
        assert len(pickle.dumps(model)) == empty
        for part in (copy.deepcopy(model), copy.copy(model.stem.conv), pickle.loads(pickle.dumps(model))):
            assert all(getattr(module, "_kept", None) is None for module in part.modules())
        part = copy.deepcopy(model)
        assert torch.equal(part(X), expected)
        part.stem.conv.gain.zero_()
        assert not torch.equal(part(X), expected)
        assert torch.equal(model(X), expected)


def test_training_mode_keeps_nothing(calls):
    model = small().train()
    with torch.no_grad():
        model(X)
        model(X)
    assert len(calls) == 2 * sum(isinstance(module, nf.WSConv2d) for module in model.modules())
    assert all(getattr(module, "_kept", None) is None for module in model.modules())


def test_replicas_keep_nothing():
    model = small()
    with torch.no_grad():
        model(X)
        for replica in (module._replicate_for_data_parallel() for module in model.modules()):
            assert "_kept" not in replica.__dict__
            assert "_shared" not in replica.__dict__


def test_memory_held_in_training_is_nobody_elses():
    model = small().train()
    copied = copy.deepcopy(model)
    empty = len(pickle.dumps(model))
    first, second = model(X), model(1.5 * X)  # both graphs alive at once
    layer = model.stem.conv
    assert layer._held is not None
    (first.sin().sum() + second.sin().sum()).backward()
    (copied(X).sin().sum() + copied(1.5 * X).sin().sum()).backward()
    for found, expected in zip(model.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-10, atol=1e-12)
    model.zero_grad()
    assert len(pickle.dumps(model)) == empty
    assert "_held" not in copy.deepcopy(model).stem.conv.__dict__
    assert all("_held" not in module._replicate_for_data_parallel().__dict__ for module in model.modules())
    model.eval()
    assert layer._held is None


def test_threads():
    model = small()
    failures = []
    stop = threading.Event()
    with torch.no_grad():
        expected = model(X)

    def evaluate():
        with torch.no_grad():
            while not stop.is_set():
                if not torch.equal(model(X), expected):
                    failures.append(1)

    threads = [threading.Thread(target=evaluate) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(20):
        model.eval()
    stop.set()
    for thread in threads:
        thread.join()
    assert not failures


def test_parameters_made_in_inference_mode():
    with torch.inference_mode():
        model = small()
        assert torch.equal(model(X), model(X))
