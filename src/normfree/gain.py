"""γ of an activation: what its output must be multiplied by to have variance 1 when its input is N(0, 1)."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from functools import lru_cache
from typing import Literal

import numpy as np
import torch
from torch import nn

from .activation import Activation, activation_module, canonical_name

GainSource = Literal["exact", "published"]

PUBLISHED_GAINS = {
    "identity": 1.0,
    "celu": 1.270926833152771,
    "elu": 1.2716004848480225,
    "gelu": 1.7015043497085571,
    "gelu_tanh": 1.7015043497085571,
    "leaky_relu": 1.70590341091156,
    "log_sigmoid": 1.9193484783172607,
    "relu": 1.7139588594436646,
    "relu6": 1.7131484746932983,
    "selu": 1.0008515119552612,
    "sigmoid": 4.803835391998291,
    "silu": 1.7881293296813965,
    "softplus": 1.9203323125839233,
    "softsign": 2.338853120803833,
    "tanh": 1.5939117670059204,
}
"""The constants of the original implementation, found by sampling; checkpoints trained with them need them."""

RELATIVE_ACCURACY = 1e-10
_EDGE = 38.0  # the standard normal density is subnormal in float64 beyond this
# whole numbers, because the kinks of the usual activations lie there
_INTERVALS = np.concatenate([[-_EDGE], np.arange(-12.0, 12.5), [_EDGE]])[:, None]
_GRID = np.linspace(-8.0, 8.0, 801)[:, None]


def gain(activation: Activation, source: GainSource = "exact") -> float:
    """γ = 1 / sqrt(var(g(z))), z ~ N(0, 1), of an elementwise function g (Brock et al. 2021, section 4.1).

    Closed forms serve the piecewise-linear and exponential-linear activations; any other function is integrated by
    adaptive Gauss–Kronrod quadrature in float64 to a relative accuracy of 1e-10. Parameters of a module are taken
    at their current values; a module is evaluated as in ``eval()`` mode and left unchanged.

    Args:
        activation: a name (``"relu"``, ``"leaky_relu(0.2)"``), a module, an elementwise callable on tensors, or None
            for the identity.
        source: ``"exact"``, or ``"published"`` for the sampled constant of the original implementation, which
            exists for names only and lies up to 0.09 % above the exact value.

    Returns:
        γ, a positive number without unit.

    Raises:
        ValueError: unknown name or source; no published constant; output variance not finite or zero; a function
            that mixes elements (softmax, GLU), changes the shape, or is random.
        TypeError: not an activation at all.
    """
    if source == "published":
        return _published(activation)
    if source != "exact":
        raise ValueError(f"source: expected 'exact' or 'published', got {source!r}")
    if isinstance(activation, str):
        return _exact_by_name(activation)
    return _exact(activation_module(activation))


def _published(activation: Activation) -> float:
    name = "identity" if activation is None else activation
    if isinstance(name, str) and "(" not in name:
        name = canonical_name(name)
        if name in PUBLISHED_GAINS:
            return PUBLISHED_GAINS[name]
    raise ValueError(
        f"source: 'published' constants exist for {', '.join(sorted(PUBLISHED_GAINS))}, not for {activation!r}; "
        "use source='exact'"
    )


@lru_cache(maxsize=256)
def _exact_by_name(name: str) -> float:
    with torch.device("cpu"):  # parameters need values, also while a model is being built on the meta device
        return _exact(activation_module(name))


def _exact(module: nn.Module) -> float:
    variance = _closed_form_variance(module)
    if variance is None:
        variance = _quadrature_variance(module)
    return 1.0 / math.sqrt(variance)


def _closed_form_variance(module: nn.Module) -> float | None:
    kind = type(module)  # exact types: a subclass may compute something else
    if kind is nn.Identity:
        return 1.0
    if kind is nn.ReLU:
        return _leaky_variance(0.0)
    if isinstance(module, nn.LeakyReLU) and kind is nn.LeakyReLU:
        return _leaky_variance(module.negative_slope)
    if isinstance(module, nn.PReLU) and kind is nn.PReLU and module.weight.device.type != "meta":
        slopes = set(module.weight.detach().double().tolist())
        if len(slopes) > 1:
            raise ValueError("activation: a PReLU with different slopes per channel has no single gain")
        return _leaky_variance(slopes.pop())
    if isinstance(module, nn.ELU) and kind is nn.ELU:
        return _exponential_linear_variance(module.alpha)
    if kind is nn.SELU:
        scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
        return scale**2 * _exponential_linear_variance(alpha)
    return None


def _leaky_variance(slope: float) -> float:
    variance = (1.0 + slope**2) / 2.0 - (1.0 - slope) ** 2 / (2.0 * math.pi)
    return _checked_variance(variance, 1.0, f"leaky_relu({slope})")


def _exponential_linear_variance(alpha: float) -> float:
    # E[e^{kz}; z < 0] = e^{k²/2} Φ(-k); written with erfc so that nothing is lost to cancellation in the tail
    def lower(k: int) -> float:
        return math.exp(k * k / 2.0) * 0.5 * math.erfc(k / math.sqrt(2.0))

    mean = 1.0 / math.sqrt(2.0 * math.pi) + alpha * (lower(1) - 0.5)
    second = 0.5 + alpha**2 * (lower(2) - 2.0 * lower(1) + 0.5)
    return _checked_variance(second - mean**2, second, f"elu({alpha})")


def _quadrature_variance(module: nn.Module) -> float:
    function = _float64_function(module)
    _check_elementwise(function, module)
    mean = _gaussian_expectation(function, module)
    # the second pass integrates the centred square: nothing is lost where the mean is large
    variance = _gaussian_expectation(lambda z: (function(z) - mean) ** 2, module)
    return _checked_variance(variance, variance + mean**2, _describe(module))


def _float64_function(module: nn.Module) -> Callable[[np.ndarray], np.ndarray]:
    if any(parameter.device.type == "meta" for parameter in module.parameters()):
        raise ValueError(f"activation: {_describe(module)} has parameters on the meta device, hence no values")
    frozen = copy.deepcopy(module).eval().double()

    def evaluate(values: np.ndarray) -> np.ndarray:
        device = next((p.device for p in frozen.parameters()), torch.device("cpu"))
        try:
            with torch.no_grad():
                output = frozen(torch.tensor(values, dtype=torch.float64, device=device))
        except Exception as error:
            raise ValueError(
                f"activation: {_describe(module)} failed on a float64 tensor of shape {values.shape}: {error}"
            ) from error
        if not isinstance(output, torch.Tensor):
            raise ValueError(f"activation: {_describe(module)} returned {type(output).__name__}, not a tensor")
        return output.double().cpu().numpy()

    return evaluate


def _check_elementwise(function: Callable[[np.ndarray], np.ndarray], module: nn.Module) -> None:
    values = np.random.default_rng(0).normal(size=(4, 2, 6, 6))
    output, again = function(values), function(values)
    if output.shape != values.shape:
        raise ValueError(
            f"activation: {_describe(module)} turns shape {values.shape} into {output.shape}; a gain exists for "
            "elementwise functions only"
        )
    if not np.array_equal(output, again, equal_nan=True):
        raise ValueError(f"activation: {_describe(module)} is random; a gain exists for deterministic functions only")
    generator = np.random.default_rng(1)
    order = generator.permutation(values.size)
    permuted = function(values.reshape(-1)[order].reshape(values.shape)).reshape(-1)
    changed = generator.random(values.shape) < 0.5
    beside = function(np.where(changed, 2.0 * values + 1.0, values))
    # treated differently by place; dependent on the others, as a mean over all of them is
    if not (_agree(permuted, output.reshape(-1)[order]) and _agree(beside[~changed], output[~changed])):
        raise ValueError(
            f"activation: {_describe(module)} mixes elements or treats channels differently; a gain exists for "
            "functions of one element only"
        )


def _agree(left: np.ndarray, right: np.ndarray) -> bool:
    return np.allclose(left, right, rtol=1e-9, atol=1e-12, equal_nan=True)


def _gaussian_expectation(function: Callable[[np.ndarray], np.ndarray], module: nn.Module) -> float:
    """E[function(z)], z ~ N(0, 1), by adaptive Gauss–Kronrod quadrature, one interval between breakpoints at a time."""
    from scipy.integrate import cubature

    def integrand(points: np.ndarray) -> np.ndarray:
        z = points[:, 0]
        density = np.exp(-0.5 * z * z) / math.sqrt(2.0 * math.pi)
        with np.errstate(over="ignore", invalid="ignore"):
            return function(z) * density

    with np.errstate(over="ignore", invalid="ignore"):
        at_edges = np.abs(integrand(_INTERVALS[[0, -1]]))
        # the integral of the absolute value, roughly: a mean that is zero can reach no relative accuracy, and what
        # it lacks enters the variance squared
        scale = float(np.nan_to_num(np.abs(integrand(_GRID)), posinf=0.0).sum() * (_GRID[1, 0] - _GRID[0, 0]))
        tolerance = {"rtol": RELATIVE_ACCURACY / 10, "atol": RELATIVE_ACCURACY / 100 * scale}
        # SciPy's own `points` would do, but it does not order the first intervals by error and may never converge
        parts = [
            cubature(integrand, low, high, **tolerance, max_subdivisions=2_000)
            for low, high in itertools.pairwise(_INTERVALS)
        ]
    value = sum(float(np.squeeze(part.estimate)) for part in parts)
    error = sum(float(np.squeeze(part.error)) for part in parts)
    if not (math.isfinite(value) and np.isfinite(at_edges).all() and at_edges.max() <= 1e-12 * max(abs(value), 1e-12)):
        raise ValueError(f"activation: the output variance of {_describe(module)} is not finite for N(0, 1) input")
    if not error <= RELATIVE_ACCURACY * max(abs(value), scale):
        raise ValueError(
            f"activation: the moments of {_describe(module)} could not be integrated to {RELATIVE_ACCURACY:g} "
            f"(estimated error {error:.1e}); they may be infinite"
        )
    return value


def _checked_variance(variance: float, second_moment: float, description: str) -> float:
    if not math.isfinite(variance):
        raise ValueError(f"activation: the output variance of {description} is not finite for N(0, 1) input")
    if variance <= 1e-14 * second_moment or variance <= 0.0:
        raise ValueError(f"activation: {description} has zero variance for N(0, 1) input, hence no gain")
    return variance


def _describe(module: nn.Module) -> str:
    return repr(module)
