"""The activations that can be asked for by name, and one way to turn any description into a module."""

from __future__ import annotations

import ast
import copy
import difflib
import re
from collections.abc import Callable
from typing import cast

import torch
from torch import nn

Activation = str | nn.Module | Callable[[torch.Tensor], torch.Tensor] | None
"""A name (``"relu"``, ``"leaky_relu(0.2)"``), a module, an elementwise callable, or None for the identity."""

_MODULES: dict[str, Callable[..., nn.Module]] = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "leaky_relu": nn.LeakyReLU,
    "prelu": lambda init=0.25: nn.PReLU(init=init),
    "elu": nn.ELU,
    "celu": nn.CELU,
    "selu": nn.SELU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "sigmoid": nn.Sigmoid,
    "log_sigmoid": nn.LogSigmoid,
    "tanh": nn.Tanh,
    "softplus": nn.Softplus,
    "softsign": nn.Softsign,
    "softshrink": nn.Softshrink,
    "hardshrink": nn.Hardshrink,
    "tanhshrink": nn.Tanhshrink,
    "hardswish": nn.Hardswish,
    "hardsigmoid": nn.Hardsigmoid,
    "hardtanh": nn.Hardtanh,
    "threshold": nn.Threshold,
}
_NUMBERS = {
    "leaky_relu": 1,
    "prelu": 1,
    "elu": 1,
    "celu": 1,
    "softplus": 2,
    "softshrink": 1,
    "hardshrink": 1,
    "hardtanh": 2,
    "threshold": 2,
}
"""How many numbers may follow a name; what torch's modules take beyond those (``inplace``, say) is no number."""

_ALIASES = {
    "linear": "identity",
    "none": "identity",
    "swish": "silu",
    "leakyrelu": "leaky_relu",
    "logsigmoid": "log_sigmoid",
    "hard_swish": "hardswish",
    "hard_sigmoid": "hardsigmoid",
    "hard_tanh": "hardtanh",
}
_CALL = re.compile(r"^\s*([A-Za-z_][A-Za-z0-9_-]*)\s*(?:\((.*)\))?\s*$")


class ElementwiseFunction(nn.Module):
    """A plain callable as a module, so that it can stand wherever an activation is expected."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self.function = function

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return self.function(input)

    def extra_repr(self) -> str:
        return getattr(self.function, "__name__", repr(self.function))


def activation_names() -> list[str]:
    """The names that :func:`activation_module` and :func:`normfree.gain` accept, sorted."""
    return sorted(_MODULES)


def canonical_name(name: str) -> str:
    """The one spelling of an activation's name: ``"Swish"`` is ``"silu"``.

    Raises:
        ValueError: no activation has this name; the message lists near ones.
    """
    key = name.strip().lower().replace("-", "_")
    key = _ALIASES.get(key, key)
    if key in _MODULES:
        return key
    near = difflib.get_close_matches(key, [*_MODULES, *_ALIASES], n=3)
    hint = f"did you mean {', '.join(near)}?" if near else f"known are {', '.join(activation_names())}."
    raise ValueError(f"activation: there is none called {name!r}; {hint}")


def activation_module(activation: Activation, inplace: bool = False) -> nn.Module:
    """A new module for an activation.

    Args:
        activation: a name, optionally with positional arguments as in ``"leaky_relu(0.2)"``; a module, which is
            returned as it is, or as a copy that leaves its input alone where it would overwrite one that it must
            not; a callable, which is wrapped; None for the identity.
        inplace: the input may be overwritten. Of the names only ReLU does, whose gradient needs nothing but its output.

    Raises:
        ValueError: unknown name or arguments that it does not take.
        TypeError: not one of the accepted kinds.
    """
    if activation is None:
        return nn.Identity()
    if isinstance(activation, nn.Module):
        return activation if inplace else _without_overwriting(activation)
    if isinstance(activation, type) and issubclass(activation, nn.Module):
        return activation()
    if isinstance(activation, str):
        name, arguments = _parse(activation)
        if len(arguments) > _NUMBERS.get(name, 0):
            raise ValueError(f"activation: {name} takes at most {_NUMBERS.get(name, 0)} numbers, got {activation!r}")
        if inplace and name == "relu":
            return nn.ReLU(inplace=True)
        try:
            return _MODULES[name](*arguments)
        except TypeError as error:
            raise ValueError(f"activation: {activation!r} has arguments that {name} does not take: {error}") from None
    if callable(activation):
        return ElementwiseFunction(cast(Callable[[torch.Tensor], torch.Tensor], activation))
    raise TypeError(f"activation: expected a name, a module, a callable or None, got {type(activation).__name__}")


def _without_overwriting(module: nn.Module) -> nn.Module:
    if not any(getattr(part, "inplace", False) for part in module.modules()):
        return module
    module = copy.deepcopy(module)
    for part in module.modules():
        if getattr(part, "inplace", False):
            setattr(part, "inplace", False)  # noqa: B010 - mypy takes a module's attributes for tensors or modules
    return module


def _parse(description: str) -> tuple[str, tuple[float, ...]]:
    match = _CALL.match(description)
    if match is None:
        raise ValueError(f"activation: cannot read {description!r}; write a name, or a name with numbers: elu(0.5)")
    name, inner = canonical_name(match[1]), match[2]
    if not inner or not inner.strip():
        return name, ()
    try:
        values = ast.literal_eval(f"({inner},)")
        return name, tuple(float(value) for value in values)
    except (ValueError, SyntaxError, TypeError):
        raise ValueError(f"activation: the arguments of {description!r} must be numbers") from None
