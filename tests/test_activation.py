import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from normfree.activation import ElementwiseFunction, activation_module, activation_names, canonical_name

REFERENCES = {
    "identity": lambda x: x,
    "relu": F.relu,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "prelu": lambda x: torch.where(x > 0, x, 0.25 * x),
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "log_sigmoid": F.logsigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "softsign": F.softsign,
    "softshrink": F.softshrink,
    "hardshrink": F.hardshrink,
    "tanhshrink": F.tanhshrink,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "hardtanh": F.hardtanh,
}


@pytest.mark.parametrize("name", REFERENCES)
def test_named_module_computes_its_function(name):
    x = torch.linspace(-5, 5, 101)
    torch.testing.assert_close(activation_module(name)(x), REFERENCES[name](x))


def test_every_name_has_a_reference():
    assert set(activation_names()) == set(REFERENCES) | {"threshold"}
    assert activation_names() == sorted(activation_names())


@pytest.mark.parametrize(
    ("description", "reference"),
    [
        ("leaky_relu(0.2)", lambda x: F.leaky_relu(x, 0.2)),
        (" LeakyReLU ( 0.3 ) ", lambda x: F.leaky_relu(x, 0.3)),
        ("elu(0.5)", lambda x: F.elu(x, 0.5)),
        ("celu(2)", lambda x: F.celu(x, 2.0)),
        ("prelu(0.1)", lambda x: F.leaky_relu(x, 0.1)),
        ("hardtanh(-2, 3)", lambda x: x.clamp(-2, 3)),
        ("threshold(0.5, -1)", lambda x: torch.where(x > 0.5, x, -1.0)),
        ("softplus(2, 10)", lambda x: F.softplus(x, 2.0, 10.0)),
        ("hardshrink(1e-1)", lambda x: F.hardshrink(x, 0.1)),
        ("softshrink(.25)", lambda x: F.softshrink(x, 0.25)),
        ("relu()", F.relu),
        ("Swish", F.silu),
        ("hard-swish", F.hardswish),
        ("none", lambda x: x),
    ],
)
def test_descriptions_with_numbers_and_aliases(description, reference):
    x = torch.linspace(-4, 4, 81)
    torch.testing.assert_close(activation_module(description)(x), reference(x))


def test_kinds_of_description():
    module = nn.GELU()
    assert activation_module(module) is module
    assert isinstance(activation_module(None), nn.Identity)
    assert isinstance(activation_module(nn.Mish), nn.Mish)
    wrapped = activation_module(torch.sin)
    assert isinstance(wrapped, ElementwiseFunction)
    assert "sin" in repr(wrapped)
    torch.testing.assert_close(wrapped(torch.ones(2)), torch.ones(2).sin())
    assert canonical_name("Swish") == "silu"


@pytest.mark.parametrize("name", [*REFERENCES, "leaky_relu(0.2)"])
def test_only_relu_overwrites_and_only_if_asked(name):
    for inplace in (False, True):
        x = torch.linspace(-2, 2, 9)
        before = x.clone()
        activation_module(name, inplace=inplace)(x)
        assert torch.equal(x, before) is not (inplace and name == "relu")


@pytest.mark.parametrize(
    "module", [nn.ReLU(inplace=True), nn.SiLU(inplace=True), nn.Sequential(nn.ReLU6(inplace=True), nn.Tanh())]
)
def test_overwriting_module_is_replaced_where_it_must_not_overwrite(module):
    x = torch.linspace(-2, 2, 9)
    before = x.clone()
    replaced = activation_module(module)
    torch.testing.assert_close(replaced(x), module(before.clone()))
    assert torch.equal(x, before)
    assert any(getattr(part, "inplace", False) for part in module.modules()), "the caller's module stays as it is"


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ("rleu", ValueError, "activation: there is none called 'rleu'; did you mean relu"),
        ("zzz", ValueError, "known are celu, elu, gelu"),
        ("elu(a)", ValueError, "must be numbers"),
        ("elu(1, 2)", ValueError, "elu takes at most 1 numbers"),
        ("relu(1)", ValueError, "relu takes at most 0 numbers"),
        ("silu(1)", ValueError, "silu takes at most 0 numbers"),
        ("gelu(1)", ValueError, "gelu takes at most 0 numbers"),
        ("threshold", ValueError, "arguments that threshold does not take"),
        ("", ValueError, "cannot read ''"),
        ("elu(__import__('os'))", ValueError, "must be numbers"),
        ("elu(0.5", ValueError, "cannot read"),
        (3, TypeError, "expected a name, a module, a callable or None, got int"),
    ],
)
def test_bad_descriptions_name_the_argument(bad, error, message):
    with pytest.raises(error, match=r"^activation: ") as raised:
        activation_module(bad)
    assert message in str(raised.value)
